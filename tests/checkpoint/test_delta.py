"""Checkpoints of what changed: that with the whole one before they are the state, to the bit, and nothing else is."""

import json
import shutil
import signal

import jax
import numpy as np
import pytest

from dlrm_jax import train
from dlrm_jax.checkpoint import delta, full
from dlrm_jax.checkpoint.contents import find_checkpoint
from dlrm_jax.checkpoint.full import Checkpoints, to_dict
from dlrm_jax.checkpoint.same_model import CheckpointError
from dlrm_jax.clock import EverySeconds
from dlrm_jax.distributed import Members
from dlrm_jax.program import make_program
from dlrm_jax.state import init_state, state_placing
from dlrm_jax.upkeep import grown_parts
from tests.helpers import crashing, devices, small_spec

KINDS = {
  'static': {'embedding__buckets': (4000,)},
  'multi_hash': {'embedding__kind': 'multi_hash', 'embedding__buckets': (4000,), 'embedding__dtype': 'bfloat16'},
  'dynamic': {
    'embedding__kind': 'dynamic', 'embedding__rows': 4 * 1024, 'embedding__admission__name': 'counter',
    'embedding__admission__expected_ids': 4 * 1024, 'optimizer__name': 'adagraddecay',
  },
  'adaptive': {
    'embedding__kind': 'adaptive', 'embedding__rows': 4 * 1024, 'embedding__admission__name': 'counter',
    'embedding__admission__expected_ids': 4 * 1024, 'embedding__buckets': (4000,),
    'optimizer__name': 'gradientdescent',
  },
}  # fmt: skip
DELTA = {'delta_seconds': 1.0, 'keep_checkpoint_max': 3, 'no_eval': True, 'embedding__shard_mb': 0.0}


def program_of(number, kind='static'):
  """A program whose tables are cut among so many devices."""
  return make_program(small_spec('data', 'result', **DELTA, **KINDS[kind]), devices(number))


def other(program, state, share, seed):
  """A state with another step and other numbers in a share of each table's rows, and in all of what is no row."""
  rng = np.random.default_rng(seed)

  def of_table(table):
    rows = len(table.value)
    chosen = rng.choice(rows, int(share * rows), replace=False)

    def some(leaf):
      leaf, touched = np.array(leaf), chosen[rng.random(len(chosen)) < 0.7]
      if leaf.ndim and len(leaf) == rows:
        bits = leaf.reshape(rows, -1).view(f'u{leaf.itemsize}')
        bits[touched, rng.integers(bits.shape[1], size=len(touched))] ^= 1 << 3
        return leaf
      return leaf + 1

    return table.replace(value=some(table.value), slots=jax.tree.map(some, table.slots))

  before = jax.device_get(state)
  state = before.replace(
    step=before.step + 7,
    params=jax.tree.map(lambda leaf: leaf + 1, before.params),
    known=jax.tree.map(lambda leaf: leaf + 1, before.known),
    tables={name: of_table(table) for name, table in before.tables.items()},
  )
  return jax.device_put(state, state_placing(program) or jax.devices()[0])


def assert_same(one, other):
  jax.tree.map(np.testing.assert_array_equal, *jax.device_get((to_dict(one), to_dict(other))))


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize(('number', 'then'), [(1, 4), (4, 1)])
def test_the_whole_one_and_what_changed_are_the_state(tmp_path, caplog, kind, number, then):
  caplog.set_level('INFO')
  program = program_of(number, kind)
  first = init_state(program)
  with Checkpoints(tmp_path, 1) as checkpoints:
    checkpoints.save_changes(first, {'at': 0}, program.spec)  # there is no other: a whole one
    assert checkpoints.steps() == [0]
    for place in (1, 2):
      state = other(program, first, share=0.02 * place, seed=place).replace(step=first.step + place)
      checkpoints.save_changes(state, {'at': place}, program.spec)
  assert sorted(path.name for path in (tmp_path / 'deltas').iterdir()) == ['1', '2']
  size = lambda folder: sum(path.stat().st_size for path in (folder / 'state').rglob('*') if path.is_file())
  assert size(tmp_path / 'deltas/2') < size(tmp_path / '0') * 0.6
  for devices_ in (number, then):
    with Checkpoints(tmp_path, 1) as checkpoints:
      restored = checkpoints.restore(program_of(devices_, kind))
    assert (restored.step, restored.position) == (2, {'at': 2})
    assert_same(restored.state, state)
  assert 'rows that changed since step 0' in caplog.text


def test_the_rows_told_are_those_that_differ():
  program = program_of(4)
  first = to_dict(init_state(program))
  before = delta.remembered(first)
  same, none = delta.changes(first, before)
  assert none == 0
  assert len(same['tables']['fused'][delta.ROW]) == 4  # one of each device, which says nothing new
  table = first['tables']['fused']
  value = np.array(table['value'])
  rows = np.array([0, 1, 25_999, 26_000, 77_777, len(value) - 1])
  value[rows, 3] = np.nextafter(value[rows, 3], np.float32(9))
  table = table | {'value': jax.device_put(value, table['value'].sharding)}
  told, count = delta.changes(first | {'tables': {'fused': table}}, before)
  told = told['tables']['fused']
  assert count == len(rows)
  assert set(rows) <= set(np.asarray(told[delta.ROW]).tolist())
  np.testing.assert_array_equal(told['value'], value[np.asarray(told[delta.ROW])])


@pytest.mark.parametrize('part', ['table', 'filter'])
@pytest.mark.parametrize('number', [1, 4])
def test_where_something_has_grown_a_whole_one_is_saved(tmp_path, number, part):
  spec = small_spec('data', 'result', **DELTA | {'embedding__shard_mb': 1e3}, **KINDS['dynamic'])  # no table is cut
  program = make_program(spec, devices(number))
  state = init_state(program)
  with Checkpoints(tmp_path, 1) as checkpoints:
    checkpoints.save(state, {}, program.spec)
    table, known = grown_parts(state.tables['fused'], state.known['fused'], (part,))
    state = state.replace(step=state.step + 1, tables={'fused': table}, known={'fused': known})
    checkpoints.save_changes(state, {}, program.spec)
    checkpoints.wait()
    assert checkpoints.steps() == [1]
    assert_same(checkpoints.restore(program).state, state)


def test_where_much_has_changed_a_whole_one_is_saved(tmp_path):
  program = program_of(1)
  first = init_state(program)
  before = delta.remembered(to_dict(first))
  assert delta.changes(to_dict(other(program, first, share=0.2, seed=1)), before)
  assert delta.changes(to_dict(other(program, first, share=0.6, seed=1)), before) is None
  with Checkpoints(tmp_path, 1) as checkpoints:
    checkpoints.save(first, {}, program.spec)
    state = other(program, first, share=0.6, seed=1)
    checkpoints.save_changes(state, {}, program.spec)
    checkpoints.wait()
    assert checkpoints.steps() == [7]
    later = other(program, state, share=0.1, seed=2)
    checkpoints.save_changes(later, {}, program.spec)  # based on the second one
    checkpoints.wait()
    assert_same(checkpoints.restore(program).state, later)
  assert not (tmp_path / 'deltas/7').exists()


@pytest.mark.parametrize('kind', ['static', *(pytest.param(kind, marks=pytest.mark.slow) for kind in [*KINDS][1:])])
def test_a_run_that_crashed_goes_on_from_what_changed_to_the_same_bits(criteo, tmp_path, kind):
  spec = lambda name, **fields: small_spec(
    criteo, tmp_path, checkpoint=str(tmp_path / name), epochs=2, **DELTA, **KINDS[kind], **fields
  )
  with crashing(deltas=(8, 12, 25, 30), after=35):
    train.run(spec('a', save_steps=20))
  names = lambda folder: sorted(path.name for path in (tmp_path / folder).iterdir())
  assert names('a/checkpoints') == ['20', '8', 'deltas']
  assert names('a/checkpoints/deltas') == ['25', '30']
  train.run(spec('a'))
  train.run(spec('b'))
  lines = [json.loads(line)['step'] for line in (tmp_path / 'a/metrics.jsonl').read_text().splitlines()]
  assert lines == [5, 8, 10, 12, 15, 20, 25, 30, 35, 38]
  assert names('a/checkpoints/deltas') == []  # the run has ended with a whole one
  program = make_program(spec('a'))
  states = []
  for name in 'ab':
    with Checkpoints(tmp_path / name / 'checkpoints', 3) as checkpoints:
      states.append(checkpoints.restore(program))
  assert states[0].step == states[1].step == 38
  assert_same(states[0].state, states[1].state)


@pytest.mark.parametrize(('stop', 'due'), [(35, 0), (35, 35)])
def test_a_signal_leaves_what_changed(criteo, tmp_path, monkeypatch, stop, due):
  fields = {'epochs': 2, 'save_steps': 20, **DELTA, **KINDS['static']}
  spec = small_spec(criteo, tmp_path, checkpoint=str(tmp_path / 'a'), **fields)
  monkeypatch.setattr(Members, 'stop', lambda self, step, received: signal.SIGTERM if step == stop else 0)
  monkeypatch.setattr(EverySeconds, 'is_due', lambda self, step: step == due)
  with pytest.raises(train.Stopped):
    train.run(spec)
  assert sorted(path.name for path in (tmp_path / 'a/checkpoints').iterdir()) == ['20', 'deltas']
  assert [path.name for path in (tmp_path / 'a/checkpoints/deltas').iterdir()] == ['35']


def saved(folder, keep=2):
  """A whole checkpoint of step 0 and deltas of steps 1 and 2, and their states."""
  program = program_of(1)
  states = [init_state(program)]
  with Checkpoints(folder, keep) as checkpoints:
    checkpoints.save(states[0], {}, program.spec)
    for step in (1, 2):
      states.append(other(program, states[0], share=0.1, seed=step).replace(step=states[0].step + step))
      checkpoints.save_changes(states[-1], {}, program.spec)
  return program, states


@pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')  # of Orbax, whose reading has failed
@pytest.mark.parametrize('damage', ['cut', 'bit', 'base', 'gone'])
def test_a_damaged_one_is_put_aside(tmp_path, caplog, damage):
  program, states = saved(tmp_path)
  folder = tmp_path / 'deltas/2'
  if damage == 'base':
    for path in (folder / 'base').iterdir():
      path.write_bytes(b'')
  elif damage == 'gone':
    shutil.rmtree(folder / 'position')
  else:
    path = max((folder / 'state').rglob('*'), key=lambda path: path.stat().st_size)
    stored = bytearray(path.read_bytes())
    stored[len(stored) // 2] ^= 1
    path.write_bytes(stored if damage == 'bit' else stored[: len(stored) // 2])
  with Checkpoints(tmp_path, 2) as checkpoints:
    restored = checkpoints.restore(program)
    assert restored.step == 1
    assert_same(restored.state, states[1])
    assert [path.name[:9] for path in (tmp_path / 'deltas').glob('damaged-*')] == ['damaged-2']
    checkpoints.save_changes(states[2], {}, program.spec)  # this step can be saved again
    checkpoints.wait()
    assert checkpoints.steps() == [0]
    again = checkpoints.restore(program)
    assert again.step == 2
    assert_same(again.state, states[2])
  assert f'{folder} cannot be read' in caplog.text


def test_without_the_whole_one_none_can_be_read_and_nothing_starts_anew(tmp_path, caplog):
  program, _ = saved(tmp_path)
  shutil.rmtree(tmp_path / '0')
  with Checkpoints(tmp_path, 2) as checkpoints, pytest.raises(CheckpointError, match=r'can be read \(steps \[2, 1\]\)'):
    checkpoints.restore(program)
  assert f'it is what changed since {tmp_path / "0"}, which is not there' in caplog.text
  assert (tmp_path / 'deltas/2').is_dir()


def test_one_of_another_model_is_refused(tmp_path):
  saved(tmp_path)
  program = make_program(small_spec('data', 'result', **DELTA, **KINDS['static'], optimizer__name='adagrad'))
  with Checkpoints(tmp_path, 2) as checkpoints, pytest.raises(CheckpointError, match=r'config\.optimizer\.name'):
    checkpoints.restore(program)


def test_its_contents_are_told_of_whole_ones_only(tmp_path):
  saved(tmp_path)
  assert find_checkpoint(tmp_path, None) == tmp_path / '0'
  with pytest.raises(CheckpointError, match='name a whole one'):
    find_checkpoint(tmp_path / 'deltas/2', None)


def test_without_seconds_no_rows_are_remembered_and_no_folder_is_made(tmp_path, monkeypatch):
  monkeypatch.setattr(full.delta, 'remembered', lambda tree: pytest.fail('digests were taken'))
  program = make_program(small_spec('data', 'result'))
  with Checkpoints(tmp_path, 1) as checkpoints:
    checkpoints.save(init_state(program), {}, program.spec)
  assert [path.name for path in tmp_path.iterdir()] == ['0']
