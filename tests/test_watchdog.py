"""A watchdog fires when steps stop, and at no other time."""

import time

from dlrm_jax.watchdog import Watchdog


def test_it_names_the_step_the_time_and_the_place_when_steps_stop():
  lines = []
  with Watchdog(2, lines.append) as watchdog:
    watchdog.step_done(7)
    time.sleep(5)
  (line,) = lines
  assert 'after step 7' in line
  assert 'config.watchdog_seconds' in line


def test_it_fires_before_the_first_step_too():
  lines = []
  with Watchdog(1, lines.append):
    time.sleep(3.5)
  assert 'before the first step' in lines[0]


def test_it_is_silent_while_steps_are_done_while_paused_and_when_off():
  lines = []
  with Watchdog(2, lines.append) as moving, Watchdog(2, lines.append) as paused, Watchdog(0, lines.append):
    with paused.paused(), paused.resumed(), paused.paused():
      for step in range(10):
        time.sleep(0.5)
        moving.step_done(step)
    moving.step_done(10)
    time.sleep(1)  # a pause leaves a whole limit to the step after it
  assert lines == []


def test_it_watches_what_is_resumed_inside_of_a_pause():
  lines = []
  with Watchdog(1, lines.append) as watchdog, watchdog.paused(), watchdog.resumed():
    time.sleep(3.5)
  assert len(lines) == 1


def test_the_heartbeat_file_is_touched_while_steps_are_done_and_no_longer(tmp_path):
  file = tmp_path / 'alive'
  with Watchdog(0, print, file) as watchdog:
    watchdog.step_done(1)
    time.sleep(1.5)
    first = file.stat().st_mtime
    time.sleep(6)
    assert file.stat().st_mtime == first
    watchdog.step_done(2)
    time.sleep(1.5)
    assert file.stat().st_mtime > first
    with watchdog.paused():
      time.sleep(6.5)
    assert file.stat().st_mtime > first + 5
