"""A training step: the same numbers however it is fused, sliced or padded; only touched rows move; only once."""

import dataclasses
import re

import jax
import numpy as np
import pytest

from configs import base
from dlrm_jax import spec as specs
from dlrm_jax.native import build
from dlrm_jax.program import make_program
from dlrm_jax.state import init_state
from dlrm_jax.step import jit_predict, jit_train_step
from dlrm_jax.structs import Batch

BUCKETS = tuple(5 + 3 * column for column in range(26))
B = 32


def make_spec(**fields):
  config = base.get_config()
  config.embedding.buckets = BUCKETS
  config.model.bottom_mlp, config.model.top_mlp, config.embedding.dim = (24, 8), (32, 16), 8
  config.batch_size = B
  for name, value in fields.items():
    *path, last = name.split('__')
    target = config
    for part in path:
      target = target[part]
    target[last] = value
  return specs.from_config(config)


def make_batch(seed=0, padding=0, size=B):
  rng = np.random.default_rng(seed)
  weight = np.ones(size, np.float32)
  weight[size - padding :] = 0
  return Batch(
    label=(rng.random(size) < 0.3).astype(np.float32),
    dense=rng.normal(size=(size, 13)).astype(np.float32),
    bucket=(rng.random((size, 26)) * BUCKETS).astype(np.uint32),
    weight=weight,
  )


def run(steps=3, padding=0, **fields):
  """(state on the host, losses) after some steps."""
  program = make_program(make_spec(**fields))
  state, step = init_state(program), jit_train_step(program)
  losses = []
  for i in range(steps):
    state, metrics = step(state, make_batch(i, padding))
    losses.append(float(metrics['loss']))
  return jax.device_get(state), losses


def value_of(state):
  """Rows of all columns under each other, however they were fused."""
  names = sorted(state.tables, key=lambda name: int(name[1:]) if name[1:].isdigit() else 0)
  return np.concatenate([state.tables[name].value for name in names])


def close(a, b, **tolerance):
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


# Slots without and with a leaf of width 1.
@pytest.mark.parametrize('optimizer', [pytest.param('adamasync', marks=pytest.mark.slow), 'adagraddecay'])
def test_one_table_or_26_give_the_same_bits(optimizer):
  fused, fused_losses = run(optimizer__name=optimizer)
  single, single_losses = run(optimizer__name=optimizer, embedding__fusion=False)
  assert len(fused.tables) == 1
  assert len(single.tables) == 26
  assert fused_losses == single_losses
  np.testing.assert_array_equal(value_of(fused), value_of(single))
  close(fused.params, single.params, atol=0)


@pytest.mark.parametrize(
  ('padding', 'interaction'),
  [(7, 'dot'), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((7, 'cat'), (0, 'cat'), (0, 'dot')))],
)
def test_slices_give_the_numbers_of_the_whole_batch(interaction, padding):
  whole, losses = run(padding=padding, model__interaction=interaction)
  sliced, sliced_losses = run(padding=padding, model__interaction=interaction, micro_batch=4)
  np.testing.assert_allclose(losses, sliced_losses, rtol=1e-5)
  close(whole.batch_stats, sliced.batch_stats, rtol=1e-3, atol=1e-4)
  program = make_program(make_spec(model__interaction=interaction))
  one = jit_predict(program)(jax.tree.map(jax.numpy.asarray, whole), make_batch(9))[0]
  other = jit_predict(program)(jax.tree.map(jax.numpy.asarray, sliced), make_batch(9))[0]
  np.testing.assert_allclose(one, other, atol=2e-3)  # Adam magnifies rounding where gradients are near 0


@pytest.mark.skipif(not build.load().ready, reason=build.load().note)
@pytest.mark.parametrize('interaction', ['cat', pytest.param('dot', marks=pytest.mark.slow)])
def test_slices_of_whole_leaves_give_the_same_bits(interaction):
  """Sums over examples are made as sums.py says, whoever makes them."""
  states = []
  for slices in (1, 2, 4):
    spec = make_spec(batch_size=512, micro_batch=slices, model__interaction=interaction)
    program = make_program(spec)
    state, step = init_state(program), jit_train_step(program)
    for seed in range(3):
      state, metrics = step(state, make_batch(seed, size=512, padding=5))
    states.append(jax.device_get((metrics, state.replace(known={}, tables=value_of(state)))))
  for other in states[1:]:
    jax.tree.map(np.testing.assert_array_equal, other, states[0])


def test_the_first_sliced_update_is_exact_to_rounding():
  fields = {'optimizer__name': 'gradientdescent', 'optimizer__learning_rate': 0.5}
  whole, _ = run(1, padding=3, **fields)
  sliced, _ = run(1, padding=3, micro_batch=8, **fields)
  close(whole.params, sliced.params, atol=1e-6)
  np.testing.assert_allclose(value_of(whole), value_of(sliced), atol=1e-6)
  close(whole.batch_stats, sliced.batch_stats, atol=1e-6)


@pytest.mark.slow
def test_fusion_passes_of_the_compiler_change_speed_only():
  fast, losses = run(optimizer__name='gradientdescent')
  slow, slow_losses = run(optimizer__name='gradientdescent', op_fusion=False)
  np.testing.assert_allclose(losses, slow_losses, rtol=1e-6)
  close(fast.params, slow.params, atol=1e-6)
  programs = [make_program(make_spec(op_fusion=fusion)) for fusion in (True, False)]
  texts = [jit_train_step(p).lower(init_state(p), make_batch()).compile().as_text() for p in programs]
  # A fusion called "wrapped" holds one operation.
  fused = [[name for name in re.findall(r'%(\S+) = .* fusion\(', text) if 'wrapped' not in name] for text in texts]
  assert fused[0]
  assert not fused[1]


def test_only_rows_of_the_batch_move_and_padding_touches_nothing():
  program = make_program(make_spec())
  before = value_of(jax.device_get(init_state(program)))
  after = value_of(run(1, padding=10)[0])
  moved = np.flatnonzero((before != after).any(axis=1))
  offsets = np.cumsum((0, *BUCKETS[:-1]))
  real = make_batch().bucket[: B - 10].astype(np.int64) + offsets
  np.testing.assert_array_equal(moved, np.unique(real))


def test_table_update_all_moves_rows_that_the_batch_has_not():
  fields = {'optimizer__name': 'adam', 'optimizer__table_update': 'all'}
  one, two = value_of(run(1, **fields)[0]), value_of(run(2, **fields)[0])
  lazy_one, lazy_two = (value_of(run(n, optimizer__name='adam')[0]) for n in (1, 2))
  np.testing.assert_allclose(one, lazy_one, atol=1e-6)
  first = set(np.flatnonzero((value_of(jax.device_get(init_state(make_program(make_spec())))) != one).any(axis=1)))
  second = set((make_batch(1).bucket.astype(np.int64) + np.cumsum((0, *BUCKETS[:-1]))).ravel())
  left_alone = sorted(first - second)
  assert left_alone
  assert (one[left_alone] != two[left_alone]).any(axis=1).all()
  np.testing.assert_array_equal(lazy_one[left_alone], lazy_two[left_alone])


def test_gradients_of_the_tables_are_those_of_autodiff_through_them():
  fields = {'optimizer__name': 'gradientdescent', 'optimizer__learning_rate': 1.0}
  program = make_program(make_spec(**fields))
  state, batch = init_state(program), make_batch(padding=4)

  def loss(value):
    vectors = value[batch.bucket.astype(np.int32) + np.cumsum((0, *BUCKETS[:-1]))[None]]
    variables = {'params': state.params, 'batch_stats': state.batch_stats}
    logit, _ = program.model.apply(variables, batch.dense, vectors, batch.weight, True, mutable=['batch_stats'])
    terms = jax.nn.softplus(logit) - batch.label * logit
    return (terms * batch.weight).sum() / batch.weight.sum()

  batch = jax.tree.map(jax.numpy.asarray, batch)
  before = state.tables['fused'].value
  expected = np.asarray(before - jax.grad(loss)(before))
  state, _ = jit_train_step(program)(state, batch)
  np.testing.assert_allclose(state.tables['fused'].value, expected, atol=1e-6)


def test_embedding_l2_pulls_touched_rows_once():
  fields = {'optimizer__name': 'gradientdescent', 'optimizer__learning_rate': 0.1}
  plain, pulled = (value_of(run(1, embedding__l2=l2, **fields)[0]) for l2 in (0.0, 0.3))
  before = value_of(jax.device_get(init_state(make_program(make_spec()))))
  touched = np.unique(make_batch().bucket.astype(np.int64) + np.cumsum((0, *BUCKETS[:-1])))
  expected = plain.copy()
  expected[touched] -= 0.1 * 0.3 * before[touched]
  np.testing.assert_allclose(pulled, expected, atol=1e-6)


def test_weight_decay_shrinks_kernels_only():
  fields = {'optimizer__name': 'gradientdescent', 'optimizer__learning_rate': 0.1}
  plain, decayed = (run(1, optimizer__weight_decay=d, **fields)[0].params for d in (0.0, 0.5))
  start = jax.device_get(init_state(make_program(make_spec())).params)
  expected = jax.tree.map(lambda w, p: p - 0.1 * 0.5 * w * (w.ndim >= 2), start, plain)
  close(decayed, expected, atol=1e-6)


def test_a_batch_of_padding_leaves_parameters_rows_and_statistics_alone():
  program = make_program(make_spec(optimizer__name='gradientdescent'))
  state = init_state(program)
  before = jax.device_get(state)
  after, metrics = jit_train_step(program)(state, dataclasses.replace(make_batch(), weight=np.zeros(B, np.float32)))
  assert float(metrics['loss']) == 0
  close(before.params, after.params, atol=0)
  close(before.batch_stats, after.batch_stats, atol=0)
  np.testing.assert_array_equal(value_of(before), value_of(jax.device_get(after)))


def test_a_step_takes_over_the_tables_and_needs_no_memory_of_their_size():
  spec = make_spec(embedding__buckets=(20_000,))
  program = make_program(spec)
  state = init_state(program)
  memory = jit_train_step(program).lower(state, make_batch()).compile().memory_analysis()
  table = 26 * 20_000 * spec.embedding.dim * 4
  assert memory.temp_size_in_bytes < table / 10
  assert memory.alias_size_in_bytes > 3 * table


def test_seed_decides_everything():
  one, losses = run(seed=5)
  again, losses_again = run(seed=5)
  other, _ = run(seed=6)
  assert losses == losses_again
  np.testing.assert_array_equal(value_of(one), value_of(again))
  assert (value_of(one) != value_of(other)).any()


def test_first_vectors_are_normal_cut_at_two_deviations():
  value = np.asarray(init_state(make_program(make_spec(embedding__buckets=(3000,)))).tables['fused'].value)
  deviation = 1 / np.sqrt(8)
  assert np.abs(value).max() <= 2 * deviation
  assert value.std() == pytest.approx(0.8796 * deviation, rel=0.01)  # of a normal cut at two deviations
  assert len(np.unique(value[:, 0])) > 0.99 * len(value)
