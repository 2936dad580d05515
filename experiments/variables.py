"""Embedding variables beside static tables: speed, memory, quality: `python -m experiments.variables --help`.

*Speed*: samples/s of training steps and of what happens between them, over batches that lie ready (Adam, `cat`), which
are taken again and again. *filling*: the first pass, in the order of the file, through an empty table, when ids come.
*known*: the last pass, when all ids have their rows: with a filter of n that is pass n + 1. The rates of all passes are
in the record. A ratio is that to the static tables of the same size, repetition and pass. Where a directory grows, the
step is compiled anew: that is in the rates, and is told. Of the memory, *computed* is `computed`, and *measured* what
the process grew by when the tables were made.

*Quality*: one epoch of the program from the CSV, then the whole evaluation: static tables, embedding variables that
take no more memory, and those with a filter of three. Ids are counted in the file, too, and held against the directory;
of those without a place, *promised* is what embeddings/directory.py says of the load.

One process at a time; the record is written after every repetition and run. The machine must be idle for the rates.
"""

import argparse
import itertools
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from experiments import common, measurements
from experiments.variables_tables import STATIC, render

PARTS, SIZES, RUNS = ('speed', 'quality'), ('full', 'small'), ('static', 'dynamic', 'counter')
# Bytes: of a row beside the vector and its slots (which lane of a batch won it), and of an id in a directory.
SCRATCH, ENTRY = 4, 16
SLOTS = 2  # of Adam
STEP = 240 * 512  # rows; a large directory has a multiple of so many


class System(NamedTuple):
  """Tables of one kind: fields of `embedding`, and the passes after the last of which all ids are known."""

  fields: dict[str, Any]
  passes: int = 1


class Speed(NamedTuple):
  """One repetition."""

  passes: list[float]  # samples/s of each; the first is `filling`, the last `known`
  new_share: float  # of the lookups of the first pass: those that gave an id its row
  grown: int
  growth_seconds: float  # of the growths and of the steps after them, which compile
  computed_gb: float
  measured_gb: float
  peak_gb: float  # of the whole process


def systems(size: str) -> dict[str, System]:
  """Static tables (full: those of base.py; small: 10,000 rows a column) and what has no vocabulary beside them."""
  rows, buckets = {'full': (1 << 24, {}), 'small': (1 << 20, {'buckets': (10_000,)})}[size]

  def variables(admission: str = 'always', threshold: int = 2, **fields: Any) -> System:
    filtered = {'name': admission, 'threshold': threshold, 'expected_ids': rows}
    passes = 1 if admission == 'always' else threshold
    return System({'kind': 'dynamic', 'rows': rows, 'admission': filtered, **fields}, passes)

  return {
    STATIC: System(buckets),
    'dynamic, always': variables(),
    'dynamic, counter of 3': variables('counter', 3),
    'dynamic, counting_bloom of 3': variables('counting_bloom', 3),
    'adaptive, counter of 8': variables('counter', 8, kind='adaptive', buckets=(10_000,)),
  }


def row_bytes(spec: Any) -> int:
  """Of a row of an `EmbeddingSpec` with Adam: dim x bytes of a number x (1 + slots) + scratch."""
  return spec.dim * (2 if spec.dtype == 'bfloat16' else 4) * (1 + SLOTS) + SCRATCH


def computed(spec: Any) -> float:
  """GB of the tables of an `EmbeddingSpec` with Adam, their directories and filters, before they grow."""
  from dlrm_jax.embeddings.directory import whole_pages
  from dlrm_jax.embeddings.layout import static_layout

  total, admission = 0, spec.admission
  if spec.kind != 'dynamic':
    total += sum(table.rows for table in static_layout(spec).values()) * row_bytes(spec)
  if spec.kind != STATIC:
    total += whole_pages(spec.rows) * (row_bytes(spec) + ENTRY)
  if admission.name == 'counter':
    total += whole_pages(admission.expected_ids) * ENTRY
  if admission.name == 'counting_bloom':
    from dlrm_jax.embeddings.admission import bloom_size

    total += bloom_size(admission.expected_ids, admission.error_rate)[1] * admission.bits // 8
  return total / 1e9


def speed(fields: dict[str, Any], passes: int, data: Path, batch_size: int, samples: int) -> Speed:
  """One repetition at one batch size; runs in a process of its own."""
  from dlrm_jax import main

  main.prepare_process(0)
  import jax

  from dlrm_jax import sources
  from dlrm_jax.program import make_program
  from dlrm_jax.state import init_state
  from dlrm_jax.stretches import Stretch, jit_train_stretch, stack_size
  from dlrm_jax.upkeep import Upkeep, numbers_of

  program = make_program(common.make_spec('base', data, 0, batch_size, no_eval=True, embedding=fields))
  opened = sources.open_sources(program.spec)
  if opened.train.rows < batch_size:
    raise common.Failed(f'{opened.train.rows} rows of data are less than one batch of {batch_size}')
  at_once, step, upkeep = stack_size(program), jit_train_stretch(program), Upkeep(program)
  stacks = measurements.ready_batches(program, opened, samples, stack=at_once)
  steps, growths = itertools.count(at_once, at_once), []
  rows_of = lambda state: [table.value.shape[0] for table in state.tables.values()]

  def train(state: Any, some: Sequence[Any]) -> Any:
    grew = False
    for stack in some:
      start = time.perf_counter()
      state, _ = step(state, Stretch(stack, 0, at_once, None))
      if grew:  # to start this step has compiled it
        growths[-1] += time.perf_counter() - start
      rows, start = rows_of(state), time.perf_counter()
      state = upkeep(state, next(steps))
      grew = rows_of(state) != rows
      if grew:
        growths.append(time.perf_counter() - start)
    return jax.block_until_ready(state)

  before = resident_gb()
  state = jax.block_until_ready(init_state(program))
  measured = resident_gb() - before
  state = train(state, stacks[: measurements.WARM_UP_STEPS // at_once])  # which compiles
  del state
  state, rates, first = jax.block_until_ready(init_state(program)), [], {}
  steps, growths = itertools.count(at_once, at_once), []
  for number in range(passes + 1):
    start = time.perf_counter()
    state = train(state, stacks)
    rates.append(len(stacks) * at_once * batch_size / (time.perf_counter() - start))
    first = first if number else numbers_of(state.known)
  share = first.get('ids_admitted', 0) / (len(stacks) * at_once * batch_size * 26)
  gigabytes = computed(program.spec.embedding), measured, common.own_peak()
  return Speed(rates, share, len(growths), sum(growths), *gigabytes)


def resident_gb() -> float:
  """Memory of this process."""
  fields = dict(line.split(':', 1) for line in Path('/proc/self/status').read_text().splitlines())
  return int(fields['VmRSS'].split()[0]) * 1024 / 1e9


def measure_speed(args: argparse.Namespace, record: dict[str, Any]) -> None:
  """All systems, sizes and batch sizes, repetition after repetition, into the record."""
  for repetition in range(args.repetitions):
    for size, batch_size in itertools.product(args.sizes, args.batch_sizes):
      for name, system in systems(size).items():
        key = f'{size}, batch {batch_size}'
        arguments = (system.fields, system.passes, args.data, batch_size, args.samples)
        try:
          one = common.in_process(speed, *arguments)
        except common.Failed as error:
          record['failed'][f'{key}: {name}'] = str(error)
          continue
        record['speed'].setdefault(key, {}).setdefault(name, {})[str(repetition)] = one._asdict()
        common.say(f'{repetition + 1}: {key}: {name}: filling {one.passes[0]:,.0f}, known {one.passes[-1]:,.0f}')
    common.write_record(common.record_path('variables', args.record), record)


def runs(args: argparse.Namespace) -> dict[str, tuple[str, dict[str, int]]]:
  """Name -> (config, fields of `embedding`) of the runs for quality."""
  spec = common.make_spec('base', args.data, args.buckets, args.batch_size)
  most = int(computed(spec.embedding) * 1e9) // (row_bytes(spec.embedding) + ENTRY)
  rows = args.directory_rows or max(most // STEP, 1) * STEP
  counter = {'rows': rows // 4, 'admission.expected_ids': rows}
  all_ = {STATIC: ('base', {}), 'dynamic': ('dynamic', {'rows': rows}), 'counter of 3': ('counter', counter)}
  return {name: run for name, run in all_.items() if name.split()[0] in args.runs}


def quality(args: argparse.Namespace, config: str, fields: dict[str, int], output: Path) -> dict[str, Any]:
  """One run of the program, and what it came to."""
  from dlrm_jax.embeddings.directory import whole_pages

  flags = [f'--config.embedding.{name}={value}' for name, value in fields.items()]
  buckets = 0 if config == 'dynamic' else args.buckets
  nested = {'rows': fields['rows']} if fields else {}
  if 'admission.expected_ids' in fields:
    nested['admission'] = {'expected_ids': fields['admission.expected_ids']}
  spec = common.make_spec(config, args.data, buckets, args.batch_size, embedding=nested).embedding
  try:
    result, peak = common.run(common.dlrm_jax(config, args.data, output, buckets, args.batch_size, *flags))
    lines = (Path(result['output_dir']) / 'metrics.jsonl').read_text().splitlines()
  finally:
    shutil.rmtree(output, ignore_errors=True)  # gigabytes of checkpoint
  last = [record for record in map(json.loads, lines) if record['kind'] == 'train'][-1]
  rows = round(last['ids'] / last['load']) if fields else sum(spec.buckets)
  names = ('ids', 'load', 'ids_admitted', 'lookups_refused', 'lookups_unplaced', 'ids_memory_gb')
  return {name: result[name] for name in ('step', 'auc', 'log_loss', 'samples_per_second')} | {
    **{name: last.get(name) for name in names},
    'rows': rows,
    'first_rows': whole_pages(spec.rows) if fields else rows,
    'computed_gb': computed(spec),
    'tables_gb': rows * row_bytes(spec) / 1e9 + last.get('ids_memory_gb', 0),
    'peak_gb': peak,
  }


def distinct_ids(data: Path, batch_size: int = 8192, most: int = 1 << 20) -> dict[str, int]:
  """Rows of the training data, and its ids over all columns; runs in a process of its own."""
  import numpy as np

  from dlrm_jax import sources
  from dlrm_jax.data import pipeline

  opened = sources.open_sources(common.make_spec('dynamic', data, 0, batch_size, no_eval=True))
  found = [np.zeros(0, np.uint64)] * 26
  waiting = []

  def merge() -> None:
    for column in range(26):
      found[column] = np.unique(np.concatenate([found[column], *(keys[:, column] for keys in waiting)]))
    waiting.clear()

  for batch, _ in pipeline.eval_batches(opened.train, opened.reading, batch_size):
    halves = batch.key[batch.weight > 0].astype(np.uint64)
    waiting.append(halves[..., 0] | halves[..., 1] << np.uint64(32))
    if len(waiting) * batch_size > most:
      merge()
  merge()
  return {'rows': opened.train.rows, 'ids': sum(map(len, found))}


def measure_quality(args: argparse.Namespace, folder: Path, record: dict[str, Any]) -> None:
  """All runs, into the record."""
  record['data'] = common.in_process(distinct_ids, args.data)
  for name, (config, fields) in runs(args).items():
    try:
      record['quality'][name] = quality(args, config, fields, folder / 'result')
    except common.Failed as error:
      record['failed'][f'quality: {name}'] = str(error)
      continue
    common.say(f'{name}: {record["quality"][name]}')
    common.write_record(common.record_path('variables', args.record), record)


def main(argv: list[str]) -> None:
  """Measures, prints the tables and writes the record."""
  parser = common.parser('variables', __doc__)
  parser.add_argument('--data', type=Path, default=Path('data'), help='folder with train.csv and eval.csv (data)')
  parser.add_argument('--parts', type=common.words, default=PARTS, help=f'of {",".join(PARTS)}, which are the default')
  parser.add_argument('--sizes', type=common.words, default=SIZES, help=f'speed: of {",".join(SIZES)}, all by default')
  parser.add_argument('--batch_sizes', type=common.numbers, default=(512, 8192), help='speed (512,8192)')
  parser.add_argument('--samples', type=int, default=262_144, help='speed: of a pass (262,144)')
  parser.add_argument('--repetitions', type=int, default=3, help='speed (3)')
  parser.add_argument('--batch_size', type=int, default=512, help='quality (512)')
  runs_help = f'quality: of {",".join(RUNS)}, which are the default'
  parser.add_argument('--runs', type=common.words, default=RUNS, help=runs_help)
  parser.add_argument('--directory_rows', type=int, default=0, help='quality (in the memory of the static tables)')
  args = parser.parse_args(argv)
  for name, known in (('parts', PARTS), ('sizes', SIZES), ('runs', RUNS)):
    if not set(getattr(args, name)) <= set(known):
      parser.error(f'--{name} {",".join(getattr(args, name))}: must be of {",".join(known)}')
  args.data = common.check_data(args.data, 'train.csv', *(['eval.csv'] if 'quality' in args.parts else []))
  about, load = common.about_data(args.data), common.load_before()
  names = ('parts', 'sizes', 'batch_sizes', 'samples', 'repetitions', 'batch_size', 'runs', 'directory_rows', 'buckets')
  settings = {name: getattr(args, name) for name in names} | {'synthetic': about}
  record = {'machine': common.about_machine(None), 'load_before': load, 'settings': settings}
  record |= {'speed': {}, 'quality': {}, 'data': {}, 'failed': {}}
  try:
    with tempfile.TemporaryDirectory() as folder:
      if 'speed' in args.parts:
        measure_speed(args, record)
      if 'quality' in args.parts:
        measure_quality(args, Path(folder), record)
  except common.Failed as error:
    raise SystemExit(f'error: {error}') from None
  common.finish('variables', record, render(record), args.record)


if __name__ == '__main__':
  main(sys.argv[1:])
