"""Several processes beside one: `python -m experiments.scaling --help`.

- *speed*: the program itself under its launcher, from the CSV: one process on one core, two on a core each, four on the
  two cores. The batch of a process is the same in all, so twice the processes do twice the work in a step.
- *network*: the same in network namespaces, with limited bandwidth and delay (scaling_network.py).
- *model*: what each of these should take (scaling_model.py), from parts measured alone: one process, and two that know
  nothing of each other; the collectives alone, between two processes; what a step's collectives carry, counted in the
  program that XLA compiled for so many devices; the tables' part of a step among so many devices. Then 10 machines and
  more, of one such core each.

Repetitions are interleaved. The machine must be idle.
"""

import concurrent.futures
import itertools
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from experiments import common, scaling_model
from experiments.scaling_model import KINDS, Cost, Network
from experiments.scaling_network import Unavailable, namespaces

LAUNCH = 'import sys; from dlrm_jax.launch import Launcher; sys.exit(Launcher(sys.argv[2:], int(sys.argv[1])).run())'
WARM_UP = 20  # steps that samples_per_second leaves out
PROCESSES = (1, 2, 4)
EXCHANGES = ('gather', 'all_to_all', 'none')  # none: every process holds all tables
PARTS = 960  # of a table, so that those are cut among processes whose number divides it; else all hold them
TABLES_SHARE = 512  # examples of a device, for the tables' part
SIZES = (4096, 2**21)  # bytes of results, about those of the batch statistics and of all gradients
COMPILE_ONCE = {'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0'}
TIMED = 10  # devices at most, of which the tables' part is timed
CALLS = 8  # of a collective in one program
SWEEPING = 4  # a config whose Adam moves every row gets so many times fewer samples
# The first shows what the namespaces cost; the last is that of the machines predicted, too.
NETWORKS = (Network(), Network(1e9 / 8), Network(1e9 / 8, 0.5e-3), Network(10e9 / 8, 0.1e-3))
# The rows of the seed's table of distributed training.
FRAMEWORKS = {
  'baseline': ("dlrm_jax, the community's settings", 'FP32'), 'base': ('dlrm_jax', 'FP32'),
  'bf16': ('dlrm_jax', 'FP32+BF16'),
}  # fmt: skip
Rates = dict[str, list[float]]  # samples/s of all processes together, by their number


class Runs:
  """Starts the program on the data, with tables of a size that are cut among the processes however small they are."""

  def __init__(self, data: Path, buckets: int, samples: int) -> None:
    self._data, self._buckets, self._samples = data, buckets, samples

  def fields(self, exchange: str) -> dict[str, Any]:
    """Of `config.embedding`."""
    cut = {'shard_mb': 1e9} if exchange == 'none' else {'shard_mb': 0.0, 'exchange': exchange}
    return cut | ({'buckets': (self._buckets,)} if self._buckets else {})

  def rate(
    self, config: str, share: int, processes: int, exchange: str = 'gather', inside: Sequence[str] = (), core: int = 0
  ) -> float:
    """Samples/s of so many processes with `share` examples each, in namespaces if `inside`; from this core on."""
    cores = sorted(os.sched_getaffinity(0))[core:][: min(processes, common.CORES)]
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

  def costs(self, inside: Sequence[str] = ()) -> dict[str, Cost]:
    """By kind, from two processes that do nothing but collectives."""
    cores = sorted(os.sched_getaffinity(0))[:2]
    program = ('-c', 'from experiments import scaling; scaling.time_collectives()')
    seconds = self.launch(2, cores, program, inside)
    return {kind: scaling_model.fit(kind, *zip(SIZES, of, strict=True)) for kind, of in seconds.items()}


def time_collectives() -> None:
  """Prints seconds of each kind of collective for each of SIZES, in a process among those of a launcher."""
  from dlrm_jax import distributed, main

  main.prepare_process(0)
  distributed.quiet()
  with distributed.joined(distributed.from_environment(os.environ), 'gloo') as members:
    seconds = _seconds_of_collectives()
    if members.index == 0:
      print(json.dumps(seconds), flush=True)


def _seconds_of_collectives() -> dict[str, list[float]]:
  import jax
  import jax.numpy as jnp
  import numpy as np

  from dlrm_jax.sharding import CUT, all_devices

  axis = all_devices()
  # Each from f32[n] to f32[n]; what it adds to the collective is little beside it. n is the size of the result but for
  # reduce-scatter, whose result is a part of n.
  calls = {
    'all-reduce': lambda x: axis.sum(x) / axis.size,
    'all-gather': lambda x: axis.gather(axis.own(x)),
    'reduce-scatter': lambda x: jnp.tile(axis.scatter_sum(x), axis.size) / axis.size,
    'all-to-all': axis.swap,
  }
  out: dict[str, list[float]] = {}
  for kind, bytes_ in itertools.product(KINDS, SIZES):
    size = bytes_ // 4 * (axis.size if kind == 'reduce-scatter' else 1)

    def chain(x: jax.Array, call: Any = calls[kind]) -> jax.Array:
      for _ in range(CALLS):
        x = call(x)
      return x

    function = jax.jit(axis.over(chain, CUT, CUT))
    x = axis.put(np.ones(size, np.float32))
    stretches = []
    for _ in range(8):  # of which the first compiles
      start = time.perf_counter()
      for _ in range(3):
        x = function(x)
      jax.block_until_ready(x)
      stretches.append((time.perf_counter() - start) / (3 * CALLS))
    out.setdefault(kind, []).append(statistics.median(stretches[1:]))
  return out


def prepare(devices: int, threads: int) -> None:
  """Starts JAX with so many devices, in a process of its own; one thread: on one core."""
  from dlrm_jax import main

  os.environ['JAX_NUM_CPU_DEVICES'] = str(devices)
  if threads:
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
  main.prepare_process(threads)


def program_and_batch(
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
  prepare(devices, 0)
  from dlrm_jax.state import abstract_state
  from dlrm_jax.step import jit_train_step

  out = {}
  for share in shares:
    program, batch = program_and_batch(config, devices, share, embedding, data, native=False)
    compiled = jit_train_step(program).lower(abstract_state(program), batch).compile()
    out[str(share)] = scaling_model.count(compiled.as_text())
  return out


def tables_seconds(config: str, devices: int, embedding: dict[str, Any], data: Path) -> float:
  """Of a device for the lookup and update of its step's tables, with so many devices on one core."""
  prepare(devices, 1)
  import jax

  from dlrm_jax.sharding import CUT
  from dlrm_jax.state import init_state, state_specs

  program, batch = program_and_batch(config, devices, TABLES_SHARE, embedding, data)
  embeddings, specs = program.embeddings, state_specs(program)

  def part(tables: Any, batch: Any) -> Any:
    found = embeddings.find({}, batch)
    return embeddings.update(tables, found, 1e-3 * embeddings.lookup(tables, found), jax.numpy.zeros((), int))

  function = jax.jit(program.axis.over(part, (specs.tables, CUT), specs.tables), donate_argnums=0)
  tables, seconds = init_state(program).tables, []
  for _ in range(8):
    start = time.perf_counter()
    tables = function(tables, batch)
    jax.block_until_ready(tables)
    seconds.append((time.perf_counter() - start) / devices)
  return statistics.median(seconds[2:])


def measure_parts(
  runs: Runs, configs: Sequence[str], shares: Sequence[int], devices: Sequence[int], data: Path
) -> dict[str, Any]:
  """The counts and the tables' part, by config and exchange. The config bf16 has those of base."""
  out: dict[str, Any] = {'collectives': {}, 'tables': {}}
  for config in dict.fromkeys(of_parts(config) for config in configs):
    for exchange in EXCHANGES if config == 'base' else EXCHANGES[:1]:
      name, arguments = f'{config}, {exchange}', (runs.fields(exchange), data)
      common.say(f'parts of {name}')
      may = [count for count in devices if exchange == 'none' or PARTS % count == 0]
      few = [count for count in may if count <= TIMED]
      of = shares if config == 'base' else shares[:1]
      carried = {str(count): common.in_process(collectives, config, count, of, *arguments) for count in may}
      tables = {str(count): common.in_process(tables_seconds, config, count, *arguments) for count in (1, *few)}
      out['collectives'][name], out['tables'][name] = carried, tables
  return out


def of_parts(config: str) -> str:
  """The config that has the same collectives and tables."""
  return 'base' if config == 'bf16' else config


def measure_speed(
  runs: Runs, configs: Sequence[str], shares: Sequence[int], first: bool, speed: dict[str, Rates]
) -> None:
  """One more repetition, into `speed`. The baseline, which is slow, is measured once, with the first share alone."""
  for config, share in itertools.product(configs, shares):
    if config == 'baseline' and share != shares[0]:
      continue
    of, what = speed.setdefault(f'{config}, gather, {share}', {}), f'{config}, {share} examples'
    for processes in PROCESSES if first or config != 'baseline' else ():
      add(of, str(processes), runs.rate(config, share, processes), what)
    if first:
      add(of, 'apart', runs.apart(config, share), what)
    if first and config == 'base' and share == shares[0]:
      routed = speed.setdefault(f'{config}, all_to_all, {share}', {})
      for processes in PROCESSES[1:]:
        add(routed, str(processes), runs.rate(config, share, processes, 'all_to_all'), f'{what}, all_to_all')


def add(rates: Rates, key: str, rate: float, what: str) -> None:
  """Keeps and tells a rate."""
  rates.setdefault(key, []).append(rate)
  common.say(f'{what}, {key}: {rate:,.0f} samples/s')


def measure_networks(runs: Runs, config: str, share: int) -> dict[str, Any]:
  """{'costs': ..., 'speed': network -> rates}; {'skipped': why} where there are no namespaces."""
  out: dict[str, Any] = {'config': config, 'share': share, 'speed': {}}
  try:
    with namespaces(2, Network()) as inside:
      out['costs'] = runs.costs(inside)
    for network, processes in itertools.product(NETWORKS, PROCESSES[1:]):
      with namespaces(processes, network) as inside:
        rate = runs.rate(config, share, processes, inside=inside)
      add(out['speed'].setdefault(str(network), {}), str(processes), rate, f'network of {network}')
  except Unavailable as error:
    return {'skipped': f'no network namespaces: {error}'}
  return out


def predictions(record: dict[str, Any]) -> list[dict[str, Any]]:
  """Samples/s by the model, with those measured where they were: processes of this machine, then machines."""
  out, on_network = [], record['network']
  for key, of in record['speed'].items():
    for processes in PROCESSES[1:]:
      out.append(predict(record, key, processes, 'loopback', Network(), of[str(processes)]))
  for network in NETWORKS:
    for processes, rates in on_network.get('speed', {}).get(str(network), {}).items():
      key = f'{on_network["config"]}, gather, {on_network["share"]}'
      out.append(predict(record, key, int(processes), 'namespaces', network, rates))
  for key, processes, exchange in itertools.product(record['speed'], record['devices'], EXCHANGES):
    config, of_key, share = key.split(', ')
    known = str(processes) in record['collectives'].get(f'{of_parts(config)}, {exchange}', {})
    if known and processes > PROCESSES[-1] and of_key == 'gather':
      out.append(predict(record, f'{config}, {exchange}, {share}', processes, 'machines', NETWORKS[-1], ()))
  return out


def predict(
  record: dict[str, Any], key: str, processes: int, where: str, network: Network, rates: Sequence[float]
) -> dict[str, Any]:
  """A row of `predictions`. key: config, exchange and share; where: loopback, namespaces or machines of one core."""
  config, exchange, share = key.split(', ')
  parts, alone = f'{of_parts(config)}, {exchange}', record['speed'][f'{config}, gather, {share}']
  # On this machine another process works beside it.
  beside = where != 'machines'
  work = (2 if beside else 1) * int(share) / statistics.median(alone['apart' if beside else '1'])
  tables = {int(count): seconds for count, seconds in record['tables'][parts].items()}
  costs = record['network' if where == 'namespaces' else 'loopback']['costs']
  seconds = scaling_model.step_seconds(
    work + scaling_model.growth(tables, processes) * int(share) / TABLES_SHARE,
    record['collectives'][parts][str(processes)][share], {kind: Cost(*cost) for kind, cost in costs.items()},
    processes, record['machine']['cores'] if beside else processes, network,
  )  # fmt: skip
  predicted, measured = processes * int(share) / seconds, statistics.median(rates) if rates else None
  return {
    'config': config, 'exchange': exchange, 'share': int(share), 'processes': processes, 'where': where,
    'network': str(network), 'predicted': predicted, 'measured': measured,
    'error': predicted / measured - 1 if measured else None,
  }  # fmt: skip


def render(record: dict[str, Any]) -> str:
  """Tables in Markdown."""
  predicted = predictions(record)
  skipped = record['network'].get('skipped')
  parts = [render_speed(record['speed']), render_model(predicted), skipped, render_carried(record['collectives'])]
  return '\n\n'.join([*filter(None, parts), render_frameworks(record, predicted)])


def render_speed(speed: dict[str, Rates]) -> str:
  """Samples/s measured on this machine."""
  rows = []
  for key, of in speed.items():
    medians = {number: statistics.median(rates) for number, rates in of.items()}
    one, two, four, apart = (medians.get(number, math.nan) for number in ('1', '2', '4', 'apart'))
    rates = [*map('{:,.0f}'.format, (one, two, four, apart)), f'{two / one:.2f}', f'{four / two:.2f}']
    rows.append([*key.split(', '), *(rate.replace('nan', '') for rate in rates)])
  header = ['config', 'exchange', 'examples of a process', '1 process', '2', '4', '2 apart', '2 : 1', '4 : 2']
  return common.table(header, rows)


def render_model(predicted: Sequence[dict[str, Any]]) -> str:
  """The model beside what was measured."""
  number = lambda value, form: '' if value is None else format(value, form)
  rows = [
    [row['config'], row['exchange'], str(row['share']), f'{row["processes"]}, {row["where"]}', row['network'],
     *(number(row[name], form) for name, form in (('measured', ',.0f'), ('predicted', ',.0f'), ('error', '+.0%')))]
    for row in predicted
  ]  # fmt: skip
  header = ['config', 'exchange', 'examples of a process', 'processes', 'network', 'measured', 'predicted', 'error']
  return common.table(header, rows)


def render_carried(collectives_: dict[str, dict[str, dict[str, scaling_model.Carried]]]) -> str:
  """What a step's collectives carry."""
  rows = [
    [*name.split(', '), devices, share, *(f'{of[kind]["times"]} x, {of[kind]["bytes"] / 1e6:.2f} MB' if kind in of else ''
                                   for kind in KINDS)]
    for name, by_devices in collectives_.items() for devices, by_share in by_devices.items()
    for share, of in by_share.items()
  ]  # fmt: skip
  return common.table(['config', 'exchange', 'devices', 'examples of a device', *KINDS], rows)


def render_frameworks(record: dict[str, Any], predicted: Sequence[dict[str, Any]]) -> str:
  """The seed's table of distributed training, with the smallest share, and the exchange that `auto` takes."""
  share, rows = min(row['share'] for row in predicted), []
  places = dict.fromkeys((row['processes'], row['where']) for row in predicted if row['where'] != 'namespaces')
  for processes, where in sorted(places):
    first = None
    for config, (framework, dtype) in FRAMEWORKS.items():
      key = {'config': config, 'share': share, 'processes': processes, 'where': where}
      found = [row for row in predicted if key.items() <= row.items()]
      if not found:
        continue
      # From 8 devices on `auto` is the second; where the tables cannot be cut there is only the last.
      row = next((row for row in found if row['exchange'] == 'all_to_all' and where == 'machines'), found[0])
      rate, how = (row['measured'], 'measured') if row['measured'] else (row['predicted'], 'predicted')
      first = first or rate
      place = f'{processes} machines of one core, {row["network"]}' if where == 'machines' else f'{processes} processes'
      ratio = 'baseline' if rate == first else f'{rate / first:.2f}x'
      rows.append([place, framework, 'gloo', row['exchange'], dtype, f'{rate:,.0f} ({ratio})', how])
  header = ['test environment', 'framework', 'protocol', 'exchange', 'dtype', 'throughput, samples/s', '']
  return common.table(header, rows)


def main(argv: Sequence[str]) -> None:
  """Measures, writes a record, prints tables."""
  parser = common.parser('scaling', __doc__)
  parser.set_defaults(buckets=10_000)
  parser.add_argument('--data', type=Path, default=Path('data'), help='folder with train.csv (data)')
  words = lambda text: tuple(text.split(','))
  parser.add_argument('--configs', type=words, default=tuple(FRAMEWORKS), help=','.join(FRAMEWORKS))
  parser.add_argument('--shares', type=common.numbers, default=(512, 2048), help='examples of a process (512,2048)')
  parser.add_argument('--samples', type=int, default=65_536, help='timed, of a process in a run (65,536)')
  parser.add_argument('--repetitions', type=int, default=2, help='interleaved (2)')
  text = 'processes that the model is asked for (2,4,10,96,100)'
  parser.add_argument('--devices', type=common.numbers, default=(2, 4, 10, 96, 100), help=text)
  args = parser.parse_args(argv)
  data = common.check_data(args.data, 'train.csv')
  record: dict[str, Any] = {
    'machine': common.about_machine(None), 'load_before': common.load_before(), 'data': common.about_data(data),
    'buckets': args.buckets, 'samples': args.samples, 'devices': args.devices, 'speed': {},
  }  # fmt: skip
  runs = Runs(data, args.buckets, args.samples)
  with tempfile.TemporaryDirectory() as cache, common.variables(COMPILE_ONCE | {'JAX_COMPILATION_CACHE_DIR': cache}):
    try:
      for repetition in range(args.repetitions):
        measure_speed(runs, args.configs, args.shares, not repetition, record['speed'])
      record['loopback'] = {'costs': runs.costs()}
      record['network'] = measure_networks(runs, 'base', args.shares[0])
      record |= measure_parts(runs, args.configs, args.shares, args.devices, data)
    except common.Failed as error:
      raise SystemExit(f'error: {error}') from None
  record['predictions'] = predictions(record)
  common.finish('scaling', record, render(record), args.record)


if __name__ == '__main__':
  main(sys.argv[1:])
