"""Which cores: those that the system says, or all."""

import os

from dlrm_jax.cores import usable_cores


def test_those_that_this_process_may_use():
  allowed = os.sched_getaffinity(0)
  os.sched_setaffinity(0, {min(allowed)})
  try:
    assert usable_cores() == [min(allowed)]
  finally:
    os.sched_setaffinity(0, allowed)
  assert usable_cores() == sorted(allowed)


def test_where_the_system_does_not_say_all(monkeypatch):
  monkeypatch.delattr(os, 'sched_getaffinity')
  assert usable_cores() == list(range(os.cpu_count()))
