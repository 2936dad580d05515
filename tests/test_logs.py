"""What a person sees while a run goes on: a bar on a terminal, lines elsewhere."""

import contextlib
import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios

import pytest

from dlrm_jax.logs import Stopwatch

SHOW = """
import logging
from dlrm_jax.logs import Progress, setup_logging
setup_logging()
with Progress(10, 20, 512) as bar:
  for step in range(10):
    bar.advance(1)
    bar.show(0.5)
  logging.info('visible %s', bar.visible)
"""


@pytest.mark.parametrize(('columns', 'visible'), [(100, True), (0, False)])
def test_a_bar_on_a_terminal_that_has_a_width(columns, visible, repository):
  ours, theirs = pty.openpty()
  fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack('HHHH', 24, columns, 0, 0))
  child = subprocess.Popen([sys.executable, '-c', SHOW], cwd=repository, stderr=theirs)
  os.close(theirs)
  text = b''
  with contextlib.suppress(OSError):  # Linux says so at the end of a terminal
    while part := os.read(ours, 4096):
      text += part
  os.close(ours)
  assert child.wait(60) == 0
  assert f'visible {visible}' in text.decode()
  assert ('train: 100%' in text.decode()) == visible
  assert ('samples/s, loss 0.5000' in text.decode()) == visible


@pytest.mark.parametrize(('process', 'expected'), [(0, ['one', 'two']), (3, ['process 3: two'])])
def test_other_processes_than_the_first_log_warnings_with_their_number(process, expected, repository):
  code = (
    'import logging; from dlrm_jax.logs import setup_logging; '
    f'setup_logging({process}); logging.info("one"); logging.warning("two")'
  )
  done = subprocess.run([sys.executable, '-c', code], cwd=repository, capture_output=True, text=True, check=True)
  assert [line.split(maxsplit=1)[1] for line in done.stderr.splitlines()] == expected


def test_the_stopwatch_leaves_out_the_first_steps_and_pauses(monkeypatch):
  now = iter(range(0, 1000, 10))
  monkeypatch.setattr('time.perf_counter', lambda: next(now))
  watch = Stopwatch(skip=2)
  watch.count(512, ())
  assert watch.rate() is None
  watch.count(512, ())  # the clock starts: 0 s
  for _ in range(3):
    watch.count(100, ())
  watch.pause(())  # 10 s
  watch.go()  # 20 s
  watch.count(100, ())
  watch.pause(())  # 30 s
  assert watch.rate() == 400 / 20
