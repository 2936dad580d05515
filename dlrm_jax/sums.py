"""Sums in one order, whoever makes them.

What is added up in one place, a term, is paired with its neighbor, pairs with neighbors are paired, and so on; what has
no neighbor waits. So aligned stretches of 1, 2, 4, ... terms can be summed apart, by threads, slices or devices, and
all come to the same bits. Examples are summed one after another in leaves; native/packing.h has the same tree.
"""

import functools
from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

PANEL = 64  # examples of a leaf of most sums
LEAF = 128  # of the gradients of kernels and rows


def of_terms(terms: Sequence[Array]) -> Array:
  """The sum of one term or more."""
  while len(terms) > 1:
    terms = [functools.reduce(jnp.add, terms[i : i + 2]) for i in range(0, len(terms), 2)]
  return terms[0]


def of_examples(x: Float[Array, 'N B']) -> Float[Array, 'N']:
  """The sum over the last axis. Within a panel it is by halves, too, since XLA's own order depends on the program."""
  panels = max(1, -(-x.shape[1] // PANEL))
  panels = 1 << (panels - 1).bit_length()
  x = jnp.pad(x, ((0, 0), (0, panels * PANEL - x.shape[1]))).reshape(-1, panels, PANEL)
  while (half := x.shape[2] // 2) > 0:
    x = x[:, :, :half] + x[:, :, half:]
  x = x[:, :, 0]
  while x.shape[1] > 1:
    x = x[:, ::2] + x[:, 1::2]
  return x[:, 0]
