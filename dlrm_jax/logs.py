"""What a run tells: log lines and a progress bar on stderr, metrics.jsonl, event files for TensorBoard."""

import contextlib
import json
import logging
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

Scalars = dict[str, float | int | None]


def setup_logging(process: int = 0) -> None:
  """Log lines of this program on stderr; other libraries and processes but the first only from warnings on."""
  # force: absl has put a handler of its own there.
  who = f'process {process}: ' if process else ''
  form = {'format': f'%(asctime)s {who}%(message)s', 'datefmt': '%H:%M:%S'}
  level = logging.WARNING if process else logging.INFO
  logging.basicConfig(level=level, stream=sys.stderr, force=True, **form)
  for name in ('jax', 'tensorboardX', 'grain'):
    logging.getLogger(name).setLevel(logging.WARNING)
  for name in ('absl', 'orbax'):  # what goes wrong in Orbax it raises as well, and is told in one line
    logging.getLogger(name).setLevel(logging.CRITICAL)
  sys.unraisablehook = _show_unraisable


def _show_unraisable(what: Any) -> None:
  # When one of its writes has failed, tensorstore's threads have this for each of the others.
  if str(what.exc_value) != 'Event loop is closed':
    sys.__unraisablehook__(what)


class Records:
  """metrics.jsonl and event files of a run in `folder`, or nothing where it is None. A context manager.

  A run that resumes at `step` goes on in the same files; what an earlier process wrote after that step is dropped,
  since those steps are trained again.
  """

  def __init__(self, folder: Path | None, step: int) -> None:
    self._file, self._events, self.is_evaluated = None, None, False  # the last: at `step`, before this process
    if folder is None:
      return
    path = folder / 'metrics.jsonl'
    whole = folder / 'metrics.jsonl.tmp'
    kept = [(record, line) for record, line in _lines(path) if record['step'] <= step]
    self.is_evaluated = any(record['step'] == step and record.get('kind') == 'eval' for record, _ in kept)
    whole.write_text(''.join(line for _, line in kept))
    whole.replace(path)
    self._file = path.open('a', buffering=1)
    # Not SummaryWriter: if its thread cannot write, it waits for it for ever.
    self._events = EventsWriter(str(folder / 'events'), f'.{step}')  # two in one second have two names
    if step:  # TensorBoard, too, forgets what comes after
      self._events.write_event(Event(step=step + 1, session_log=SessionLog(status=SessionLog.START)))

  def __enter__(self) -> 'Records':
    return self

  def __exit__(self, *_: object) -> None:
    for each in (self._file, self._events):
      if each:
        each.close()

  def write(self, kind: str, step: int, scalars: Scalars) -> None:
    """One line and one point per scalar. `kind` is train or eval."""
    if not self._file:
      return
    self._file.write(json.dumps({'step': step, 'kind': kind, 'time': round(time.time(), 3), **scalars}) + '\n')
    values = [Summary.Value(tag=f'{kind}/{name}', simple_value=x) for name, x in scalars.items() if x is not None]
    self._events.write_event(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))
    self._events.flush()


def _lines(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
  """The records of a file, each with its line."""
  lines = path.read_text(errors='replace').splitlines(keepends=True) if path.exists() else []
  for line in lines:
    with contextlib.suppress(ValueError, KeyError, TypeError):  # a killed process may have left half a line
      record = json.loads(line)
      if line.endswith('\n') and isinstance(record['step'], int):
        yield record, line


class Progress:
  """A bar with rate and time left on a terminal; nothing elsewhere, where log lines must do. A context manager."""

  def __init__(self, step: int, last_step: int, batch_size: int, wanted: bool = True) -> None:
    # A terminal of width 0, such as some containers have, would show nothing at all.
    terminal = wanted and sys.stderr.isatty() and os.get_terminal_size(sys.stderr.fileno()).columns > 0
    self._bar = tqdm(
      total=last_step * batch_size, initial=step * batch_size, unit=' samples', unit_scale=True,
      disable=not terminal, dynamic_ncols=True, smoothing=0.1, desc='train',
    )  # fmt: skip
    self._batch_size = batch_size
    self._redirect = logging_redirect_tqdm()

  def __enter__(self) -> 'Progress':
    self._redirect.__enter__()
    return self

  def __exit__(self, *error: Any) -> None:
    self._bar.close()
    self._redirect.__exit__(*error)

  @property
  def visible(self) -> bool:
    """Whether there is a terminal that shows the bar."""
    return not self._bar.disable

  def advance(self, steps: int) -> None:
    """So many steps more."""
    self._bar.update(steps * self._batch_size)

  def show(self, loss: float) -> None:
    """The loss beside the bar."""
    self._bar.set_postfix_str(f'loss {loss:.4f}', refresh=False)


class Meter:
  """Mean loss and rate since the last line of log, without waiting for the device in between."""

  def __init__(self) -> None:
    self.restart()

  def restart(self) -> None:
    """Forgets what was added."""
    self._metrics: list[dict[str, Any]] = []
    self._since = time.perf_counter()

  def add(self, metrics: dict[str, Any]) -> None:
    """The metrics of one more step, or of several together."""
    self._metrics.append(metrics)

  @property
  def has_steps(self) -> bool:
    """Whether any were added since the last read."""
    return bool(self._metrics)

  def read(self) -> Scalars:
    """Means since the last read."""
    parts = jax.device_get(self._metrics)
    examples = float(sum(part['examples'] for part in parts))
    loss = float(sum(part['loss'] * part['examples'] for part in parts)) / examples if examples else None
    rate = examples / (time.perf_counter() - self._since)
    self.restart()
    return {'loss': loss, 'samples_per_second': round(rate, 1)}


class Stopwatch:
  """Seconds and examples of steady training: the first `skip` steps and what is between pause and go are left out."""

  def __init__(self, skip: int) -> None:
    self._skip = skip
    self._examples = 0
    self._seconds = 0.0
    self._since: float | None = None

  @property
  def is_warming(self) -> bool:
    """Whether steps are still to be skipped."""
    return self._skip > 0

  def count(self, examples: int, result: Any) -> None:
    """More was started, whose `result` can be waited for: one step, or also several when none are to be skipped."""
    if self._skip > 0:
      self._skip -= 1
      if self._skip == 0:
        jax.block_until_ready(result)
        self.go()
    else:
      self._examples += examples

  def go(self) -> None:
    """The clock runs from here, unless steps are still to be skipped."""
    if self._skip == 0:
      self._since = time.perf_counter()

  def pause(self, result: Any) -> None:
    """Waits for `result`, that of the last step, and stops the clock."""
    jax.block_until_ready(result)
    if self._since is not None:
      self._seconds += time.perf_counter() - self._since
      self._since = None

  def rate(self) -> float | None:
    """Samples per second so far; None before the first. Call it while paused."""
    return self._examples / self._seconds if self._examples else None
