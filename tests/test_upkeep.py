"""Whole runs with embedding variables: they fill, evict, grow, stop and go on, and evaluation changes nothing."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from dlrm_jax import sources, train
from dlrm_jax.checkpoint.full import CheckpointError, Checkpoints
from dlrm_jax.embeddings import directory as directories
from dlrm_jax.program import make_program
from dlrm_jax.spec import COLUMNS
from dlrm_jax.state import init_state
from dlrm_jax.step import jit_predict, jit_train_step
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
  assert evaluation['ids_C1'] == 4
  assert evaluation['auc'] > 0.8


@pytest.mark.parametrize('policy', ['refuse', 'evict'])
def test_at_the_limit_of_memory(criteo, tmp_path, caplog, policy):
  fields = VARIABLES | {'embedding__memory_gb': 2e-4, 'embedding__at_limit': policy}
  spec = small_spec(criteo, tmp_path, checkpoint=str(tmp_path / 'c'), epochs=4, **fields)
  train.run(spec)
  known = saved(tmp_path / 'c', spec).known['fused']
  assert directories.rows_of(known.directory) == 512
  assert caplog.text.count('config.embedding.memory_gb=0.0002') == 1
  assert (int(known.counts.evicted) > 0) == (policy == 'evict')
  assert int(known.counts.unplaced) > 0
  assert_whole({'fused': known})


def test_a_limit_below_the_first_tables_is_one_line(criteo, tmp_path):
  with pytest.raises(train.TrainingError, match=r'config.embedding.memory_gb=0.0001.*raise it, or lower'):
    train.run(small_spec(criteo, tmp_path, **VARIABLES, embedding__memory_gb=1e-4))


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


def test_a_checkpoint_of_another_filter_is_one_line(criteo, tmp_path):
  spec = small_spec(criteo, tmp_path, checkpoint=str(tmp_path / 'c'), steps=3, **VARIABLES | COUNTER)
  train.run(spec)
  for fields, word in ((BLOOM, 'admission.name'), (COUNTER | WIDTH, 'width.name'), (ADAPTIVE, 'kind')):
    other = small_spec(criteo, tmp_path, checkpoint=str(tmp_path / 'c'), steps=5, **VARIABLES | fields)
    with pytest.raises(CheckpointError, match=f'config.embedding.{word}'):
      saved(tmp_path / 'c', other)


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
