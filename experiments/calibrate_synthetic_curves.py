"""Fits the distributions and hierarchies of the synthetic categories to published counts, for calibrate_synthetic.py.

The density of each column's numbers, and for each level of a hierarchy what share of the numbers keeps its identity
and the density of the parents of the others: least squares on analytic expectations of the published statistics
(coverage of the commonest values and distinct values in a sample of 35,565 rows; distinct values in 8M and 45.8M).
"""

import numpy as np
from scipy.optimize import least_squares
from scipy.special import pdtrc

from dlrm_jax.data import synthetic_rows, synthetic_stats

SAMPLE = 35_565
KNOTS = np.array([1, 2, 3, 4, 5, 7, 10, 14, 20, 30, 70, 200, 600, 2e3, 6e3, 2e4, 7e4, 3e5, 1e6, 4e6, 2e7, 1e8, 1e9])
COVERED = (1, 2, 3, 4, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000)
GROWTH = (1000, 5000, SAMPLE, 8_000_000, 45_840_617)
COUNTS = np.unique(np.r_[np.arange(1, 25), np.geomspace(25, 200, 16).astype(int)])
KEPT_BELOW = 20.0  # the commonest numbers keep their identity at each level
SIZES = {
  'C3': 400_000_000, 'C15': 15_500, 'C7': 13_000, 'C10': 130_000, 'C26': 180_000, 'C1': 1460, 'C5': 305, 'C8': 633,
  'C19': 2300, 'C25': 105, 'C6': 24, 'C17': 10, 'C20': 4, 'C22': 18, 'C23': 15, 'C9': 3, 'C14': 27,
}  # fmt: skip
DRIFTING = ('C3', 'C15', 'C7', 'C10', 'C26')
# Of the statistic in the fit: distinct values weigh most.
WEIGHTS = {'distinct 8000000': 25, 'distinct 35565': 15, 'distinct 45840617': 4}


def _expected(mass, count, present):
  """Statistics of `count` ids of probability `mass` each."""
  out = {f'distinct {n}': (count * -np.expm1(-n * present * mass)).sum() for n in GROWTH}
  rows = SAMPLE * present
  big = rows * mass > 120  # their order in the sample is their order of probability
  order = np.argsort(-mass[big])
  ids = np.r_[0, np.cumsum(count[big][order])]
  covered = np.r_[0, np.cumsum((mass * count)[big][order])]
  at_least = pdtrc(COUNTS[:, None] - 1.0, rows * mass[None, ~big]) @ count[~big]  # ids seen so often or more
  step = np.diff(COUNTS)
  for k in COVERED:
    share, rest = np.interp(k, ids, covered), max(k - ids[-1], 0)
    m = np.minimum(rest, at_least)
    share += (m[0] + np.where(step == 1, m[1:], (m[:-1] + m[1:]) / 2 * step + (m[1:] - m[:-1]) / 2).sum()) / rows
    out[f'top {k}'] = min(share, 1.0)
  return out


def _wanted(stats, column):
  """The published statistics of a column, and its share of present rows."""
  c = stats['cats'][column]
  out = {f'distinct {n}': c['growth'][str(n)] for n in GROWTH[:3]}
  out[f'distinct {GROWTH[3]}'] = stats['deeprec_readme_cardinality'][column]
  out[f'distinct {GROWTH[4]}'] = c['full_cardinality']
  out |= {f'top {k}': share for k, share in c['top_coverage'].items()}
  if len(c['top5_share']) >= 4:
    out['top 4'] = sum(c['top5_share'][:4])
  return out, 1 - c['missing']


def _residual(found, wanted):
  out = []
  for name, value in wanted.items():
    weight, x = WEIGHTS.get(name, 6 if name[0] == 'd' else 12), max(found[name], 1e-9)
    out.append(weight * np.log(x / value))
    if name[0] == 't':
      out.append(weight / 2 * np.log((1 - x + 0.003) / (1 - value + 0.003)))
  return np.array(out)


def _density(edges, knots, log_density):
  width = np.diff(edges)
  density = np.exp(synthetic_stats.log_interpolate(edges, knots, log_density))
  density[np.sqrt(edges[:-1] * (edges[1:] - 1.0)) > knots[-1]] = 0
  return density / (density * width).sum()


def _flat(parts):
  return np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts])


def fit_root(stats, column):
  """The density of a column's numbers, and its parts (mass, count, may be a parent) for the next level."""
  wanted, present = _wanted(stats, column)
  size, edges = SIZES[column], synthetic_stats.bin_edges(SIZES[column])
  knots = np.arange(1.0, size + 2) if size <= 30 else np.r_[KNOTS[size * 0.75 > KNOTS], size + 1.0]
  renewed = (column in DRIFTING) * synthetic_rows.RENEWED_SHARE * (edges[:-1] >= synthetic_rows.RENEWED_FROM)

  def parts(log_slope):
    log_density = -np.r_[0, np.cumsum(np.exp(log_slope) * np.diff(np.log(knots)))]
    d, width = _density(edges, knots, log_density), np.diff(edges)
    old_and_new = [(d / 2, renewed * width, first) for first in (True, False)]
    return log_density, [(d, (1 - renewed) * width, True), *old_and_new]

  def residual(x):
    return np.r_[_residual(_expected(*_flat(parts(x)[1]), present), wanted), 0.05 * np.diff(x), 0.02 * (x + 0.1)]

  second = max(wanted['top 2'] - wanted['top 1'], 1e-4)
  first_slope = np.log(max(np.log(wanted['top 1'] / second) / np.log(2), 0.1))
  starts = [np.r_[first_slope, np.full(len(knots) - 2, s)] for s in (-0.3, 0.4, 0.9, -1.3, 1.7)]
  best = None
  for x in starts:
    result = least_squares(residual, x, max_nfev=80)
    best = result if best is None or result.cost < best.cost else best
    if best.cost < 0.5:  # every statistic within a few percent
      break
  log_density, fitted = parts(best.x)
  drifts = column in DRIFTING
  return (
    {'size': size, 'drifts': drifts, 'knots': round_all(knots), 'log_density': round_all(log_density)},
    edges,
    fitted,
  )


def fit_level(stats, column, edges, fine, correction):
  """How the numbers of the finer column map to this one, and the parts of this one."""
  wanted, present = _wanted(stats, column)
  wanted |= {name: wanted[name] * factor for name, factor in correction.items()}
  width, middle, size = np.diff(edges), np.sqrt(edges[:-1] * (edges[1:] - 1.0)), edges[-1] - 1
  keep_knots = np.r_[KEPT_BELOW, KNOTS[(KNOTS > KEPT_BELOW) & (size * 0.75 > KNOTS)], size + 1.0]
  most = min(size, 4 * wanted[f'distinct {GROWTH[3]}'])
  knots = np.r_[KNOTS[most * 0.75 > KNOTS], most + 1.0]
  n, mass = len(keep_knots) - 1, sum(m * c for m, c, _ in fine)

  def parts(x):
    logit = np.r_[4.0, x[:n]]
    keep = 1 / (1 + np.exp(-synthetic_stats.log_interpolate(edges, keep_knots, logit)))
    keep[middle < KEPT_BELOW] = 1
    joined = _density(edges, knots, x[n:]) * (mass * (1 - keep)).sum()
    out = [(m + joined * parent, c * keep, parent) for m, c, parent in fine]
    out.append((joined, np.maximum(width - sum(c for _, c, parent in out if parent), 0), True))
    return logit, out

  def residual(x):
    logit, out = parts(x)
    smooth = [0.15 * np.diff(logit) / np.diff(np.log(keep_knots)), 0.1 * np.diff(x[n:]) / np.diff(np.log(knots))]
    return np.r_[_residual(_expected(*_flat(out), present), wanted), *smooth, 0.01 * x]

  x = least_squares(residual, np.r_[np.linspace(3, 0, n), -np.log(knots)], max_nfev=40).x
  logit, out = parts(x)
  level = {'keep_knots': keep_knots, 'keep': logit, 'knots': knots, 'log_density': x[n:]}
  return {name: round_all(values) for name, values in level.items()}, out


def fit_curves(stats, rounds=4):
  """All distributions and levels.

  The expectations treat the parents that numbers join as drawn anew for each row; they are drawn once for each number,
  so that fewer are seen. The numbers of distinct values are therefore counted in drawn rows, and what the fit aims at
  is corrected by their ratio.
  """
  roots, fitted = {}, {}
  for column in SIZES:
    roots[column], edges, parts = fit_root(stats, column)
    fitted[column] = edges, parts
  corrections = {column: {} for chain in synthetic_rows.CHAINS for column in chain[1:]}
  for _ in range(rounds):
    levels = {}
    for fine, *coarser in synthetic_rows.CHAINS:
      edges, parts = fitted[fine]
      for column in coarser:
        levels[column], parts = fit_level(stats, column, edges, parts, corrections[column])
    for column, found in count_distinct(roots, levels).items():
      wanted, _ = _wanted(stats, column)
      for name, value in found.items():
        corrections[column][name] = corrections[column].get(name, 1.0) * wanted[name] / value
      print(column, {name: f'{value} ({wanted[name]})' for name, value in found.items()}, flush=True)
  return {'roots': roots, 'levels': levels}


def count_distinct(roots, levels):
  """Distinct values of the coarser columns in rows drawn without effects, where C3's hierarchy is missing in 3.5%."""
  c = {'roots': roots, 'levels': levels, 'alternative_share': 0.0, 'tilt': {}, 'effects': {}}
  world = synthetic_rows.World(*synthetic_rows.build_categories(c), {}, c)
  out, rows, zero = {}, 1 << 19, np.zeros(1 << 19, np.float32)
  for chain in synthetic_rows.CHAINS:
    random = np.random.Generator(np.random.SFC64(11))
    seen, drawn, present = {column: [] for column in chain[1:]}, 0, 0.965 if chain[0] == 'C3' else 1.0
    out |= {column: {} for column in chain[1:]}
    for name in (f'distinct {GROWTH[2]}', f'distinct {GROWTH[3]}'):
      while drawn < (rest := round(int(name.split()[1]) * present)):
        n = min(rows, rest - drawn)
        columns = synthetic_rows.draw_group(world, random, chain, random.random(n), zero[:n])
        for column in chain[1:]:
          seen[column].append(np.unique(columns[column][0]))
        drawn += n
      for column in chain[1:]:
        out[column][name] = len(np.unique(np.concatenate(seen[column])))
  return out


def round_all(values):
  """Five digits."""
  return [float(f'{v:.5g}') for v in values]
