"""The model of the synthetic rows: see `dlrm_jax.data.synthetic` for what it says in words."""

import dataclasses
import functools

import numpy as np

from dlrm_jax.data import synthetic_stats
from dlrm_jax.data.synthetic_stats import CATEGORIES, INTEGERS, Discrete, Level, Quantiles, hash32, hash64, normals

BLOCK = 1 << 16  # rows drawn from one generator: part of what a seed means
CHAINS = (('C3', 'C12', 'C21', 'C16', 'C4', 'C24'), ('C15', 'C18', 'C2'), ('C7', 'C11', 'C13'))
SINGLE = ('C1', 'C5', 'C6', 'C8', 'C10', 'C17', 'C19', 'C20', 'C22', 'C23', 'C25', 'C26')
_FUNCTIONS = {'C15': 'C14', 'C7': 'C9'}  # a fine id and a column of few values that is a function of it
_ALTERNATIVE = 1 << 30  # this bit marks a second C11 of a C13
_RENEWED = 1 << 31  # this bit marks the id that replaces an older one
RENEWED_SHARE, RENEWED_FROM = 0.15, 64  # of the numbers from this one on
_MASKS = {  # name: columns that are missing together
  'I1': ('I1', 'I10'), 'I3': ('I3',), 'I4': ('I4', 'I13'), 'I5': ('I5',), 'I6': ('I6',), 'I7': ('I7', 'I9', 'I11'),
  'I8': ('I8',), 'I12': ('I12',), 'C3': CHAINS[0], 'C6': ('C6',), 'C19': ('C19', 'C20', 'C25', 'C26'),
  'C22': ('C22',),
}  # fmt: skip
_MASK_OF = {column: mask for mask, columns in _MASKS.items() for column in columns}
_DAYS = 7
# Products of two hidden factors, each (column, factor 0..2) or (integer column, None).
_PRODUCTS = (
  (('C14', 0), ('C17', 0)), (('C17', 1), ('I6', None)), (('C14', 1), ('I5', None)), (('C2', 0), ('I13', None)),
  (('I5', None), ('I13', None)), (('I7', None), ('I3', None)),
)  # fmt: skip
WITH_FACTORS = {column for pair in _PRODUCTS for column, factor in pair if factor is not None}


@dataclasses.dataclass(frozen=True)
class Block:
  """Consecutive rows. integer: i32[13, n]; id: u32[26, n]; missing: bool[39, n]; label: u8[n]; probability: f64[n]."""

  label: np.ndarray
  integer: np.ndarray
  id: np.ndarray
  missing: np.ndarray
  probability: np.ndarray


@dataclasses.dataclass(frozen=True)
class World:
  """The samplers and maps, and the fitted constants."""

  roots: dict[str, Discrete]
  levels: dict[str, Level]
  integers: dict[str, Quantiles]
  constants: dict


def build_world(constants: dict) -> World:
  """The fixed world of the constants."""
  integers = {name: Quantiles.build(constants['integers'][name]) for name in INTEGERS}
  return World(*build_categories(constants), integers, constants)


def build_categories(constants: dict) -> tuple[dict[str, Discrete], dict[str, Level]]:
  """Distribution of each column that is drawn, and map to each coarser column."""
  grids = {name: synthetic_stats.bin_edges(root['size']) for name, root in constants['roots'].items()}
  roots = {
    name: Discrete.build(grids[name], root['knots'], root['log_density']) for name, root in constants['roots'].items()
  }
  levels = {
    name: Level.build(CATEGORIES.index(name) + 100, grids[chain[0]], constants['levels'][name])
    for chain in CHAINS
    for name in chain[1:]
  }
  return roots, levels


@functools.cache
def world() -> World:
  """The world of the committed constants."""
  return build_world(synthetic_stats.constants())


def draw_block(world: World, seed: int, index: int, rows: int, total: int) -> Block:
  """Block `index` (rows from index * BLOCK on) of a file pair with `total` rows: a function of the arguments only."""
  random = np.random.Generator(np.random.SFC64(np.random.SeedSequence([seed, index])))
  time = (index * BLOCK + np.arange(rows)) / total
  inclination = random.standard_normal(rows, dtype=np.float32)
  missing = _draw_missing(world.constants['missing'], random, rows)
  number, effects, factors = {}, np.zeros(rows, np.float32), {}
  for group in (*CHAINS, *((name,) for name in SINGLE)):
    for name, (n, effect, hidden) in draw_group(world, random, group, time, inclination).items():
      number[name] = n
      present = ~missing[_MASK_OF[name]] if name in _MASK_OF else np.True_
      effects += effect * present
      factors[name] = [f * present for f in hidden]
  z = _latent_integers(world.constants, random, inclination)
  integer = np.stack([world.integers[name](z[i]) for i, name in enumerate(INTEGERS)])
  shown = _standardise(world.constants, integer, missing)
  score = effects + _integer_score(world.constants, shown, missing) + _products(world.constants, factors, shown)
  score += world.constants['intercept'] + _rate_over_time(world.constants, time)
  probability = 1 / (1 + np.exp(-score.astype(np.float64)))
  label = (random.random(rows) < probability).astype(np.uint8)
  ids = np.stack([hash32(number[name], i + 1) for i, name in enumerate(CATEGORIES)])
  mask = np.stack([missing.get(_MASK_OF.get(name), np.zeros(rows, bool)) for name in INTEGERS + CATEGORIES])
  return Block(label, integer, ids, mask, probability)


Column = tuple[np.ndarray, np.ndarray | float, list[np.ndarray]]  # number u32[n], main effect and hidden factors f32[n]


def draw_group(world: World, random: np.random.Generator, group: tuple[str, ...], time: np.ndarray,
                inclination: np.ndarray) -> dict[str, Column]:  # fmt: skip
  """The columns of a hierarchy, as if nothing were missing.

  Of two candidates a row inclined to click takes the one with the larger effect, others the one with the smaller: so
  all columns tell partly the same, as in real data, and the distribution of each stays what it was.
  """
  tilt = world.constants['tilt'].get(group[0], 0)  # share of the rows that choose
  candidates = 2 if tilt else 1
  bits = random.integers(0, 2**64, (candidates, len(time)), dtype=np.uint64)
  columns = _columns(world, random, group, bits.ravel(), np.tile(time, candidates))
  if not tilt:
    return columns
  first, second = sum(effect for _, effect, _ in columns.values()).reshape(2, -1)
  swap = ((second > first) == (inclination > 0)) & (random.random(len(time), dtype=np.float32) < tilt)
  pick = np.arange(len(time)) + len(time) * swap
  return {name: (number[pick], effect[pick] if np.ndim(effect) else effect, [h[pick] for h in hidden])
          for name, (number, effect, hidden) in columns.items()}  # fmt: skip


def _columns(world: World, random: np.random.Generator, group: tuple[str, ...], bits: np.ndarray,
             time: np.ndarray) -> dict[str, Column]:  # fmt: skip
  """The columns of a hierarchy from 64 random bits a row."""
  fine = group[0]
  number, bin_ = world.roots[fine].draw(bits)
  if world.constants['roots'][fine]['drifts']:
    number = _renew(number, time, CATEGORIES.index(fine) + 200)
  numbers = {fine: number}
  for name in group[1:]:
    number, bin_ = world.levels[name](number, bin_)
    numbers[name] = number
  if fine in _FUNCTIONS:
    name = _FUNCTIONS[fine]
    numbers[name], _ = world.roots[name].draw(hash64(numbers[fine], CATEGORIES.index(name) + 300))
  if 'C11' in numbers:
    second = (hash32(numbers['C13'], 400) & np.uint32(15)) == 0
    second &= random.random(len(time), dtype=np.float32) < world.constants['alternative_share']
    numbers['C11'] = np.where(second, numbers['C13'] | np.uint32(_ALTERNATIVE), numbers['C11'])
  return {name: (number, *_effects(world.constants, name, number)) for name, number in numbers.items()}


def _effects(c: dict, name: str, number: np.ndarray) -> tuple[np.ndarray | float, list[np.ndarray]]:
  """Main effect f32[n] of the ids of a column, and their hidden factors where products need them."""
  if name not in c['effects']:
    return 0.0, []
  effect = c['effects'][name]
  normal = normals(hash64(number, CATEGORIES.index(name) + 600), 4 if name in WITH_FACTORS else 1)
  rank = (number & np.uint32(_ALTERNATIVE - 1)).astype(np.float32)
  # Rare ids differ less from each other (nothing could be learned about them) but as a group from the frequent ones.
  main = np.float32(effect['scale']) / np.sqrt(1 + rank / np.float32(effect['half_rank'])) * normal[0]
  if effect['trend']:
    main += np.float32(effect['trend'] / 5) * (6 - np.log(rank))
  hidden = zip(normal[1:], effect.get('factors', ()), strict=False)
  return main, [(factor - np.float32(mean)) / np.float32(std) for factor, (mean, std) in hidden]


def _renew(number: np.ndarray, time: np.ndarray, salt: int) -> np.ndarray:
  """Some numbers become another id at a moment of their own."""
  h = hash32(number, salt)
  renewed = (h & np.uint32(0xFF)) < 256 * RENEWED_SHARE
  renewed &= (h >> np.uint32(8)) < time * 2**24
  renewed &= number >= RENEWED_FROM
  return np.where(renewed, number | np.uint32(_RENEWED), number)


def _draw_missing(rates: dict, random: np.random.Generator, rows: int) -> dict[str, np.ndarray]:
  """bool[n] for each mask. I5 and I7 are missing only where I6 is; I1 follows I6 and I4 follows I3."""
  u = dict(zip(_MASKS, random.random((len(_MASKS), rows), dtype=np.float32), strict=True))
  missing = {name: u[name] < rates[name] for name in ('I3', 'I6', 'I8', 'I12', 'C3', 'C6', 'C19', 'C22')}
  for name, leader in (('I1', 'I6'), ('I4', 'I3'), ('I5', 'I6'), ('I7', 'I6')):
    with_leader, without = rates[name]
    missing[name] = u[name] < np.where(missing[leader], np.float32(with_leader), np.float32(without))
  return missing


def _latent_integers(c: dict, random: np.random.Generator, inclination: np.ndarray) -> np.ndarray:
  """f32[13, n] standard normal numbers with the fitted correlations among them and with the inclination to click."""
  noise = random.standard_normal((len(INTEGERS), len(inclination)), dtype=np.float32)
  z = np.multiply.outer(np.asarray(c['lean'], np.float32), inclination)
  for i, weights in enumerate(np.asarray(c['factor'], np.float32)):  # lower triangular
    for j in range(i + 1):  # not a matrix product: BLAS would start threads, and round as its machine likes
      z[i] += weights[j] * noise[j]
  return z


def _standardise(c: dict, integer: np.ndarray, missing: dict) -> dict[str, np.ndarray]:
  """log(1 + value) with mean 0 and variance 1, and 0 where missing: all that the score sees of the integers."""
  shown = {}
  for name, value in zip(INTEGERS, integer, strict=True):
    x = np.log1p(np.maximum(value, 0).astype(np.float32))
    x = (x - np.float32(c['integers'][name]['log1p_mean'])) / np.float32(c['integers'][name]['log1p_std'])
    shown[name] = np.where(missing[_MASK_OF[name]], np.float32(0), x) if name in _MASK_OF else x
  return shown


def _integer_score(c: dict, shown: dict, missing: dict) -> np.ndarray:
  """f32[n]: linear in the standardised integers, plus an effect of each mask."""
  score = sum(np.float32(c['slopes'][name]) * shown[name] for name in INTEGERS)
  return score + sum(np.float32(effect) * missing[mask] for mask, effect in c['mask_effects'].items())


def _products(c: dict, factors: dict, shown: dict) -> np.ndarray:
  """f32[n]: the interactions; no single column tells anything about them."""

  def factor(column: str, which: int | None) -> np.ndarray:
    return np.clip(shown[column], -2, 2) if which is None else factors[column][which]

  return np.float32(c['product_scale']) * sum(factor(*a) * factor(*b) for a, b in _PRODUCTS)


def _rate_over_time(c: dict, time: np.ndarray) -> np.ndarray:
  """f64[n]: the click rate is lowest at the start of each of seven days."""
  return -c['daily_swing'] * np.cos(2 * np.pi * _DAYS * time)
