"""The transpose and the moments of Adam in C++, beside numpy and XLA."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlrm_jax.model.layers import native_transpose
from dlrm_jax.native import build
from dlrm_jax.native.adam import native_moments, xla_moments

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


def test_moments_are_those_of_xla():
  # More than one piece of 16,384 elements, a scalar, and an empty leaf.
  shapes = [(300, 200), (17,), (), (0, 4)]
  rng = np.random.default_rng(2)
  trees = [{str(i): jnp.asarray(rng.normal(size=shape), jnp.float32) for i, shape in enumerate(shapes)} for _ in 'gmv']
  trees[2] = jax.tree.map(jnp.square, trees[2])
  arguments = (*trees, jnp.float32(0.1), 0.9, 0.999, 1e-8)
  found, wanted = (jax.jit(form, static_argnums=(4, 5, 6))(*arguments) for form in (native_moments, xla_moments))
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
    assert a.shape == b.shape
    np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-7)
  # What was given is still there: the call works in place only on copies.
  np.testing.assert_array_equal(arguments[1]['1'], trees[1]['1'])
