"""What this machine can do at most: `python -m experiments.limits --help`.

- *machine*: square matrix products, memory read and written in order, reads of random rows of 16 floats.
- *network*: the matrix products of one training step alone, at the shapes of the layers: forward, gradient of the
  weights, and gradient of the input (of all layers but the first of the bottom MLP). No activation, no bias, no batch
  norm, no embedding: no step with these products can be faster. Of each product the fastest library counts: XLA with
  activations as [features, batch], and PyTorch with [batch, features] where the twin of peers/pytorch is installed. The
  products between vectors of the `dot` interaction are left out.

Every figure is the best of three stretches.
"""

import argparse
import functools
import itertools
import json
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from experiments import common

DTYPES = ('f32', 'bf16')
LIBRARIES = ('xla', 'torch')
STRETCHES = 3
STRETCH_SECONDS = 0.02
SIDE = 2048  # of the square products
ARRAY_BYTES = 1 << 29
GATHER_ROWS, GATHERED = 1 << 24, 8192 * 26  # table and reads: a table of 1 GiB, the lookups of a batch of 8192
INPUTS, VECTORS, WIDTH = 13, 26, 16
BOTTOM, TOP = (512, 256, 64, 16), (512, 256, 1)


class Product(NamedTuple):
  """One matrix product of a step with a layer of K inputs and N outputs on B examples: 2 K N B operations."""

  kind: str  # forward, weight or input
  k: int
  n: int
  b: int

  @property
  def flop(self) -> int:
    """Floating point operations."""
    return 2 * self.k * self.n * self.b


Seconds = Callable[[Product, str], float]  # (product, dtype) -> seconds of one


def products(batch_size: int, interaction: str) -> list[Product]:
  """The products of one step of the model of configs/base.py."""
  features = VECTORS * WIDTH if interaction == 'cat' else VECTORS * (VECTORS + 1) // 2
  layers = [*_layers((INPUTS, *BOTTOM)), *_layers((BOTTOM[-1] + features, *TOP))]
  forward = [Product('forward', k, n, batch_size) for k, n in layers]
  weight = [product._replace(kind='weight') for product in forward]
  return [*forward, *weight, *(product._replace(kind='input') for product in forward[1:])]


def _layers(sizes: Sequence[int]) -> list[tuple[int, int]]:
  return list(itertools.pairwise(sizes))


def best_of(work: Callable[[int], Any], seconds: float = STRETCH_SECONDS) -> float:
  """Seconds of one repetition of the work, where `work(n)` does n and waits for them."""
  work(1)
  count, spent = 1, _timed(work, 1)
  while spent < seconds / 2 and count < 1 << 20:
    count = max(2 * count, min(int(count * seconds / max(spent, 1e-7)), 64 * count))
    spent = _timed(work, count)
  return min(spent, *(_timed(work, count) for _ in range(STRETCHES - 1))) / count


def _timed(work: Callable[[int], Any], count: int) -> float:
  start = time.perf_counter()
  work(count)
  return time.perf_counter() - start


def xla_product(product: Product, dtype: str) -> float:
  """Seconds of a product by XLA, with activations [features, B] and sums in float32."""
  import jax
  import jax.numpy as jnp

  kind, k, n, b = product
  # The transposed weights of the forward pass lie ready: XLA multiplies plain matrices fastest.
  shapes = {'forward': ((n, k), 1, (k, b), 0), 'weight': ((k, b), 1, (n, b), 1), 'input': ((k, n), 1, (n, b), 0)}
  left, left_axis, right, right_axis = shapes[kind]
  dtype = {'f32': jnp.float32, 'bf16': jnp.bfloat16}[dtype]

  def multiply(a: jax.Array, c: jax.Array) -> jax.Array:
    dimensions = (((left_axis,), (right_axis,)), ((), ()))
    return jax.lax.dot_general(a, c, dimensions, preferred_element_type=jnp.float32)

  @jax.jit
  def repeat(a: jax.Array, c: jax.Array, count: int) -> tuple[jax.Array, ...]:
    # A number of each product goes into the operands of the next, or the loop would be one product.
    def body(_: int, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
      a, c, out = carry
      out = multiply(a, c)
      return a.at[0, 0].set((out[0, 0] * 0).astype(dtype)), c, out

    return jax.lax.fori_loop(0, count, body, (a, c, multiply(a, c)))

  a, c = jnp.full(left, 0.01, dtype), jnp.full(right, 0.01, dtype)
  return best_of(lambda count: jax.block_until_ready(repeat(a, c, count)))


def torch_product(product: Product, dtype: str) -> float:
  """Seconds of a product by PyTorch, with activations [B, features]."""
  import torch

  kind, k, n, b = product
  make = functools.partial(torch.full, fill_value=0.01, dtype={'f32': torch.float32, 'bf16': torch.bfloat16}[dtype])
  h, weight, gradient = make((b, k)), make((n, k)), make((b, n))
  a, c = {'forward': (h, weight.T), 'weight': (gradient.T, h), 'input': (gradient, weight)}[kind]
  out = a @ c

  def work(count: int) -> None:
    for _ in range(count):
      torch.mm(a, c, out=out)

  return best_of(work)


def of_library(seconds: Seconds, batch_sizes: Sequence[int], interaction: str) -> dict[str, Any]:
  """Of one library: GFLOP/s of square products, and seconds of every product of the network."""
  square = Product('forward', SIDE, SIDE, SIDE)
  return {
    'gflops': {dtype: round(square.flop / seconds(square, dtype) / 1e9, 1) for dtype in DTYPES},
    'seconds': {
      dtype: {str(size): [seconds(product, dtype) for product in products(size, interaction)] for size in batch_sizes}
      for dtype in DTYPES
    },
  }


def of_xla(batch_sizes: Sequence[int], interaction: str) -> dict[str, Any]:
  """`of_library` of XLA, and what memory can do; runs in a process of its own."""
  return of_library(xla_product, batch_sizes, interaction) | {'memory': memory()}


def memory(array_bytes: int = ARRAY_BYTES, rows: int = GATHER_ROWS, gathered: int = GATHERED) -> dict[str, float]:
  """GB/s that XLA reads and writes while it adds 1 to all of an array, and millions of random rows read per second."""
  import jax
  import jax.numpy as jnp
  import numpy as np

  add = jax.jit(lambda x: x + 1, donate_argnums=0)  # in place: new memory would cost more than the copy
  whole = [jnp.ones(array_bytes // 4)]

  def copy(count: int) -> None:
    for _ in range(count):
      whole[0] = add(whole[0])
    jax.block_until_ready(whole[0])

  seconds = best_of(copy, 0.5)
  table = jnp.ones((rows, WIDTH))
  row = jnp.asarray(np.random.default_rng(0).integers(rows, size=gathered, dtype=np.int32))
  gather = jax.jit(lambda table, row: table.at[row].get(mode='clip'))
  read = best_of(lambda count: [jax.block_until_ready(gather(table, row)) for _ in range(count)], 0.2)
  return {'gb_per_second': round(2 * array_bytes / seconds / 1e9, 2), 'million_rows_read': gathered / read / 1e6}


def combine(libraries: dict[str, dict[str, Any]]) -> dict[str, Any]:
  """Samples/s that the network's products allow, by dtype and batch size, beside what was measured.

  `samples_per_second` takes the fastest library of each product; `of_library` one library for all of them.
  """
  seconds = {name: library['seconds'] for name, library in libraries.items()}
  best, alone = {}, {name: {} for name in seconds}
  for dtype, sizes in next(iter(seconds.values())).items():
    of_both = {size: zip(*(of[dtype][size] for of in seconds.values()), strict=True) for size in sizes}
    best[dtype] = {size: round(int(size) / sum(map(min, times)), 1) for size, times in of_both.items()}
    for name, of in seconds.items():
      alone[name][dtype] = {size: round(int(size) / sum(times), 1) for size, times in of[dtype].items()}
  return {'samples_per_second': best, 'of_library': alone, 'libraries': libraries}


def measure(batch_sizes: Sequence[int], interaction: str, torch: bool) -> dict[str, Any]:
  """All limits; `torch`: with PyTorch, from the environment of the twin."""
  libraries = {'xla': common.in_process(of_xla, tuple(batch_sizes), interaction)}
  if torch:
    flags = ['--library', 'torch', '--interaction', interaction, '--batch_sizes', ','.join(map(str, batch_sizes))]
    libraries['torch'], _ = common.run([common.TWIN.python, '-m', 'experiments.limits', *flags])
  return combine(libraries)


def render(limits: dict[str, Any]) -> str:
  """Two tables."""
  libraries, lines = limits['libraries'], []
  for dtype in DTYPES:
    speeds = [f'{name} {library["gflops"][dtype]:,.0f}' for name, library in libraries.items()]
    lines.append([f'matrix product {SIDE} x {SIDE} x {SIDE}, {dtype}, GFLOP/s', ', '.join(speeds)])
  of_memory = libraries['xla']['memory']
  lines.append(['memory, GB/s read and written in place', f'{of_memory["gb_per_second"]:.1f}'])
  lines.append([f'random rows of {WIDTH} floats read, millions/s', f'{of_memory["million_rows_read"]:.1f}'])
  machine = common.table(['limits of the machine', ''], lines)
  lines = []
  for dtype, sizes in limits['samples_per_second'].items():
    for size, rate in sizes.items():
      alone = [f'{limits["of_library"][name][dtype][size]:,.0f}' if name in libraries else '' for name in LIBRARIES]
      lines.append([f'{dtype}, batch {size}', f'{rate:,.0f}', *alone])
  header = ['matrix products of the network, samples/s', 'fastest of each', 'XLA alone', 'PyTorch alone']
  return f'{machine}\n\n{common.table(header, lines)}'


def main(argv: list[str]) -> None:
  """Prints the tables, or what one library does as a line of JSON."""
  form = argparse.RawDescriptionHelpFormatter
  parser = argparse.ArgumentParser(prog='experiments.limits', description=__doc__, formatter_class=form)
  parser.add_argument('--batch_sizes', type=common.numbers, default=(512, 2048, 8192))
  parser.add_argument('--interaction', choices=('cat', 'dot'), default='cat')
  parser.add_argument('--library', choices=('torch',), help='this one only, from the Python at hand, as JSON')
  args = parser.parse_args(argv)
  if args.library:
    import torch

    torch.set_num_threads(common.CORES)
    print(json.dumps(of_library(torch_product, args.batch_sizes, args.interaction)))
    return
  try:
    torch = bool(common.install(common.TWIN))
  except common.Failed as error:
    common.say(f'without PyTorch: {error}')
    torch = False
  try:
    print(render(measure(args.batch_sizes, args.interaction, torch)))
  except common.Failed as error:
    raise SystemExit(f'error: {error}') from None


if __name__ == '__main__':
  main(sys.argv[1:])
