"""Whole runs with embedding variables: they fill, evict, grow, stop and go on, and evaluation changes nothing."""

import collections
import dataclasses
import json

import jax
import numpy as np
import pytest

from dlrm_jax import sources, train, upkeep
from dlrm_jax.checkpoint.full import Checkpoints
from dlrm_jax.checkpoint.same_model import CheckpointError
from dlrm_jax.embeddings import directory as directories
from dlrm_jax.program import make_program
from dlrm_jax.spec import COLUMNS
from dlrm_jax.state import init_state
from dlrm_jax.step import jit_predict, jit_train_step
from tests.embeddings import reference_variables as reference
from tests.helpers import small_spec

VARIABLES = {'embedding__kind': 'dynamic', 'embedding__rows': 512, 'no_eval': True}
COUNTER = {'embedding__admission__name': 'counter', 'embedding__admission__threshold': 3,
           'embedding__admission__expected_ids': 512}  # fmt: skip
BLOOM = {'embedding__admission__name': 'counting_bloom', 'embedding__admission__threshold': 3,
         'embedding__admission__expected_ids': 2000}  # fmt: skip
OLD = {'embedding__eviction__name': 'global_step', 'embedding__eviction__steps_to_live': 2,
       'embedding__eviction__every': 7}  # fmt: skip
SHORT = {'embedding__eviction__name': 'l2', 'embedding__eviction__l2': 0.3, 'embedding__eviction__every': 6}
WIDTH = {'embedding__width__name': 'dynamic', 'embedding__width__every': 5}
ADAPTIVE = {'embedding__kind': 'adaptive', **COUNTER}


def saved(folder, spec):
  """The newest state of a run, as it restores."""
  with Checkpoints(folder / 'checkpoints', 1) as checkpoints:
    return jax.device_get(checkpoints.restore(make_program(spec)).state)


def without_scratch(state):
  return state.replace(tables={name: table.replace(scratch=0) for name, table in state.tables.items()})


def assert_whole(known):
  """Every directory knows each id once, and counts what it holds."""
  for vocabulary in known.values():
    entries = directories.entries(vocabulary.directory)
    alive = np.asarray(entries.frequency) > 0
    ids = np.column_stack([np.asarray(entries.ids.key), np.asarray(entries.ids.feature)])[alive]
    assert len(np.unique(ids, axis=0)) == len(ids) == int(vocabulary.directory.used)


# Each feature with each of the others at least once, in few runs.
RUNS = {
  'plain': {},
  'counter_old_bf16': COUNTER | OLD | {'embedding__dtype': 'bfloat16', 'optimizer__name': 'adagraddecay'},
  'bloom_short_width': BLOOM | SHORT | WIDTH | {'optimizer__name': 'adam', 'micro_batch': 4},
  'adaptive_old_width': ADAPTIVE | OLD | WIDTH | {'optimizer__name': 'adagrad'},
}


@pytest.mark.slow
@pytest.mark.parametrize('name', sorted(RUNS))
def test_a_stopped_run_equals_an_unstopped_one_bit_for_bit(criteo, tmp_path, name):
  fields = VARIABLES | RUNS[name]
  for folder, stops in (('whole', (30,)), ('stopped', (23, 30))):
    for steps in stops:
      spec = small_spec(criteo, tmp_path, checkpoint=str(tmp_path / folder), steps=steps, **fields)
      train.run(spec)
  whole, stopped = (without_scratch(saved(tmp_path / folder, spec)) for folder in ('whole', 'stopped'))
  jax.tree.map(np.testing.assert_array_equal, whole, stopped)
  assert_whole(whole.known)
  lines = [json.loads(line) for line in (tmp_path / 'whole' / 'metrics.jsonl').read_text().splitlines()]
  last = [line for line in lines if line['kind'] == 'train'][-1]
  assert (last['lookups_refused'] > 0) == ('admission__name' in str(fields))
  assert (last['ids_evicted'] > 0) == ('eviction__name' in str(fields))
  assert 0 < last['ids'] <= last['ids_admitted']
  assert last['load'] <= 1


def test_tables_grow_until_all_ids_have_their_row(criteo, tmp_path, caplog):
  caplog.set_level('INFO')
  spec = small_spec(criteo, tmp_path, checkpoint=str(tmp_path / 'c'), epochs=5, **VARIABLES | {'no_eval': False})
  train.run(spec)
  state = saved(tmp_path / 'c', spec)
  known = state.known['fused']
  rows = directories.rows_of(known.directory)
  assert rows > 512
  assert state.tables['fused'].value.shape[0] == rows
  assert f'{rows} rows' in caplog.text
  lines = [json.loads(line) for line in (tmp_path / 'c' / 'metrics.jsonl').read_text().splitlines()]
  *_, before, last, evaluation = lines
  assert before['lookups_unplaced'] == last['lookups_unplaced']
  assert last['ids'] == sum(evaluation[f'ids_C{column + 1}'] for column in range(COLUMNS)) == known.directory.used
  assert evaluation['ids_C1'] == evaluation['admitted_C1'] == 4
  assert evaluation['lookups_C1'] == 5 * 600
  assert evaluation['load_fused'] == last['load']
  assert evaluation['auc'] > 0.8


COUNTED = ('lookups', 'admitted', 'refused', 'unplaced', 'evicted')


@pytest.mark.parametrize('fusion', [True, pytest.param(False, marks=pytest.mark.slow)])
def test_the_counts_of_each_column_are_those_of_plain_python(criteo, tmp_path, fusion):
  fields = VARIABLES | COUNTER | OLD | {'embedding__fusion': fusion, 'embedding__admission__threshold': 2}
  spec = small_spec(criteo, tmp_path, **fields)
  program = make_program(spec)
  state, step_fn, keep = init_state(program), jit_train_step(program), upkeep.Upkeep(program)
  make = lambda: reference.Variables(reference.Ids(1, 64, 8), reference.Counter(2, 1, 64, 8))
  expected = {name: make() for name in program.embeddings.layout}
  number = collections.defaultdict(collections.Counter)
  with sources.train_batches(sources.open_sources(spec), spec, sources.START) as batches:
    for step in range(19):  # the epoch; its last batch is partly padding
      batch, _ = next(batches)
      for name, table in program.embeddings.layout.items():
        ids = ids_of(batch, table.columns)
        _, fresh, refused, unplaced = expected[name].lookup(ids, step)
        lookups = [lane for lane, id in enumerate(ids) if id]
        for part, lanes in zip(COUNTED[:4], (lookups, fresh, refused, unplaced), strict=True):
          number[part].update(ids[lane][2] for lane in lanes)
        if (step + 1) % spec.embedding.eviction.every == 0:
          before = set(expected[name].ids.known)
          expected[name].evict('global_step', spec.embedding.eviction.steps_to_live, step)
          number['evicted'].update(id[2] for id in before - set(expected[name].ids.known))
      state, _ = step_fn(state, batch)
      state = keep(state, step + 1)
  for table in expected.values():
    number['ids'].update(id[2] for id in table.ids.known)
    number['waiting'].update(id[2] for id in table.admission.waiting.known)
  found, totals = upkeep.per_column(program, state), upkeep.numbers_of(state.known)
  for part in (*COUNTED, 'ids', 'waiting'):
    assert [found[f'{part}_C{column + 1}'] for column in range(COLUMNS)] == [number[part][c] for c in range(COLUMNS)]
    assert number[part].total() > 0 or (part == 'unplaced' and not fusion)
  # A row: 8 numbers of 4 bytes and twice as much of Adam's, 16 bytes of its id, 4 of scratch; 16 an id that waits.
  sizes = [number['ids'][c] * (3 * 32 + 16 + 4) + number['waiting'][c] * 16 for c in range(COLUMNS)]
  assert [found[f'memory_gb_C{column + 1}'] for column in range(COLUMNS)] == pytest.approx([s / 1e9 for s in sizes])
  for name, table in expected.items():
    assert found[f'load_{name}'] == len(table.ids.known) / 512
  assert totals['ids_admitted'] == number['admitted'].total()
  assert totals['ids_evicted'] == number['evicted'].total()
  assert totals['lookups_refused'] == number['refused'].total()
  assert totals['lookups_unplaced'] == number['unplaced'].total()


def ids_of(batch, columns):
  """(low, high, feature) of a batch's lookups in a table, None for padding."""
  return [
    (*key[column].tolist(), column) if weight else None
    for key, weight in zip(np.asarray(batch.key), batch.weight.tolist(), strict=True)
    for column in columns
  ]


def test_sums_go_beyond_32_bits_and_differences_across_their_end(criteo, tmp_path):
  program = make_program(small_spec(criteo, tmp_path, **VARIABLES))
  known = init_state(program).known['fused']
  full = np.full(COLUMNS, 2**32 - 1, np.uint32)
  counts = known.counts.replace(refused=full, lookups=full + np.uint32(101), asked=np.stack([full, full]))
  known = known.replace(counts=counts.replace(unplaced=full + np.uint32(0)))
  assert upkeep.numbers_of({'fused': known})['lookups_refused'] == 26 * (2**32 - 1)
  assert upkeep.full_parts(known) == []  # 26 * 101 lookups since it was asked, none without a place
  known = known.replace(counts=known.counts.replace(unplaced=full + np.uint32(1)))
  assert upkeep.full_parts(known) == ['table']


@pytest.mark.parametrize('policy', ['refuse', 'evict'])
def test_at_the_limit_of_memory(criteo, tmp_path, caplog, policy):
  fields = VARIABLES | {'embedding__memory_gb': 2e-4, 'embedding__at_limit': policy}
  spec = small_spec(criteo, tmp_path, checkpoint=str(tmp_path / 'c'), epochs=4, **fields)
  train.run(spec)
  known = saved(tmp_path / 'c', spec).known['fused']
  assert directories.rows_of(known.directory) == 512
  assert caplog.text.count('config.embedding.memory_gb=0.0002') == 1
  assert (known.counts.evicted.sum() > 0) == (policy == 'evict')
  assert known.counts.unplaced.sum() > 0
  assert_whole({'fused': known})


def test_a_limit_below_the_first_tables_is_one_line(criteo, tmp_path):
  with pytest.raises(train.TrainingError, match=r'config.embedding.memory_gb=0.0001.*raise it, or lower'):
    train.run(small_spec(criteo, tmp_path, **VARIABLES, embedding__memory_gb=1e-4))


@pytest.mark.slow
@pytest.mark.parametrize('name', sorted(RUNS))
def test_ids_keep_their_vectors_in_another_capacity(criteo, tmp_path, name):
  fields = VARIABLES | RUNS[name]
  spec = small_spec(criteo, tmp_path, checkpoint=str(tmp_path / 'c'), steps=30, **fields)
  train.run(spec)
  larger = dataclasses.replace(spec, embedding=dataclasses.replace(spec.embedding, rows=5000))
  old, new = (saved(tmp_path / 'c', each) for each in (spec, larger))
  assert directories.rows_of(new.known['fused'].directory) == 5120
  assert_whole(new.known)
  data = sources.open_sources(spec)
  with sources.train_batches(data, spec, sources.START) as batches:
    batch, _ = next(batches)
  one, other = (jit_predict(make_program(each))(state, batch)[0] for each, state in ((spec, old), (larger, new)))
  np.testing.assert_array_equal(one, other)


def test_another_capacity_moves_nothing_else_and_has_room_for_all(criteo, tmp_path):
  fields = VARIABLES | COUNTER | {'checkpoint': str(tmp_path / 'c'), 'embedding__admission__threshold': 2}
  fields |= {'steps': 60, 'model__top_mlp': (8,)}
  spec = small_spec(criteo, tmp_path, **fields)
  train.run(spec)
  old = saved(tmp_path / 'c', spec)
  rows = lambda state: [directories.rows_of(getattr(state.known['fused'], part)) for part in ('directory', 'filter')]
  assert rows(old)[0] > 512
  for name, value in (('embedding__admission__expected_ids', 9000), ('embedding__rows', 1024)):
    new = saved(tmp_path / 'c', small_spec(criteo, tmp_path, **fields | {name: value}))
    same, other = ('directory', 'filter') if 'admission' in name else ('filter', 'directory')
    pairs = [(getattr(state.known['fused'], same), state.tables if same == 'directory' else 0) for state in (old, new)]
    jax.tree.map(np.testing.assert_array_equal, *pairs)
    assert getattr(new.known['fused'], other).used == getattr(old.known['fused'], other).used
    assert_whole(new.known)
  assert rows(new) == rows(old)  # 1024 are too few


def test_a_checkpoint_of_another_filter_is_one_line(criteo, tmp_path):
  spec = small_spec(criteo, tmp_path, checkpoint=str(tmp_path / 'c'), steps=3, **VARIABLES | COUNTER)
  train.run(spec)
  for fields, word in ((BLOOM, 'admission.name'), (COUNTER | WIDTH, 'width.name'), (ADAPTIVE, 'kind')):
    other = small_spec(criteo, tmp_path, checkpoint=str(tmp_path / 'c'), steps=5, **VARIABLES | fields)
    with pytest.raises(CheckpointError, match=f'config.embedding.{word}'):
      saved(tmp_path / 'c', other)


def test_a_checkpoint_that_counted_otherwise_is_one_line(criteo, tmp_path):
  spec = small_spec(criteo, tmp_path, steps=3, **VARIABLES)
  program = make_program(spec)
  state = init_state(program)
  known = state.known['fused']
  totals = known.replace(counts=jax.tree.map(lambda leaf: leaf.sum(axis=-1), known.counts))
  with Checkpoints(tmp_path / 'c' / 'checkpoints', 1) as checkpoints:
    checkpoints.save(state.replace(known={'fused': totals}), {}, spec)
    checkpoints.wait()
  with pytest.raises(CheckpointError) as error:
    saved(tmp_path / 'c', spec)
  assert f'{tmp_path / "c" / "checkpoints" / "0"} is of another version' in str(error.value)
  assert 'known.fused.counts.' in str(error.value)
  assert '()' in str(error.value)
  assert '(26,)' in str(error.value)
  assert '\n' not in str(error.value)


@pytest.mark.slow  # to compile 26 tables takes a minute
@pytest.mark.parametrize('kind', [{}, COUNTER, ADAPTIVE], ids=['always', 'counter', 'adaptive'])
def test_one_table_or_26_give_the_same_numbers_and_evaluation_changes_nothing(criteo, tmp_path, kind):
  losses = {}
  for fusion in (True, False):
    room = {'embedding__rows': 26 * 512, 'embedding__admission__expected_ids': 26 * 512}
    fields = VARIABLES | kind | room | {'embedding__fusion': fusion}
    spec = small_spec(criteo, tmp_path, **fields)
    program = make_program(spec)
    state, step, logits = init_state(program), jit_train_step(program), jit_predict(program)
    with sources.train_batches(sources.open_sources(spec), spec, sources.START) as batches:
      for _ in range(6):
        batch, _ = next(batches)
        before = jax.device_get(state)
        logits(state, batch)
        jax.tree.map(np.testing.assert_array_equal, before, jax.device_get(state))
        state, metrics = step(state, batch)
        losses.setdefault(fusion, []).append(float(metrics['loss']))
    assert len(state.known) == (1 if fusion else 26)
  np.testing.assert_allclose(losses[True], losses[False], rtol=1e-5)
