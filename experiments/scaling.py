"""Several processes beside one: `python -m experiments.scaling --help`.

Each run is the program itself under its launcher, from the CSV: one process on one core, two on a core each, four on
the two cores. The batch of a process is the same in all, so twice the processes do twice the work in a step. Beside the
samples/s: what the collectives of a step carry, counted in the program that XLA compiled, for one device of so many.
The machine must be idle.
"""

import math
import os
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments import common

NUMBER = {'f32': 4, 's32': 4, 'u32': 4, 'bf16': 2, 'u16': 2, 'pred': 1}
# An operation of XLA's that devices do together, with its results: a shape, or several in parentheses.
COLLECTIVE = re.compile(r'= (\([^()]*\)|[^() ]+) (all-reduce|all-gather|reduce-scatter|all-to-all)(?:-start)?\(')
SHAPE = re.compile(r'(\w+)\[([\d,]*)\]')


def samples_per_second(config: str, data: Path, processes: int, share: int, steps: int, flags: Sequence[str]) -> float:
  """Of a run of so many processes with `share` examples each in a step."""
  cores = sorted(os.sched_getaffinity(0))[: min(processes, common.CORES)]
  with tempfile.TemporaryDirectory() as output:
    fields = {
      'data_location': data.absolute(), 'no_eval': True, 'batch_size': share * processes, 'steps': steps,
      'checkpoint': output,
    }  # fmt: skip
    command = [
      *('taskset', '-c', ','.join(map(str, cores)), sys.executable, '-m', 'dlrm_jax.launch'),
      *('--processes', str(processes), '--', f'--config=configs/{config}.py'),
      *(f'--config.{name}={value}' for name, value in fields.items()),
      *flags,
    ]
    return common.run(command)[0]['samples_per_second']


def collectives(devices: int, share: int, fields: dict[str, Any], data: Path) -> dict[str, dict[str, int]]:
  """Kind -> {'times', 'bytes'} of a step's collectives, by their results; in a process of its own, with XLA alone."""
  from dlrm_jax import main

  os.environ['JAX_NUM_CPU_DEVICES'] = str(devices)
  main.prepare_process(0)
  from dlrm_jax import sources
  from dlrm_jax.program import make_program
  from dlrm_jax.sharding import all_devices
  from dlrm_jax.state import abstract_state
  from dlrm_jax.step import jit_train_step

  program = make_program(common.make_spec('base', data, 0, devices * share, no_eval=True, **fields), all_devices())
  with sources.train_batches(sources.open_sources(program.spec), program.spec, sources.START, program.axis) as batches:
    batch, _ = next(batches)
  compiled = jit_train_step(program).lower(abstract_state(program), batch).compile()
  return count(compiled.as_text())


def count(program: str) -> dict[str, dict[str, int]]:
  """Kind -> {'times', 'bytes'} of the collectives in the text of a compiled program, by their results."""
  found: dict[str, dict[str, int]] = {}
  for shapes, kind in COLLECTIVE.findall(program):
    of_kind = found.setdefault(kind, {'times': 0, 'bytes': 0})
    of_kind['times'] += 1
    for number, axes in SHAPE.findall(shapes):
      of_kind['bytes'] += NUMBER[number] * math.prod(int(axis) for axis in axes.split(',') if axis)
  return found


def render(record: dict[str, Any]) -> str:
  """Tables in Markdown."""
  speed = [
    [*key.split(', '), *(f'{rates.get(str(n), math.nan):,.0f}' for n in (1, 2, 4)),
     f'{rates["2"] / rates["1"]:.2f}', f'{rates["4"] / rates["2"]:.2f}']
    for key, rates in record['speed'].items()
  ]  # fmt: skip
  header = ['config', 'examples of a process', '1 process', '2 processes', '4 processes', '2 : 1', '4 : 2']
  carried = [
    [name, devices, *(f'{of.get(kind, {}).get("times", 0)} x, {of.get(kind, {}).get("bytes", 0) / 1e6:.2f} MB'
                      for kind in ('all-reduce', 'all-gather', 'reduce-scatter', 'all-to-all'))]
    for name, by_devices in record['collectives'].items() for devices, of in by_devices.items()
  ]  # fmt: skip
  kinds = ['exchange', 'devices', 'all-reduce', 'all-gather', 'reduce-scatter', 'all-to-all']
  return f'{common.table(header, speed)}\n\n{common.table(kinds, carried)}'


def main(argv: Sequence[str]) -> None:
  """Measures, writes a record, prints tables."""
  parser = common.parser('scaling', __doc__)
  parser.add_argument('--data', type=Path, default=Path('data'), help='folder with train.csv (data)')
  words = lambda text: tuple(text.split(','))
  parser.add_argument('--configs', type=words, default=('base', 'bf16'), help='base,bf16')
  parser.add_argument('--shares', type=common.numbers, default=(512, 2048), help='examples of a process (512,2048)')
  parser.add_argument('--samples', type=int, default=262_144, help='of a process in a run (262,144)')
  parser.add_argument('--devices', type=common.numbers, default=(2, 4, 8, 16), help='for the count (2,4,8,16)')
  args = parser.parse_args(argv)
  data = common.check_data(args.data, 'train.csv')
  record: dict[str, Any] = {
    'machine': common.about_machine(None), 'load_before': common.load_before(), 'data': common.about_data(data),
    'samples': args.samples, 'speed': {}, 'collectives': {},
  }  # fmt: skip
  for config in args.configs:
    for share in args.shares:
      rates = record['speed'].setdefault(f'{config}, {share}', {})
      for processes in (1, 2, 4):
        flags = ['--config.embedding.buckets=(10000,)', '--config.embedding.shard_mb=0', '--config.log_every=1000']
        rates[str(processes)] = samples_per_second(config, data, processes, share, args.samples // share, flags)
        common.say(f'{config}, {share} examples, {processes} processes: {rates[str(processes)]:,.0f} samples/s')
  for exchange in ('gather', 'all_to_all'):
    for devices in args.devices:
      fields = {'native': False, 'embedding': {'buckets': (10_000,), 'shard_mb': 0.0, 'exchange': exchange}}
      carried = common.in_process(collectives, devices, 512, fields, data)
      record['collectives'].setdefault(exchange, {})[str(devices)] = carried
  common.finish('scaling', record, render(record), args.record)


if __name__ == '__main__':
  main(sys.argv[1:])
