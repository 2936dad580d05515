"""What a step of P processes should take, from parts that were measured alone.

  seconds = crowd * (work + tables + times * (P - 1) * message + sent * byte) + times * delay + sent / bandwidth

- crowd: processes of a core, where there are more of them than cores; else 1.
- work: a step of one process that knows of no other, beside as many others as share its machine.
- tables: by how much the tables' part of a step grows among P devices, measured with P devices in one process. With
  `gather` every device answers the lookups of all, so it grows with P.
- times: all-to-alls of a step, which of two processes are permutes; nothing else is sent. In each a process sends P - 1
  messages at once, and waits once.
- sent: (P - 1) / P of what they give.
- message, byte: what a message and a byte sent cost the cores; from two processes that do nothing else.
- delay, bandwidth: of the network, one way; of what a process sends.

What it leaves out: that processes wait for the slowest, and whatever of sending could go on beside computing.
"""

import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

NUMBER = {'f32': 4, 's32': 4, 'u32': 4, 'bf16': 2, 'u16': 2, 'pred': 1}
SELDOM = 'further_rounds'  # that of embeddings/exchange.py, which would start JAX before its devices are known
# An operation of XLA's that devices do together, with its results: a shape, or several in parentheses.
COLLECTIVE = re.compile(
  r'= (\([^()]*\)|[^() ]+) (all-reduce|all-gather|reduce-scatter|collective-permute|all-to-all)(?:-start)?\('
)
SHAPE = re.compile(r'(\w+)\[([\d,]*)\]')
COMPUTATION = re.compile(r'^(ENTRY )?%?([\w.-]+) [^\n]*\{\n(.*?)^\}', re.MULTILINE | re.DOTALL)
CALLED = re.compile(r'(?:body|to_apply|calls)=%?([\w.-]+)')
# What `Axis` uses, and how often its result counts: a permute's is half of an all-to-all's.
COUNTS = {'all-to-all': 1, 'collective-permute': 2}


class Carried(NamedTuple):
  """By the all-to-alls of a step. A permute of two devices is one without what a device would send to itself."""

  times: int
  bytes: int  # of their results


class Cost(NamedTuple):
  """Seconds that an all-to-all costs the cores."""

  message: float
  byte: float


class Network(NamedTuple):
  """What lies between two processes."""

  bandwidth: float = math.inf  # bytes/s that a process can send
  delay: float = 0.0  # seconds, one way

  def __str__(self) -> str:
    rate = f'{self.bandwidth * 8e-9:g} Gbit/s' if math.isfinite(self.bandwidth) else 'no limit'
    return f'{rate}, {self.delay * 1e3:g} ms'


def count(program: str) -> Carried:
  """Of the text of a compiled program. A loop counts once, and what `exchange.SELDOM` names not at all.

  ValueError if devices do anything else together.
  """
  bodies = {name: body for _, name, body in COMPUTATION.findall(program)}
  (entry,) = [name for is_entry, name, _ in COMPUTATION.findall(program) if is_entry]

  def of(name: str) -> Iterator[tuple[str, int]]:
    """The shapes of results, and how often they count."""
    for line in bodies[name].splitlines():
      if SELDOM in line:
        continue
      for shapes, kind in COLLECTIVE.findall(line):
        if kind not in COUNTS:
          raise ValueError(f'{kind}: the model knows of {" and ".join(COUNTS)} alone')
        yield shapes, COUNTS[kind]
        break
      else:
        for called in CALLED.findall(line):
          yield from of(called)

  results = list(of(entry))
  size = lambda number, axes: NUMBER[number] * math.prod(int(axis) for axis in axes.split(',') if axis)
  return Carried(len(results), sum(n * size(*shape) for shapes, n in results for shape in SHAPE.findall(shapes)))


def sent(result: float, processes: int) -> float:
  """Bytes that a process sends for so many bytes of results."""
  return result * (processes - 1) / processes


def fit(small: tuple[float, float], large: tuple[float, float]) -> Cost:
  """From (bytes of the result, seconds) of two sizes of an all-to-all between two processes."""
  low, high = (sent(result, 2) for result, _ in (small, large))
  byte = max(0.0, (large[1] - small[1]) / (high - low))
  return Cost(max(0.0, small[1] - low * byte), byte)


def step_seconds(work: float, carried: Carried, cost: Cost, processes: int, cores: int, network: Network) -> float:
  """See the top of the file. work: with the tables' growth; cores: for all the processes together."""
  size = sent(carried.bytes, processes)
  own = carried.times * (processes - 1) * cost.message + size * cost.byte
  wire = carried.times * network.delay + size / network.bandwidth
  return max(1.0, processes / cores) * (work + own) + wire


def growth(seconds: Mapping[int, float], devices: int) -> float:
  """Seconds more than on one device: as measured, or on the line through the two largest numbers of devices."""
  if devices in seconds:
    return seconds[devices] - seconds[1]
  low, high = sorted(seconds)[-2:]
  slope = (seconds[high] - seconds[low]) / (high - low)
  return seconds[high] + slope * (devices - high) - seconds[1]
