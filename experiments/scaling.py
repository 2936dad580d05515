"""Several processes beside one: `python -m experiments.scaling --help`.

- *speed*: the program itself under its launcher, from the CSV: one process on one core, two on a core each, four on the
  two cores. The batch of a process is the same in all, so twice the processes do twice the work in a step.
- *network*: the same in network namespaces, with limited bandwidth and delay (scaling_network.py).
- *model*: what each of these should take (scaling_model.py), from parts measured alone (scaling_parts.py): one process,
  and two that know nothing of each other; all-to-alls alone, between two processes; what those of a step
  carry, counted in the program that XLA compiled for so many devices; the tables' part of a step among so many devices.
  Then 10 machines and more, of one such core each.

Repetitions are interleaved. The machine must be idle.
"""

import concurrent.futures
import itertools
import statistics
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from dlrm_jax.cores import usable_cores
from experiments import common, scaling_model, scaling_parts
from experiments.scaling_model import Cost, Network
from experiments.scaling_network import Unavailable, namespaces
from experiments.scaling_tables import (
  CORES,
  EXCHANGES,
  FRAMEWORKS,
  NETWORKS,
  PROCESSES,
  Rates,
  of_tables,
  predictions,
  render,
)  # fmt: skip

LAUNCH = 'import sys; from dlrm_jax.launch import Launcher; sys.exit(Launcher(sys.argv[2:], int(sys.argv[1])).run())'
WARM_UP = 20  # steps that samples_per_second leaves out
PARTS = 960  # of a table, so that those are cut among processes whose number divides it; else all hold them
TIMED = 16  # devices at most, of which the tables' part is timed
SWEEPING = 4  # a config whose Adam moves every row gets so many times fewer samples
COMPILE_ONCE = {'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0'}


class Runs:
  """Starts the program on the data, with tables of a size that are cut among the processes however small they are."""

  def __init__(self, data: Path, buckets: int, samples: int) -> None:
    self._data, self._buckets, self._samples = data, buckets, samples

  def fields(self, exchange: str) -> dict[str, Any]:
    """Of `config.embedding`."""
    cut = {'shard_mb': 1e9} if exchange == 'none' else {'shard_mb': 0.0, 'exchange': exchange}
    return cut | ({'buckets': (self._buckets,)} if self._buckets else {})

  def rate(
    self,
    config: str,
    share: int,
    processes: int,
    exchange: str = EXCHANGES[0],
    inside: Sequence[str] = (),
    core: int = 0,
  ) -> float:
    """Samples/s of so many processes with `share` examples each, in namespaces if `inside`; from this core on."""
    cores = usable_cores()[core:][: min(processes, CORES)]
    steps = WARM_UP + max(5, self._samples // (SWEEPING if config == 'baseline' else 1) // share)
    with tempfile.TemporaryDirectory() as output:
      fields = {
        'data_location': self._data, 'no_eval': True, 'batch_size': share * processes, 'steps': steps,
        'checkpoint': output, 'log_every': 10_000,
      } | {f'embedding.{name}': value for name, value in self.fields(exchange).items()}  # fmt: skip
      program = [
        *('-m', 'dlrm_jax.main', f'--config=configs/{config}.py'),
        *(f'--config.{name}={value}' for name, value in fields.items()),
      ]
      return self.launch(processes, cores, program, inside)['samples_per_second']

  def launch(self, processes: int, cores: Iterable[int], program: Sequence[str], inside: Sequence[str]) -> Any:
    """The line of JSON of processes of Python that divide the cores."""
    command = [
      *('taskset', '-c', ','.join(map(str, cores)), sys.executable, '-c', LAUNCH, str(processes)),
      *(*inside, sys.executable, *program),
    ]
    return common.run(command)[0]

  def apart(self, config: str, share: int) -> float:
    """Samples/s of two processes together that know nothing of each other, on a core each."""
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
      rates = list(pool.map(lambda core: self.rate(config, share, 1, core=core), (0, 1)))
    return 2 * statistics.harmonic_mean(rates)

  def cost(self, inside: Sequence[str] = ()) -> Cost:
    """From two processes that do nothing but all-to-alls."""
    cores = usable_cores()[:CORES]
    program = ('-c', 'from experiments import scaling_parts; scaling_parts.time_collectives()')
    seconds = self.launch(2, cores, program, inside)
    return scaling_model.fit(*zip(scaling_parts.SIZES, seconds, strict=True))


def measure_speed(
  runs: Runs, configs: Sequence[str], shares: Sequence[int], first: bool, speed: dict[str, Rates]
) -> None:
  """One more repetition, into `speed`. The baseline, which is slow, is measured once, with the first share alone."""
  for config, share in itertools.product(configs, shares):
    if config == 'baseline' and share != shares[0]:
      continue
    of, what = speed.setdefault(f'{config}, {EXCHANGES[0]}, {share}', {}), f'{config}, {share} examples'
    for processes in PROCESSES if first or config != 'baseline' else ():
      add(of, str(processes), runs.rate(config, share, processes), what)
    if first:
      add(of, 'apart', runs.apart(config, share), what)
    if first and config == 'base' and share == shares[0]:
      other = speed.setdefault(f'{config}, {EXCHANGES[1]}, {share}', {})
      for processes in PROCESSES[1:]:
        add(other, str(processes), runs.rate(config, share, processes, EXCHANGES[1]), f'{what}, {EXCHANGES[1]}')


def add(rates: Rates, key: str, rate: float, what: str) -> None:
  """Keeps and tells a rate."""
  rates.setdefault(key, []).append(rate)
  common.say(f'{what}, {key}: {rate:,.0f} samples/s')


def measure_networks(runs: Runs, config: str, share: int) -> dict[str, Any]:
  """{'cost': ..., 'speed': network -> rates}; {'skipped': why} where there are no namespaces."""
  out: dict[str, Any] = {'config': config, 'share': share, 'speed': {}}
  try:
    with namespaces(2, Network()) as inside:
      out['cost'] = runs.cost(inside)
    for network, processes in itertools.product(NETWORKS, PROCESSES[1:]):
      with namespaces(processes, network) as inside:
        rate = runs.rate(config, share, processes, inside=inside)
      add(out['speed'].setdefault(str(network), {}), str(processes), rate, f'network of {network}')
  except Unavailable as error:
    return {'skipped': f'no network namespaces: {error}'}
  return out


def measure_parts(
  runs: Runs, configs: Sequence[str], shares: Sequence[int], devices: Sequence[int], data: Path
) -> dict[str, Any]:
  """The counts and the tables' part, by config and exchange. The config bf16 has the tables of base."""
  out: dict[str, Any] = {'collectives': {}, 'tables': {}}
  for config in dict.fromkeys((*configs, *map(of_tables, configs))):
    for exchange in EXCHANGES if config == 'base' else EXCHANGES[:1]:
      name, arguments = f'{config}, {exchange}', (runs.fields(exchange), data)
      common.say(f'parts of {name}')
      may = [count for count in devices if exchange == 'none' or PARTS % count == 0]
      few = [count for count in may if count <= TIMED]
      of = shares[:1] if config == 'baseline' else shares
      out['collectives'][name] = {
        str(count): common.in_process(scaling_parts.collectives, config, count, of, *arguments) for count in may
      }
      if config == of_tables(config):
        out['tables'][name] = {
          str(count): common.in_process(scaling_parts.tables_seconds, config, count, *arguments) for count in (1, *few)
        }
  return out


def main(argv: Sequence[str]) -> None:
  """Measures, writes a record, prints tables."""
  parser = common.parser('scaling', __doc__)
  parser.set_defaults(buckets=10_000)
  parser.add_argument('--data', type=Path, default=Path('data'), help='folder with train.csv (data)')
  parser.add_argument('--configs', type=common.words, default=tuple(FRAMEWORKS), help=','.join(FRAMEWORKS))
  parser.add_argument('--shares', type=common.numbers, default=(512, 2048), help='examples of a process (512,2048)')
  parser.add_argument('--samples', type=int, default=65_536, help='timed, of a process in a run (65,536)')
  parser.add_argument('--repetitions', type=int, default=2, help='interleaved (2)')
  text = 'processes that the model is asked for (2,4,8,10,16,96,100)'
  parser.add_argument('--devices', type=common.numbers, default=(2, 4, 8, 10, 16, 96, 100), help=text)
  args = parser.parse_args(argv)
  data = common.check_data(args.data, 'train.csv')
  if common.CORES < CORES:
    raise SystemExit(f'error: this needs {CORES} cores, and may use {common.CORES}')
  record: dict[str, Any] = {
    'machine': common.about_machine(None), 'load_before': common.load_before(), 'data': common.about_data(data),
    'buckets': args.buckets, 'samples': args.samples, 'devices': sorted({*PROCESSES[1:], *args.devices}), 'speed': {},
  }  # fmt: skip
  runs = Runs(data, args.buckets, args.samples)
  with tempfile.TemporaryDirectory() as cache, common.variables(COMPILE_ONCE | {'JAX_COMPILATION_CACHE_DIR': cache}):
    try:
      for repetition in range(args.repetitions):
        measure_speed(runs, args.configs, args.shares, not repetition, record['speed'])
      record['loopback'] = {'cost': runs.cost()}
      record['network'] = measure_networks(runs, 'base' if 'base' in args.configs else args.configs[0], args.shares[0])
      record |= measure_parts(runs, args.configs, args.shares, record['devices'], data)
    except common.Failed as error:
      raise SystemExit(f'error: {error}') from None
  record['predictions'] = predictions(record)
  common.finish('scaling', record, render(record), args.record)


if __name__ == '__main__':
  main(sys.argv[1:])
