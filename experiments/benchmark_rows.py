"""The rows of benchmark.py: what each measures, and how."""

import argparse
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from experiments import common, measurements
from experiments.limits import DTYPES
from experiments.measurements import Loaded, Rates

CONFIGS = {'f32': 'base', 'bf16': 'bf16'}
SMALL = 10_000  # buckets of the rows that have small tables
# Kinds of peers.
TORCH, EAGER, TF1, TF2 = 'PyTorch of any kind', 'PyTorch eager f32', 'TensorFlow 1.15.5', 'TensorFlow 2'
SLOW = 4  # the rows whose Adam moves every row of the tables get a fourth of the samples


@dataclasses.dataclass(frozen=True)
class Row:
  """A row of the table. That of a peer has kinds, and is a process for each batch size."""

  name: str
  dtype: str  # of its matrix products: a key of limits.py
  buckets: int  # of every column; 0: those of configs/base.py
  measure: Callable[[Sequence[int]], dict[int, Rates]]  # by batch size
  peer: common.Peer | None = None
  kinds: tuple[str, ...] = ()
  quality: str = ''  # its name in the records of quality.py


def small(name: str) -> str:
  """The name of a row with small tables."""
  return f'{name}, {SMALL:,} buckets'


def dlrm_jax_rows(args: argparse.Namespace) -> Iterator[Row]:
  """All batch sizes of a row in one process, which fills its table once."""
  fields = {'model': {'interaction': args.interaction}}

  def measure(config: str, buckets: int, samples: int) -> Callable[[Sequence[int]], dict[int, Rates]]:
    call = functools.partial(common.in_process, measurements.train, config, args.data, buckets)
    return lambda sizes: call(sizes, samples, fields)

  for buckets in dict.fromkeys((args.buckets, SMALL)):
    for dtype, config in CONFIGS.items():
      name = f'dlrm_jax {dtype}'
      shown = name if buckets == args.buckets else small(name)
      yield Row(shown, dtype, buckets, measure(config, buckets, args.samples), quality=name)
  baseline = measure('baseline', SMALL, args.samples // SLOW)
  yield Row(small('dlrm_jax baseline.py'), 'f32', SMALL, baseline, quality='dlrm_jax baseline.py')


def peer_rows(args: argparse.Namespace, arrays: Path) -> Iterator[Row]:
  """The rows of the peers; `arrays` is the folder of the batches that they train from."""
  same = {'interaction': args.interaction, 'samples': args.samples, 'buckets': args.buckets}

  def in_memory(name: str, peer: common.Peer, dtype: str, fast: bool, **flags: str) -> Row:
    one = functools.partial(measurements.peer, peer, arrays, dtype=dtype, compile=fast, **same, **flags)
    measure = lambda sizes: {size: one(size) for size in sizes}
    kinds = (TORCH, EAGER) if dtype == 'f32' and not fast else (TORCH,)
    name = f'{name}, {flags["optimizer"]}, {dtype}, {"compiled" if fast else "eager"}'
    quality = 'PyTorch f32' if name == 'PyTorch pull, adam, f32, eager' else ''
    return Row(name, dtype, args.buckets, measure, peer, kinds, quality)

  def from_csv(name: str, peer: common.Peer, kind: str, dtype: str, **flags: int) -> Row:
    flags = same | flags
    one = functools.partial(measurements.csv_peer, peer, args.data, dtype=dtype, **flags)
    measure = lambda sizes: {size: one(size) for size in sizes}
    return Row(name, dtype, flags['buckets'], measure, peer, (kind,), quality=f'{kind} {dtype}')

  for optimizer in ('adam', 'adagrad'):
    for dtype in DTYPES:
      for fast in (False, True):
        yield in_memory('PyTorch sparse', common.TWIN, dtype, fast, table='sparse', optimizer=optimizer)
    for dtype in DTYPES:
      yield in_memory('PyTorch pull', common.TWIN, dtype, dtype == 'bf16', table='pull', optimizer=optimizer)
  for optimizer in ('adagrad', 'rowwise_adagrad'):
    for dtype in DTYPES:
      yield in_memory('PyTorch + FBGEMM', common.FBGEMM, dtype, dtype == 'bf16', optimizer=optimizer)
  for dtype in DTYPES:
    yield from_csv(f'TensorFlow 2 {dtype}', common.TENSORFLOW_2, TF2, dtype)
  few = {'buckets': SMALL, 'samples': args.samples // SLOW}
  yield from_csv(small('TensorFlow 1.15.5 f32'), common.TENSORFLOW_1, TF1, 'f32', **few)


def loader_rows(args: argparse.Namespace) -> dict[str, Callable[[], Loaded]]:
  """The loader alone."""
  load = functools.partial(functools.partial, common.in_process, measurements.load, args.data, args.buckets)
  return {
    f'loader, {threads}{", data.cache" if cache else ""}': load(cores, cache)
    for cache in (False, True)
    for cores, threads in ((1, 'one thread'), (2, 'two threads'))
    if cores <= common.CORES
  }
