"""The PyTorch twin with FBGEMM's fused table: the gradient updates the rows inside backward. See README.md.

Command line and output are those of `../pytorch/twin.py`, which does everything but the table.
"""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(1, str(Path(__file__).resolve().parent.parent / 'pytorch'))
import fbgemm_gpu
import torch
import twin
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import (
  BoundsCheckMode,
  ComputeDevice,
  EmbeddingLocation,
  PoolingMode,
)
from fbgemm_gpu.split_table_batched_embeddings_ops_training import SplitTableBatchedEmbeddingBagsCodegen
from tables import ACCUMULATOR
from torch.nn import functional as F

OPTIMIZERS = {
  'adagrad': EmbOptimType.EXACT_ADAGRAD,
  'rowwise_adagrad': EmbOptimType.EXACT_ROWWISE_ADAGRAD,
  'adam': EmbOptimType.ADAM,
}


class FusedTable:
  """All columns in one table of FBGEMM, whose backward merges duplicate rows and applies Adagrad to them."""

  def __init__(self, rows: int, dim: int, optimizer: str, lr: float):
    try:
      self.table = SplitTableBatchedEmbeddingBagsCodegen(
        [(rows, dim, EmbeddingLocation.HOST, ComputeDevice.CPU)],
        optimizer=OPTIMIZERS[optimizer],
        learning_rate=lr,
        eps=0.0,
        pooling_mode=PoolingMode.SUM,  # of bags of one row: up to ten times as fast as NONE
        bounds_check_mode=BoundsCheckMode.NONE,
      )
    except AssertionError as error:
      raise SystemExit(f'FBGEMM {fbgemm_gpu.__version__}: {error}') from error
    for slot in self.slots():
      slot.fill_(ACCUMULATOR)
    self.dim, self.offset = dim, torch.zeros(0, dtype=torch.int64)

  @property
  def value(self) -> torch.Tensor:
    """The vectors `[rows, D]`, as a view."""
    return self.table.split_embedding_weights()[0]

  def slots(self) -> list[torch.Tensor]:
    """The optimizer's slots: Adagrad's accumulator `[rows, D]`, or `[rows]` if row-wise."""
    return list(self.table.split_optimizer_states()[0])

  def pull(self, row: torch.Tensor) -> torch.Tensor:
    """Vectors `[..., D]` of the rows, differentiable; backward updates the table."""
    if len(self.offset) != row.numel() + 1:
      self.offset = torch.arange(row.numel() + 1)
    return self.table(row.reshape(-1), self.offset).view(*row.shape, self.dim)

  def push(self) -> None:
    """Nothing is left to do: see `pull`."""

  def lookup(self, row: torch.Tensor) -> torch.Tensor:
    """Vectors `[..., D]` of the rows, for evaluation."""
    return F.embedding(row, self.value)


def updates_agree(optimizer: str) -> float:
  """Largest difference from the published formulas in float64, after 30 batches with many duplicates.

  Adagrad: the gradients of a row are summed, squared, and added to its accumulator. Row-wise: the accumulator is one
  number a row, to which the mean of the squares is added.
  """
  rows, dim, lr = 500, 16, 0.05
  rng = np.random.default_rng(1)
  table = FusedTable(rows, dim, optimizer, lr)
  value = rng.normal(size=(rows, dim)).astype(np.float32)
  table.value.copy_(torch.from_numpy(value))
  value, slot = value.astype(np.float64), np.full((rows, dim), ACCUMULATOR)
  for _ in range(30):
    row, upstream = (rng.random((64, 26)) ** 4 * rows).astype(np.int64), rng.normal(size=(64, 26, dim))
    vectors = table.pull(torch.from_numpy(row))
    if not np.allclose(vectors.detach(), value[row], rtol=0, atol=1e-4):
      raise SystemExit(f'selfcheck {optimizer}: the vectors looked up are not those of the rows')
    vectors.backward(torch.from_numpy(upstream).float())
    grad = np.zeros((rows, dim))
    np.add.at(grad, row, upstream)
    square = grad**2
    slot += square.mean(1, keepdims=True) if optimizer == 'rowwise_adagrad' else square
    value -= lr * grad / np.sqrt(slot)
  difference = float(np.abs(table.value.numpy() - value).max())
  if not difference < 1e-4:
    raise SystemExit(f'selfcheck {optimizer}: the table differs from the formula by {difference}')
  return difference


def check() -> dict[str, object]:
  """Both optimizers; the largest difference of each."""
  return {'ok': True, **{optimizer: updates_agree(optimizer) for optimizer in ('adagrad', 'rowwise_adagrad')}}


if __name__ == '__main__':
  twin.main(sys.argv[1:], {'fused': FusedTable}, tuple(OPTIMIZERS), check)
