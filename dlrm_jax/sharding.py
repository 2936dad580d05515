"""The devices that a batch and the tables are cut among: one axis, and what the code of one device asks of the others.

A whole training step is one `shard_map`: its code sees the examples of its own device and its own rows of the tables,
and every word between devices is one of `Axis`'s. On one device each of them is the identity.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import multihost_utils
from jax.flatten_util import ravel_pytree
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Int32, UInt32

from dlrm_jax import bits, sums

NAME = 'devices'
CUT = PartitionSpec(NAME)  # the leading axis of an array: examples of a batch, rows of a table
CUT_STACK = PartitionSpec(None, NAME)  # the second one: examples of each of a stack of batches
WHOLE = PartitionSpec()  # every device has all of it
# Numbers at most whose sum every device takes of all; of more, it takes that of its part, and tells the others.
FEW = 4096


@dataclasses.dataclass(frozen=True)
class Axis:
  """The devices of a mesh with one axis, in order; without a mesh, one device.

  All words are made of `swap`, in which a device sends to all others at once and waits once; on two devices, of a
  permute, which copies nothing that stays. Gloo's sums and gathers go round a ring, in messages that wait for each
  other, and took up to three times as long. Sums are those of sums.py: if a device has 1, 2, 4, ... leaves of examples,
  they have the same bits on any number of devices.

  To differentiate: of what all devices have alike, the gradient is alike on all.
  """

  mesh: Mesh | AbstractMesh | None = None
  # What is to have the same bits on any number of devices goes through this: `native.fence`, or nothing.
  fence: Callable[[Any], Any] = lambda tree: tree

  @property
  def size(self) -> int:
    """How many they are."""
    return self.mesh.size if self.mesh else 1

  def index(self) -> int | Int32[Array, '']:
    """Which of them runs this code."""
    return jax.lax.axis_index(NAME) if self.mesh else 0

  def sum(self, tree: Any) -> Any:
    """The sum over the devices of each leaf, alike on all."""
    return jax.tree.map(self._sum, tree) if self.mesh else tree

  def _sum(self, x: Array, dtype: str = 'float32') -> Array:
    if self.size == 2:  # each has all that it takes after one message
      own = bits.stored(x, dtype)
      return bits.widen(own) + bits.widen(self._of_other(own))
    if x.size <= FEW:
      return self._add(self._all(bits.stored(x, dtype)))
    flat = jnp.pad(x.reshape(-1), (0, -x.size % self.size))
    whole = self.gather(bits.stored(self.scatter_sum(flat, dtype), dtype))
    return bits.widen(whole)[: x.size].reshape(x.shape)

  def sum_flat(self, tree: Any, dtype: str = 'float32') -> Any:
    """As `sum`, of float32 leaves, in one message, in which the numbers are of this type. May be differentiated."""
    return _sum_flat(self, tree, dtype)

  def to_each(self, tree: Any, dtype: str = 'float32') -> Any:
    """What all devices have alike, for each to use with its examples: the gradient is the `sum_flat` of all uses."""
    return _to_each(self, tree, dtype)

  def gather(self, tree: Any) -> Any:
    """The leaves of all devices, one after another along the leading axis; leaves of 32-bit numbers in one message."""
    if not self.mesh:
      return tree
    leaves, structure = jax.tree.flatten(tree)
    if len(leaves) < 2 or any(leaf.dtype.itemsize != 4 for leaf in leaves):
      return jax.tree.map(lambda x: self._all(x).reshape(-1, *x.shape[1:]), tree)
    together, apart = packed(leaves)
    return structure.unflatten(apart(self.gather(together)))

  def scatter_sum(self, x: Array, dtype: str = 'float32') -> Array:
    """This device's part of the leading axis of the sum over the devices, to which numbers of this type are sent."""
    if not self.mesh:
      return x
    return self._add(self.swap(bits.stored(x, dtype)).reshape(self.size, -1, *x.shape[1:]))

  def _add(self, parts: Array) -> Array:
    """The sum of what every device gave, [devices, ...]. XLA:CPU's own is several times as slow."""
    return sums.of_terms([bits.widen(parts[device]) for device in range(self.size)])

  def most(self, x: Array) -> Array:
    """The largest of the devices' numbers."""
    return self._all(x).max(axis=0) if self.mesh else x

  def _all(self, x: Array) -> Array:
    """That of every device, [devices, ...]."""
    return self.swap(jnp.broadcast_to(x, (self.size, *x.shape)))

  def swap(self, x: Array) -> Array:
    """Of each device the part of its leading axis that is for this one, one after another."""
    if self.size == 2:
      half = x.shape[0] // 2
      at = (1 - self.index()) * half  # of what is for the other; what comes from it takes its place
      theirs = self._of_other(jax.lax.dynamic_slice_in_dim(x, at, half))
      return jax.lax.dynamic_update_slice_in_dim(x, theirs, at, 0)
    return jax.lax.all_to_all(x, NAME, 0, 0, tiled=True) if self.mesh else x

  def _of_other(self, x: Array) -> Array:
    """That of the other one of two devices. A swap would copy this one's own as well."""
    return jax.lax.ppermute(x, NAME, [(0, 1), (1, 0)])

  def own(self, x: Array) -> Array:
    """This device's part of the leading axis of what all devices have."""
    size = x.shape[0] // self.size
    return jax.lax.dynamic_slice_in_dim(x, self.index() * size, size) if self.mesh else x

  def over(self, function: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """The function of whole arrays that runs `function` on every device's parts. Specs are `CUT` and `WHOLE`."""
    if not self.mesh:
      return function
    # check_vma=False: the C++ kernels do not say which of their results are the same on all devices.
    return jax.shard_map(function, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)

  def put(self, tree: Any, multiple: int = 1, stacked: bool = False) -> Any:
    """Arrays of this process as its part of arrays of all processes, cut among the devices by examples.

    Their leading axis is that of the examples, or, if they are `stacked`, the one after it. Where it is not so many
    times a `multiple` long as this process has devices, zeros are put after it.
    """
    if not self.mesh:
      return jax.device_put(tree)
    sharding = NamedSharding(self.mesh, CUT_STACK if stacked else CUT)
    examples, multiple = int(stacked), multiple * len(self.mesh.local_devices)

    def put(leaf: np.ndarray) -> Array:
      more = -leaf.shape[examples] % multiple
      if more:
        leaf = np.pad(leaf, [(0, more if axis == examples else 0) for axis in range(leaf.ndim)])
      return jax.make_array_from_process_local_data(sharding, leaf)

    return jax.tree.map(put, tree)

  def placed(self, specs: Any) -> Any:
    """Specs as shardings; None on one device."""
    if not self.mesh:
      return None
    is_spec = lambda leaf: isinstance(leaf, PartitionSpec)
    return jax.tree.map(lambda spec: NamedSharding(self.mesh, spec), specs, is_leaf=is_spec)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 2))
def _sum_flat(axis: Axis, tree: Any, dtype: str) -> Any:
  if axis.mesh:
    flat, unflatten = ravel_pytree(tree)
    tree = unflatten(axis._sum(flat, dtype))
  return axis.fence(tree)  # on one device, too


_sum_flat.defvjp(
  lambda axis, tree, dtype: (_sum_flat(axis, tree, dtype), None), lambda axis, dtype, _, gradient: (gradient,)
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 2))
def _to_each(axis: Axis, tree: Any, dtype: str) -> Any:
  return tree


_to_each.defvjp(
  lambda axis, tree, dtype: (tree, None), lambda axis, dtype, _, gradient: (_sum_flat(axis, gradient, dtype),)
)

ALONE = Axis()


def packed(leaves: Sequence[Array]) -> tuple[UInt32[Array, 'N W'], Callable[[Array], list[Array]]]:
  """Arrays [N, ...] of 32-bit numbers as one, for one message; and what makes of rows of it, however many, arrays like
  them."""
  rows = [jax.lax.bitcast_convert_type(leaf, jnp.uint32).reshape(len(leaf), -1) for leaf in leaves]
  ends = list(itertools.accumulate(row.shape[1] for row in rows))

  def apart(together: Array) -> list[Array]:
    parts = [together[:, end - row.shape[1] : end] for row, end in zip(rows, ends, strict=True)]
    whole = lambda part, leaf: jax.lax.bitcast_convert_type(part, leaf.dtype).reshape(-1, *leaf.shape[1:])
    return list(map(whole, parts, leaves))

  return jnp.concatenate(rows, axis=1), apart


def after(tree: Any, others: Any) -> Any:
  """The tree, to be had only when the others are.

  Devices must do what they do together in one order. XLA sees to that, but for what stands in a loop: it may run beside
  anything of which it needs no number. So each such loop, and what comes after it, must need one; here it is 0, made of
  the others' first rows. They are 32-bit numbers.
  """
  rows = [leaf[0] if leaf.ndim > 1 else leaf for leaf in jax.tree.leaves(others)]
  if not rows:
    return tree
  positive = (jax.lax.bitcast_convert_type(row, jnp.uint32) >> 1 for row in rows)
  zero = sum(jnp.min(jnp.minimum(row.astype(jnp.int32), 0)) for row in positive)
  return jax.tree.map(lambda leaf: leaf + zero.astype(leaf.dtype), tree)


def all_devices() -> Axis:
  """Every device of every process."""
  devices = jax.devices()
  return Axis(Mesh(devices, (NAME,))) if len(devices) > 1 else ALONE


def of_first(number: int) -> int:
  """Process 0's number, in every process. Waits for process 0."""
  if jax.process_count() == 1:
    return number
  return int(multihost_utils.broadcast_one_to_all(np.array(number, np.int32)))


def of_all(number: int) -> list[int]:
  """Every process's number, in every process. Waits for all."""
  if jax.process_count() == 1:
    return [number]
  halves = multihost_utils.process_allgather(np.array(divmod(number, 2**31), np.int32))  # JAX has 32 bits
  return [high * 2**31 + low for high, low in halves.tolist()]
