"""Seconds as steps, against a clock that the test moves."""

import pytest

from dlrm_jax import clock
from dlrm_jax.clock import EverySeconds


class Time:
  """Steps take `seconds` each."""

  def __init__(self, monkeypatch):
    self.now, self.asked = 1000.0, 0
    monkeypatch.setattr(clock.time, 'monotonic', lambda: self.now)
    monkeypatch.setattr(clock, 'of_first', self.of_first)

  def of_first(self, number):
    self.asked += 1
    return number

  def due(self, every, step, until, seconds):
    """The first step up to this one at which it is due."""
    while step < until:
      step, self.now = step + 1, self.now + seconds
      if every.is_due(step):
        return step
    return None


@pytest.mark.parametrize('seconds', [0.001, 0.01, 1.0])
def test_it_is_due_as_soon_as_the_seconds_have_passed_and_seldom_asked(monkeypatch, seconds):
  time, step = Time(monkeypatch), 500
  every = EverySeconds(30.0, step)
  for _ in range(3):
    began = time.now
    step = time.due(every, step, step + 10**6, seconds)
    assert 30 - 1e-6 <= time.now - began <= 30 + seconds + 1e-6
    every.restart(step)
  assert time.asked <= 3 * 26


def test_steps_that_become_slower_are_noticed_in_time(monkeypatch):
  time = Time(monkeypatch)
  every = EverySeconds(60.0, 0)
  assert time.due(every, 0, 1000, 0.01) is None  # 10 s
  began = time.now
  assert time.due(every, 1000, 10**6, 0.03)
  assert time.now - began < 100


def test_periods_shorter_than_the_first_steps_are_due_after_these(monkeypatch):
  time = Time(monkeypatch)
  assert time.due(EverySeconds(1.0, 0), 0, 100, 5.0) == clock.FIRST


def test_zero_seconds_are_never_due_and_ask_nobody(monkeypatch):
  time = Time(monkeypatch)
  assert time.due(EverySeconds(0.0, 0), 0, 1000, 1e3) is None
  assert time.asked == 0
