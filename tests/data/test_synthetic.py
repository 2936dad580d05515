"""The synthetic data set: format, exact structure, statistics near the published aggregates, known best metrics."""

import csv
import itertools
import json
import re

import numpy as np
import pytest
from sklearn.metrics import log_loss, roc_auc_score

from dlrm_jax.data import synthetic, synthetic_rows
from dlrm_jax.data.synthetic_csv import format_rows

BLOCK = synthetic_rows.BLOCK
BLOCKS = 4
COLUMNS = [f'I{i}' for i in range(1, 14)] + [f'C{i}' for i in range(1, 27)]
CHAINS = ['C3 C12 C21 C16 C4 C24', 'C15 C18 C2', 'C15 C14', 'C7 C13', 'C11 C13', 'C7 C9']
SAME_MASK = ['I1 I10', 'I4 I13', 'I7 I9 I11', 'C3 C12 C21 C16 C4 C24', 'C19 C20 C25 C26']
# Aggregates of the public Criteo Kaggle train set (random rows): share missing, and AUC of each column alone.
MISSING = {
  'I1': 0.458, 'I2': 0, 'I3': 0.215, 'I4': 0.220, 'I5': 0.027, 'I6': 0.227, 'I7': 0.044, 'I8': 0.0004, 'I12': 0.768,
  'C1': 0, 'C2': 0, 'C3': 0.035, 'C6': 0.122, 'C7': 0, 'C15': 0, 'C17': 0, 'C19': 0.446, 'C22': 0.77,
}  # fmt: skip
ALONE = dict(zip(COLUMNS, (
  0.607, 0.534, 0.563, 0.537, 0.629, 0.675, 0.632, 0.521, 0.539, 0.590, 0.618, 0.520, 0.590,
  0.493, 0.608, 0.602, 0.617, 0.504, 0.533, 0.607, 0.503, 0.525, 0.570, 0.606, 0.604, 0.608, 0.554, 0.621, 0.613,
  0.601, 0.615, 0.518, 0.515, 0.608, 0.507, 0.561, 0.610, 0.516, 0.584), strict=True))  # fmt: skip
QUANTILES = {  # p25, p50, p75, p90, p99
  'I1': (0, 1, 3, 9, 37), 'I2': (0, 3, 35, 182, 2150), 'I3': (2, 6, 18, 44, 211), 'I4': (2, 4, 10, 18, 40),
  'I5': (344, 2813, 10216, 34827, 359409), 'I6': (8, 32, 101, 269, 1273), 'I7': (1, 3, 11, 34, 213),
  'I8': (2, 7, 19, 34, 48), 'I9': (10, 38, 108, 260, 954), 'I10': (0, 1, 1, 1, 3), 'I11': (1, 1, 3, 6, 26),
  'I12': (0, 0, 1, 2, 18), 'I13': (2, 4, 10, 20, 48),
}  # fmt: skip
SPEARMAN = {('I1', 'I5'): -0.73, ('I1', 'I10'): 0.83, ('I7', 'I11'): 0.89, ('I4', 'I13'): 0.81, ('I5', 'I6'): 0.61,
            ('I2', 'I3'): -0.07, ('I8', 'I9'): 0.48, ('I6', 'I10'): -0.64}  # fmt: skip
TOP = {  # shares of the 1, 10 and 100 commonest values in 35,565 rows, and distinct values
  'C3': (0.040, 0.153, 0.296, 18021), 'C12': (0.040, 0.160, 0.317, 17010), 'C16': (0.040, 0.160, 0.349, 14742),
  'C4': (0.056, 0.215, 0.399, 11723), 'C24': (0.066, 0.348, 0.568, 6508), 'C15': (0.015, 0.092, 0.403, 3779),
  'C18': (0.040, 0.206, 0.610, 1983), 'C2': (0.123, 0.399, 0.856, 482), 'C7': (0.015, 0.074, 0.266, 5904),
  'C13': (0.024, 0.131, 0.415, 2534), 'C10': (0.250, 0.302, 0.442, 6934), 'C26': (0.083, 0.260, 0.479, 4983),
}  # fmt: skip


@pytest.fixture(scope='module')
def sample():
  """All columns of a few blocks: present values of column c are `column[c][~missing[c]]`."""
  total = BLOCKS * BLOCK
  blocks = [synthetic_rows.draw_block(synthetic_rows.world(), 3, i, BLOCK, total) for i in range(BLOCKS)]
  joined = {
    name: np.concatenate([getattr(b, name) for b in blocks], axis=-1)
    for name in ('label', 'integer', 'id', 'missing', 'probability')
  }
  column = dict(zip(COLUMNS, [*joined['integer'].astype(np.int64), *joined['id'].astype(np.int64)], strict=True))
  missing = dict(zip(COLUMNS, joined['missing'], strict=True))
  return {'label': joined['label'], 'probability': joined['probability'], 'column': column, 'missing': missing}


@pytest.mark.parametrize('chain', CHAINS)
def test_hierarchy_is_exact(sample, chain):
  names = chain.split()
  for fine, coarse in itertools.pairwise(names):
    present = ~sample['missing'][fine]
    pairs = np.unique(np.stack([sample['column'][fine][present], sample['column'][coarse][present]]), axis=1)
    assert pairs.shape[1] == len(np.unique(pairs[0]))
    assert len(np.unique(pairs[1])) < len(np.unique(pairs[0]))


def test_c7_nearly_determines_c11(sample):
  c7, c11 = sample['column']['C7'], sample['column']['C11']
  _, first, group = np.unique(c7, return_index=True, return_inverse=True)
  agrees = (c11[first][group] == c11).mean()
  assert 0.85 < agrees < 0.999


@pytest.mark.parametrize('columns', SAME_MASK)
def test_columns_are_missing_together(sample, columns):
  first, *others = columns.split()
  for other in others:
    np.testing.assert_array_equal(sample['missing'][first], sample['missing'][other])


def test_missing_shares_and_their_correlation(sample):
  for name, share in MISSING.items():
    assert sample['missing'][name].mean() == pytest.approx(share, abs=0.01), name
  for a, b, phi in (('I1', 'I6', 0.49), ('I3', 'I4', 0.457), ('I5', 'I6', 0.303), ('I6', 'I7', 0.394)):
    assert np.corrcoef(sample['missing'][a], sample['missing'][b])[0, 1] == pytest.approx(phi, abs=0.03)


@pytest.mark.parametrize('name', QUANTILES)
def test_integer_quantiles(sample, name):
  value = sample['column'][name][~sample['missing'][name]]
  found = np.quantile(value, (0.25, 0.5, 0.75, 0.9, 0.99))
  np.testing.assert_allclose(np.log1p(found), np.log1p(QUANTILES[name]), atol=0.15, rtol=0.05)


@pytest.mark.parametrize('pair', SPEARMAN)
def test_integer_correlations(sample, pair):
  present = ~sample['missing'][pair[0]] & ~sample['missing'][pair[1]]
  ranks = []
  for name in pair:
    _, group, count = np.unique(sample['column'][name][present], return_inverse=True, return_counts=True)
    ranks.append((np.cumsum(count) - (count - 1) / 2)[group])  # the mean rank of equal values
  assert np.corrcoef(*ranks)[0, 1] == pytest.approx(SPEARMAN[pair], abs=0.06)


@pytest.mark.parametrize('name', TOP)
def test_heavy_tails(sample, name):
  rows = np.random.default_rng(0).permutation(len(sample['label']))[:35_565]
  value = sample['column'][name][rows][~sample['missing'][name][rows]]
  count = np.sort(np.unique(value, return_counts=True)[1])[::-1]
  shares = [count[:k].sum() / len(value) for k in (1, 10, 100)]
  np.testing.assert_allclose(shares, TOP[name][:3], rtol=0.1, atol=0.01)
  assert len(count) == pytest.approx(TOP[name][3], rel=0.15)


def _codes(values, missing):
  """Integers with many values become fifty quantile bins; a missing value is a value."""
  if len(np.unique(values)) > 60 and values.max() < 2**31 and len(np.unique(values)) < 40_000:
    cuts = np.unique(np.quantile(values[~missing], np.linspace(0, 1, 51)[1:-1]))
    values = np.searchsorted(cuts, values, side='right')
  return np.where(missing, -9, values)


def _auc_alone(codes, label, rng):
  """AUC of the click rate of a row's value in the four other folds, smoothed by twenty rows of the mean rate."""
  _, value = np.unique(codes, return_inverse=True)
  fold, score = rng.integers(0, 5, len(label)), np.empty(len(label))
  for i in range(5):
    seen, held = fold != i, fold == i
    clicks = np.bincount(value[seen], label[seen], minlength=value.max() + 1)
    rows = np.bincount(value[seen], minlength=value.max() + 1)
    score[held] = ((clicks + 20 * label[seen].mean()) / (rows + 20))[value[held]]
  return roc_auc_score(label, score)


@pytest.mark.parametrize('name', COLUMNS)
def test_each_column_alone_is_as_informative_as_the_real_one(sample, name):
  rng = np.random.default_rng(1)
  order = rng.permutation(len(sample['label']))
  found = []
  for rows in order[: 3 * 40_000].reshape(3, -1):
    values, missing = sample['column'][name][rows], sample['missing'][name][rows]
    codes = _codes(values, missing) if name[0] == 'I' else np.where(missing, -9, values)
    found.append(_auc_alone(codes, sample['label'][rows], rng))
  assert np.mean(found) == pytest.approx(ALONE[name], abs=0.03)


def test_click_rate_and_its_drift(sample):
  label = sample['label']
  assert label.mean() == pytest.approx(0.256, abs=0.006)
  day = len(label) / 7
  phase = np.arange(len(label)) % day / day
  night = (phase < 0.1) | (phase > 0.9)
  assert label[night].mean() < 0.235 < 0.265 < label[(phase > 0.4) & (phase < 0.6)].mean()


def test_label_follows_the_probability(sample):
  place = np.argsort(sample['probability']).reshape(64, -1)
  expected, found = sample['probability'][place].mean(axis=1), sample['label'][place].mean(axis=1)
  error = np.sqrt(expected * (1 - expected) / place.shape[1])
  assert np.abs((found - expected) / error).max() < 4.5


def test_ids_are_renewed_over_time(sample):
  value = sample['column']['C7']
  quarters = [set(part.tolist()) for part in np.array_split(value, 4)]
  shared = len(quarters[0] & quarters[3]) / len(quarters[0] & quarters[1])
  assert shared < 0.97


def test_files_report_and_independence_of_workers(tmp_path):
  rows, eval_rows = 70_000, 3_000
  one = synthetic.generate(tmp_path / 'one', rows, eval_rows, seed=5, processes=1)
  two = synthetic.generate(tmp_path / 'two', rows, eval_rows, seed=5, processes=2)
  other = synthetic.generate(tmp_path / 'other', rows, eval_rows, seed=6, processes=1)
  assert one == two
  assert other != one
  for name in ('train.csv', 'eval.csv', 'synthetic.json'):
    assert (tmp_path / 'one' / name).read_bytes() == (tmp_path / 'two' / name).read_bytes()
  assert (tmp_path / 'other' / 'train.csv').read_bytes() != (tmp_path / 'one' / 'train.csv').read_bytes()
  assert {path.name for path in (tmp_path / 'one').iterdir()} == {'train.csv', 'eval.csv', 'synthetic.json'}
  assert json.loads((tmp_path / 'one' / 'synthetic.json').read_text()) == one

  total = rows + eval_rows
  blocks = [synthetic_rows.draw_block(synthetic_rows.world(), 5, i, min(BLOCK, total - i * BLOCK), total)
            for i in range(2)]  # fmt: skip
  label = np.concatenate([b.label for b in blocks])
  probability = np.concatenate([b.probability for b in blocks])
  with open(tmp_path / 'one' / 'train.csv', newline='') as train, open(tmp_path / 'one' / 'eval.csv') as evaluation:
    lines = [*csv.reader(train), *csv.reader(evaluation)]
  assert [line[0] for line in lines] == [str(v) for v in label]
  for part, found in ((slice(rows), one['train']), (slice(rows, None), one['eval'])):
    y, p = label[part], probability[part]
    assert found['rows'] == len(y)
    assert found['click_rate'] == pytest.approx(y.mean())
    assert found['best_auc'] == pytest.approx(roc_auc_score(y, p), abs=1e-5)
    assert found['best_log_loss'] == pytest.approx(log_loss(y, p), rel=1e-9)
    entropy = log_loss(y, np.full(len(y), y.mean()))
    assert found['best_normalized_entropy'] == pytest.approx(log_loss(y, p) / entropy, rel=1e-9)
    assert 0.79 < found['best_auc'] < 0.84


def test_every_line_has_forty_fields_of_the_right_form(tmp_path):
  synthetic.generate(tmp_path, 5_000, 10, seed=0, processes=1)
  pattern = re.compile(r'[01](,(-?\d{1,8})?){13}(,([0-9a-f]{8})?){26}\n')
  with open(tmp_path / 'train.csv', newline='') as file:
    lines = list(file)
  assert len(lines) == 5_000
  assert all(pattern.fullmatch(line) for line in lines)


def test_format_rows_writes_what_python_would():
  values = [0, 1, 9, 10, 99, 123, 9999, 10_000, 10_001, 123_456, 99_999_999, -1, -2, -9]
  rng = np.random.default_rng(0)
  integer = rng.choice(values, (13, 300)).astype(np.int32)
  ids = rng.choice([0, 1, 0xFFFFFFFF, 0x0000ABCD, 0x12345678], (26, 300)).astype(np.uint32)
  label, missing = rng.integers(0, 2, 300).astype(np.uint8), rng.random((39, 300)) < 0.3
  text = [[str(v) for v in column] for column in integer] + [[f'{v:08x}' for v in column] for column in ids]
  expected = ''.join(
    ','.join([str(label[r]), *('' if missing[c, r] else text[c][r] for c in range(39))]) + '\n' for r in range(300)
  )
  assert format_rows(label, integer, ids, missing) == expected.encode()


@pytest.mark.parametrize(
  ('arguments', 'says'),
  [
    (['--rows', 'many', '--out', 'x'], '--rows'),
    (['--rows', '0', '--out', 'x'], '--rows=0'),
    (['--rows', '10'], '--out'),
    (['--rows', '10', '--out', __file__], 'is a file'),
    (['--rows', '10', '--out', 'x', '--processes', '0'], '--processes=0'),
  ],
)
def test_a_wrong_argument_ends_in_one_line(arguments, says):
  with pytest.raises(SystemExit) as error:
    synthetic.main(arguments)
  assert says in str(error.value)
  assert '\n' not in str(error.value)


def test_one_row_has_one_to_evaluate(tmp_path):
  synthetic.main(['--rows', '1', '--out', str(tmp_path), '--processes', '1'])
  assert [(tmp_path / f'{name}.csv').read_text().count('\n') for name in ('train', 'eval')] == [1, 1]


def test_a_stopped_run_leaves_no_finished_file(tmp_path, monkeypatch):
  def fail(*_):
    raise OSError('disk full')

  monkeypatch.setattr(synthetic.synthetic_csv, 'format_rows', fail)
  with pytest.raises(SystemExit, match='disk full'):
    synthetic.main(['--rows', '10', '--out', str(tmp_path), '--processes', '1'])
  assert not list(tmp_path.glob('*.csv'))
  assert not list(tmp_path.glob('*.json'))
