"""One training step, and the logits of one batch: pure functions of (program, state, batch)."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from dlrm_jax import sums
from dlrm_jax.model.mlp import Activations
from dlrm_jax.program import Program
from dlrm_jax.sharding import CUT, CUT_STACK, WHOLE, after
from dlrm_jax.state import state_specs
from dlrm_jax.structs import Batch, TrainState

Metrics = dict[str, Array]
BOTTOM = 'bottom_mlp'  # the parameters of the bottom half

# XLA:CPU fuses in two places: into calls of its kernel library, and by its own passes.
NO_FUSION = {'xla_cpu_experimental_ynn_fusion_type': '', 'xla_disable_hlo_passes': 'fusion,cpu_multi_output_fusion'}


def train_step(program: Program, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
  """The state after one update, and the batch's mean loss and number of examples."""
  embeddings, whole = program.embeddings, state.replace(params=whole_params(program, state.params))
  tables, known, found = embeddings.resolve(state.tables, state.known, after_params(program, whole, batch), state.step)
  vectors = embeddings.lookup(tables, found)
  if embeddings.takes_turns:
    batch = batch.replace(dense=after(batch.dense, vectors), weight=after(batch.weight, vectors))
  examples = program.axis.sum(batch.weight.sum())
  loss, (params_gradient, vectors_gradient), batch_stats = gradients(program, whole, vectors, batch, examples)
  params, opt_state = program.update_parameters(params_gradient, state.opt_state, state.params)
  new_state = TrainState(
    step=state.step + 1,
    params=params,
    batch_stats=batch_stats,
    opt_state=opt_state,
    tables=embeddings.update(tables, found.after((loss, params_gradient)), vectors_gradient, state.step),
    known=known,
  )
  return new_state, {'loss': loss, 'examples': examples}


def train_steps(
  program: Program, state: TrainState, batches: Batch, first: int | Array, after: int | Array
) -> tuple[TrainState, Metrics]:
  """`train_step` on each of the batches from `first` to before `after` of a stack of them, [K, B, ...], in one loop.

  The metrics are those of their examples together. Whatever the two numbers are, a step has the same bits.
  """

  def one(i: Array, carry: tuple[TrainState, Array, Array]) -> tuple[TrainState, Array, Array]:
    state, loss, examples = carry
    state, metrics = train_step(program, state, jax.tree.map(lambda leaf: leaf[i], batches))
    return state, loss + metrics['loss'] * metrics['examples'], examples + metrics['examples']

  state, loss, examples = jax.lax.fori_loop(first, after, one, (state, jnp.zeros(()), jnp.zeros(())))
  return state, {'loss': loss / jnp.maximum(examples, 1), 'examples': examples}


def gradients(
  program: Program, state: TrainState, vectors: Float[Array, 'B F D'], batch: Batch, examples: Float[Array, '']
) -> tuple[Array, tuple[Any, Array], Any]:
  """The loss, its gradients by (params, vectors), and the new batch statistics. `examples` of all devices.

  The bottom MLP sees the whole batch, so that its statistics are those of the batch however it is sliced; the rest,
  where most of the activations are, runs over the slices one after another.
  """

  def bottom(params: Any) -> tuple[Activations, Any]:
    variables = {'params': state.params | params, 'batch_stats': state.batch_stats}
    out, new = program.model.apply(variables, batch.dense, batch.weight, True, mutable=['batch_stats'], method='bottom')
    return out, new.get('batch_stats', {})

  def top_loss(shared: Any, h: Array, vectors: Array, label: Array, weight: Array) -> Array:
    params, scale_shift = shared
    inputs = Activations(h, scale_shift), vectors, label, weight, total
    return program.model.apply({'params': state.params | params}, *inputs, method='loss')

  (h, scale_shift), bottom_vjp, batch_stats = jax.vjp(bottom, {BOTTOM: state.params[BOTTOM]}, has_aux=True)
  of_top = {name: part for name, part in state.params.items() if name != BOTTOM}
  total, top = jnp.maximum(examples, 1), jax.value_and_grad(top_loss, argnums=(0, 1, 2))
  loss, ((top_gradient, of_scale_shift), h_gradient, vectors_gradient) = _over_slices(
    top, program.spec.micro_batch, (of_top, scale_shift), h, vectors, batch
  )
  cut = cut_params(program)
  (loss, of_scale_shift), top_gradient = summed(program, cut, (loss, of_scale_shift), top_gradient)
  (bottom_gradient,) = bottom_vjp(Activations(h_gradient, of_scale_shift))
  params_gradient = own_part(program, cut, bottom_gradient) | top_gradient
  return loss, (params_gradient, vectors_gradient), batch_stats


def whole_params(program: Program, params: Any) -> Any:
  """The network's parameters, of which every device may have a part."""
  if not program.axis.mesh:
    return params
  whole = lambda spec, leaf: program.axis.gather(leaf) if spec == CUT else leaf
  return jax.tree.map(whole, state_specs(program).params, params)


def after_params(program: Program, whole: TrainState, batch: Batch) -> Batch:
  """The batch for the tables' lookups, which may wait until the parameters are whole, see `sharding.after`."""
  if not program.embeddings.takes_turns:
    return batch
  return batch.replace(bucket=after(batch.bucket, whole.params), key=after(batch.key, whole.params))


def cut_params(program: Program) -> dict[str, Any]:
  """Of each parameter of the network, whether every device has a part of it, not all."""
  return jax.tree.map(lambda spec: spec == CUT, state_specs(program).params)


def summed(program: Program, cut: dict[str, Any], exact: Any, gradient: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
  """Of all devices' examples: what is not to be rounded on its way, and the gradient by some of the parameters; of one
  that is cut, this device's part."""
  leaves, structure = jax.tree.flatten(gradient)
  cut = jax.tree.leaves({name: cut[name] for name in gradient})
  dtype, axis = program.spec.model.reduce_dtype, program.axis
  parts = [axis.fence(axis.scatter_sum(leaf, dtype)) for leaf, is_cut in zip(leaves, cut, strict=True) if is_cut]
  wholes = [leaf for leaf, is_cut in zip(leaves, cut, strict=True) if not is_cut]
  if dtype == 'float32':
    exact, wholes = axis.sum_flat((exact, wholes))
  else:
    exact, wholes = axis.sum_flat(exact), axis.sum_flat(wholes, dtype)
  order = iter(parts), iter(wholes)
  return exact, structure.unflatten([next(order[0] if is_cut else order[1]) for is_cut in cut])


def own_part(program: Program, cut: dict[str, Any], gradient: dict[str, Any]) -> dict[str, Any]:
  """Of the gradient by some of the parameters, which all devices have: of one that is cut, this device's part."""
  own = lambda leaf, is_cut: program.axis.own(leaf) if is_cut else leaf
  return jax.tree.map(own, program.axis.fence(gradient), {name: cut[name] for name in gradient})


def _over_slices(
  top: Callable[..., Any],
  slices: int,
  shared: Any,
  h: Float[Array, 'K B'],
  vectors: Float[Array, 'B F D'],
  batch: Batch,
) -> tuple[Array, tuple[Any, Array, Array]]:
  """Loss and gradients of `top`, summed (shared) or joined (h, vectors) over the slices of the batch."""
  if slices == 1:
    return top(shared, h, vectors, batch.label, batch.weight)
  split = lambda leaf: leaf.reshape(slices, -1, *leaf.shape[1:])
  # h is feature-major: its examples stand in the last axis.
  h_slices = jnp.moveaxis(h.reshape(h.shape[0], slices, -1), 1, 0)
  pieces = (h_slices, split(vectors), split(batch.label), split(batch.weight))
  loss, (shared_gradient, h_gradient, vectors_gradient) = jax.lax.map(lambda piece: top(shared, *piece), pieces)
  loss, shared_gradient = jax.tree.map(sums.of_terms, (loss, shared_gradient))
  return loss, (
    shared_gradient,
    jnp.moveaxis(h_gradient, 0, 1).reshape(h.shape),
    vectors_gradient.reshape(vectors.shape),
  )


def logits(program: Program, state: TrainState, batch: Batch) -> Float[Array, 'B']:
  """Logits of this device's batch with the running batch statistics; the state is read only."""
  whole = state.replace(params=whole_params(program, state.params))
  found = program.embeddings.find(state.known, after_params(program, whole, batch))
  vectors = program.embeddings.lookup(state.tables, found)
  variables = {'params': whole.params, 'batch_stats': state.batch_stats}
  return program.model.apply(variables, batch.dense, vectors, batch.weight, False)


def predict(program: Program, state: TrainState, batch: Batch) -> tuple[Array, Array, Array]:
  """(logit, label, weight) f32[B] each, of the examples of all devices."""
  return program.axis.gather((logits(program, state, batch), batch.label, batch.weight))


def jit_train_step(program: Program) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
  """`train_step`, compiled; it takes over the memory of the state that it is given."""
  specs = state_specs(program)
  step = program.axis.over(functools.partial(train_step, program), (specs, CUT), (specs, WHOLE))
  return jax.jit(step, donate_argnums=0, compiler_options=compiler_options(program))


def jit_train_steps(program: Program) -> Callable[[TrainState, Batch, int, int], tuple[TrainState, Metrics]]:
  """`train_steps`, compiled, as `jit_train_step` is."""
  specs = state_specs(program)
  steps = program.axis.over(functools.partial(train_steps, program), (specs, CUT_STACK, WHOLE, WHOLE), (specs, WHOLE))
  return jax.jit(steps, donate_argnums=0, compiler_options=compiler_options(program))


def jit_predict(program: Program) -> Callable[[TrainState, Batch], tuple[Array, Array, Array]]:
  """`predict`, compiled."""
  step = program.axis.over(functools.partial(predict, program), (state_specs(program), CUT), WHOLE)
  return jax.jit(step, compiler_options=compiler_options(program))


def compiler_options(program: Program) -> dict[str, str]:
  """Of XLA, for the functions of a program."""
  return {} if program.spec.op_fusion else NO_FUSION
