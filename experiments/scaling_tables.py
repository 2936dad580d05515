"""The model of scaling_model.py beside what scaling.py measured, as tables."""

import itertools
import math
import statistics
from collections.abc import Sequence
from typing import Any

from experiments import common, scaling_model
from experiments.scaling_model import Carried, Cost, Network
from experiments.scaling_parts import TABLES_SHARE

CORES = 2  # that all processes of this machine divide, however many it has
PROCESSES = (1, 2, 4)
# The first is what `auto` takes; none: every process holds all tables.
EXCHANGES = ('all_to_all', 'gather', 'none')
# The first shows what the namespaces cost; the last is that of the machines predicted, too.
NETWORKS = (Network(), Network(1e9 / 8), Network(1e9 / 8, 0.5e-3), Network(10e9 / 8, 0.1e-3))
# The rows of the seed's table of distributed training.
FRAMEWORKS = {
  'baseline': ("dlrm_jax, the community's settings", 'FP32'), 'base': ('dlrm_jax', 'FP32'),
  'bf16': ('dlrm_jax', 'FP32+BF16'),
}  # fmt: skip
Rates = dict[str, list[float]]  # samples/s of all processes together, by their number


def predictions(record: dict[str, Any]) -> list[dict[str, Any]]:
  """Samples/s by the model, with those measured where they were: processes of this machine, then machines."""
  out, on_network = [], record['network']
  for key, of in record['speed'].items():
    for processes in PROCESSES[1:]:
      out.append(predict(record, key, processes, 'loopback', Network(), of[str(processes)]))
  for network in NETWORKS:
    for processes, rates in on_network.get('speed', {}).get(str(network), {}).items():
      key = f'{on_network["config"]}, {EXCHANGES[0]}, {on_network["share"]}'
      out.append(predict(record, key, int(processes), 'namespaces', network, rates))
  for key, processes, exchange in itertools.product(record['speed'], record['devices'], EXCHANGES):
    config, of_key, share = key.split(', ')
    known = str(processes) in record['collectives'].get(f'{config}, {exchange}', {})
    if known and processes > PROCESSES[-1] and of_key == EXCHANGES[0]:
      out.append(predict(record, f'{config}, {exchange}, {share}', processes, 'machines', NETWORKS[-1], ()))
  return out


def predict(
  record: dict[str, Any], key: str, processes: int, where: str, network: Network, rates: Sequence[float]
) -> dict[str, Any]:
  """A row of `predictions`. key: config, exchange and share; where: loopback, namespaces or machines of one core."""
  config, exchange, share = key.split(', ')
  alone = record['speed'][f'{config}, {EXCHANGES[0]}, {share}']
  # On this machine another process works beside it.
  beside = where != 'machines'
  work = (2 if beside else 1) * int(share) / statistics.median(alone['apart' if beside else '1'])
  tables = {int(count): seconds for count, seconds in record['tables'][f'{of_tables(config)}, {exchange}'].items()}
  cost = Cost(*record['network' if where == 'namespaces' else 'loopback']['cost'])
  seconds = scaling_model.step_seconds(
    work + scaling_model.growth(tables, processes) * int(share) / TABLES_SHARE,
    Carried(*record['collectives'][f'{config}, {exchange}'][str(processes)][share]), cost, processes,
    CORES if beside else processes, network,
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


def render_carried(collectives: dict[str, dict[str, dict[str, Sequence[int]]]]) -> str:
  """What a step sends."""
  rows = [
    [*name.split(', '), devices, share, str(carried.times), f'{carried.bytes / 1e6:.2f}']
    for name, by_devices in collectives.items() for devices, by_share in by_devices.items()
    for share, carried in ((share, Carried(*of)) for share, of in by_share.items())
  ]  # fmt: skip
  return common.table(['config', 'exchange', 'devices', 'examples of a device', 'all-to-alls', 'MB received'], rows)


def render_frameworks(record: dict[str, Any], predicted: Sequence[dict[str, Any]]) -> str:
  """The seed's table of distributed training, with the smallest share, and the first exchange that there is."""
  share, rows = min(row['share'] for row in predicted), []
  places = dict.fromkeys((row['processes'], row['where']) for row in predicted if row['where'] != 'namespaces')
  for processes, where in sorted(places):
    first = None
    for config, (framework, dtype) in FRAMEWORKS.items():
      key = {'config': config, 'share': share, 'processes': processes, 'where': where}
      found = [row for row in predicted if key.items() <= row.items()]
      if not found:
        continue
      row = min(found, key=lambda row: EXCHANGES.index(row['exchange']))
      rate, how = (row['measured'], 'measured') if row['measured'] else (row['predicted'], 'predicted')
      first = first or rate
      place = f'{processes} machines of one core, {row["network"]}' if where == 'machines' else f'{processes} processes'
      ratio = 'baseline' if rate == first else f'{rate / first:.2f}x'
      rows.append([place, framework, 'gloo', row['exchange'], dtype, f'{rate:,.0f} ({ratio})', how])
  header = ['test environment', 'framework', 'protocol', 'exchange', 'dtype', 'throughput, samples/s', '']
  return common.table(header, rows)


def of_tables(config: str) -> str:
  """The config that has the same tables."""
  return 'base' if config == 'bf16' else config
