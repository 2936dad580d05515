"""Batch norm's scale and shift in the next layer, in C++, beside the form in XLA and numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlrm_jax.model.layers import native_fold, xla_fold
from dlrm_jax.native import build

NATIVE = build.choose(True)
pytestmark = pytest.mark.skipif(not NATIVE.ready, reason=NATIVE.note)
# Whole stretches of 32 rows and 16 columns, and what is left over of each.
SHAPES = [(512, 256), (64, 16), (100, 30), (33, 7), (1, 1), (3, 100)]


def operands(k, n):
  """kernel, bias, scale, shift; cotangents of kernel and bias. Whole numbers, so that no sum is rounded."""
  draw = np.random.default_rng(0).integers
  whole = [jnp.float32(draw(-9, 9, shape)) for shape in ((k, n), n, k, k, (k, n), n)]
  return whole[:4], tuple(whole[4:])


@pytest.mark.parametrize('shape', SHAPES)
def test_fold_is_numpys_and_gradients_are_xlas(shape):
  arrays, cotangents = operands(*shape)
  (kernel, bias), pull = jax.vjp(native_fold, *arrays)
  w, b, scale, shift = map(np.asarray, arrays)
  np.testing.assert_array_equal(kernel, scale[:, None] * w)
  np.testing.assert_array_equal(bias, b + shift @ w)
  _, expected = jax.vjp(xla_fold, *arrays)
  for found, wanted in zip(pull(cotangents), expected(cotangents), strict=True):
    np.testing.assert_array_equal(found, wanted)


def test_rounded_sums_are_those_of_doubles():
  k, n = 512, 256
  rng = np.random.default_rng(1)
  w, b, scale, shift, gw, gb = (rng.normal(size=shape) for shape in ((k, n), n, k, k, (k, n), n))
  arrays = [jnp.float32(x) for x in (w, b, scale, shift)]
  (_, bias), pull = jax.vjp(native_fold, *arrays)
  _, _, of_scale, of_shift = pull((jnp.float32(gw), jnp.float32(gb)))
  np.testing.assert_allclose(bias, b + shift @ w, atol=1e-4)
  np.testing.assert_allclose(of_scale, (gw * w).sum(1), atol=1e-4)
  np.testing.assert_allclose(of_shift, w @ gb, atol=1e-4)
