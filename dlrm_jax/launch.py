"""python -m dlrm_jax.launch --processes 4 [--max-restarts 3] [--devices 2] -- --config=configs/bf16.py ...

Starts the processes of one run on this machine, each on its own cores. The log of process i is prefixed with [i]; the
stdout of process 0, one line of JSON, passes through. When one fails the others are ended, and its exit code is this
program's. SIGTERM and SIGINT go to all of them, which stop after the same step, with a checkpoint.
"""

import argparse
import contextlib
import ctypes
import itertools
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import IO

from dlrm_jax.cores import usable_cores
from dlrm_jax.distributed import LOST

GRACE = 10.0  # seconds between SIGTERM and SIGKILL, when another process has failed
SAVING = 120.0  # seconds that the others have to end by themselves, when all were asked to stop
# Exit codes after which nothing is started again: done, a wrong command, and asked to stop, by whoever it was.
FINAL = (0, 2, 128 + signal.SIGTERM, 128 + signal.SIGINT)
PR_SET_PDEATHSIG = 1


def main(argv: list[str]) -> int:
  """The exit code of the first process that failed, or 0."""
  parser = argparse.ArgumentParser(prog='python -m dlrm_jax.launch', allow_abbrev=False)
  parser.add_argument('--processes', type=int, required=True, help='how many to start')
  parser.add_argument('--max-restarts', type=int, default=0, help='how often to start all again after a failure')
  parser.add_argument('--devices', type=int, default=1, help='CPU devices of each process')
  parser.add_argument('arguments', nargs='*', metavar='-- --config=...', help='what dlrm_jax.main is given')
  options = parser.parse_args(argv[1:])
  for name, low in (('processes', 1), ('max_restarts', 0), ('devices', 1)):
    if getattr(options, name) < low:
      parser.error(f'--{name.replace("_", "-")} must be at least {low}')
  if options.max_restarts and not any('checkpoint=' in argument for argument in options.arguments):
    say('without --config.checkpoint=DIR a restart begins anew')
  command = [sys.executable, '-m', 'dlrm_jax.main', *options.arguments]
  return Launcher(command, options.processes, options.devices).run(options.max_restarts)


def say(line: str) -> None:
  """A line of the launcher's own."""
  write(b'launch: %b\n' % line.encode())


class Launcher:
  """Runs `command` in some processes at once."""

  def __init__(self, command: Sequence[str], processes: int, devices: int = 1) -> None:
    self._command, self._processes, self._devices = command, processes, devices
    self._children: list[subprocess.Popen] = []
    self._pumps: list[threading.Thread] = []
    self._asked = 0  # the signal that asked all to stop

  def run(self, max_restarts: int = 0) -> int:
    """Until they succeed, fail once too often, or are asked to stop."""
    for number in (signal.SIGTERM, signal.SIGINT):
      signal.signal(number, self._forward)
    for restart in range(max_restarts + 1):
      if restart:
        say(f'restart {restart} of {max_restarts}')
      code = self._run_once()
      if code in FINAL or self._asked:
        break
    return code

  def _forward(self, number: int, _: object) -> None:
    self._asked = number
    self._signal(number)

  def _signal(self, number: int) -> None:
    for child in self._children:
      if child.poll() is None:
        child.send_signal(number)

  def _run_once(self) -> int:
    self._children, self._pumps = [], []
    # Held while they run, so that nobody else is given the port; gRPC, too, asks to share it.
    with socket.socket() as held:
      held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
      held.bind(('127.0.0.1', 0))
      for index, share in enumerate(shares(usable_cores(), self._processes)):
        if self._asked:
          break
        self._start(index, share, held.getsockname()[1])
      code = self._wait()
    for pump in self._pumps:
      pump.join()
    return code

  def _start(self, index: int, cores: list[int], port: int) -> None:
    own = {
      'DLRM_COORDINATOR': f'127.0.0.1:{port}', 'DLRM_NUM_PROCESSES': str(self._processes),
      'DLRM_PROCESS_ID': str(index), 'NPROC': str(len(cores)), 'JAX_NUM_CPU_DEVICES': str(self._devices),
    }  # fmt: skip
    parent = os.getpid()
    child = subprocess.Popen(
      self._command, env={**os.environ, **own}, stdin=subprocess.DEVNULL,
      stdout=None if index == 0 else subprocess.PIPE, stderr=subprocess.PIPE,
      start_new_session=True,  # or Ctrl-C in a terminal would reach them twice
      preexec_fn=lambda: prepare_child(cores, parent),
    )  # fmt: skip
    self._children.append(child)
    for stream in filter(None, (child.stdout, child.stderr)):
      pump = threading.Thread(target=pass_on, args=(stream, index), daemon=True)
      pump.start()
      self._pumps.append(pump)

  def _wait(self) -> int:
    """Until all have ended. The code of the first that failed; the others are ended with it."""
    code, kill_at = self._asked and 128 + self._asked, float('inf')
    ended: set[int] = set()
    while len(ended) < len(self._children):
      time.sleep(0.05)
      for index, child in enumerate(self._children):
        if index in ended or child.poll() is None:
          continue
        ended.add(index)
        if code == LOST and child.returncode > 0 and child.returncode != 128 + signal.SIGTERM:
          code = child.returncode  # this one was the reason, though another one ended before it
        if child.returncode and kill_at == float('inf'):
          code = child.returncode if child.returncode > 0 else 128 - child.returncode
          say(f'process {index} {how(child.returncode)}' + ('' if self._asked else '; ending the others'))
          kill_at = time.monotonic() + (SAVING if self._asked else GRACE)
          if not self._asked:  # else they are stopping already, and a second signal would cut the saving short
            self._signal(signal.SIGTERM)
      if time.monotonic() > kill_at:
        self._signal(signal.SIGKILL)  # which ends stopped ones, too
    return code


def shares(cores: list[int], processes: int) -> list[list[int]]:
  """Neighbouring cores for each process; one core in turn where there are more processes than cores."""
  if processes >= len(cores):
    return [[cores[index % len(cores)]] for index in range(processes)]
  cuts = [len(cores) * index // processes for index in range(processes + 1)]
  return [cores[low:high] for low, high in itertools.pairwise(cuts)]


def prepare_child(cores: list[int], parent: int) -> None:
  """In the child, before its program: its cores, and its end when the launcher is killed."""
  os.sched_setaffinity(0, cores)
  ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
  if os.getppid() != parent:
    os._exit(1)


def pass_on(stream: IO[bytes], index: int) -> None:
  """Each line to stderr, with the number of its process."""
  for line in stream:
    write(b'[%d] %b' % (index, line if line.endswith(b'\n') else line + b'\n'))


def write(line: bytes) -> None:
  """To stderr. If nobody reads it any more, the run goes on all the same."""
  with contextlib.suppress(OSError):
    os.write(2, line)


def how(code: int) -> str:
  """How a process ended."""
  return f'was ended by {signal.Signals(-code).name}' if code < 0 else f'ended with code {code}'


if __name__ == '__main__':
  sys.exit(main(sys.argv))
