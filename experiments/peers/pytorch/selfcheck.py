"""Checks of the twin against independent numbers: golden numbers, brute force, plain numpy. Raises on a difference."""

import numpy as np
import torch
from model import BatchNorm, Dlrm
from tables import TABLES, DenseOptimizer, fill_truncated_normal
from torch import nn

# Three steps at lr .1, computed in float64 from the published formulas (DeepRec's training_ali_ops.cc@00f39803).
START = [[1.0, -2.0], [0.5, 0.5], [0.0, 0.0]]
STEPS = [{0: [0.1, -0.2], 1: [0.5, 0.5]}, {0: [0.3, 0.1]}, {0: [-0.2, 0.4], 2: [1.0, -1.0]}]
GOLDEN = {
  'adam': [[0.782431937, -1.919099639], [0.400000063, 0.400000063], [-0.06388134, 0.06388134]],
  'adagrad': [[0.943591655, -2.044209761], [0.415484575, 0.415484575], [-0.095346259, 0.095346259]],
}


def check(name: str, found: object, expected: object, tolerance: float) -> float:
  """The largest difference; an error that names the check if it is beyond the tolerance."""
  difference = float(np.max(np.abs(np.asarray(found, np.float64) - np.asarray(expected, np.float64))))
  if not difference <= tolerance:
    raise SystemExit(f'selfcheck {name}: {found} differs from {expected} by {difference}')
  return difference


def sparse_golden(table: str, optimizer: str) -> float:
  """Lazy rows: each gradient arrives in two halves on duplicate ids, so summing is checked as well."""
  rows = TABLES[table](3, 2, optimizer, 0.1)
  rows.value.copy_(torch.tensor(START))
  for step in STEPS:
    row = torch.tensor([r for r in step for _ in range(2)])
    half = torch.tensor([step[r] for r in step for _ in range(2)]) / 2
    (rows.pull(row) * half).sum().backward()
    rows.push()
  return check(f'{table} {optimizer}', rows.value.tolist(), GOLDEN[optimizer], 1e-6)


def dense_golden(optimizer: str) -> float:
  """Row 0 of the same numbers as a dense parameter."""
  weight = nn.Parameter(torch.tensor(START[0]))
  dense = DenseOptimizer([weight], optimizer, 0.1)
  for step in STEPS:
    weight.grad = torch.tensor(step[0])
    dense.step()
  return check(f'dense {optimizer}', weight.tolist(), GOLDEN[optimizer][0], 1e-6)


def epsilon(update: str) -> float:
  """One Adam step on a gradient of 1e-7, where the place of epsilon decides: 0.1 of it outside the bias correction."""
  grad, lr = 1e-7, 0.1
  expected = -lr * np.sqrt(1 - 0.999) / (1 - 0.9) * (0.1 * grad) / (np.sqrt(0.001) * grad + 1e-8)
  if update == 'dense':
    weight = nn.Parameter(torch.zeros(1))
    dense = DenseOptimizer([weight], 'adam', lr)
    weight.grad = torch.tensor([grad])
    dense.step()
    return check('epsilon dense', weight.tolist(), [expected], 1e-6)
  rows = TABLES[update](1, 1, 'adam', lr)
  rows.value.zero_()
  (rows.pull(torch.tensor([0])) * grad).sum().backward()
  rows.push()
  return check(f'epsilon {update}', rows.value.tolist(), [[expected]], 1e-6)


def tables_agree(optimizer: str) -> float:
  """Both table variants after 30 steps on the same random batches with many duplicates."""
  values = []
  for table in sorted(TABLES):
    torch.manual_seed(1)
    rows = TABLES[table](500, 16, optimizer, 0.01)
    fill_truncated_normal(rows.value)
    for _ in range(30):
      row = (torch.rand(64, 26) ** 4 * 500).long()
      (rows.pull(row) * torch.randn(64, 26, 16)).sum().backward()
      rows.push()
    values.append(rows.value.detach().clone().numpy())
  return check(f'tables {optimizer}', *values, 1e-5)


def batch_norm() -> float:
  """Running statistics over batches of 50, 50 and 7 against float64 numpy; the first batch alone gives itself."""
  norm, rng, mean, var = BatchNorm(3), np.random.default_rng(0), np.zeros(3), np.zeros(3)
  worst = 0.0
  for step, examples in enumerate((50, 50, 7), 1):
    x = rng.normal([1, 2, 3], [1, 2, 4], (examples, 3))
    norm.set_batch_size(examples)
    out = norm(torch.tensor(x, dtype=torch.float32), None)
    mean, var = 0.99 * mean + 0.01 * x.mean(0), 0.99 * var + 0.01 * x.var(0)
    found = torch.stack(norm.statistics(step)).numpy()
    worst = max(worst, check('batch norm running', found, np.stack([mean, var]) / (1 - 0.99**step), 1e-4))
    worst = max(worst, check('batch norm', out.detach(), (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-3), 1e-4))
  return worst


def forward(interaction: str) -> float:
  """The whole model in training form against numpy, the dot products by a double loop."""
  torch.manual_seed(2)
  model, rng = Dlrm(interaction), np.random.default_rng(3)
  dense, vectors = rng.normal(size=(20, 13)), rng.normal(size=(20, 26, 16))
  model.set_batch_size(20)
  logit = model(torch.tensor(dense, dtype=torch.float32), torch.tensor(vectors, dtype=torch.float32))
  numbers = [
    [p.detach().numpy().astype(np.float64) for p in layer.parameters()] for layer in (*model.bottom, *model.top)
  ]
  h = dense
  for w, b in numbers[:4]:
    h = np.maximum(h @ w.T + b, 0)
    h = (h - h.mean(0)) / np.sqrt(h.var(0) + 1e-3)
  if interaction == 'cat':
    z = np.concatenate([h, vectors.reshape(20, -1)], 1)
  else:
    stack = np.concatenate([h[:, None], vectors], 1)
    pairs = [np.sum(stack[:, i] * stack[:, j], 1) for i in range(27) for j in range(i)]
    z = np.concatenate([h, np.stack(pairs, 1)], 1)
  for w, b in numbers[4:6]:
    z = np.maximum(z @ w.T + b, 0)
  return check(f'forward {interaction}', logit.detach(), (z @ numbers[6][0].T + numbers[6][1])[:, 0], 1e-4)


def auc_brute_force() -> float:
  """Exact AUC against all pairs, with many ties."""
  from shared import auc

  rng = np.random.default_rng(4)
  label, score = (rng.random(500) < 0.3).astype(np.float32), rng.integers(0, 40, 500).astype(np.float32)
  above = score[label == 1][:, None] - score[label == 0][None]
  return check('auc', auc(label, score), np.mean((above > 0) + 0.5 * (above == 0)), 1e-12)


def run() -> dict[str, object]:
  """All checks; the largest difference of each."""
  checks = {f'sparse {t} {o}': sparse_golden(t, o) for t in TABLES for o in GOLDEN}
  checks |= {f'dense {o}': dense_golden(o) for o in GOLDEN}
  checks |= {f'epsilon {u}': epsilon(u) for u in ('dense', *TABLES)}
  checks |= {f'tables agree {o}': tables_agree(o) for o in GOLDEN}
  checks |= {f'forward {i}': forward(i) for i in ('cat', 'dot')}
  return {'ok': True, **checks, 'batch norm': batch_norm(), 'auc': auc_brute_force()}
