"""Fits the constants of the synthetic data set: `python -m experiments.calibrate_synthetic --stats criteo_stats.json`.

First the distributions (calibrate_synthetic_curves.py). Then the effects: draws rows, measures the AUC of each column
alone, the correlations and the click rates, corrects the constants, and repeats. The file of statistics holds
aggregates only. About four minutes.
"""

import argparse
import itertools
import json
import pathlib

import numpy as np
from scipy.stats import norm, rankdata

from dlrm_jax.data import synthetic_rows
from dlrm_jax.data.synthetic_stats import CATEGORIES, INTEGERS
from experiments.calibrate_synthetic_curves import fit_curves, round_all

EFFECTS = {  # column: rank at which the effects of ids have shrunk to 0.7
  'C24': 200, 'C4': 200, 'C16': 100, 'C3': 30, 'C2': 1000, 'C18': 100, 'C15': 50, 'C14': 1000, 'C13': 300, 'C11': 100,
  'C7': 100, 'C9': 1000, 'C17': 1000, 'C26': 100, 'C23': 1000, 'C10': 100, 'C6': 1000, 'C19': 50,
}  # fmt: skip
BY_TREND = ('C3', 'C7', 'C15')  # the frequency of the id tells, hardly its identity
TILT = {'C3': 1, 'C15': 1, 'C7': 1, 'C17': 0.9, 'C26': 1, 'C10': 0.75, 'C23': 0.5, 'C6': 0.3}
SIGN = dict(zip(INTEGERS, (1, 1, -1, -1, -1, -1, 1, -1, -1, 1, 1, 1, -1), strict=True))
# Discriminating power (d') of the present values of I1..I13: the direction in which the integers lean.
LEAN = np.array([0.34, 0.12, -0.22, -0.14, -0.47, -0.6, 0.48, -0.07, -0.13, 0.19, 0.43, 0.05, -0.36])
LEANING = 0.97  # correlation of the inclination to click with the best linear combination of the integers
EASING = 0.93  # the AUCs aimed at are this much nearer to 0.5: else the sum of all columns is easier than the real data


def _d(auc):
  """Discriminating power: distance of two unit normal distributions with this AUC; 0 below 0.5."""
  return norm.ppf(max(auc, 0.5)) * 2**0.5


def _logit(p):
  return np.log(p / (1 - p))


def _with_leader(share, leader, phi):
  """Shares missing where another mask is missing, and where it is not, from the correlation of the masks."""
  both = share * leader + phi * np.sqrt(share * (1 - share) * leader * (1 - leader))
  return [both / leader, (share - both) / (1 - leader)]


def first_guess(stats, curves):
  """Constants before the first correction."""
  ints = stats['ints_partial45k_plus']
  share = {name: ints[name]['missing'] for name in ('I1', 'I3', 'I4', 'I5', 'I6', 'I7', 'I8', 'I12')}
  missing = {name: share[name] for name in ('I3', 'I6', 'I8', 'I12')}
  missing |= {'C3': 0.0350, 'C6': 0.1223, 'C19': 0.4462, 'C22': 0.77}
  missing |= {'I1': _with_leader(share['I1'], share['I6'], 0.49), 'I4': _with_leader(share['I4'], share['I3'], 0.457)}
  missing |= {name: [share[name] / share['I6'], 0.0] for name in ('I5', 'I7')}
  kept = ('quantiles', 'share_zero', 'share_negative', 'log1p_mean', 'log1p_std')
  return {
    **curves,
    'missing': missing,
    'alternative_share': 0.5,
    'integers': {name: {k: ints[name][k] for k in kept} for name in INTEGERS},
    'effects': {n: {'scale': 0.2, 'half_rank': h, 'trend': 0.2 * (n in BY_TREND)} for n, h in EFFECTS.items()},
    'tilt': TILT,
    'slopes': dict.fromkeys(INTEGERS, 0.0),
    'mask_effects': dict.fromkeys(('I1', 'I3', 'I4', 'I5', 'I6', 'I7', 'I12', 'C19'), 0.0),
    'intercept': -1.2,
    'daily_swing': 0.25,
    'product_scale': 0.34,
  }


def _positive(matrix, floor):
  """The nearest correlation matrix, roughly, without eigenvalues below the floor."""
  value, vector = np.linalg.eigh(matrix)
  out = vector @ np.diag(np.maximum(value, floor)) @ vector.T
  scale = np.sqrt(np.diag(out))
  return out / np.outer(scale, scale)


def _set_factor(c, latent):
  lean = LEANING * LEAN / np.sqrt(LEAN @ np.linalg.solve(latent, LEAN))
  value, vector = np.linalg.eigh(latent - np.outer(lean, lean))
  factor = np.linalg.cholesky(vector @ np.diag(np.maximum(value, 1e-3)) @ vector.T)
  c['lean'], c['factor'] = round_all(lean), [round_all(row) for row in factor]


def set_factor_moments(c, blocks=4):
  """Hidden factors get mean 0 and variance 1 over the rows, so that products tell nothing about one column."""
  for name in synthetic_rows.WITH_FACTORS:
    c['effects'][name].pop('factors', None)
  rows, found = synthetic_rows.BLOCK, {name: [] for name in synthetic_rows.WITH_FACTORS}
  for name in found:
    c['effects'][name]['factors'] = [[0.0, 1.0]] * 3
  world = synthetic_rows.build_world(c)
  for i in range(blocks):
    random = np.random.Generator(np.random.SFC64(i))
    inclination, time = random.standard_normal(rows, dtype=np.float32), (i + np.arange(rows) / rows) / blocks
    for group in (*synthetic_rows.CHAINS, *((name,) for name in synthetic_rows.SINGLE)):
      for name, (_, _, hidden) in synthetic_rows.draw_group(world, random, group, time, inclination).items():
        if name in found:
          found[name].append(np.stack(hidden))
  for name, parts in found.items():
    factors = np.concatenate(parts, axis=1)
    moments = zip(factors.mean(axis=1), factors.std(axis=1), strict=True)
    c['effects'][name]['factors'] = [round_all(m) for m in moments]


def auc(label, score):
  """Area under the ROC curve."""
  rank, positive = rankdata(score), label.sum()
  return (rank[label == 1].sum() - positive * (positive + 1) / 2) / (positive * (len(label) - positive))


def auc_alone(codes, label, rng):
  """AUC of out-of-fold target encoding: five folds, smoothed by twenty rows of the mean rate."""
  _, value = np.unique(codes, return_inverse=True)
  values, fold, score = value.max() + 1, rng.integers(0, 5, len(label)), np.empty(len(label))
  for i in range(5):
    seen = fold != i
    rows = np.bincount(value[seen], minlength=values)
    clicks = np.bincount(value[seen], label[seen], minlength=values)
    score[~seen] = ((clicks + 20 * label[seen].mean()) / (rows + 20))[value[~seen]]
  return auc(label, score)


def integer_codes(value, missing):
  """At most fifty quantile bins; missing is a value."""
  cuts = np.unique(value[~missing])
  if len(cuts) > 60:
    cuts = np.unique(np.quantile(value[~missing], np.linspace(0, 1, 51)[1:-1]))
  return np.where(missing, -1, np.searchsorted(cuts, value, side='right'))


def draw(world, seed, blocks):
  """Blocks joined to one."""
  total = blocks * synthetic_rows.BLOCK
  parts = [synthetic_rows.draw_block(world, seed, i, synthetic_rows.BLOCK, total) for i in range(blocks)]
  names = ('label', 'integer', 'id', 'missing', 'probability')
  return synthetic_rows.Block(**{name: np.concatenate([getattr(p, name) for p in parts], axis=-1) for name in names})


def measure_alone(rows, size=40_000, samples=7):
  """AUC of each column alone, mean of several samples of the size that the published ones were measured on."""
  rng = np.random.default_rng(1)
  order, out = rng.permutation(len(rows.label)), {}
  for i, name in enumerate(INTEGERS + CATEGORIES):
    found = []
    for j in range(samples):
      p = order[j * size : (j + 1) * size]
      missing = rows.missing[i][p]
      if i < len(INTEGERS):
        codes = integer_codes(rows.integer[i][p], missing)
      else:
        codes = np.where(missing, -1, rows.id[i - len(INTEGERS)][p].astype(np.int64))
      found.append(auc_alone(codes, rows.label[p], rng))
    out[name] = float(np.mean(found))
  return out


def measure_spearman(rows, size=150_000):
  """Rank correlations of the integers, over the rows that have both."""
  out = np.eye(len(INTEGERS))
  for i, j in itertools.combinations(range(len(INTEGERS)), 2):
    both = ~rows.missing[i][:size] & ~rows.missing[j][:size]
    ranks = [rankdata(rows.integer[k][:size][both]) for k in (i, j)]
    out[i, j] = out[j, i] = np.corrcoef(*ranks)[0, 1]
  return out


def _correct_categories(c, gap, found):
  """By how much (squared d') each column tells too little; nested columns share, so the corrections are additive."""
  for name, effect in c['effects'].items():
    if name in BY_TREND:
      effect['trend'] = float(np.sqrt(max(effect['trend'] ** 2 + 0.7 * gap[name], 1e-4)))
      continue
    gain = 0.6 * np.clip(effect['scale'] ** 2 / max(_d(found[name]) ** 2, 1e-3), 0.5, 8)
    effect['scale'] = float(np.sqrt(max(effect['scale'] ** 2 + gain * gap[name], 1e-4)))
    if name in ('C26', 'C10'):
      effect['trend'] = 0.6 * effect['scale']


def fit_effects(stats, c, steps, blocks=5):
  """Corrects the effects until the AUCs, correlations and click rates are the published ones. Prints the progress."""
  ints, spearman = stats['ints_partial45k_plus'], np.array(stats['int_spearman'])
  page = {name: ints[name]['oof_auc'] if name in ints else stats['cats'][name]['oof_auc']
          for name in INTEGERS + CATEGORIES}  # fmt: skip
  wanted = {name: 0.5 + EASING * (auc - 0.5) for name, auc in page.items()}
  latent = 2 * np.sin(np.pi * spearman / 6)
  np.fill_diagonal(latent, 1)
  latent = _positive(latent, 0.03)
  set_factor_moments(c)
  for step in range(steps):
    _set_factor(c, latent)
    rows = draw(synthetic_rows.build_world(c), 100 + step, blocks)
    found, correlations = measure_alone(rows), measure_spearman(rows)
    worst = max(page, key=lambda name: abs(found[name] - page[name]))
    print(f'{step}: click rate {rows.label.mean():.4f}, best AUC {auc(rows.label, rows.probability):.4f}, '
          f'farthest {worst} {found[worst]:.4f} ({page[worst]:.4f}), '
          f'Spearman within {np.abs(correlations - spearman).max():.3f}', flush=True)  # fmt: skip
    _correct_categories(c, {n: _d(wanted[n]) ** 2 - _d(found[n]) ** 2 for n in page}, found)
    missing_power = np.array([SIGN[n] * (_d(wanted[n]) - _d(found[n])) for n in INTEGERS])
    for name, change in zip(INTEGERS, 0.8 * np.linalg.solve(_positive(latent, 0.2), missing_power), strict=True):
      c['slopes'][name] += float(change)
    for name in ('I1', 'I3', 'I4', 'I5', 'I6', 'I7', 'I12'):
      mask = rows.missing[INTEGERS.index(name)]
      now = _logit(rows.label[mask].mean()) - _logit(rows.label[~mask].mean())
      aim = _logit(ints[name]['ctr_if_missing']) - _logit(ints[name]['ctr_if_present'])
      c['mask_effects'][name] += float(0.7 * (aim - now))
    c['mask_effects']['C19'] += float(_d((wanted['C20'] + wanted['C25']) / 2) - _d((found['C20'] + found['C25']) / 2))
    c['intercept'] += float(_logit(0.2562) - _logit(rows.label.mean()))
    latent = np.clip(latent + 0.8 * (spearman - correlations), -0.995, 0.995)
    np.fill_diagonal(latent, 1)
    latent = _positive(latent, 0.01)


def _rounded(tree):
  if isinstance(tree, dict):
    return {name: _rounded(value) for name, value in tree.items()}
  if isinstance(tree, list):
    return [_rounded(value) for value in tree]
  return float(f'{tree:.5g}') if isinstance(tree, float) else tree


def main():
  """Writes the constants beside the generator."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--stats', type=pathlib.Path, required=True, help='JSON of published aggregates')
  parser.add_argument('--steps', type=int, default=20, help='corrections of the effects')
  parser.add_argument('--out', type=pathlib.Path, default=pathlib.Path('dlrm_jax/data/synthetic_constants.json'))
  args = parser.parse_args()
  stats = json.loads(args.stats.read_text())
  c = first_guess(stats, fit_curves(stats))
  fit_effects(stats, c, args.steps)
  text = json.dumps(_rounded(c), indent=1)
  args.out.write_text(text + '\n')


if __name__ == '__main__':
  main()
