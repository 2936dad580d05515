"""Batches from the queue: the rule's order alone; with several processes, in threads here, every row once an epoch."""

import itertools
import json
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dlrm_jax.data import queue_reader
from dlrm_jax.data.index import FileIndex, index_files
from dlrm_jax.data.pipeline import batches_per_epoch
from dlrm_jax.data.queue_reader import queue_batches
from dlrm_jax.data.schema import DataError
from dlrm_jax.data.shuffle import seeded_order
from dlrm_jax.data.stage import stage
from tests.data.numbered import Numbers, counted, numbers

START = {'epoch': 0, 'position': 0}


class Member:
  """One of the processes that agree by a dictionary; made by `members`."""

  def __init__(self, index, count, told, changed):
    self.index, self.count, self._told, self._changed = index, count, told, changed
    self.round = 0

  def agree(self, number):
    with self._changed:
      self._tell(number)
      names = [(self.round, i) for i in range(self.count)]
      if not self._changed.wait_for(lambda: all(name in self._told for name in names), timeout=60):
        raise TimeoutError('a process waits for ever')
      self.round += 1
      numbers = [self._told[name] for name in names]
    if -1 in numbers:
      raise RuntimeError('a process has left')
    return numbers

  def leave(self):
    with self._changed:
      self._tell(-1)

  def _tell(self, number):
    self._told.setdefault((self.round, self.index), number)
    self._changed.notify_all()


def members(count):
  told, changed = {}, threading.Condition()
  return [Member(i, count, told, changed) for i in range(count)]


class Slow(Numbers):
  """Rows that take their time, by a function of the number of the read."""

  def __init__(self, rows, seconds):
    super().__init__(rows)
    self._seconds = seconds

  def read(self, start, stop, on_bad_row):
    time.sleep(self._seconds())
    return super().read(start, stop, on_bad_row)


def in_lockstep(iterators, steps):
  """Next batches of all, step after step, until `steps` or the end of the first epoch; checks that they agree."""
  with ThreadPoolExecutor(len(iterators)) as pool:
    while steps:
      both = list(pool.map(next, iterators))
      batches, states = zip(*both, strict=True)
      assert all(state == states[0] for state in states)
      assert len({batch.label.shape for batch in batches}) == 1
      yield [numbers(batch) for batch in batches], states[0]
      steps -= 1
      if states[0]['epoch']:
        return


def close(iterators):
  with ThreadPoolExecutor(len(iterators)) as pool:
    list(pool.map(lambda iterator: iterator.close(), iterators))


def order_by_rule(rows, slice_rows, seed, epoch, shuffle):
  """The order of an epoch, from the definition."""
  slices = -(-rows // slice_rows)
  starts = [rows * k // slices for k in range(slices + 1)]
  order = []
  for number in seeded_order((seed, epoch, 0), slices):
    part = np.arange(starts[number], starts[number + 1])
    order += part[seeded_order((seed, epoch, 1 + int(number)), len(part))].tolist() if shuffle else part.tolist()
  return order


@settings(max_examples=25, deadline=None)
@given(
  rows=st.integers(1, 150),
  slice_rows=st.integers(1, 60),
  size=st.integers(1, 70),
  threads=st.integers(0, 2),
  shuffle=st.booleans(),
  seed=st.integers(0, 3),
)
def test_alone_the_batches_are_those_of_the_rule(criteo, rows, slice_rows, size, threads, shuffle, seed):
  spec = criteo.spec('', slice_rows=slice_rows, threads=threads, shuffle_rows=5 if shuffle else 0)
  iterator = queue_batches(counted(rows), spec, size, seed)
  for epoch in range(2):
    order = order_by_rule(rows, slice_rows, seed, epoch, shuffle)
    assert sorted(order) == list(range(rows))
    for start in range(0, rows, size):
      batch, state = next(iterator)
      assert numbers(batch) == order[start : start + size]
      assert batch.label.shape == (size,)
      last = start + size >= rows
      assert (state['epoch'], state['position']) == ((epoch + 1, 0) if last else (epoch, start + size))
      assert state == iterator.get_state()
      assert len(state['open']) <= 1
      assert state['drawn'] >= len(state['open'])
      assert state['drawn'] == 0 or not last
  iterator.close()


def test_resume_at_every_cut_equals_uninterrupted(criteo):
  rows, size = 103, 7
  spec = criteo.spec('', slice_rows=20)
  whole = queue_batches(counted(rows), spec, size, 3)
  uninterrupted = [next(whole) for _ in range(3 * batches_per_epoch(rows, size))]
  state = START
  for cut, (_, after) in enumerate(uninterrupted[:-4]):
    resumed = queue_batches(counted(rows), spec, size, 3, state=json.loads(json.dumps(state)))
    for batch, expected_state in uninterrupted[cut : cut + 4]:
      again, again_state = next(resumed)
      assert again_state == expected_state
      np.testing.assert_array_equal(again.label, batch.label)
      np.testing.assert_array_equal(again.weight, batch.weight)
    resumed.close()
    state = after
  whole.set_state(uninterrupted[4][1])
  np.testing.assert_array_equal(next(whole)[0].label, uninterrupted[5][0].label)
  whole.close()


@settings(max_examples=15, deadline=None)
@given(
  rows=st.integers(1, 200),
  slice_rows=st.integers(1, 60),
  lives=st.lists(st.tuples(st.integers(1, 4), st.integers(4, 40), st.integers(0, 6)), min_size=1, max_size=3),
  seed=st.integers(0, 1000),
)
def test_processes_of_any_speed_share_each_epoch_whatever_crashes(criteo, rows, slice_rows, lives, seed):
  """Each life goes on from the state that the one before it had some steps before its end."""
  rng, state, history = random.Random(seed), START, []
  spec = criteo.spec('', slice_rows=slice_rows)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(queue_reader, 'PATIENCE', 0.001)
    for number, (count, size, steps) in enumerate(lives):
      delays = [rng.choice([0, 0.001, 0.004]) for _ in range(count)]
      slow = lambda delay: lambda: rng.random() * delay
      iterators = [
        queue_batches(FileIndex([Slow(rows, slow(delay))]), spec, size, 7, member, state)
        for member, delay in zip(members(count), delays, strict=True)
      ]
      last = number == len(lives) - 1
      for brought, after in in_lockstep(iterators, 10**6 if last else steps):
        assert any(brought), 'a step without rows'
        history += itertools.chain(*brought)
        state = after
      if not last:
        for _ in in_lockstep(iterators, 2):
          pass
      close(iterators)
      if state['epoch']:
        break
  assert sorted(history) == list(range(rows))


def test_a_slow_reader_brings_fewer_rows_and_holds_up_nobody(criteo, monkeypatch):
  monkeypatch.setattr(queue_reader, 'PATIENCE', 0.001)
  spec = criteo.spec('', slice_rows=50)
  seconds = [0.1, 0, 0]
  iterators = [
    queue_batches(FileIndex([Slow(5000, lambda delay=delay: delay)]), spec, 30, 1, member)
    for member, delay in zip(members(3), seconds, strict=True)
  ]
  totals = np.sum([[len(rows) for rows in brought] for brought, _ in in_lockstep(iterators, 10**6)], axis=0)
  close(iterators)
  assert totals.sum() == 5000
  assert totals[0] < 0.5 * totals[1:].min()


def test_processes_without_rows_wait_for_their_own_and_ask_seldom(criteo, monkeypatch):
  monkeypatch.setattr(queue_reader, 'PATIENCE', 0.05)
  spec, both = criteo.spec('', slice_rows=50), members(2)
  iterators = [queue_batches(FileIndex([Slow(300, lambda: 0.3)]), spec, 20, 1, member) for member in both]
  steps = len(list(in_lockstep(iterators, 10**6)))
  close(iterators)
  assert both[0].round < steps + 60


def test_staged_processes_end_at_the_same_step_however_far_each_is_ahead(criteo):
  """One that has begun to ask about steps that nobody will do is let go when the others end."""
  before = set(threading.enumerate())
  for steps in range(1, 12):

    def train(member, steps=steps):
      items = queue_batches(counted(1000), criteo.spec('', slice_rows=20), 12, 1, member)
      with stage(items, lambda batch: batch, depth=1 + member.index) as batches:
        return [next(batches)[1] for _ in range(steps)]

    with ThreadPoolExecutor(3) as pool:
      first, *others = list(pool.map(train, members(3)))
    assert all(states == first for states in others)
  for thread in set(threading.enumerate()) - before:
    thread.join(10)
    assert not thread.is_alive()


def test_an_error_comes_where_its_rows_would_have_come_and_frees_the_others(criteo):
  class Broken(Numbers):
    def read(self, start, stop, on_bad_row):
      if start <= 50 < stop:
        raise DataError('line 51')
      return super().read(start, stop, on_bad_row)

  spec = criteo.spec('', slice_rows=10)
  alone = queue_batches(FileIndex([Broken(100)]), spec, 10, 0)
  for _ in range(order_by_rule(100, 10, 0, 0, shuffle=True).index(50) // 10):  # slices of ten rows, batches of ten
    next(alone)
  with pytest.raises(DataError, match='line 51'):
    next(alone)
  alone.close()

  def train(member):
    with stage(queue_batches(FileIndex([Broken(100)]), spec, 10, 0, member), lambda batch: batch) as batches:
      while True:
        next(batches)

  with ThreadPoolExecutor(2) as pool:
    errors = {type(future.exception()) for future in [pool.submit(train, member) for member in members(2)]}
  assert errors == {DataError, RuntimeError}


def test_skipped_rows_are_padding_and_counted(criteo):
  bad = [3, 4, 77]
  spec = criteo.spec('', slice_rows=30)
  good, skipping = (queue_batches(counted(100, rows), spec, 9, 1) for rows in ([], bad))
  for _ in range(batches_per_epoch(100, 9)):
    assert numbers(next(skipping)[0]) == [n for n in numbers(next(good)[0]) if n not in bad]
  assert skipping.skipped_rows == 3
  assert good.skipped_rows == 0
  good.close()
  skipping.close()


def test_batches_own_their_memory(criteo):
  """Placing a batch on a CPU device may share its memory, so it must never be written again."""
  iterator = queue_batches(counted(100), criteo.spec('', slice_rows=10), 10, 0)
  batches = [next(iterator)[0] for _ in range(20)]
  seen = [numbers(batch) for batch in batches]
  for epoch in (seen[:10], seen[10:]):
    assert sorted(itertools.chain(*epoch)) == list(range(100))
  assert not any(np.shares_memory(one.dense, two.dense) for one, two in itertools.pairwise(batches))
  iterator.close()


@pytest.mark.parametrize(('size', 'shares'), [(10, [3, 3, 4]), (3, [1, 1, 1])])
def test_processes_bring_no_more_than_the_batch(criteo, size, shares):
  iterators = [queue_batches(counted(90), criteo.spec('', slice_rows=30), size, 0, member) for member in members(3)]
  for brought, _ in in_lockstep(iterators, 5):
    assert [len(rows) for rows in brought] == shares
  close(iterators)


def test_more_processes_than_examples_of_a_batch(criteo):
  with pytest.raises(ValueError, match=r'batch_size=2 cannot be shared by 3 processes.*set batch_size=3'):
    queue_batches(counted(90), criteo.spec(''), 2, 0, members(3)[0])


@pytest.mark.parametrize('count', [1, 2, 5])
@pytest.mark.parametrize('keys', [False, True])
def test_files_to_batches(criteo, tmp_path, count, keys):
  """Three uneven files, end to end: every row once, with its own label, integers and buckets."""
  rows = []
  for name, lines in [('a.csv', 61), ('b.csv', 1), ('c.csv', 140)]:
    part = criteo.rows(lines, first=len(rows), seed=len(rows))
    criteo.write(tmp_path / name, part)
    rows += part
  label, dense, bucket = criteo.expected(rows, 'none')
  index = index_files('*.csv', str(tmp_path))
  spec = criteo.spec(tmp_path, dense_transform='none', slice_rows=50, keys=keys)
  iterators = [queue_batches(index, spec, 16, 4, member) for member in members(count)]
  seen, epoch = [], 0
  with ThreadPoolExecutor(count) as pool:
    while not epoch:
      for batch, state in pool.map(next, iterators):
        epoch = state['epoch']
        real = batch.weight == 1
        number = batch.dense[real, 0].astype(int)
        np.testing.assert_array_equal(batch.label[real], label[number])
        np.testing.assert_array_equal(batch.dense[real], dense[number])
        np.testing.assert_array_equal(batch.bucket[real], bucket[number])
        assert (batch.key is not None) == keys
        assert not batch.bucket[~real].any()
        seen += number.tolist()
  close(iterators)
  assert sorted(seen) == list(range(len(rows)))
