"""Where the time of a training step goes: `python -m experiments.step_parts --help`.

Milliseconds of one batch for each part alone, compiled by itself and waited for after each call:

- *loader*: one thread's time from the bytes of the CSV to packed rows, `parse and hash`, which are one pass over the
  bytes (native/lines.cc). In training it runs beside the step.
- *step*: `lookup` (rows and their vectors), `dense forward`, `dense backward` (forward and backward less forward),
  `dense optimizer`, `row update` (merging of equal rows, their new values and slots), and the `whole step`. A part
  alone pays for a call and for results that the whole step never writes, and is measured with warmer caches.
- *training from the CSV*: `step, while loading` and `waiting for data`, when each step is waited for before the next
  batch is asked for.
"""

import functools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from experiments import common, measurements
from experiments.benchmark_rows import CONFIGS

STRETCHES = 3
POOL_BATCHES = 16
READ_ROWS = 65536  # that the loader's parts are measured on
Parts = dict[str, float]  # milliseconds of a batch


def milliseconds(call: Callable[[Any], Any], batches: Sequence[Any], seconds: float) -> float:
  """Time of a call whose result is waited for: the median of three stretches of `seconds`, over the batches in turn."""
  import jax

  jax.block_until_ready(call(batches[0]))  # compiles
  means = []
  for _ in range(STRETCHES):
    start, count = time.perf_counter(), 0
    while not count or time.perf_counter() - start < seconds:
      jax.block_until_ready(call(batches[count % len(batches)]))
      count += 1
    means.append((time.perf_counter() - start) / count)
  return 1e3 * statistics.median(means)


def of_step(program: Any, state: Any, batches: Sequence[Any], seconds: float) -> tuple[Parts, Any]:
  """The parts of a step, and the state after the steps that this took."""
  import jax

  from dlrm_jax import step

  embeddings = program.embeddings
  look = jax.jit(lambda tables, batch: embeddings.lookup(tables, embeddings.find(state.known, batch)))
  both = jax.jit(lambda state, vectors, batch: step.gradients(program, state, vectors, batch, batch.weight.sum()))
  # A top that is one kernel (native/top.cc) makes its gradients with the loss: forward alone is what its layers take.
  model = program.model.clone(kernels=program.model.kernels._replace(cat_loss=None))

  @jax.jit
  def forward(state: Any, vectors: Any, batch: Any) -> Any:
    variables = {'params': state.params, 'batch_stats': state.batch_stats}
    apply = functools.partial(model.apply, variables, mutable=['batch_stats'])
    bottom, statistics = apply(batch.dense, batch.weight, True, method='bottom')
    return apply(bottom, vectors, batch.label, batch.weight, batch.weight.sum(), method='loss')[0], statistics

  def optimize(gradient: Any, opt_state: Any, params: Any) -> tuple[Any, Any]:
    params, opt_state = program.update_parameters(gradient, opt_state, params)
    return opt_state, params  # in the order that they are donated in, or XLA copies them

  optimize = jax.jit(optimize, donate_argnums=(1, 2))
  update = jax.jit(lambda *arguments: embeddings.update(*arguments, state.step), donate_argnums=0)
  network = state.replace(tables={})
  vectors = [look(state.tables, batch) for batch in batches]
  pairs = list(zip(vectors, batches, strict=True))
  _, (dense_gradient, gradient), _ = both(network, *pairs[0])
  found = [embeddings.find(state.known, batch) for batch in batches]
  held = {'dense': jax.tree.map(jax.numpy.copy, (state.opt_state, state.params)), 'tables': state.tables}

  def optimize_held(_: Any) -> Any:
    held['dense'] = optimize(dense_gradient, *held['dense'])
    return held['dense']

  def update_held(found: Any) -> Any:
    held['tables'] = update(held['tables'], found, gradient)
    return held['tables']

  parts = {
    'lookup': milliseconds(lambda batch: look(held['tables'], batch), batches, seconds),
    'dense forward': milliseconds(lambda pair: forward(network, *pair), pairs, seconds),
  }
  parts['dense backward'] = milliseconds(lambda pair: both(network, *pair), pairs, seconds) - parts['dense forward']
  parts['dense optimizer'] = milliseconds(optimize_held, [None], seconds)
  parts['row update'] = milliseconds(update_held, found, seconds)
  held = {'state': state.replace(tables=held['tables'])}
  whole = step.jit_train_step(program)

  def step_held(batch: Any) -> Any:
    held['state'], _ = whole(held['state'], batch)
    return held['state']

  parts['whole step'] = milliseconds(step_held, batches, seconds)
  return parts, held['state']


def of_training(program: Any, opened: Any, state: Any, samples: int) -> tuple[Parts, Any]:
  """Waiting for the next batch, and the step, in training from the CSV; and the state after it."""
  import jax

  from dlrm_jax import sources
  from dlrm_jax.step import jit_train_step

  position, steps = measurements.stretch(opened.train.rows, program.spec.batch_size, samples)
  step, waited, stepped = jit_train_step(program), 0.0, 0.0
  with sources.train_batches(opened, program.spec, position) as batches:
    for number in range(steps):
      start = time.perf_counter()
      batch, _ = next(batches)
      got = time.perf_counter()
      state, _ = step(state, batch)
      jax.block_until_ready(state)
      if number >= measurements.WARM_UP_STEPS:
        waited, stepped = waited + got - start, stepped + time.perf_counter() - got
  timed = steps - measurements.WARM_UP_STEPS
  return {'step, while loading': 1e3 * stepped / timed, 'waiting for data': 1e3 * waited / timed}, state


def of_loader(opened: Any) -> Parts:
  """Milliseconds of one row on one thread."""
  rows = min(opened.train.rows, READ_ROWS)
  read = lambda _: opened.train.read(0, rows, opened.reading)
  return {'parse and hash': milliseconds(read, [None], 0) / rows}


def measure(
  config: str,
  data: Path,
  buckets: int,
  batch_sizes: Sequence[int],
  interaction: str,
  samples: int,
  seconds: float = 0.4,
) -> dict[str, Parts]:
  """Parts by batch size, with one table; runs in a process of its own."""
  from dlrm_jax import main

  main.prepare_process(threads=0)
  from dlrm_jax import sources
  from dlrm_jax.program import make_program
  from dlrm_jax.state import init_state

  out, state, opened = {}, None, None
  fields = {'no_eval': True, 'model': {'interaction': interaction}}
  for size in sorted(batch_sizes):
    program = make_program(common.make_spec(config, data, buckets, size, **fields))
    opened = opened or sources.open_sources(program.spec)
    loader = {name: time * size for name, time in of_loader(opened).items()}
    state = init_state(program) if state is None else state
    batches = measurements.ready_batches(program, opened, POOL_BATCHES * size)
    parts, state = of_step(program, state, batches, seconds)
    training, state = of_training(program, opened, state, samples)
    out[str(size)] = loader | parts | training
  return out


def render(parts: dict[str, dict[str, Parts]]) -> str:
  """The table: parts, by dtype and batch size."""
  columns = {f'{dtype}, {size}': of for dtype, sizes in parts.items() for size, of in sizes.items()}
  names = next(iter(columns.values()), {})
  lines = [[name, *(f'{of[name]:.2f}' for of in columns.values())] for name in names]
  if columns:
    shares = [of['waiting for data'] / (of['waiting for data'] + of['step, while loading']) for of in columns.values()]
    lines.append(['share of training that waits', *(f'{share:.0%}' for share in shares)])
  return common.table(['ms of a batch', *columns], lines)


def main(argv: list[str]) -> None:
  """Measures f32 and bf16, prints the table."""
  parser = common.parser('step_parts', __doc__, record=False)
  common.add_data(parser, 2_000_000)
  parser.add_argument('--batch_sizes', type=common.numbers, default=(512, 2048, 8192))
  parser.add_argument('--interaction', choices=('cat', 'dot'), default='cat')
  parser.add_argument('--samples', type=int, default=262_144, help='of training from the CSV (262,144)')
  args = parser.parse_args(argv)
  try:
    with tempfile.TemporaryDirectory() as name:
      data = common.find_data(args.data, args.rows, Path(name))
      arguments = (data, args.buckets, args.batch_sizes, args.interaction, args.samples)
      print(render({dtype: common.in_process(measure, config, *arguments) for dtype, config in CONFIGS.items()}))
  except common.Failed as error:
    raise SystemExit(f'error: {error}') from None


if __name__ == '__main__':
  main(sys.argv[1:])
