"""The first state of a run, and how a state lies on the devices."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from dlrm_jax.data.schema import CATEGORIES, INTEGERS
from dlrm_jax.program import Program
from dlrm_jax.sharding import ALONE, CUT, WHOLE
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
  params = jax.tree.map(functools.partial(_spec, program), state.params)
  # An optimizer's memory is cut where cutting the parameters changes its shape.
  part = lambda spec, leaf: jax.ShapeDtypeStruct(
    (leaf.shape[0] // program.axis.size, *leaf.shape[1:]) if spec == CUT else leaf.shape, leaf.dtype
  )
  cut = jax.eval_shape(program.dense_tx.init, jax.tree.map(part, params, state.params))
  opt_state = jax.tree.map(lambda a, b: WHOLE if a.shape == b.shape else CUT, cut, state.opt_state)
  return jax.tree.map(lambda _: WHOLE, state).replace(params=params, opt_state=opt_state, tables=tables, known=known)


def _spec(program: Program, leaf: Any) -> PartitionSpec:
  """Of a parameter of the network."""
  least, devices = program.spec.model.shard_kb * 1024, program.axis.size
  large = 0 < least <= leaf.size * leaf.dtype.itemsize
  return CUT if devices > 1 and large and leaf.ndim and leaf.shape[0] % devices == 0 else WHOLE


def state_placing(program: Program) -> Any:
  """`state_specs` as shardings; None on one device."""
  return program.axis.placed(state_specs(program))


def _init(program: Program) -> TrainState:
  dim, seed = program.spec.embedding.dim, program.spec.seed
  dense, vectors = jnp.zeros((1, len(INTEGERS))), jnp.zeros((1, len(CATEGORIES), dim))
  tables, known = program.embeddings.init()
  variables = program.model.init(jax.random.key(seed), dense, vectors, jnp.ones(1), train=True)
  params = variables['params']
  if program.axis.mesh:
    own = lambda spec, leaf: program.axis.own(leaf) if spec == CUT else leaf
    params = jax.tree.map(own, state_specs(program).params, params)
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    batch_stats=variables.get('batch_stats', {}),
    opt_state=program.dense_tx.init(params),
    tables=tables,
    known=known,
  )
