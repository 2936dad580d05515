"""What a step of P processes should take, from parts that were measured alone.

  seconds = crowd * (work + tables + sum over collectives of (messages * message + sent * byte))
          + sum over collectives of (rounds * delay + sent / bandwidth)

- crowd: processes of a core, where there are more of them than cores; else 1.
- work: a step of one process that knows of no other, beside as many others as share its machine.
- tables: by how much the tables' part of a step grows among P devices, measured with P devices in one process. With
  `gather` every device answers the lookups of all, so it grows with P.
- message, byte: what a message and a byte sent cost the cores, by kind; from two processes that do nothing else.
- messages, rounds, sent: of gloo's algorithms; rounds are messages that wait for the one before. All-reduce and
  all-gather are rings, reduce-scatter halves, and an all-to-all sends all its messages at once.
- delay, bandwidth: of the network, one way; of what a process sends.

What it leaves out: that processes wait for the slowest, and whatever of sending could go on beside computing.
"""

import math
import re
from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

NUMBER = {'f32': 4, 's32': 4, 'u32': 4, 'bf16': 2, 'u16': 2, 'pred': 1}
SELDOM = 'further_rounds'  # that of embeddings/exchange.py, which would start JAX before its devices are known
KINDS = ('all-reduce', 'all-gather', 'reduce-scatter', 'all-to-all')
# An operation of XLA's that devices do together, with its results: a shape, or several in parentheses.
COLLECTIVE = re.compile(rf'= (\([^()]*\)|[^() ]+) ({"|".join(KINDS)})(?:-start)?\(')
SHAPE = re.compile(r'(\w+)\[([\d,]*)\]')
COMPUTATION = re.compile(r'^(ENTRY )?%?([\w.-]+) [^\n]*\{\n(.*?)^\}', re.MULTILINE | re.DOTALL)
CALLED = re.compile(r'(?:body|to_apply|calls)=%?([\w.-]+)')
BRANCHES = re.compile(r'branch_computations=\{([^}]*)\}|true_computation=(\S+), false_computation=([^\s,]+)')

Carried = Mapping[str, Mapping[str, float]]  # kind -> {'times', 'bytes'} of a step, by the results


class Cost(NamedTuple):
  """Seconds that a collective costs the cores."""

  message: float
  byte: float


class Network(NamedTuple):
  """What lies between two processes."""

  bandwidth: float = math.inf  # bytes/s that a process can send
  delay: float = 0.0  # seconds, one way

  def __str__(self) -> str:
    rate = f'{self.bandwidth * 8e-9:g} Gbit/s' if math.isfinite(self.bandwidth) else 'no limit'
    return f'{rate}, {self.delay * 1e3:g} ms'


def count(program: str) -> dict[str, dict[str, int]]:
  """Kind -> {'times', 'bytes'} of a step's collectives, by their results, in the text of a compiled program.

  A loop counts once, of a condition's branches the one that sends most, and what `exchange.SELDOM` names not at all.
  """
  bodies = {name: body for _, name, body in COMPUTATION.findall(program)}
  (entry,) = [name for is_entry, name, _ in COMPUTATION.findall(program) if is_entry]

  def of(name: str) -> Counter:
    found: Counter = Counter()
    for line in bodies[name].splitlines():
      if SELDOM in line:
        continue
      for shapes, kind in COLLECTIVE.findall(line):
        found[kind, 'times'] += 1
        for number, axes in SHAPE.findall(shapes):
          found[kind, 'bytes'] += NUMBER[number] * math.prod(int(axis) for axis in axes.split(',') if axis)
        break
      else:
        found.update(sum((of(called) for called in CALLED.findall(line)), Counter()))
        for branches in BRANCHES.findall(line):
          names = [name.strip(' %') for name in ','.join(branches).split(',') if name.strip()]
          found.update(max((of(name) for name in names), key=lambda each: each.total()))
    return found

  all_ = of(entry)
  return {kind: {what: all_[kind, what] for what in ('times', 'bytes')} for kind in KINDS if all_[kind, 'times']}


def messages(kind: str, processes: int) -> int:
  """That a process sends in a collective."""
  halvings = math.ceil(math.log2(processes))
  of_ring = processes - 1
  return {'all-reduce': 2 * of_ring, 'all-gather': of_ring, 'reduce-scatter': halvings, 'all-to-all': of_ring}[kind]


def rounds(kind: str, processes: int) -> int:
  """Of them, those that wait for the one before."""
  return 1 if kind == 'all-to-all' else messages(kind, processes)


def sent(kind: str, result: float, processes: int) -> float:
  """Bytes that a process sends for so many bytes of results."""
  others = processes - 1
  part = {'all-reduce': 2 * others / processes, 'reduce-scatter': others}
  return result * part.get(kind, others / processes)


def fit(kind: str, small: tuple[float, float], large: tuple[float, float]) -> Cost:
  """From (bytes of the result, seconds) of two sizes of a collective between two processes."""
  low, high = (sent(kind, result, 2) for result, _ in (small, large))
  byte = max(0.0, (large[1] - small[1]) / (high - low))
  return Cost(max(0.0, small[1] - low * byte) / messages(kind, 2), byte)


def collectives_seconds(
  carried: Carried, costs: Mapping[str, Cost], processes: int, network: Network
) -> tuple[float, float]:
  """Seconds of the cores, and of the network, for what the collectives of a step carry."""
  cores = wire = 0.0
  for kind, of in carried.items():
    size = sent(kind, of['bytes'], processes)
    cores += of['times'] * messages(kind, processes) * costs[kind].message + size * costs[kind].byte
    wire += of['times'] * rounds(kind, processes) * network.delay + size / network.bandwidth
  return cores, wire


def step_seconds(
  work: float, carried: Carried, costs: Mapping[str, Cost], processes: int, cores: int, network: Network
) -> float:
  """See the top of the file. work: with the tables' growth; cores: for all the processes together."""
  own, wire = collectives_seconds(carried, costs, processes, network)
  return max(1.0, processes / cores) * (work + own) + wire


def growth(seconds: Mapping[int, float], devices: int) -> float:
  """Seconds more than on one device: as measured, or on the line through the two largest numbers of devices."""
  if devices in seconds:
    return seconds[devices] - seconds[1]
  low, high = sorted(seconds)[-2:]
  slope = (seconds[high] - seconds[low]) / (high - low)
  return seconds[high] + slope * (devices - high) - seconds[1]
