"""The transpose in C++, beside numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlrm_jax.model.layers import native_transpose
from dlrm_jax.native import build

NATIVE = build.choose(True)
pytestmark = pytest.mark.skipif(not NATIVE.ready, reason=NATIVE.note)
# Whole tiles of 64, and what is left over of each side.
SHAPES = [(64, 64), (512, 416), (416, 512), (200, 16), (16, 200), (65, 129), (1, 1), (3, 70)]


@pytest.mark.parametrize('shape', SHAPES)
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_transpose_is_numpys_rounded(shape, dtype):
  x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
  found = jax.jit(lambda x: native_transpose(x, dtype))(x)
  assert found.dtype == dtype
  np.testing.assert_array_equal(found, jnp.asarray(x.T).astype(dtype))


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_the_gradient_of_a_transpose_is_turned_back(dtype):
  rng = np.random.default_rng(1)
  x, gradient = jnp.asarray(rng.normal(size=(130, 70)), jnp.float32), rng.normal(size=(70, 130))
  _, pull = jax.vjp(lambda x: native_transpose(x, dtype), x)
  gradient = jnp.asarray(gradient, dtype)
  (found,) = pull(gradient)
  assert found.dtype == np.float32
  np.testing.assert_array_equal(found, gradient.astype(jnp.float32).T)
