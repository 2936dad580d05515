"""The pure parts of the experiments, and what they measure at sizes that mean nothing."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dlrm_jax import train
from dlrm_jax.data.layout import Layout
from dlrm_jax.data.synthetic import main as make_data
from dlrm_jax.structs import Batch
from experiments import (
  benchmark,
  benchmark_tables,
  common,
  epoch,
  limits,
  measurements,
  quality,
  scaling_quality,
  step_parts,
  switches,
)
from experiments.benchmark_rows import EAGER, TF1, TORCH, Row, dlrm_jax_rows, peer_rows
from experiments.benchmark_tables import Measured
from experiments.measurements import Loaded, Rates


def rows_read(rows, position, streams=16, size=20480):
  """Rows of all windows that have been read when this many rows of an endless row of epochs have been used."""
  layout = Layout(rows, streams, size)
  epochs, inside = divmod(position, rows)
  begun = [window for window in layout.schedule() if window.start * streams + window.stream < inside]
  return epochs * rows + sum(window.stop - window.start for window in begun)


@pytest.mark.parametrize('rows', [1_000, 60_000, 1_000_000, 1_700_000, 8_000_000])
@pytest.mark.parametrize('batch_size', [512, 8192])
def test_in_a_stretch_as_many_rows_are_read_as_trained(rows, batch_size):
  position, steps = measurements.stretch(rows, batch_size, 500_000)
  timed = steps - measurements.WARM_UP_STEPS
  assert timed * batch_size >= 500_000
  epoch = -(-rows // batch_size)
  if position == {'epoch': 0, 'position': 0}:  # whole epochs, each with a last batch that is padded
    assert timed % epoch == 0
    return
  first = position['position'] + measurements.WARM_UP_STEPS * batch_size
  last = first + timed * batch_size
  assert rows_read(rows, last) - rows_read(rows, first) == pytest.approx(last - first, abs=2 * 20480)
  assert position['epoch'] == 0
  assert last < rows


def test_a_stretch_from_the_first_row_would_get_rows_for_nothing():
  assert rows_read(8_000_000, 512) > 450_000


def test_the_loop_leaves_out_the_steps_that_a_stretch_adds():
  assert measurements.WARM_UP_STEPS == train.WARMUP_STEPS


def row(name, kinds=(), measure=None):
  measure = measure or (lambda sizes: {size: Rates(1.0, 2.0, 3.0) for size in sizes})
  return Row(name, 'f32', 0, measure, common.TWIN if kinds else None, kinds)


def measured(rates, limit=100.0):
  """`Measured` from {name: {batch size: [(memory, csv) of each repetition, or None]}}."""
  made = {
    name: {size: {i: Rates(*pair, 1.5 + i) for i, pair in enumerate(pairs) if pair} for size, pairs in sizes.items()}
    for name, sizes in rates.items()
  }
  sizes = {str(size): limit for of in rates.values() for size in of}
  repetitions = max(len(pairs) for of in rates.values() for pairs in of.values())
  return Measured(rates=made, limits=[{'samples_per_second': {'f32': sizes, 'bf16': sizes}}] * repetitions)


def test_ratios_are_taken_within_a_repetition_to_the_best_peer():
  rows = [row('dlrm_jax bf16'), row('a', (TORCH, EAGER)), row('b', (TORCH,)), row('t', (TF1,))]
  of = measured(
    {
      'dlrm_jax bf16': {
        512: [(40.0, 30.0), (90.0, 80.0), (70.0, 66.0)],
        2048: [(80.0, 15.0), (90.0, 8.0), (35.0, 33.0)],
      },
      'a': {512: [(10.0, None), (20.0, None), (30.0, None)]},
      'b': {512: [(15.0, None), None, (33.0, None)]},
      't': {512: [(None, 3.0), (None, 8.0), (None, 11.0)]},
      'dlrm_jax bf16, 10,000 buckets': {512: [(80.0, 60.0), None, (35.0, 33.0)]},
    }
  )
  ratios = {
    name.removeprefix('dlrm_jax bf16, batch '): ratio
    for name, ratio in benchmark_tables.ratios(rows, (512, 2048), of).items()
  }
  assert ratios['512, from the CSV / best PyTorch of any kind in memory'] == {0: 2, 1: 4, 2: 2}
  assert ratios['512, from the CSV / best PyTorch eager f32 in memory'] == {0: 3, 1: 4, 2: 2.2}
  assert ratios['512, from the CSV / TensorFlow 1.15.5 from the CSV'] == {0: 10, 1: 10, 2: 6}
  assert ratios['512, compute only / its matrix products alone'] == {0: 0.4, 1: 0.9, 2: 0.7}
  assert ratios['512, compute only / the same with 10,000 buckets'] == {0: 0.5, 2: 2}
  assert ratios['2048, from the CSV / batch 512'] == {0: 0.5, 1: 0.1, 2: 0.5}
  assert not any('TensorFlow 2' in name or '2048, from the CSV / best' in name for name in ratios)
  # The median of the ratios, not the ratio of the medians 66 / 20.
  assert benchmark_tables.spread(ratios['512, from the CSV / best PyTorch of any kind in memory'].values(), '.2f') == [
    '2.00',
    '2.00-4.00',
  ]


def test_the_loader_s_share_is_its_time_at_the_rate_of_training():
  of = Measured(loads={'loader, one thread': {0: Loaded(5e5, 2.0, 0.4), 2: Loaded(5e5, 4.0, 0.4)}})
  assert benchmark_tables.loader_share({0: 1e5, 1: 1e5, 2: 1e5}, of) == pytest.approx(
    {0: 0.2 / common.CORES, 2: 0.4 / common.CORES}
  )


def test_rate_table_has_medians_ranges_and_shares():
  of = measured(
    {'ours': {512: [(1000.4, 60.0), (2000.0, 70.0), (3000.0, 80.0)]}, 'theirs': {512: [(None, 30.0)]}}, 4000.0
  )
  args = argparse.Namespace(buckets=0, interaction='cat')
  lines = benchmark_tables.render_rates(args, [row('ours'), row('theirs', (TF1,)), row('none')], 512, of).splitlines()
  assert lines[2] == '| ours | 2,000 | 1,000-3,000 | 70 | 60-80 | 0.50 | 3.50 |  |  |'
  assert lines[3] == '| theirs |  |  | 30 |  | 0.01 | 1.50 |  |  |'
  assert len(lines) == 4
  assert len({line.count('|') for line in lines}) == 1


def test_quality_comes_from_the_newest_record_with_the_same_settings(tmp_path):
  def write(name, auc, **settings):
    settings = {'batch_size': 512, 'buckets': 0, 'interaction': 'cat', **settings}
    runs = {'x': [{'auc': auc, 'log_loss': 0.4}, {'auc': auc + 0.1, 'log_loss': 0.6}]}
    (tmp_path / f'quality_{name}.json').write_text(json.dumps({'settings': settings, 'runs': runs}))

  write('2026-01-01', 0.5)
  write('2026-01-02', 0.6)
  write('2026-01-03', 0.7, buckets=10_000)
  assert benchmark_tables.quality_of('x', 512, 0, 'cat', tmp_path) == ['0.65000', '0.50000']
  assert benchmark_tables.quality_of('x', 512, 10_000, 'cat', tmp_path) == ['0.75000', '0.50000']
  assert benchmark_tables.quality_of('x', 2048, 0, 'cat', tmp_path) == ['', '']
  assert benchmark_tables.quality_of('y', 512, 0, 'cat', tmp_path) == ['', '']


def test_what_fails_leaves_the_others_and_is_not_tried_again():
  tried = []

  def fails_at_2048(sizes):
    tried.append(tuple(sizes))
    if 2048 in sizes:
      raise common.Failed('exit code 9: no memory')
    return {size: Rates(1.0, None, 1.0) for size in sizes}

  rows = [row('ours'), row('peer', (TORCH,), measure=fails_at_2048)]
  of = Measured()
  for repetition in range(2):
    benchmark.measure_rows(rows, (512, 2048), repetition, of)
  assert of.failed == {'peer, batch 2048': 'exit code 9: no memory'}
  assert tried == [(512,), (2048,), (512,)]
  assert {size: list(repetitions) for size, repetitions in of.rates['ours'].items()} == {512: [0, 1], 2048: [0, 1]}
  broken = lambda: fails_at_2048([2048])
  benchmark.measure_loader({'good': lambda: Loaded(1.0, 1.0, 1.0), 'bad': broken}, 0, of)
  assert list(of.loads) == ['good']
  assert of.failed['bad'] == 'exit code 9: no memory'


def test_later_repetitions_measure_the_first_of_each_kind():
  rows = [row('ours'), row('a', (TORCH, EAGER)), row('b', (TORCH, EAGER)), row('c', (TORCH,)), row('t', (TF1,))]
  of = measured(
    {
      'ours': {512: [(1.0, 1.0)], 2048: [(1.0, 1.0)]},
      'a': {512: [(10.0, None)], 2048: [(30.0, None)]},
      'b': {512: [(9.0, None)], 2048: [(20.0, None)]},
      'c': {512: [(12.0, None)]},
      't': {512: [(None, 3.0)]},
    }
  )
  assert [benchmark.chosen(one, (512, 2048), rows, of) for one in rows] == [[512, 2048], [512, 2048], [], [512], [512]]


def test_a_peer_that_cannot_be_installed_is_a_row_that_says_so(tmp_path, monkeypatch):
  monkeypatch.setattr(common, 'ROOT', tmp_path)
  monkeypatch.setenv('PATH', str(tmp_path))
  folder = tmp_path / 'experiments' / 'peers'
  for name in ('x', 'y'):
    (folder / name).mkdir(parents=True)
    (folder / name / 'requirements.txt').write_text('no-such-package @ file:///nowhere/no_such-1.0-py3-none-any.whl\n')
  missing, old = common.Peer('X', 'x', 'no_such_module'), common.Peer('Y', 'y', 'no_such_module', version='2.0')
  rows = [row('ours'), with_peer('x1', missing), with_peer('x2', missing), with_peer('y1', old)]
  failed = {}
  left, versions = benchmark.install(rows, failed)
  assert [one.name for one in left] == ['ours']
  assert versions == {}
  assert failed['Y'] == 'no Python 2.0'
  assert failed['X'].startswith('not installed: ')
  assert '/' not in failed['X']


def with_peer(name, peer):
  return Row(name, 'f32', 0, dict, peer, (TORCH,))


def test_a_peer_that_is_there_is_asked_for_its_version(tmp_path, monkeypatch):
  monkeypatch.setattr(common, 'ROOT', tmp_path)
  here = common.Peer('Here', 'here', 'numpy')
  here.python.parent.mkdir(parents=True)
  here.python.symlink_to(sys.executable)
  monkeypatch.setenv('PYTHONPATH', str(Path(np.__file__).parent.parent))
  assert common.install(here) == np.__version__


def test_rows_of_the_grid_have_names_of_their_own():
  args = argparse.Namespace(data=Path('d'), buckets=0, samples=8, interaction='cat')
  names = [one.name for one in (*dlrm_jax_rows(args), *peer_rows(args, Path('a')))]
  assert len(set(names)) == len(names)
  for pattern in (
    'dlrm_jax baseline',
    'PyTorch sparse, adagrad, bf16, compiled',
    'FBGEMM',
    'TensorFlow 1.15.5 f32, 10,000',
  ):
    assert any(pattern in name for name in names)
  args.buckets = 10_000  # no row twice
  assert len(list(dlrm_jax_rows(args))) == 3


def test_flags_of_a_peer(tmp_path, monkeypatch):
  monkeypatch.setattr(common, 'ROOT', tmp_path)
  peer = common.Peer('Here', 'here', 'json')
  peer.python.parent.mkdir(parents=True)
  peer.python.symlink_to(sys.executable)
  (peer.path / 'run.py').write_text('import json, sys; print(json.dumps(sys.argv[1:]))')
  words, _ = common.run_peer(peer, 'speed', batch_size=512, compile=True, other=False)
  flags = ['--batch_size', '512', '--compile', '--mode', 'speed', '--threads', str(common.CORES)]
  assert words == [*flags, '--learning_rate', '0.002']


def test_products_are_those_of_the_network():
  """By hand: 13-512-256-64-16, then 432 or 367 -512-256-1."""
  cat = limits.products(512, 'cat')
  assert {(one.k, one.n) for one in cat if one.kind == 'forward'} == {
    (13, 512), (512, 256), (256, 64), (64, 16), (432, 512), (256, 1)
  }  # fmt: skip
  assert [one.kind for one in cat].count('forward') == [one.kind for one in cat].count('weight') == 7
  assert (13, 512) not in {(one.k, one.n) for one in cat if one.kind == 'input'}
  assert sum(one.flop for one in cat) / 512 / 1e6 == pytest.approx(3.04, abs=0.01)
  assert any(one.k == 367 for one in limits.products(512, 'dot'))


def test_the_limit_is_the_fastest_library_of_each_product():
  of = lambda first, second: {'seconds': {'f32': {'512': [first, second]}, 'bf16': {'512': [first / 2, second / 2]}}}
  both = limits.combine({'xla': of(1.0, 4.0), 'torch': of(2.0, 3.0)})
  assert both['samples_per_second'] == {'f32': {'512': 128.0}, 'bf16': {'512': 256.0}}
  assert both['of_library']['xla']['f32'] == {'512': 102.4}
  assert limits.combine({'xla': of(1.0, 1.0)})['samples_per_second']['f32'] == {'512': 256.0}


def test_best_of_counts_repetitions():
  slept = []

  def work(count):
    slept.append(count)
    subprocess.run(['sleep', str(0.002 * count)], check=True)

  assert limits.best_of(work, 0.05) >= 0.002
  assert len(slept) >= limits.STRETCHES + 1


@pytest.mark.parametrize('dtype', limits.DTYPES)
@pytest.mark.parametrize('kind', ['forward', 'weight', 'input'])
def test_products_run_in_xla(kind, dtype, monkeypatch):
  monkeypatch.setattr(limits, 'STRETCH_SECONDS', 1e-4)
  assert 0 < limits.xla_product(limits.Product(kind, 5, 3, 7), dtype) < 1


def test_limits_of_memory_are_positive():
  of = limits.memory(array_bytes=1 << 16, rows=64, gathered=32)
  assert of['gb_per_second'] > 0
  assert of['million_rows_read'] > 0


@pytest.fixture(scope='module')
def data(tmp_path_factory):
  folder = tmp_path_factory.mktemp('data')
  make_data(['--rows', '2000', '--eval_rows', '1', '--out', str(folder)])
  return folder


@pytest.mark.slow
def test_training_is_measured_in_memory_and_from_the_csv(data):
  rates = measurements.train('bf16', data, 50, (256, 128), 300, {'model': {'interaction': 'dot'}})
  assert sorted(rates) == [128, 256]
  assert all(rate > 0 for of in rates.values() for rate in of)
  assert measurements.train('base', data, 50, (128,), 300, memory=False)[128].memory is None
  with pytest.raises(common.Failed, match='2000 rows of data are less than one batch of 4096'):
    measurements.train('base', data, 50, (4096,), 300)


@pytest.mark.slow
def test_parts_of_a_step_are_measured(data):
  parts = step_parts.measure('base', data, 50, (128,), 'cat', 300, seconds=0.0)
  assert list(parts) == ['128']
  dense = ['dense forward', 'dense backward', 'dense optimizer']
  names = ['parse and hash', 'lookup', *dense, 'row update', 'whole step']
  assert list(parts['128']) == [*names, 'step, while loading', 'waiting for data']
  assert all(time > 0 for name, time in parts['128'].items() if name != 'dense backward')


def test_table_of_parts():
  of = dict.fromkeys(('lookup', 'step, while loading'), 3.0) | {'waiting for data': 1.0}
  lines = step_parts.render({'f32': {'512': of}, 'bf16': {'512': of}}).splitlines()
  assert lines[0] == '| ms of a batch | f32, 512 | bf16, 512 |'
  assert lines[-1] == '| share of training that waits | 25% | 25% |'


def test_the_loader_is_measured_alone_and_leaves_nothing_beside_the_data(data):
  before = sorted(data.iterdir())
  for cache in (False, True):
    assert min(common.in_process(measurements.load, data, 50, 1, cache)) > 0
  assert sorted(data.iterdir()) == before


def test_switches_are_compared_with_the_defaults_of_their_repetition():
  rates = {switches.DEFAULTS: [10.0, 20.0, 40.0], 'x': [5.0, 30.0, 40.0]}
  results = {name: {i: Rates(None, rate, 1.0 + i) for i, rate in enumerate(of)} for name, of in rates.items()}
  text = switches.render(switches.summary(results), {'jemalloc preloaded': 'no libjemalloc'}, 'title')
  assert text.splitlines()[2:] == [
    '| defaults | 20 | 10-40 |  |  | 2.00 |',
    '| x | 30 | 5-40 | 1.00 | 0.50-1.50 | 2.00 |',
    '| jemalloc preloaded: no libjemalloc |  |  |  |  |  |',
  ]


def test_every_switch_is_a_config_that_can_be_run():
  for switch in switches.switches(512):
    common.make_spec('base', Path('d'), 10, 512, no_eval=True, **switch.fields)


def test_a_library_that_is_not_there_or_not_loaded_is_said_so(tmp_path):
  with pytest.raises(common.Failed, match='no libno_such_library on this machine; install it, or give --no_such'):
    switches.find_library('no_such_library', None)
  with pytest.raises(common.Failed, match=r'no file x\.so'):
    switches.find_library('jemalloc', tmp_path / 'x.so')
  with pytest.raises(common.Failed, match=r'libno_such\.so was not loaded'):
    switches.train('libno_such.so')


def test_a_child_has_the_variables_and_the_parent_only_as_long(monkeypatch):
  monkeypatch.setenv('DLRM_TEST_A', 'before')
  with common.variables({'DLRM_TEST_A': 'a', 'DLRM_TEST_B': 'b'}):
    assert [common.os.environ[f'DLRM_TEST_{name}'] for name in 'AB'] == ['a', 'b']
  assert common.os.environ['DLRM_TEST_A'] == 'before'
  assert 'DLRM_TEST_B' not in common.os.environ


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


def test_an_epoch_s_table_begins_with_what_could_be_run():
  def refused():
    raise common.Failed('no Python 3.7')

  run = lambda rate: {'accuracy': 0.78, 'auc': 0.8, 'log_loss': 0.5, 'samples_per_second': rate, 'peak_memory_gb': 1.0}
  rows = [('theirs', 'FP32', refused), ('ours', 'FP32', lambda: run(1000)), ('ours', 'BF16', lambda: run(2500))]
  text = epoch.render(epoch.measure(rows), {'best_auc': 0.9, 'best_log_loss': 0.4})
  _, _, theirs, first, second, best = text.splitlines()
  assert theirs == '| theirs | FP32 | no Python 3.7 |  |  |  |  |'
  assert first == '| ours | FP32 | 0.780000 | 0.800000 | 0.500000 | 1,000 (baseline) | 1.00 GB |'
  assert '| 2,500 (2.50x) |' in second
  assert '0.900000 | 0.400000' in best


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


def test_the_quality_of_several_processes_is_beside_that_of_the_first():
  args = argparse.Namespace(configs=('base',), optimizers=('adam', 'adagrad'), seeds=(3,), processes=(1, 2))
  known = {('adam', '1'): 0.7, ('adam', '2'): 0.7001, ('adam', scaling_quality.OTHER_KERNELS): 0.69995}
  asked = []

  def run(args, config, optimizer, seed, processes, output):
    asked.append((config, optimizer, seed, processes))
    return known.get((optimizer, processes), 0.6)

  text = scaling_quality.render(scaling_quality.measure(args, run))
  assert asked == [
    ('base', optimizer, 3, processes)
    for optimizer in args.optimizers
    for processes in ('1', '2', scaling_quality.OTHER_KERNELS)
  ]
  assert '| base, adam, seed 3 | 0.70000 | +1.00 | -0.50 |' in text
  assert '| base, adagrad, seed 3 | 0.60000 | +0.00 | +0.00 |' in text
