"""DLRM as a PyTorch user would write it: bottom MLP with batch norm, interaction, chained top MLP, logits."""

import itertools

import torch
from shared import COLUMNS, DENSE, DIM
from torch import nn
from torch.nn import functional as F

BOTTOM, TOP = (512, 256, 64, DIM), (512, 256)
MOMENTUM, EPSILON = 0.99, 1e-3


class BatchNorm(nn.Module):
  """Batch norm with TensorFlow's momentum .99 and biased variance, and running statistics that suit short runs.

  The statistics start at zero, so after t batches they weigh 1 - .99^t in all; evaluation divides by that weight.
  PyTorch accumulates the unbiased variance, n/(n-1) times the biased one: `set_batch_size` keeps that factor known,
  so that evaluation takes it out exactly.
  """

  def __init__(self, features: int):
    super().__init__()
    self.weight = nn.Parameter(torch.ones(features))
    self.bias = nn.Parameter(torch.zeros(features))
    self.register_buffer('mean', torch.zeros(features))
    self.register_buffer('var', torch.zeros(features))
    self.bessel = 1.0

  def set_batch_size(self, examples: int) -> None:
    """Says how many examples (two or more) the next training batches have."""
    bessel = examples / (examples - 1)
    self.var.mul_(bessel / self.bessel)
    self.bessel = bessel

  def statistics(self, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Debiased running mean and biased variance `[features]` after `steps` training batches."""
    seen = 1 - MOMENTUM**steps
    return self.mean / seen, self.var / (seen * self.bessel)

  def forward(self, x: torch.Tensor, steps: int | None) -> torch.Tensor:
    """Normalises `[B, features]`: by the batch if `steps` is None, else by the statistics after `steps` batches."""
    if steps is None:
      return F.batch_norm(x, self.mean, self.var, self.weight, self.bias, True, 1 - MOMENTUM, EPSILON)
    mean, var = self.statistics(steps)
    return F.batch_norm(x, mean, var, self.weight, self.bias, False, 0.0, EPSILON)


def linear(inputs: int, outputs: int) -> nn.Linear:
  """A Linear with glorot-uniform kernel and zero bias, TensorFlow's defaults."""
  layer = nn.Linear(inputs, outputs)
  nn.init.xavier_uniform_(layer.weight)
  nn.init.zeros_(layer.bias)
  return layer


class Dlrm(nn.Module):
  """Everything but the table: `(dense [B, 13], vectors [B, 26, 16]) -> logit [B]`."""

  def __init__(self, interaction: str):
    super().__init__()
    widths = (DENSE, *BOTTOM)
    self.bottom = nn.ModuleList(linear(a, b) for a, b in itertools.pairwise(widths))
    self.norms = nn.ModuleList(BatchNorm(width) for width in BOTTOM)
    vectors = COLUMNS + 1
    width = {'cat': vectors * DIM, 'dot': DIM + vectors * COLUMNS // 2}[interaction]
    self.top = nn.ModuleList([linear(width, TOP[0]), linear(*TOP), linear(TOP[1], 1)])
    self.interact = {'cat': cat_interaction, 'dot': self.dot_interaction}[interaction]
    i, j = torch.tril_indices(vectors, vectors, offset=-1)
    self.register_buffer('pair', i * vectors + j, persistent=False)

  def set_batch_size(self, examples: int) -> None:
    """See BatchNorm."""
    for norm in self.norms:
      norm.set_batch_size(examples)

  def dot_interaction(self, bottom: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
    """`[B, 16 + 351]`: the bottom output, then all products of two of the 27 vectors, (1,0), (2,0), (2,1), ..."""
    stack = torch.cat([bottom.unsqueeze(1), vectors.to(bottom.dtype)], 1)
    products = torch.bmm(stack, stack.transpose(1, 2)).flatten(1)
    return torch.cat([bottom, products.index_select(1, self.pair)], 1)

  def forward(self, dense: torch.Tensor, vectors: torch.Tensor, steps: int | None = None) -> torch.Tensor:
    """Logits `[B]`, float32 also under autocast; `steps` (training batches so far) is given in evaluation only."""
    h = dense
    for layer, norm in zip(self.bottom, self.norms, strict=True):
      h = norm(F.relu_(layer(h)), steps)  # in place: a pass less over the activations
    z = self.interact(h, vectors)
    for layer in self.top[:-1]:
      z = F.relu_(layer(z))
    return self.top[-1](z).squeeze(1).to(vectors.dtype)


def cat_interaction(bottom: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
  """`[B, 16 + 26 * 16]`: the bottom output and the embeddings side by side."""
  return torch.cat([bottom, vectors.flatten(1).to(bottom.dtype)], 1)
