"""A small experiment that trains in a second, and running the program as users do."""

import contextlib
import json
import os
import socket
import subprocess
import sys

import jax
import pytest
from jax.sharding import Mesh

from configs import base
from dlrm_jax import spec as specs
from dlrm_jax.clock import EverySeconds
from dlrm_jax.distributed import Members
from dlrm_jax.sharding import ALONE, NAME, Axis

# 600 rows in batches of 32: 19 steps an epoch, the last one partial.
SMALL = {
  'batch_size': 32, 'data.streams': 4, 'model.bottom_mlp': (16, 8), 'model.top_mlp': (16,), 'embedding.dim': 8,
  'embedding.buckets': (50,), 'log_every': 5, 'optimizer.learning_rate': 0.01,
}  # fmt: skip

# Number of devices -> fields of a config that cuts its tables among so many.
DEVICES = {'1': {}, '2': {'embedding.shard_mb': 0.0}, '4': {'embedding.shard_mb': 0.0, 'model.shard_kb': 0.4}}


def devices(number):
  """So many of this process's devices."""
  return Axis(Mesh(jax.devices()[:number], (NAME,))) if number > 1 else ALONE


def small_spec(data, output, **fields):
  """The spec of a small run; a double underscore stands for the dot of a nested field."""
  config = base.get_config()
  config.data_location, config.output_dir = str(data), str(output)
  config.update_from_flattened_dict(SMALL | {name.replace('__', '.'): value for name, value in fields.items()})
  return specs.from_config(config)


def command(config, *arguments, **fields):
  """The command line of a run."""
  flags = [f'--config.{name.replace("__", ".")}={value}' for name, value in fields.items()]
  return [sys.executable, '-m', 'dlrm_jax.main', f'--config={config}', *flags, *arguments]


def small_command(data, output, *arguments, **fields):
  """The command line of a small run."""
  return command('configs/base.py', *arguments, **{**SMALL, 'data_location': data, 'output_dir': output, **fields})


def with_small_files(arguments):
  """The command where no file can be larger than 200 KB, as if the disk were full then."""
  return ['sh', '-c', 'ulimit -f 400; exec "$@"', '-', *arguments]


class Crash(Exception):
  """Of a run that `crashing` ends."""


@contextlib.contextmanager
def crashing(deltas, after):
  """Has a run in this process, if it has `delta_seconds`, save what changed after these steps, and crash after another.

  Steps that they stop at: each of the first 20, then those that a line of log or a checkpoint is due after.
  """

  def stop(self, step, received=0):
    if step == after:
      raise Crash
    return 0

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(EverySeconds, 'is_due', lambda self, step: self._seconds > 0 and step in deltas)
    patch.setattr(Members, 'stop', stop)
    with pytest.raises(Crash):
      yield


def ours(coordinator='h:9', processes='4', index='2'):
  """The environment of one of several processes; None leaves a variable out."""
  values = {'DLRM_COORDINATOR': coordinator, 'DLRM_NUM_PROCESSES': processes, 'DLRM_PROCESS_ID': index}
  return {name: value for name, value in values.items() if value is not None}


def free_port():
  """A port that nobody listens on."""
  with socket.socket() as probe:
    probe.bind(('127.0.0.1', 0))
    return probe.getsockname()[1]


def execute(arguments, cwd, **environment):
  """(exit code, stdout, stderr) of a command."""
  done = subprocess.run(
    arguments, cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True, timeout=300, check=False
  )
  return done.returncode, done.stdout, done.stderr


def outputs_on_threads(code, repository, *numbers):
  """What a program of Python prints where XLA has so many threads, one number after another."""
  outputs = [execute([sys.executable, '-c', code], repository, NPROC=str(number)) for number in numbers]
  assert not any(status for status, _, _ in outputs), outputs
  return [stdout for _, stdout, _ in outputs]


def result(stdout):
  """The one line of JSON."""
  (line,) = stdout.splitlines()
  return json.loads(line)
