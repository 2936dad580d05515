"""Optimizers: one optax transformation each, used on the dense parameters and, through `rowwise`, on table rows."""

from typing import Any

import jax
import optax

from dlrm_jax.optim.adagrad import adagrad
from dlrm_jax.optim.adagrad_decay import adagrad_decay
from dlrm_jax.optim.adam import adam
from dlrm_jax.optim.adam_async import adam_async
from dlrm_jax.optim.schedules import LearningRate, rate_at
from dlrm_jax.optim.sgd import sgd

OPTIMIZERS = {
  'adagrad': adagrad,
  'adagraddecay': adagrad_decay,
  'adam': adam,
  'adamasync': adam_async,
  'gradientdescent': sgd,
}


def optimizer(name: str, learning_rate: LearningRate, **options: Any) -> optax.GradientTransformation:
  """The optimizer of that name; `options` are the other arguments of its function. ValueError for an unknown name."""
  if name not in OPTIMIZERS:
    raise ValueError(f'optimizer {name!r} is not known; choose one of {sorted(OPTIMIZERS)}')
  return OPTIMIZERS[name](learning_rate, **options)


def dense_transform(
  tx: optax.GradientTransformation, learning_rate: LearningRate, weight_decay: float = 0.0
) -> optax.GradientTransformation:
  """`tx` with decoupled weight decay, w -= lr weight_decay w, on the leaves with two or more axes.

  Biases and the scale and shift of batch norm have one axis and are left alone.
  Source: Loshchilov and Hutter, arXiv:1711.05101.
  """
  if weight_decay < 0:
    raise ValueError(f'weight_decay={weight_decay} must be 0 (none) or more')
  if not weight_decay:
    return tx
  # optax.adamw adds the decay before it scales by -lr. Our `tx` has scaled already, so the decay brings its own -lr
  # and is added after; in this place the moments of `tx` never see it, which is what "decoupled" means.
  decay = optax.add_decayed_weights(
    lambda count: -weight_decay * rate_at(learning_rate, count),
    mask=lambda params: jax.tree.map(lambda leaf: leaf.ndim >= 2, params),
  )
  return optax.chain(tx, decay)
