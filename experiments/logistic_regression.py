"""Hashed logistic regression on the same batches as the DLRM: `python -m experiments.logistic_regression --data DIR`.

One weight for each bucket of each category and for each bin of each integer, one epoch, Adam on touched rows. What
interactions between columns are worth is the DLRM's AUC minus this one: the synthetic data must have at least .01.
Prints one line of JSON.
"""

import argparse
import functools
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np

from configs import base
from dlrm_jax import metrics, sources
from dlrm_jax import spec as specs
from dlrm_jax.embeddings.update import update_rows
from dlrm_jax.model.loss import cross_entropy
from dlrm_jax.optim import OPTIMIZERS
from dlrm_jax.optim.rowwise import init_slots
from dlrm_jax.structs import Table

BINS = 128  # of each integer after the log transform, a quarter wide


def rows_of(offsets, batch):
  """Rows i32[B, 39] of a batch's weights; padding has none."""
  bins = jnp.clip(jnp.floor(batch.dense * 4) + 16, 0, BINS - 1).astype(jnp.int32)
  rows = jnp.concatenate([batch.bucket.astype(jnp.int32), bins], axis=1) + offsets[None, :-1]
  return jnp.where(batch.weight[:, None] > 0, rows, offsets[-1])


def logits(offsets, table, batch):
  """Sums of the weights, f32[B]."""
  return table.value.at[rows_of(offsets, batch)].get(mode='fill', fill_value=0).sum(axis=(1, 2))


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def step(tx, offsets, table, batch):
  """The table after one update."""
  gradient = jax.grad(cross_entropy)(logits(offsets, table, batch), batch.label, batch.weight, batch.weight.sum())
  rows = rows_of(offsets, batch)
  return update_rows(tx, table, rows.reshape(-1), jnp.repeat(gradient, rows.shape[1])[:, None])


def run(spec, learning_rate):
  """Metrics after one epoch."""
  data = sources.open_sources(spec)
  sizes = (*spec.embedding.buckets, *[BINS] * 13)
  offsets = jnp.asarray(np.cumsum((0, *sizes)), jnp.int32)
  value = jnp.zeros((sum(sizes), 1))
  tx = OPTIMIZERS['adam'](learning_rate)
  table = Table(value=value, slots=init_slots(tx, value), scratch=jnp.zeros(len(value), jnp.int32))
  with sources.train_batches(data, spec, sources.START) as batches:
    for _ in range(sources.remaining_batches(data, spec, sources.START)):
      table = step(tx, offsets, table, next(batches)[0])
  score = jax.jit(logits)
  with sources.eval_batches(data, spec) as batches:
    parts = [(score(offsets, table, batch), batch.label, batch.weight) for batch, _ in batches]
  logit, label, weight = (np.concatenate(column) for column in zip(*jax.device_get(parts), strict=True))
  return metrics.evaluate(logit[weight > 0], label[weight > 0])


def main():
  """Command line."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--data', default='./data', help='folder of train.csv and eval.csv')
  parser.add_argument('--learning_rate', type=float, default=0.002)
  args = parser.parse_args()
  config = base.get_config()
  config.data_location = args.data
  result = run(specs.from_config(config), args.learning_rate)
  print(json.dumps({'model': 'hashed logistic regression', 'learning_rate': args.learning_rate, **result}))


if __name__ == '__main__':
  sys.exit(main())
