"""One layer of an MLP, relu(kernel^T h + bias), in XLA and in C++ (native/dense.cc). Activations are [features, B].

With the layer come its moments, the sums of weight * y and weight * y^2 over the examples: all that batch norm needs.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float

from dlrm_jax.sums import PANEL

Moments = tuple[Float[Array, 'N'], Float[Array, 'N']]


# Either form: (kernel, bias, h, weight, dtype, moments) -> (activations [N, B], their moments). The operands of the
# products are rounded to `dtype`, sums are float32. Without `moments`, what comes in their place means nothing.
Layer = Callable[[Array, Array, Array, Array, DTypeLike, bool], tuple[Array, Moments]]
# Either form: (f32[R, C], dtype) -> [C, R] in float32, or already in `dtype`, to which the next product will round it.
Transpose = Callable[[Array, DTypeLike], Array]
# Either form: (kernel [K, N], bias, scale [K], shift [K]) -> kernel and bias of the layer that makes of h what this one
# makes of h * scale + shift.
Fold = Callable[[Array, Array, Array, Array], tuple[Array, Array]]
# (dtype, the network's parameters, bottom [K, B], vectors [B, F, D], label, weight, total) -> `cross_entropy` of the
# top MLP's logits with the interaction `cat`.
CatLoss = Callable[[DTypeLike, Any, Array, Array, Array, Array, Array], Array]


class LayerKernels(NamedTuple):
  """Either form of what the network is made of."""

  layer: Layer
  transpose: Transpose
  fold: Fold
  cat_loss: CatLoss | None = None  # None: as the other two make it


def xla_layer(
  kernel: Float[Array, 'K N'],
  bias: Float[Array, 'N'],
  h: Float[Array, 'K B'],
  weight: Float[Array, 'B'],
  dtype: DTypeLike,
  moments: bool,
) -> tuple[Float[Array, 'N B'], Moments]:
  """See `Layer`. The activations are float32."""
  del moments  # XLA leaves out what nobody reads
  y = jax.nn.relu(matmul(kernel, h, dtype) + bias[:, None])
  return y, ((y * weight[None]).sum(axis=1), (jnp.square(y) * weight[None]).sum(axis=1))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def matmul(kernel: Float[Array, 'K N'], h: Float[Array, 'K B'], dtype: DTypeLike) -> Float[Array, 'N B']:
  """kernel^T h with operands rounded to `dtype`, in the forward and the backward pass, and sums in float32."""
  return _matmul_forward(kernel, h, dtype)[0]


def _matmul_forward(kernel: Array, h: Array, dtype: DTypeLike) -> tuple[Array, tuple[Array, Array]]:
  kernel, h = kernel.astype(dtype), h.astype(dtype)
  if kernel.dtype == jnp.float32:
    return _contract(kernel.T, 1, h, 0), (kernel, h)
  # XLA:CPU folds a transpose into the product, and its bfloat16 units have no such form: 3x slower. It folds none that
  # gets another row, so the product has one row too many.
  extra = jnp.zeros((1, kernel.shape[0]), kernel.dtype)
  return _contract(jnp.concatenate([kernel.T, extra]), 1, h, 0)[:-1], (kernel, h)


def _matmul_backward(dtype: DTypeLike, operands: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
  kernel, h = operands
  gradient = gradient.astype(dtype)
  return _contract(h, 1, gradient, 1), _contract(kernel, 1, gradient, 0)


matmul.defvjp(_matmul_forward, _matmul_backward)


def _contract(a: Array, axis_a: int, b: Array, axis_b: int) -> Array:
  # float32 accumulation is also what makes XLA:CPU choose the processor's bfloat16 units.
  return jax.lax.dot_general(a, b, (((axis_a,), (axis_b,)), ((), ())), preferred_element_type=jnp.float32)


def native_layer(
  kernel: Float[Array, 'K N'],
  bias: Float[Array, 'N'],
  h: Float[Array, 'K B'],
  weight: Float[Array, 'B'],
  dtype: DTypeLike,
  moments: bool,
) -> tuple[Float[Array, 'N B'], Moments]:
  """See `Layer`. The activations have `dtype`. Needs `native.load()`. Examples are filled up to whole panels."""
  examples = h.shape[1]
  more = -examples % PANEL
  h, weight = jnp.pad(h.astype(dtype), ((0, 0), (0, more))), jnp.pad(weight, (0, more))
  # The kernels have a panel of examples in one stretch of memory. Between two layers XLA sees that nothing changes.
  panels = h.reshape(h.shape[0], -1, PANEL).transpose(1, 0, 2)
  y, total, square = _native(kernel, bias, panels, weight, moments)
  return y.transpose(1, 0, 2).reshape(y.shape[1], -1)[:, :examples], (total, square)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _native(kernel: Array, bias: Array, h: Array, weight: Array, moments: bool) -> tuple[Array, Array, Array]:
  return _native_forward(kernel, bias, h, weight, moments)[0]


def _native_forward(
  kernel: Array, bias: Array, h: Array, weight: Array, moments: bool
) -> tuple[tuple[Array, Array, Array], tuple[Array, ...]]:
  size = kernel.shape[1]
  moment = jax.ShapeDtypeStruct((size,), jnp.float32)
  call = jax.ffi.ffi_call(
    f'dlrm_dense_forward_{h.dtype}', (jax.ShapeDtypeStruct((len(h), size, PANEL), h.dtype), moment, moment)
  )
  y, total, square = call(kernel, bias, h, weight, moments=moments)
  return (y, total, square), (kernel, h, y, weight)


def _native_backward(
  moments: bool, saved: tuple[Array, ...], gradient: tuple[Array, Array, Array]
) -> tuple[Array, Array, Array, Array]:
  kernel, h, y, weight = saved
  shapes = [jax.ShapeDtypeStruct(kernel.shape, jnp.float32), jax.ShapeDtypeStruct(kernel.shape[1:], jnp.float32)]
  call = jax.ffi.ffi_call(f'dlrm_dense_backward_{h.dtype}', (*shapes, jax.ShapeDtypeStruct(h.shape, h.dtype)))
  return *call(kernel, h, y, gradient[0], weight, *gradient[1:], moments=moments), jnp.zeros_like(weight)


_native.defvjp(_native_forward, _native_backward)


def xla_transpose(x: Float[Array, 'R C'], dtype: DTypeLike) -> Float[Array, 'C R']:
  """See `Transpose`: float32."""
  del dtype
  return x.T


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def native_transpose(x: Float[Array, 'R C'], dtype: DTypeLike) -> Float[Array, 'C R']:
  """See `Transpose`: in `dtype`. Needs `native.load()`."""
  turned = jax.ShapeDtypeStruct(x.shape[::-1], jnp.dtype(dtype))
  return jax.ffi.ffi_call(f'dlrm_transpose_{x.dtype}_{turned.dtype}', turned)(x)


native_transpose.defvjp(
  lambda x, dtype: (native_transpose(x, dtype), None),
  lambda dtype, _, gradient: (native_transpose(gradient, jnp.float32),),
)


def xla_fold(
  kernel: Float[Array, 'K N'], bias: Float[Array, 'N'], scale: Float[Array, 'K'], shift: Float[Array, 'K']
) -> tuple[Float[Array, 'K N'], Float[Array, 'N']]:
  """See `Fold`."""
  return scale[:, None] * kernel, bias + shift @ kernel


@jax.custom_vjp
def native_fold(
  kernel: Float[Array, 'K N'], bias: Float[Array, 'N'], scale: Float[Array, 'K'], shift: Float[Array, 'K']
) -> tuple[Float[Array, 'K N'], Float[Array, 'N']]:
  """See `Fold`. Needs `native.load()`."""
  return jax.ffi.ffi_call('dlrm_fold', (kernel, bias))(kernel, bias, scale, shift)


def _fold_backward(
  saved: tuple[Array, Array, Array], gradient: tuple[Array, Array]
) -> tuple[Array, Array, Array, Array]:
  kernel, scale, shift = saved
  call = jax.ffi.ffi_call('dlrm_fold_backward', saved)  # each result is as large as what it is the gradient by
  of_kernel, of_scale, of_shift = call(kernel, scale, shift, *gradient)
  return of_kernel, gradient[1], of_scale, of_shift


native_fold.defvjp(
  lambda kernel, bias, scale, shift: (native_fold(kernel, bias, scale, shift), (kernel, scale, shift)), _fold_backward
)


def native_cat_loss(
  dtype: DTypeLike,
  params: Any,
  bottom: Float[Array, 'K B'],
  vectors: Float[Array, 'B F D'],
  label: Float[Array, 'B'],
  weight: Float[Array, 'B'],
  total: Float[Array, ''],
) -> Float[Array, '']:
  """See `CatLoss`, native/top.cc. Needs `native.load()`."""
  more = -bottom.shape[1] % PANEL
  top = params['top_mlp']
  layers = [(top[f'kernel_{i}'], top[f'bias_{i}']) for i in range(len(top) // 2)]
  last = jnp.pad(label, (0, more)), jnp.pad(weight, (0, more)), total, params['logit_kernel'], params['logit_bias']
  bottom = jnp.pad(bottom.astype(jnp.float32), ((0, 0), (0, more)))
  return _cat_loss(jnp.dtype(dtype), bottom, jnp.pad(vectors, ((0, more), (0, 0), (0, 0))), *last, layers)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _cat_loss(dtype: jnp.dtype, *operands: Any) -> Array:
  return _cat_loss_forward(dtype, *operands)[0]


def _cat_loss_forward(dtype: jnp.dtype, *operands: Any) -> tuple[Array, tuple[Any, ...]]:
  # The loss comes with its gradients, since making them apart would cost another forward pass.
  bottom, vectors, _, _, total, *others = operands
  differentiated = (bottom, vectors, *others)
  results = [jax.ShapeDtypeStruct(leaf.shape, jnp.float32) for leaf in (total, *jax.tree.leaves(differentiated))]
  call = jax.ffi.ffi_call(f'dlrm_top_{dtype}', results)
  loss, *gradients = call(*jax.tree.leaves(operands))
  return loss, jax.tree.unflatten(jax.tree.structure(differentiated), gradients)


def _cat_loss_backward(_: jnp.dtype, gradients: tuple[Any, ...], cotangent: Array) -> tuple[Any, ...]:
  bottom, vectors, *others = jax.tree.map(lambda gradient: cotangent * gradient, gradients)
  return bottom, vectors, None, None, None, *others


_cat_loss.defvjp(_cat_loss_forward, _cat_loss_backward)

XLA = LayerKernels(xla_layer, xla_transpose, xla_fold)
NATIVE = LayerKernels(native_layer, native_transpose, native_fold, native_cat_loss)  # needs native.build.load()
