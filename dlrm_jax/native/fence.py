"""Parts of a program that are computed to the same bits wherever they stand."""

from typing import Any

import jax


def fence(tree: Any) -> Any:
  """The tree, as numbers that XLA does not fuse with what they were made of. Needs `build.load()`.

  How a sum of products is rounded depends on what XLA:CPU fuses: with one rounding or two, of one product or the other.
  So the same formula has other bits in another program, unless the whole of it is between such fences. XLA's own
  `optimization_barrier` is gone before it fuses.
  """

  leaves, structure = jax.tree.flatten(tree)
  call = jax.ffi.ffi_call('dlrm_fence', leaves, input_output_aliases={i: i for i in range(len(leaves))})
  return structure.unflatten(call(*leaves))
