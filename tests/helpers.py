"""A small experiment that trains in a second, and running the program as users do."""

import json
import os
import subprocess
import sys

import jax
from jax.sharding import Mesh

from configs import base
from dlrm_jax import spec as specs
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


def execute(arguments, cwd, **environment):
  """(exit code, stdout, stderr) of a command."""
  done = subprocess.run(
    arguments, cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True, timeout=300, check=False
  )
  return done.returncode, done.stdout, done.stderr


def result(stdout):
  """The one line of JSON."""
  (line,) = stdout.splitlines()
  return json.loads(line)
