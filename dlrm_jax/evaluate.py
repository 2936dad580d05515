"""Metrics of a model over a whole evaluation set. Reads the state, never writes it."""

from collections.abc import Callable, Iterable

import jax
import numpy as np
from jax import Array

from dlrm_jax import metrics
from dlrm_jax.structs import Batch, TrainState


def evaluate(
  predict: Callable[[TrainState, Batch], tuple[Array, Array, Array]], state: TrainState, batches: Iterable[Batch]
) -> dict[str, float | int | None]:
  """All metrics over the batches' rows of weight 1, with `step.jit_predict`'s function; holds 12 bytes per row."""
  parts = [predict(state, batch) for batch in batches]
  if not parts:
    return metrics.evaluate(np.zeros(0), np.zeros(0))
  logit, label, weight = (np.concatenate(column) for column in zip(*jax.device_get(parts), strict=True))
  return metrics.evaluate(logit[weight > 0], label[weight > 0])
