"""Ends a process whose steps have stopped, and shows a probe from outside that they have not."""

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

TICK = 1.0  # seconds between looks
TOUCH = 5.0  # seconds between touches of the heartbeat file, at least


class Watchdog:
  """Calls `stuck` with one line, on a thread of its own, when no step was done for `limit` seconds (0: never).

  `heartbeat` names a file that is touched while steps are done, and while the watchdog is paused. A context manager.
  """

  def __init__(self, limit: float, stuck: Callable[[str], None], heartbeat: Path | None = None) -> None:
    self._limit, self._stuck, self._heartbeat = limit, stuck, heartbeat
    self._step: int | None = None
    self._moved = True
    self._pauses = 0
    self._closed = threading.Event()
    self._main = threading.get_ident()
    self._thread = threading.Thread(target=self._watch, name='watchdog', daemon=True)

  def __enter__(self) -> 'Watchdog':
    self._touch()  # also of a run that ends before the first look
    self._thread.start()
    return self

  def __exit__(self, *_: object) -> None:
    self._closed.set()
    self._thread.join()

  def step_done(self, step: int) -> None:
    """The run has come as far as this step."""
    self._step, self._moved = step, True

  @contextlib.contextmanager
  def paused(self) -> Iterator[None]:
    """For what may take as long as it needs: compilation, saves, evaluation, growth of tables."""
    self._pauses += 1
    try:
      yield
    finally:
      self._moved = True  # first, since the thread may look in between
      self._pauses -= 1

  @contextlib.contextmanager
  def resumed(self) -> Iterator[None]:
    """For the steps inside of what is paused."""
    self._moved = True
    self._pauses -= 1
    try:
      yield
    finally:
      self._pauses += 1

  def _watch(self) -> None:
    still, touched, before = 0.0, -TOUCH, time.monotonic()
    while not self._closed.wait(TICK):
      now = time.monotonic()
      # Bounded: time for which the whole process was stopped, in a debugger say, is no fault of the step.
      still, before = still + min(now - before, 2 * TICK), now
      if self._moved or self._pauses:
        self._moved, still = False, 0.0
        if now - touched >= TOUCH:
          touched = now
          self._touch()
      if self._limit and still >= self._limit:
        after = 'before the first step' if self._step is None else f'after step {self._step}'
        self._stuck(
          f'no step was done for {still:.0f} s {after}, which is more than config.watchdog_seconds allows; '
          f'the loop is at {whereabouts(self._main)}'
        )
        return

  def _touch(self) -> None:
    if self._heartbeat:
      with contextlib.suppress(OSError):  # the probe will say so
        self._heartbeat.touch()


def whereabouts(thread: int) -> str:
  """File and line of this program where a thread is."""
  own = Path(__file__).parent
  frame = sys._current_frames().get(thread)
  while frame and own not in Path(frame.f_code.co_filename).parents and frame.f_back:
    frame = frame.f_back
  return f'{Path(frame.f_code.co_filename).name}:{frame.f_lineno}' if frame else 'its end'
