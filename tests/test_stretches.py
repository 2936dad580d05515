"""Steps done in one call are the steps done one by one, wherever they are cut; and they end where something is due."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlrm_jax import train
from dlrm_jax.embeddings import exchange
from dlrm_jax.program import make_program
from dlrm_jax.sharding import ALONE
from dlrm_jax.state import abstract_state, init_state
from dlrm_jax.step import jit_train_step, jit_train_steps
from dlrm_jax.stretches import MOST_EXAMPLES, MOST_STEPS, Stacked, Stretches, jit_train_stretch, stack_size
from tests.helpers import devices, small_spec
from tests.test_sharding import CASES, COUNTER, make_batch

STEPS = 6


def cut_at(program, stack, places):
  """(state, loss and examples of each stretch) after the batches of a stack, in stretches that end at these places."""
  state, steps, metrics = init_state(program), jit_train_steps(program), []
  for first, after in zip([0, *places], [*places, STEPS], strict=True):
    state, of = steps(state, stack, first, after)
    metrics.append((float(of['loss']), float(of['examples'])))
  return jax.device_get(state), metrics


@pytest.mark.parametrize(
  ('case', 'number'),
  [
    *((case, 1) for case in ('static', 'bfloat16', 'dot, slices', 'multi-hash', 'width', 'adaptive')),
    *((case, 2) for case in ('static', 'all to all')),
    *(
      pytest.param(case, 4, marks=pytest.mark.slow)
      for case in ('network', 'dot, slices', 'all to all', 'counter', 'all to all, counter', 'all to all, adaptive')
    ),
  ],
)
def test_a_stack_is_its_steps_one_by_one_and_may_be_cut_anywhere(case, number, monkeypatch):
  monkeypatch.setattr(exchange, 'capacity', lambda lookups, devices: 45)  # too few for one round
  spec = small_spec('data', 'result', **CASES[case])
  program = make_program(spec, devices(number))
  put = functools.partial(program.axis.put, multiple=spec.micro_batch)
  batches = [make_batch(seed, padding=seed) for seed in range(STEPS)]
  stack = put(jax.tree.map(lambda *leaves: np.stack(leaves), *batches), stacked=True)
  whole, metrics = cut_at(program, stack, [])
  parts, of_parts = cut_at(program, stack, [1, 4])
  jax.tree.map(np.testing.assert_array_equal, whole, parts)
  sums = [sum(loss * examples for loss, examples in of) for of in (metrics, of_parts)]
  np.testing.assert_allclose(*sums, rtol=1e-6)

  state, step, losses = init_state(program), jit_train_step(program), []
  for batch in batches:
    state, of = step(state, put(batch))
    losses.append((float(of['loss']), float(of['examples'])))
  examples = sum(number for _, number in losses)
  mean = sum(loss * number for loss, number in losses) / examples
  np.testing.assert_allclose(metrics, [(mean, examples)], rtol=1e-5)
  np.testing.assert_allclose(parts.params['logit_kernel'], state.params['logit_kernel'], rtol=1e-3, atol=1e-5)
  # Which ids have which rows is no matter of rounding.
  of_ids = lambda known: [(one.directory, one.filter, one.counts) for one in known.values()]
  jax.tree.map(np.testing.assert_array_equal, of_ids(parts.known), of_ids(jax.device_get(state.known)))


@pytest.mark.parametrize(
  ('kind', 'number'),
  [('static', 1), ('dynamic', 1), ('adaptive', 1), ('static', 4), pytest.param('dynamic', 4, marks=pytest.mark.slow)],
)
def test_a_stack_needs_no_memory_of_the_size_of_the_tables(kind, number):
  fields = {'embedding__kind': kind, 'embedding__buckets': (40_000,), 'embedding__rows': 26 * 40_000}
  fields |= COUNTER if kind == 'adaptive' else {}
  program = make_program(small_spec('data', 'result', **fields, embedding__exchange='all_to_all'), devices(number))
  # A device's part.
  state, table = abstract_state(program), 26 * 40_000 * program.spec.embedding.dim * 4 / number
  stack = jax.eval_shape(lambda: jax.tree.map(lambda leaf: jnp.stack([leaf] * STEPS), make_batch(0)))
  memory = jit_train_steps(program).lower(state, stack, 0, STEPS).compile().memory_analysis()
  assert memory.temp_size_in_bytes < table / (10 if number == 1 else 2)
  assert memory.alias_size_in_bytes > 3 * table


def test_the_size_of_a_stack():
  of = lambda size, axis=ALONE: stack_size(make_program(small_spec('data', 'result', batch_size=size), axis))
  assert [of(size) for size in (8, 512, 1024, 4096, MOST_EXAMPLES + 1)] == [MOST_STEPS, MOST_STEPS, 10, 2, 1]
  # Of a device.
  assert [of(size, devices(2)) for size in (512, 2048, 8192)] == [MOST_STEPS, 10, 2]


class Batches:
  """Batches of one number, their own, with as many tens of skipped rows."""

  def __init__(self, count, make=lambda number: np.array([number])):
    self.skipped_rows, self._count, self._make, self._next = 0, count, make, 0

  def __next__(self):
    if self._next == self._count:
      raise StopIteration
    number, self._next = self._next, self._next + 1
    self.skipped_rows = 10 * number
    return self._make(number), number


@pytest.mark.parametrize('size', [1, 4])
def test_stretches_are_the_batches_in_order_with_their_positions(size):
  rng = np.random.default_rng(0)
  stretches = Stretches(Stacked(Batches(400), size))
  seen = []
  while len(seen) < 300:
    most = int(rng.integers(1, 7))
    stretch = stretches.take(most)
    assert 1 <= stretch.steps <= min(most, size)
    batches = stretch.batches[None] if size == 1 else stretch.batches
    seen += batches[stretch.first : stretch.after, 0].tolist()
    assert stretch.place == (seen[-1], 10 * seen[-1])
  assert seen == list(range(len(seen)))


def test_a_stack_that_cannot_be_filled_ends_the_batches():
  assert [[place.position for place in places] for _, places in Stacked(Batches(7), 3)] == [[0, 1, 2], [3, 4, 5]]


def test_large_batches_go_one_by_one():
  program = make_program(small_spec('data', 'result', batch_size=MOST_EXAMPLES + 1))
  assert stack_size(program) == 1
  state, stretches = init_state(program), Stretches(Stacked(Batches(3, make_batch), 1))
  for seed in range(3):
    stretch = stretches.take(5)
    state, metrics = jit_train_stretch(program)(state, stretch)
    assert (stretch.place.position, stretch.steps, float(metrics['examples'])) == (seed, 1, 29)
  assert int(state.step) == 3


@pytest.mark.parametrize('timeline', [0, 1, 2, 9])
def test_a_stretch_ends_where_something_is_due(timeline):
  periods = {'save_steps': 12, 'eval_every': 0, 'log_every': 10}
  run = types.SimpleNamespace(spec=types.SimpleNamespace(**periods, timeline=timeline), step=0, last_step=67)
  due = {step for period in (12, 10, 7) for step in range(0, 67, period)} | {67}
  if timeline:  # it begins where a step is to be profiled, and ends with it
    due |= {step for last in range(timeline, 67, timeline) for step in (last - 1, last)}
  ends = {0}
  while run.step < run.last_step:
    run.step += train.until_due(run, [7])
    ends.add(run.step)
  assert ends == due
