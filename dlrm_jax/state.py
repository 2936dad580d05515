"""The first state of a run, and how a state lies on the devices."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from dlrm_jax.data.schema import CATEGORIES, INTEGERS
from dlrm_jax.program import Program
from dlrm_jax.sharding import ALONE, WHOLE
from dlrm_jax.structs import TrainState


def init_state(program: Program) -> TrainState:
  """Weights, statistics, optimizer memory and tables before the first step: a function of the spec's seed."""
  return jax.jit(program.axis.over(lambda: _init(program), (), state_specs(program)))()


def abstract_state(program: Program) -> TrainState:
  """Shapes and types of `init_state`, of whole arrays."""
  embeddings = dataclasses.replace(program.embeddings, axis=ALONE)
  alone = dataclasses.replace(program, model=program.model.clone(axis=ALONE), embeddings=embeddings, axis=ALONE)
  return jax.eval_shape(lambda: _init(alone))


def state_specs(program: Program) -> TrainState:
  """Of each array of a state, whether every device has all of it or a part."""
  state = abstract_state(program)
  tables, known = program.embeddings.specs(state.tables, state.known)
  return jax.tree.map(lambda _: WHOLE, state).replace(tables=tables, known=known)


def state_placing(program: Program) -> Any:
  """`state_specs` as shardings; None on one device."""
  return program.axis.placed(state_specs(program))


def _init(program: Program) -> TrainState:
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
