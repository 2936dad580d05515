"""The pure parts of the benchmark and of the comparison of quality."""

import json

import numpy as np
import pytest

from dlrm_jax.data.layout import Layout
from dlrm_jax.structs import Batch
from experiments import benchmark, common, quality
from experiments.benchmark import Measured


def rows_read(rows, position, streams=16, size=20480):
  """Rows of all windows that have been read when this many rows of an endless row of epochs have been used."""
  layout = Layout(rows, streams, size)
  epochs, inside = divmod(position, rows)
  begun = [window for window in layout.schedule() if window.start * streams + window.stream < inside]
  return epochs * rows + sum(window.stop - window.start for window in begun)


@pytest.mark.parametrize('rows', [1_000, 60_000, 1_000_000, 1_700_000, 8_000_000])
@pytest.mark.parametrize('batch_size', [512, 8192])
def test_in_a_stretch_as_many_rows_are_read_as_trained(rows, batch_size):
  first, last = benchmark.stretch(rows, batch_size, 1000)
  assert last - first >= 1000
  epoch = -(-rows // batch_size)
  if first % epoch == 0:  # whole epochs, each with a last batch that is padded
    assert last % epoch == 0
    return
  read = rows_read(rows, last * batch_size) - rows_read(rows, first * batch_size)
  assert read == pytest.approx((last - first) * batch_size, abs=2 * 20480)
  assert last * batch_size < rows


def test_a_stretch_from_the_first_row_would_get_rows_for_nothing():
  assert rows_read(8_000_000, 512) > 450_000


def test_steady_rate_is_that_between_two_steps():
  records = [
    {'step': 640, 'kind': 'train', 'time': 100.0, 'samples_per_second': 9e9},
    {'step': 1280, 'kind': 'train', 'time': 108.0},
    {'step': 1640, 'kind': 'eval', 'time': 999.0},
    {'step': 1640, 'kind': 'train', 'time': 110.0},
  ]
  assert benchmark.steady_rate([json.dumps(record) for record in records], 640, 1640, 512) == 51200


def test_ratios_are_taken_within_a_repetition_to_the_best_peer():
  pull, sparse = benchmark.F32_PEERS
  rates = {'dlrm_jax': [30.0, 80.0, 66.0], pull: [10.0, 20.0, 30.0], sparse: [15.0, 10.0, 33.0], 'loader': [1, 2, 3]}
  measured = {name: [Measured(rate, 1.5 + i) for i, rate in enumerate(values)] for name, values in rates.items()}
  rows = benchmark.summary(measured)
  assert rows['dlrm_jax']['ratios'] == [2, 4, 2]
  assert (rows['dlrm_jax']['rate'], rows['dlrm_jax']['ratio']) == (66, 2)  # not 66 / 20, of the medians
  assert rows[pull]['ratios'] == [0.667, 1, 0.909]
  assert rows['loader']['ratio'] is None
  assert rows['loader']['peak_memory_gb'] == 3.5


def test_without_the_twin_there_are_no_ratios_but_a_row_that_says_why():
  rows = benchmark.summary({'dlrm_jax': [Measured(1234.5, 2.0)]})
  text = benchmark.render(rows, {'PyTorch': 'not installed: no room'})
  assert text.splitlines()[2:] == [
    '| dlrm_jax | 1,234 | 1,234-1,234 |  |  | 2.00 |',
    '| PyTorch: not installed: no room |  |  |  |  |  |',
  ]


def test_a_twin_that_fails_leaves_the_other_rows():
  def fails():
    raise common.Failed('exit code 9: no memory')

  rows = {'dlrm_jax': lambda: Measured(1.0, 1.0), 'PyTorch x': fails}
  results, failed = benchmark.measure(rows, 2)
  assert list(results) == ['dlrm_jax']
  assert len(results['dlrm_jax']) == 2
  assert failed == {'PyTorch x': 'exit code 9: no memory'}
  with pytest.raises(common.Failed, match='dlrm_jax: exit code 9'):
    benchmark.measure({'dlrm_jax': fails}, 1)


def test_quality_table_has_means_errors_and_differences():
  run = lambda auc: {'auc': auc, 'log_loss': 0.5, 'samples_per_second': 1000.0, 'peak_memory_gb': 1.0}
  results = {'dlrm_jax f32': [run(0.8), run(0.82)], quality.TWIN: [run(0.79), run(0.81)]}
  auc, loss = quality.render(results, [1, 2], {'best_auc': 0.9, 'best_log_loss': 0.4}).split('\n\n')
  lines = auc.splitlines()
  assert lines[2] == '| dlrm_jax f32 | 0.80000 | 0.82000 | 0.81000 | 0.01000 | +0.01000 | 1,000 | 1.00 |'
  assert lines[4] == '| best possible |  |  | 0.90000 |  |  |  |  |'
  assert len({line.count('|') for line in lines}) == 1
  assert '0.40000' in loss
  assert quality.mean_and_error([0.5]) == (0.5, None)


def test_cpuinfo_is_read():
  text = 'processor\t: 0\nmodel name\t: A CPU @ 2: fast\nflags\t\t: fpu amx_bf16 sse\n\nmodel name\t: B\n'
  assert common.parse_cpuinfo(text) == ('A CPU @ 2: fast', {'amx_bf16': True, 'avx512_bf16': False})


def test_last_words_have_no_paths_and_no_addresses():
  text = 'Traceback\nERROR: no x==1 at https://host/simple/x, wheel /some/where/x.whl is bad\n\n[notice] update pip\n'
  assert common.last_words(text) == 'ERROR: no x==1 at an address wheel x.whl is bad'
  assert common.last_words('\n') == 'no message'


def test_arrays_leave_padding_out(tmp_path):
  rng = np.random.default_rng(0)
  parts = [
    Batch(rng.random(4, np.float32), rng.random((4, 13), np.float32), rng.integers(9, size=(4, 26)), np.float32(weight))
    for weight in ([1, 1, 1, 1], [1, 1, 0, 0])
  ]
  common.write_arrays(tmp_path, 'train', 6, [(part, None) for part in parts])
  for name in ('label', 'dense', 'bucket'):
    both = np.concatenate([getattr(part, name) for part in parts])
    array = np.load(tmp_path / f'train_{name}.npy')
    np.testing.assert_array_equal(array, both[:6])
    assert array.dtype == (np.uint32 if name == 'bucket' else np.float32)
  with pytest.raises(ValueError, match='6 rows'):
    common.write_arrays(tmp_path, 'train', 7, [(part, None) for part in parts])


def test_missing_data_is_one_line(tmp_path):
  with pytest.raises(SystemExit, match=r'^error: no eval.csv in .*dlrm_jax.data.synthetic --rows \d+ --out .*$'):
    common.check_data(tmp_path, 'eval.csv')


def test_run_returns_the_last_line_and_fails_with_the_last_words():
  code = 'import sys; print("hello"); print("{\\"a\\": 1}")'
  result, peak = common.run([common.sys.executable, '-c', code])
  assert result == {'a': 1}
  assert 0.001 < peak < 1e3
  with pytest.raises(common.Failed, match='exit code 3: bad luck'):
    common.run([common.sys.executable, '-c', 'import sys; print("bad luck", file=sys.stderr); sys.exit(3)'])
