"""One merged embedding table with its sparse optimizer, in two variants: PyTorch's own modules, and a faster one.

Both do the same numbers (`twin.py --mode selfcheck`): duplicates are summed first, then Adam or Adagrad moves the
touched rows and their slots only (lazy), with TensorFlow's place for epsilon: outside the root, before the bias
correction.
"""

import math
from typing import Protocol

import torch
from torch import nn
from torch.nn import functional as F

BETA1, BETA2, EPSILON, ACCUMULATOR = 0.9, 0.999, 1e-8, 0.1
SLOTS = {'adam': 2, 'adagrad': 1}


def fill_truncated_normal(table: torch.Tensor, rows_at_once: int = 1 << 20) -> None:
  """Truncated normal, deviation .25, cut at two deviations, into `[rows, D]`, in pieces to need no second table."""
  for piece in table.split(rows_at_once):
    fresh = torch.empty(piece.numel()).normal_(std=0.25)
    far = (fresh.abs() > 0.5).nonzero().view(-1)  # 5 % are drawn again: four times as fast as trunc_normal_ for all
    fresh[far] = nn.init.trunc_normal_(torch.empty(len(far)), std=0.25, a=-0.5, b=0.5)
    piece.copy_(fresh.view_as(piece))


class Table(Protocol):
  """An embedding table that updates itself; made by `(rows, dim, optimizer, learning rate)`."""

  @property
  def value(self) -> torch.Tensor:
    """The vectors `[rows, D]`, as a view."""

  def pull(self, row: torch.Tensor) -> torch.Tensor:
    """Vectors `[..., D]` of the rows, differentiable."""

  def push(self) -> None:
    """Updates the rows of the last `pull` from the gradient that backward left."""

  def lookup(self, row: torch.Tensor) -> torch.Tensor:
    """Vectors `[..., D]` of the rows, for evaluation."""


class SparseTable:
  """`nn.EmbeddingBag(sparse=True)` with SparseAdam or Adagrad: the form of the textbooks.

  Bags of one row: with SparseAdam up to 1.4 times as fast as `nn.Embedding`, with Adagrad the same. SparseAdam's
  epsilon stands where TensorFlow's does (unlike that of torch.optim.Adam); Adagrad's is set to 0.
  """

  def __init__(self, rows: int, dim: int, optimizer: str, lr: float):
    self.bag = nn.EmbeddingBag.from_pretrained(torch.empty(rows, dim), freeze=False, mode='sum', sparse=True)
    weights = [self.bag.weight]
    if optimizer == 'adam':
      self.optimizer = torch.optim.SparseAdam(weights, lr=lr, betas=(BETA1, BETA2), eps=EPSILON)
    else:
      self.optimizer = torch.optim.Adagrad(weights, lr=lr, initial_accumulator_value=ACCUMULATOR, eps=0.0)

  @property
  def value(self) -> torch.Tensor:
    """The vectors `[rows, D]`, as a view."""
    return self.bag.weight.data

  def pull(self, row: torch.Tensor) -> torch.Tensor:
    """Vectors `[..., D]` of the rows, differentiable."""
    return self.bag(row.reshape(-1, 1)).view(*row.shape, -1)

  def push(self) -> None:
    """Updates the rows of the last `pull` from the gradient that backward left."""
    self.optimizer.step()
    self.optimizer.zero_grad()

  def lookup(self, row: torch.Tensor) -> torch.Tensor:
    """Vectors `[..., D]` of the rows, for evaluation."""
    return F.embedding(row, self.value)


class PullTable:
  """The distinct rows of a batch are pulled out once, trained as a small dense leaf, and pushed back once.

  Value and slots of a row lie side by side, so a step is one gather and one scatter; autograd sums the duplicates
  (the backward of a small gather), nothing is coalesced.
  """

  def __init__(self, rows: int, dim: int, optimizer: str, lr: float):
    self.dim, self.lr, self.step, self.update = dim, lr, 0, {'adam': self.adam, 'adagrad': self.adagrad}[optimizer]
    self.block = torch.zeros(rows, (1 + SLOTS[optimizer]) * dim)
    if optimizer == 'adagrad':
      self.block[:, dim:] = ACCUMULATOR

  @property
  def value(self) -> torch.Tensor:
    """The vectors `[rows, D]`, as a view."""
    return self.block[:, : self.dim]

  def pull(self, row: torch.Tensor) -> torch.Tensor:
    """Vectors `[..., D]` of the rows, differentiable."""
    self.rows, lane = torch.unique(row, return_inverse=True)
    self.pulled = self.block.index_select(0, self.rows)
    self.leaf = self.pulled[:, : self.dim].contiguous().requires_grad_()
    # Not F.embedding: on the CPU its dense backward is up to four times slower than index_select's index_add_.
    return self.leaf.index_select(0, lane.view(-1)).view(*row.shape, self.dim)

  def push(self) -> None:
    """Updates the rows of the last `pull` from the gradient that backward left."""
    self.step += 1
    self.update(*self.pulled.split(self.dim, 1), self.leaf.grad)
    self.block.index_copy_(0, self.rows, self.pulled)

  def lookup(self, row: torch.Tensor) -> torch.Tensor:
    """Vectors `[..., D]` of the rows, for evaluation."""
    return F.embedding(row, self.value)

  def adam(self, w: torch.Tensor, m: torch.Tensor, v: torch.Tensor, grad: torch.Tensor) -> None:
    """Lazy Adam in place on `[n, D]` each."""
    rate = self.lr * math.sqrt(1 - BETA2**self.step) / (1 - BETA1**self.step)
    m.lerp_(grad, 1 - BETA1)
    v.mul_(BETA2).addcmul_(grad, grad, value=1 - BETA2)
    w.addcdiv_(m, v.sqrt().add_(EPSILON), value=-rate)

  def adagrad(self, w: torch.Tensor, a: torch.Tensor, grad: torch.Tensor) -> None:
    """Adagrad in place on `[n, D]` each."""
    a.addcmul_(grad, grad)
    w.addcdiv_(grad, a.sqrt(), value=-self.lr)


TABLES = {'pull': PullTable, 'sparse': SparseTable}


class DenseOptimizer:
  """PyTorch's fused Adam or Adagrad with TensorFlow's epsilon: Adam's is rescaled each step, Adagrad's is 0."""

  def __init__(self, parameters: list[nn.Parameter], optimizer: str, lr: float):
    self.step_number, self.adam = 0, optimizer == 'adam'
    if self.adam:
      self.optimizer = torch.optim.Adam(parameters, lr=lr, betas=(BETA1, BETA2), eps=EPSILON, fused=True)
    else:
      self.optimizer = torch.optim.Adagrad(
        parameters, lr=lr, initial_accumulator_value=ACCUMULATOR, eps=0.0, fused=True
      )

  def step(self) -> None:
    """One update from the gradients, which it then drops."""
    self.step_number += 1
    if self.adam:
      # PyTorch divides by sqrt(v / (1 - b2^t)) + eps, TensorFlow by (sqrt(v) + eps) / sqrt(1 - b2^t).
      self.optimizer.param_groups[0]['eps'] = EPSILON / math.sqrt(1 - BETA2**self.step_number)
    self.optimizer.step()
    self.optimizer.zero_grad(set_to_none=True)
