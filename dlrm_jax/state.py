"""The first state of a run."""

import jax
import jax.numpy as jnp

from dlrm_jax.data.schema import CATEGORIES, INTEGERS
from dlrm_jax.program import Program
from dlrm_jax.structs import TrainState


def init_state(program: Program) -> TrainState:
  """Weights, statistics, optimizer memory and tables before the first step: a function of the spec's seed."""
  dim, seed = program.spec.embedding.dim, program.spec.seed
  # Column numbers are folded into the tables' keys, so the network takes a number that no column has.
  key = jax.random.fold_in(jax.random.key(seed), len(CATEGORIES))
  dense, vectors = jnp.zeros((1, len(INTEGERS))), jnp.zeros((1, len(CATEGORIES), dim))
  tables, known = program.embeddings.init()
  variables = program.model.init(key, dense, vectors, jnp.ones(1), train=True)
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=variables['params'],
    batch_stats=variables.get('batch_stats', {}),
    opt_state=program.dense_tx.init(variables['params']),
    tables=tables,
    known=known,
  )
