"""Sums as trees, beside numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlrm_jax import sums
from tests.native.trees import tree_sum


@pytest.mark.parametrize('terms', [1, 2, 3, 5, 7, 8, 13])
def test_terms(terms):
  x = np.random.default_rng(terms).normal(size=(terms, 9)).astype(np.float32)
  np.testing.assert_array_equal(sums.of_terms(jnp.asarray(x)), tree_sum(list(x)))
  np.testing.assert_array_equal(sums.of_terms([jnp.asarray(one) for one in x]), tree_sum(list(x)))


def halves(x):
  """The sum of the last axis, a power of two, by halves."""
  while x.shape[-1] > 1:
    x = x[..., : x.shape[-1] // 2] + x[..., x.shape[-1] // 2 :]
  return x[..., 0]


@pytest.mark.parametrize('examples', [1, 63, 64, 65, 192, 512, 700])
def test_examples(examples):
  x = np.random.default_rng(examples).normal(size=(3, examples)).astype(np.float32)
  panels = np.pad(x, ((0, 0), (0, -examples % sums.PANEL))).reshape(3, -1, sums.PANEL)
  expected = tree_sum([halves(panels[:, i]) for i in range(panels.shape[1])])
  np.testing.assert_array_equal(jax.jit(sums.of_examples)(x), expected)
  np.testing.assert_allclose(expected, x.sum(1, dtype=np.float64), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('parts', [2, 4, 8])
def test_parts_that_are_a_power_of_two_of_panels_sum_to_the_same_bits(parts):
  x = np.random.default_rng(parts).normal(size=(3, 512)).astype(np.float32)
  apart = [sums.of_examples(part) for part in jnp.split(jnp.asarray(x), parts, axis=1)]
  np.testing.assert_array_equal(sums.of_terms(apart), sums.of_examples(jnp.asarray(x)))
