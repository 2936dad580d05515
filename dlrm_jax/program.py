"""The static parts of a training program, bound once: model, layout of the tables, optimizers."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import optax

from dlrm_jax.embeddings.adaptive import Adaptive
from dlrm_jax.embeddings.admission import ADMISSIONS
from dlrm_jax.embeddings.dynamic import Dynamic
from dlrm_jax.embeddings.layout import TableLayout, static_layout
from dlrm_jax.embeddings.multi_hash import multi_hash
from dlrm_jax.embeddings.static import Static
from dlrm_jax.embeddings.update import UPDATES
from dlrm_jax.model import layers
from dlrm_jax.model.dlrm import DLRM
from dlrm_jax.native import build, directory, exchange, rows
from dlrm_jax.native.fence import fence
from dlrm_jax.optim import OPTIMIZERS, dense_transform
from dlrm_jax.optim.parameters import update_parameters
from dlrm_jax.optim.schedules import LearningRate, schedule
from dlrm_jax.sharding import ALONE, Axis
from dlrm_jax.spec import KEYED, OptimizerSpec, Spec
from dlrm_jax.structs import Table


@dataclasses.dataclass(frozen=True)
class Program:
  """What a step does, apart from its state."""

  spec: Spec
  model: DLRM
  dense_tx: optax.GradientTransformation
  update_parameters: Callable[..., tuple[Any, Any]]  # (gradient, opt_state, params) -> (params, opt_state), of dense_tx
  embeddings: Static  # or a kind of tables that is made from it
  native: build.Native
  axis: Axis


def make_program(spec: Spec, axis: Axis = ALONE) -> Program:
  """The program of an experiment on the devices of an axis."""
  options, rate = spec.optimizer, learning_rate(spec.optimizer)
  make = OPTIMIZERS[options.name]
  native = build.choose(spec.native)
  axis = dataclasses.replace(axis, fence=fence) if native.ready else axis
  kernels = rows.NATIVE if native.ready else rows.XLA
  table_tx = make(rate, **OPTIONS[options.name](options))
  # DeepRec has the RMSProp mode for table rows alone.
  dense_tx = make(rate, **OPTIONS[options.name](dataclasses.replace(options, rmsprop=False)))
  dense_tx = dense_transform(dense_tx, rate, options.weight_decay)
  layout = static_layout(spec.embedding)
  update_table = functools.partial(UPDATES[options.table_update], table_tx, l2=spec.embedding.l2, kernels=kernels)
  return Program(
    spec=spec,
    model=DLRM(spec.model, layers.NATIVE if native.ready else layers.XLA, axis),
    dense_tx=dense_tx,
    update_parameters=functools.partial(update_parameters, dense_tx, native=native.ready),
    embeddings=embeddings_of(spec, layout, table_tx, update_table, axis, native.ready),
    native=native,
    axis=axis,
  )


KINDS = {'static': Static, 'multi_hash': multi_hash, 'dynamic': Dynamic, 'adaptive': Adaptive}


def embeddings_of(
  spec: Spec,
  layout: dict[str, TableLayout],
  tx: optax.GradientTransformation,
  update_table: Callable[..., Table],
  axis: Axis,
  native: bool,
) -> Static:
  """The kind of tables that a spec names."""
  embedding = spec.embedding
  kernels = directory.NATIVE if native else directory.XLA
  exchanges = exchange.NATIVE if native else exchange.XLA
  parts = embedding, layout, tx, update_table, kernels, exchanges, spec.seed, axis
  if embedding.kind not in KEYED:
    return KINDS[embedding.kind](*parts)
  options = embedding.admission
  share = options.expected_ids if embedding.fusion else -(-options.expected_ids // len(layout))
  admission = {
    'always': lambda make: make(kernels),
    'counter': lambda make: make(options.threshold, share, kernels),
    'counting_bloom': lambda make: make(options.threshold, share, options.error_rate, options.bits, kernels),
  }[options.name](ADMISSIONS[options.name])
  return KINDS[embedding.kind](*parts, admission)


def learning_rate(spec: OptimizerSpec) -> LearningRate:
  """The learning rate as a schedule, or as a number if it never changes."""
  start = spec.decay_start or None
  return schedule(spec.decay, spec.learning_rate, spec.warmup_steps, spec.decay_steps, start, spec.final_factor)


def _adam_options(spec: OptimizerSpec) -> dict[str, Any]:
  return {'b1': spec.b1, 'b2': spec.b2, 'eps': spec.eps}


def _adagrad_options(spec: OptimizerSpec) -> dict[str, Any]:
  return {'initial_accumulator': spec.initial_accumulator}


def _decay_options(spec: OptimizerSpec) -> dict[str, Any]:
  return {'decay_steps': spec.accumulator_decay_steps, 'decay_rate': spec.accumulator_decay_rate}


OPTIONS = {
  'adam': _adam_options,
  'adamasync': lambda spec: _adam_options(spec) | {'rmsprop': spec.rmsprop},
  'adagraddecay': lambda spec: _adagrad_options(spec) | _decay_options(spec),
  'adagrad': _adagrad_options,
  'gradientdescent': lambda spec: {},
}
