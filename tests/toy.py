"""A process of a toy run: sums over all processes, step by step. python -m tests.toy STEPS [FAIL_AT [STUCK_AT]]

Prints a line per step; stands in for training wherever only the life of processes is tested.
"""

import os
import signal
import sys
import time

from dlrm_jax import cluster as clusters
from dlrm_jax import distributed


def summation():
  """A sum over all devices of all processes."""
  import jax
  import numpy as np
  from jax.sharding import Mesh, NamedSharding, PartitionSpec

  mesh = Mesh(np.array(jax.devices()), 'all')
  spec = PartitionSpec('all')
  whole = jax.shard_map(lambda x: jax.lax.psum(x, 'all'), mesh=mesh, in_specs=spec, out_specs=PartitionSpec())
  total = jax.jit(whole)
  count = len(jax.devices())
  ones = jax.make_array_from_callback((count,), NamedSharding(mesh, spec), lambda _: np.ones(1, np.float32))
  return lambda: total(ones)


def train(members, steps, fail_at, stuck_at, limit):
  """The loop; the signal that ended it, or 0."""
  import jax

  received = 0

  def receive(number, _):
    nonlocal received
    received = number

  signal.signal(signal.SIGTERM, receive)
  add, step, stop = summation(), 0, 0
  with members.watchdog(limit) as watchdog:
    with watchdog.paused():
      assert add()[0] == jax.device_count()
    while step < steps and not (stop := members.stop(step, received)):
      if step == fail_at and members.index == 1:
        raise ValueError('the toy broke')
      if step == stuck_at and members.index == 1:
        time.sleep(1000)
      jax.block_until_ready(add())
      time.sleep(0.02)
      step += 1
      watchdog.step_done(step)
      if step % 10 == 0:
        print(f'step {step}', file=sys.stderr, flush=True)
  print(f'ended after step {step}', file=sys.stderr, flush=True)
  return stop


def main(steps, fail_at=-1, stuck_at=-1):
  """The exit code."""
  distributed.quiet()
  from dlrm_jax.logs import setup_logging

  cluster = clusters.from_environment(os.environ)
  setup_logging(cluster.index if cluster else 0)
  with distributed.joined(cluster, 'gloo') as members:
    stop = train(members, steps, fail_at, stuck_at, float(os.environ.get('TOY_WATCHDOG', '0')))
    if members.index == 0:
      print('{"toy": true}', flush=True)
    return 128 + stop if stop else 0


if __name__ == '__main__':
  sys.exit(main(*map(int, sys.argv[1:])))
