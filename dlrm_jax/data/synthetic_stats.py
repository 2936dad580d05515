"""The vectorised pieces of the synthetic world: hashes, categorical distributions, levels of a hierarchy, integers.

All constants are aggregates of the public Criteo data set or were fitted to such aggregates
(`experiments/calibrate_synthetic.py` wrote `synthetic_constants.json`); no row and no id of the data is in them.
"""

import dataclasses
import functools
import json
import pathlib
import statistics

import numpy as np

INTEGERS = tuple(f'I{i}' for i in range(1, 14))
CATEGORIES = tuple(f'C{i}' for i in range(1, 27))
_BINS = 512  # of an alias table: nine bits choose the bin
_STEPS = 4096  # of the tables of the normal distribution
_Z_MAX = 5.0

Bits = np.ndarray  # u64[n]
Numbers = np.ndarray  # u32[n]


def constants() -> dict:
  """The fitted constants, read once from the file beside this module."""
  return _constants()


@functools.cache
def _constants() -> dict:
  return json.loads(pathlib.Path(__file__).with_name('synthetic_constants.json').read_text())


def hash32(x: Numbers, salt: int) -> Numbers:
  """A bijection of 32 bits for each salt, so that different numbers never get the same id.

  Source: the "lowbias32" mixer, github.com/skeeto/hash-prospector.
  """
  x = x ^ np.uint32(salt * 0x9E3779B9 & 0xFFFFFFFF)
  x ^= x >> np.uint32(16)
  x *= np.uint32(0x7FEB352D)
  x ^= x >> np.uint32(15)
  x *= np.uint32(0x846CA68B)
  x ^= x >> np.uint32(16)
  return x


def hash64(x: Numbers, salt: int) -> Bits:
  """64 random-looking bits of (number, salt). Source: the finaliser of SplitMix64, Steele, Lea and Flood 2014."""
  z = x.astype(np.uint64)
  z += np.uint64(salt << 32)
  z *= np.uint64(0x9E3779B97F4A7C15)
  z ^= z >> np.uint64(30)
  z *= np.uint64(0xBF58476D1CE4E5B9)
  z ^= z >> np.uint64(27)
  z *= np.uint64(0x94D049BB133111EB)
  z ^= z >> np.uint64(31)
  return z


@functools.cache
def normal_table() -> np.ndarray:
  """f32[4096]: quantiles of the normal distribution, so that twelve bits give one normal number."""
  inverse = statistics.NormalDist().inv_cdf
  return np.array([inverse((i + 0.5) / _STEPS) for i in range(_STEPS)], np.float32)


def normals(bits: Bits, count: int) -> list[np.ndarray]:
  """Up to five independent standard normal arrays f32[n] from 64 bits each."""
  table = normal_table()
  return [table[(bits >> np.uint64(12 * i)) & np.uint64(_STEPS - 1)] for i in range(count)]


def bin_edges(size: int) -> np.ndarray:
  """i64[bins + 1]: the numbers 1..size in bins, one number each up to 32, then twelve bins an octave."""
  edges, x = list(range(1, 33)), 32.0
  while edges[-1] < size + 1:
    x *= 2 ** (1 / 12)
    if round(x) > edges[-1]:
      edges.append(min(round(x), size + 1))
  return np.array([e for e in edges if e <= size + 1])


def log_interpolate(edges: np.ndarray, knots: list[float], values: list[float]) -> np.ndarray:
  """f64[bins]: a piecewise linear function of the logarithm of the number, at the (geometric) middle of each bin."""
  middle = np.sqrt(edges[:-1] * (edges[1:] - 1.0))
  return np.interp(np.log(middle), np.log(knots), values)


@dataclasses.dataclass(frozen=True)
class Discrete:
  """A distribution over the numbers 1..size, sampled in constant time by Walker's alias method over bins.

  first, width: u32[512] the numbers in a bin, equally likely; threshold: u32[512] out of 2^23; alias: i64[512].
  """

  first: np.ndarray
  width: np.ndarray
  threshold: np.ndarray
  alias: np.ndarray

  @classmethod
  def build(cls, edges: np.ndarray, knots: list[float], log_density: list[float]) -> 'Discrete':
    """From the logarithm of the (not normalised) probability of one number at some knots; 0 beyond the last knot."""
    width = np.diff(edges)
    mass = np.exp(log_interpolate(edges, knots, log_density)) * width
    mass[np.sqrt(edges[:-1] * (edges[1:] - 1.0)) > knots[-1]] = 0
    pad = _BINS - len(width)
    share = np.pad(mass / mass.sum() * _BINS, (0, pad))
    threshold, alias = _alias(share)
    first = np.pad(edges[:-1], (0, pad), constant_values=1)
    return cls(first.astype(np.uint32), np.pad(width, (0, pad), constant_values=1).astype(np.uint64), threshold, alias)

  def draw(self, bits: Bits) -> tuple[Numbers, np.ndarray]:
    """One number u32[n] and its bin i64[n] for each of the random words."""
    slot = (bits >> np.uint64(55)).astype(np.int64)
    coin = (bits >> np.uint64(32)).astype(np.uint32) & np.uint32(0x7FFFFF)
    bin_ = np.where(coin < self.threshold[slot], slot, self.alias[slot])
    within = ((bits & np.uint64(0xFFFFFFFF)) * self.width[bin_]) >> np.uint64(32)
    return self.first[bin_] + within.astype(np.uint32), bin_


def _alias(share: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Threshold (of 2^23) and alias of each slot from the shares, whose mean is 1."""
  share, alias = share.copy(), np.arange(len(share))
  threshold = np.full(len(share), 1.0)
  small, large = list(np.flatnonzero(share < 1)), list(np.flatnonzero(share >= 1))
  while small and large:
    s, l = small.pop(), large.pop()
    threshold[s], alias[s] = share[s], l
    share[l] -= 1 - share[s]
    (small if share[l] < 1 else large).append(l)
  return np.round(threshold * 2**23).astype(np.uint32), alias


@dataclasses.dataclass(frozen=True)
class Level:
  """A map from the numbers of a column to those of the next coarser one, the same for every row.

  A number either keeps its identity (with a probability by bin) or joins a parent that its hash draws.
  """

  salt: int
  keep: np.ndarray  # u32[512], out of 2^16
  parents: Discrete

  @classmethod
  def build(cls, salt: int, edges: np.ndarray, level: dict) -> 'Level':
    """From the fitted logits of keeping and the density of the parents."""
    logit = log_interpolate(edges, level['keep_knots'], level['keep'])
    keep = np.where(edges[:-1] < level['keep_knots'][0], 1.0, 1 / (1 + np.exp(-logit)))
    keep = np.pad(np.round(keep * 2**16), (0, _BINS - len(keep))).astype(np.uint32)
    return cls(salt, keep, Discrete.build(edges, level['knots'], level['log_density']))

  def __call__(self, number: Numbers, bin_: np.ndarray) -> tuple[Numbers, np.ndarray]:
    """Parent number u32[n] and its bin."""
    parent, parent_bin = self.parents.draw(hash64(number, self.salt))
    keeps = (hash32(number, self.salt) >> np.uint32(16)) < self.keep[bin_]
    return np.where(keeps, number, parent), np.where(keeps, bin_, parent_bin)


@dataclasses.dataclass(frozen=True)
class Quantiles:
  """An integer column as a function of a standard normal number: floor of a piecewise linear quantile function."""

  value: np.ndarray  # f64[4097] over [-5, 5]

  @classmethod
  def build(cls, stats: dict) -> 'Quantiles':
    """From quantiles and the shares of negative numbers and of zeros (of the present values)."""
    inverse = statistics.NormalDist().inv_cdf
    points = {_Z_MAX: stats['quantiles']['1'] + 0.5}
    low = stats['quantiles']['0']
    for probability, value in stats['quantiles'].items():
      p = float(probability)
      if 0 < p < 1 and value >= 1:
        points[inverse(p)] = value + (0.5 if value < 20 else 0.0)
    negative, zero = stats['share_negative'], stats['share_zero']
    start = [(-_Z_MAX, low)]
    if negative:
      start += [(inverse(negative * 0.06), -1.0), (inverse(negative), -1e-6), (inverse(negative) + 1e-6, 0.0)]
    boundary = inverse(negative + zero)
    start += [(boundary - 1e-9, 1 - 1e-6), (boundary, 1.0)]
    points = [(z, v) for z, v in sorted(points.items()) if z > boundary]
    z, v = np.array(start + points).T
    grid = np.linspace(-_Z_MAX, _Z_MAX, _STEPS + 1)
    shift = 1 - low  # the logarithm of what is at least 1
    return cls(np.exp(np.interp(grid, z, np.log(v + shift))) - shift)

  def __call__(self, z: np.ndarray) -> np.ndarray:
    """i32[n] values for the normal numbers f32[n]."""
    x = (np.clip(z, -_Z_MAX, _Z_MAX - 1e-3) + np.float32(_Z_MAX)) * np.float32(_STEPS / (2 * _Z_MAX))
    cell = x.astype(np.int32)
    low = self.value[cell]
    return np.floor(low + (x - cell) * (self.value[cell + 1] - low)).astype(np.int32)
