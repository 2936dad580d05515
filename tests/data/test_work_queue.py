"""The queue alone, with processes that parse at random speeds: every row once an epoch, whatever crashes between."""

import collections
import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dlrm_jax.data.schema import DataError
from dlrm_jax.data.work_queue import WorkQueue

START = {'epoch': 0, 'position': 0}


class Processes:
  """As many as there are shares; each parses its next piece with its own chance in every round."""

  def __init__(self, rows, slice_rows, shares, chances, threads=1, seed=0, state=START, rng=None):
    self.queue = WorkQueue(rows, slice_rows, seed, list(shares), threads, state)
    self.chances, self.rng = chances, rng or random.Random(0)
    self.hands = [collections.deque() for _ in shares]  # of [piece, parsed, rows to come]
    self.pieces = [0] * len(shares)
    self.steps = self.rounds = self.empty_rounds = 0

  def run_until(self, done):
    """Steps until `done()`; yields what each one brings: (epoch, row) of all processes."""
    while True:
      self.rounds += 1
      for process, piece in self.queue.hand_out():
        self.hands[process].append([piece, False, list(range(piece.start + piece.done, piece.stop))])
        self.pieces[process] += 1
      for _ in range(self.queue.plan([self.parse(process) for process in range(len(self.hands))])):
        if done():
          return
        self.empty_rounds = 0
        self.steps += 1
        yield [row for process, rows in enumerate(self.queue.step()) for row in self.take(process, rows)]
      self.empty_rounds += 1
      assert self.empty_rounds < 1000, 'nobody goes on'

  def parse(self, process):
    for read in self.hands[process]:
      if not read[1]:
        read[1] = self.rng.random() < self.chances[process]
        break
    ready = 0
    for piece, parsed, rows in self.hands[process]:
      if not parsed or piece.epoch != self.queue.epoch:
        break
      ready += len(rows)
    return ready

  def take(self, process, count):
    taken, hand = [], self.hands[process]
    while len(taken) < count:
      piece, parsed, rows = hand[0]
      assert parsed
      part, hand[0][2] = rows[: count - len(taken)], rows[count - len(taken) :]
      taken += [(piece.epoch, row) for row in part]
      if not hand[0][2]:
        hand.popleft()
    return taken


def processes(most=5):
  return st.lists(st.tuples(st.integers(1, 9), st.floats(0.1, 1)), min_size=1, max_size=most)


@settings(max_examples=200, deadline=None)
@given(
  rows=st.integers(1, 120),
  slice_rows=st.integers(1, 50),
  lives=st.lists(
    st.tuples(processes(), st.integers(1, 3), st.integers(0, 12), st.integers(0, 5)), min_size=1, max_size=4
  ),
  seed=st.integers(0, 2**32 - 1),
)
def test_every_row_once_an_epoch_with_any_processes_speeds_and_crashes(rows, slice_rows, lives, seed):
  """Each life is trained for some steps, saved, trained for some more that are lost, and goes on as the next one."""
  rng, state, history = random.Random(seed), START, []
  for number, (members, threads, saved, lost) in enumerate(lives):
    shares, chances = zip(*members, strict=True)
    job = Processes(rows, slice_rows, shares, chances, threads, seed, state, rng)
    last = number == len(lives) - 1
    done = (lambda: job.queue.epoch >= 3) if last else (lambda: job.steps >= saved)  # noqa: B023
    for brought in job.run_until(done):
      assert brought, 'a step without rows'
      assert len(brought) <= sum(shares)
      history += brought
      assert job.queue.state()['position'] == sum(epoch == job.queue.epoch for epoch, _ in history)
    state = json.loads(json.dumps(job.queue.state()))
    for _ in job.run_until(lambda: job.steps >= saved + lost):  # noqa: B023
      pass
  ended = [item for item in history if item[0] < 3]
  assert sorted(ended) == [(epoch, row) for epoch in range(3) for row in range(rows)]
  assert [epoch for epoch, _ in history] == sorted(epoch for epoch, _ in history)


def test_what_many_had_in_use_comes_first_when_one_goes_on():
  state, history = START, []
  for count, steps in ((8, 5), (1, 2), (3, 4), (1, 1000)):
    job = Processes(1000, 50, [4] * count, [1] * count, state=state)
    for brought in job.run_until(lambda: job.steps >= steps or job.queue.epoch):  # noqa: B023
      history += brought
    opened, state = state.get('open', []), job.queue.state()
    assert len(state['open']) <= max(8, count)
    if opened and count == 1 and steps == 2:  # only the first of the eight slices was touched
      assert state['open'][1:] == opened[1:]
  assert sorted(history) == [(0, row) for row in range(1000)]


def test_a_slow_reader_gets_fewer_slices_and_keeps_nobody_from_full_batches():
  job = Processes(20_000, 100, [10, 10, 10], [0.02, 1, 1])
  brought = [len(rows) for rows in job.run_until(lambda: job.queue.epoch == 1)]
  assert job.pieces[0] < job.pieces[1] / 2
  assert max(job.pieces[1:]) - min(job.pieces[1:]) <= 2
  assert sum(rows >= 20 for rows in brought) > 0.9 * len(brought)


@pytest.mark.parametrize(('count', 'slices'), [(1, 37), (3, 100), (7, 100), (4, 1), (5, 4)])
def test_readers_in_time_bring_full_batches_up_to_the_last_slices(count, slices):
  rows, size = 12_345, 10
  job = Processes(rows, -(-rows // slices), [size] * count, [1] * count)
  brought = []
  for batch in job.run_until(lambda: job.queue.epoch == 1):
    brought.append(len(batch))
    # Whoever uses a slice has the next one to parse meanwhile.
    assert min(sum(len(rows) for _, _, rows in hand) for hand in job.hands) > rows // slices // 2
  tail = 2 * -(-rows // slices) // size + 2
  assert len(brought) <= rows // (size * count) + tail
  assert set(brought[: len(brought) - tail]) <= {size * count}
  assert job.rounds < len(brought) / 2
  if count == 1:
    assert len(brought) == -(-rows // size)


def test_a_state_stays_small():
  job = Processes(10**6, 1000, [50] * 8, [0.3] * 8, threads=2)
  for _ in job.run_until(lambda: job.steps > 1500):
    assert len(job.queue.state()['open']) <= 8 * 4


def order_of_slices(seed, epochs=2):
  job, order = Processes(1000, 10, [10], [1], seed=seed), []
  for brought in job.run_until(lambda: job.queue.epoch == epochs):
    order += [row for _, row in brought[:1]]
  return order[:100], order[100:]


def test_each_epoch_and_seed_has_its_order_of_the_slices():
  first, second = order_of_slices(5)
  assert sorted(first) == sorted(second) == list(range(0, 1000, 10))
  assert (first, second) == order_of_slices(5)
  assert len({tuple(order) for order in (first, second, *order_of_slices(6), range(0, 1000, 10))}) == 5


@pytest.mark.parametrize(
  'state',
  [
    {'position': 12, 'drawn': 1, 'open': []},
    {'position': 7, 'drawn': 2, 'open': [[0, 7], [2, 0]]},
    {'position': 120, 'drawn': 12, 'open': []},
    {'position': 21, 'drawn': 2, 'open': [[1, 11]]},
  ],
)
def test_a_state_that_does_not_fit_the_slices_is_refused(state):
  with pytest.raises(DataError, match=r'100 rows are cut in 10; resume with the data and data\.slice_rows'):
    WorkQueue(100, 10, 0, [5], 1, {'epoch': 0, **state})
