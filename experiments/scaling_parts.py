"""What the model of scaling_model.py is fitted to: collectives alone, what a step's carry, the tables' part of a step.

Each function runs in a process of its own.
"""

import json
import os
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dlrm_jax.cores import usable_cores
from experiments import common, scaling_model

SIZES = (4096, 2**21)  # bytes of results, about those of the batch statistics and of all gradients
CALLS = 8  # of an all-to-all in one program
TABLES_SHARE = 512  # examples of a device, for the tables' part


def time_collectives() -> None:
  """Prints the seconds of an all-to-all of each of SIZES, in a process among those of a launcher."""
  from dlrm_jax import cluster, distributed, main

  main.prepare_process(0)
  distributed.quiet()
  with distributed.joined(cluster.from_environment(os.environ), 'gloo') as members:
    seconds = _seconds_of_collectives()
    if members.index == 0:
      print(json.dumps(seconds), flush=True)


def _seconds_of_collectives() -> list[float]:
  import jax
  import numpy as np

  from dlrm_jax.sharding import CUT, all_devices

  axis = all_devices()

  def chain(x: jax.Array) -> jax.Array:
    for _ in range(CALLS):
      x = axis.swap(x)
    return x

  out = []
  for size in SIZES:
    function = jax.jit(axis.over(chain, CUT, CUT))
    x = axis.put(np.ones(size // 4, np.float32))
    stretches = []
    for _ in range(8):  # of which the first compiles
      start = time.perf_counter()
      for _ in range(3):
        x = function(x)
      jax.block_until_ready(x)
      stretches.append((time.perf_counter() - start) / (3 * CALLS))
    out.append(statistics.median(stretches[1:]))
  return out


def _prepare(devices: int, threads: int) -> None:
  """Starts JAX with so many devices, in a process of its own; one thread: on one core."""
  from dlrm_jax import main

  os.environ['JAX_NUM_CPU_DEVICES'] = str(devices)
  if threads:
    os.sched_setaffinity(0, usable_cores()[:threads])
  main.prepare_process(threads)


def _program_and_batch(
  config: str, devices: int, share: int, embedding: dict[str, Any], data: Path, **fields: Any
) -> tuple[Any, Any]:
  """Of a step of so many devices with so many examples each."""
  from dlrm_jax import sources
  from dlrm_jax.program import make_program
  from dlrm_jax.sharding import all_devices

  spec = common.make_spec(config, data, 0, devices * share, no_eval=True, embedding=embedding, **fields)
  program = make_program(spec, all_devices())
  with sources.train_batches(sources.open_sources(spec), spec, sources.START, program.axis) as batches:
    return program, next(batches)[0]


def collectives(
  config: str, devices: int, shares: Sequence[int], embedding: dict[str, Any], data: Path
) -> dict[str, scaling_model.Carried]:
  """What those of a step carry, by share, with XLA alone."""
  _prepare(devices, 0)
  from dlrm_jax.state import abstract_state
  from dlrm_jax.step import jit_train_step

  out = {}
  for share in shares:
    program, batch = _program_and_batch(config, devices, share, embedding, data, native=False)
    compiled = jit_train_step(program).lower(abstract_state(program), batch).compile()
    out[str(share)] = scaling_model.count(compiled.as_text())
  return out


def tables_seconds(config: str, devices: int, embedding: dict[str, Any], data: Path) -> float:
  """Of a device for the lookup and update of its step's tables, with so many devices on one core."""
  _prepare(devices, 1)
  import jax

  from dlrm_jax.sharding import CUT
  from dlrm_jax.state import init_state, state_specs
  from dlrm_jax.step import compiler_options

  program, batch = _program_and_batch(config, devices, TABLES_SHARE, embedding, data)
  embeddings, specs = program.embeddings, state_specs(program)

  def part(tables: Any, batch: Any) -> Any:
    found = embeddings.find({}, batch)
    return embeddings.update(tables, found, 1e-3 * embeddings.lookup(tables, found), jax.numpy.zeros((), int))

  over = program.axis.over(part, (specs.tables, CUT), specs.tables)
  function = jax.jit(over, donate_argnums=0, compiler_options=compiler_options(program))
  tables, seconds = init_state(program).tables, []
  for _ in range(8):
    start = time.perf_counter()
    tables = function(tables, batch)
    jax.block_until_ready(tables)
    seconds.append((time.perf_counter() - start) / devices)
  return statistics.median(seconds[2:])
