"""Staging against the plain loop."""

import threading
import time

import pytest

from dlrm_jax.data.stage import stage


def items(count, fail_at=None):
  """Pairs (i, state after i); raises instead of item `fail_at`."""
  for i in range(count):
    if i == fail_at:
      raise ValueError(f'item {i}')
    yield i, {'position': i + 1}


class Endless:
  """An iterator that counts what was taken and knows when it was closed."""

  def __init__(self):
    self.taken = 0
    self.closed = False

  def __iter__(self):
    return self

  def __next__(self):
    self.taken += 1
    return self.taken - 1, self.taken

  def close(self):
    self.closed = True


@pytest.fixture(autouse=True)
def no_thread_is_left():
  before = set(threading.enumerate())
  yield
  assert set(threading.enumerate()) <= before


both = pytest.mark.parametrize('background', [True, False])


@both
@pytest.mark.parametrize('depth', [1, 2, 4])
@pytest.mark.parametrize('count', [0, 1, 2, 5, 20])
def test_order_and_states(background, depth, count):
  with stage(items(count), lambda i: i * i, depth, background) as staged:
    assert list(staged) == [(i * i, {'position': i + 1}) for i in range(count)]
    with pytest.raises(StopIteration):
      next(staged)


@both
@pytest.mark.parametrize('fail_at', [0, 1, 7])
@pytest.mark.parametrize('where', ['items', 'place'])
def test_an_exception_comes_where_its_item_would_have(background, fail_at, where):
  def place(i):
    if where == 'place' and i == fail_at:
      raise ValueError(f'item {i}')
    return i

  staged = stage(items(10, fail_at if where == 'items' else None), place, 3, background)
  for i in range(fail_at):
    assert next(staged) == (i, {'position': i + 1})
  with pytest.raises(ValueError, match=f'item {fail_at}'):
    next(staged)
  with pytest.raises(StopIteration):
    next(staged)


@both
def test_consumer_that_stops_early(background):
  source = Endless()
  with stage(source, lambda i: i, 2, background) as staged:
    assert next(staged) == (0, 1)
  assert source.closed
  staged.close()
  assert list(staged) == []


@both
def test_consumer_that_raises(background):
  source = Endless()

  def train():
    with stage(source, lambda i: i, 2, background) as staged:
      for _ in staged:
        raise RuntimeError('step failed')

  with pytest.raises(RuntimeError, match='step failed'):
    train()
  assert source.closed


@pytest.mark.parametrize('depth', [1, 3])
def test_works_ahead_in_another_thread_and_no_further_than_depth(depth):
  source = Endless()
  threads = set()

  def place(i):
    threads.add(threading.get_ident())
    return i

  with stage(source, place, depth) as staged:
    for step in range(5):
      assert next(staged)[0] == step
      deadline = time.monotonic() + 10
      while source.taken < step + 1 + depth and time.monotonic() < deadline:
        time.sleep(0.001)
      assert source.taken == step + 1 + depth
  assert len(threads) == 1
  assert threading.get_ident() not in threads


def test_inline_does_nothing_ahead():
  source = Endless()
  with stage(source, lambda i: i, background=False) as staged:
    next(staged)
    assert source.taken == 1


def test_depth_must_be_positive():
  with pytest.raises(ValueError, match='depth=0 must be at least 1'):
    stage(items(1), lambda i: i, 0)
