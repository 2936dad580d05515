"""The top of the network in one C++ kernel, beside numpy and beside its form in XLA."""


import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlrm_jax.model.dlrm import DLRM
from dlrm_jax.model.layers import NATIVE, XLA
from dlrm_jax.model.mlp import Activations
from dlrm_jax.native import build
from dlrm_jax.spec import ModelSpec
from tests.helpers import outputs_on_threads

pytestmark = pytest.mark.skipif(not build.load().ready, reason=build.load().note)
# Numbers of the bottom's output, of columns and in a vector; sizes of the layers; examples.
SHAPES = [
  (16, 26, 16, (512, 256), 512),
  (16, 26, 16, (512, 256), 1100),
  (5, 26, 3, (100, 70, 33), 64),
  (7, 2, 8, (24,), 1),
  (1, 1, 1, (1, 1), 130),
]


def operands(shape, seed=0):
  """Parameters of the top, bottom, vectors, label, weight and their sum."""
  bottom, columns, dim, sizes, examples = shape
  rng = np.random.default_rng(seed)
  normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  widths = (bottom + columns * dim, *sizes)
  top = {}
  for i, (k, n) in enumerate(zip(widths, sizes, strict=False)):
    top |= {f'kernel_{i}': normal(k, n) * np.float32(2 / k) ** 0.5, f'bias_{i}': normal(n)}
  params = {'top_mlp': top, 'logit_kernel': normal(sizes[-1], 1), 'logit_bias': normal()}
  label, weight = (jnp.asarray(rng.integers(0, 4, examples) > limit, jnp.float32) for limit in (2, 0))
  return params, normal(bottom, examples), normal(examples, columns, dim), label, weight, jnp.float32(examples + 3)


def loss_and_gradients(kernels, shape, dtype, arrays):
  """The loss, and its gradients by parameters, bottom and vectors."""
  model = DLRM(ModelSpec((1,), shape[3], True, 'cat', 0, dtype, 'float32'), kernels)

  def loss(params, bottom, vectors):
    return model.apply({'params': params}, Activations(bottom), vectors, *arrays[3:], method='loss')

  return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(*arrays[:3])


def expected(params, bottom, vectors, label, weight, total):
  """The same in numpy, float64."""
  params, bottom, vectors, label, weight, total = jax.tree.map(
    lambda x: np.asarray(x, np.float64), (params, bottom, vectors, label, weight, total)
  )
  top, gradients = params['top_mlp'], {}
  activations = [np.concatenate([bottom, vectors.reshape(len(vectors), -1).T])]
  for i in range(len(top) // 2):
    activations.append(np.maximum(top[f'kernel_{i}'].T @ activations[-1] + top[f'bias_{i}'][:, None], 0))
  logit = params['logit_kernel'][:, 0] @ activations[-1] + params['logit_bias']
  loss = (weight * (np.logaddexp(logit, 0) - label * logit)).sum() / total
  glogit = weight * (1 / (1 + np.exp(-logit)) - label) / total
  g = params['logit_kernel'] * glogit
  for i in reversed(range(len(top) // 2)):
    g = np.where(activations[i + 1] > 0, g, 0)
    gradients |= {f'kernel_{i}': activations[i] @ g.T, f'bias_{i}': g.sum(1)}
    g = top[f'kernel_{i}'] @ g
  of_params = {
    'top_mlp': gradients,
    'logit_kernel': (activations[-1] @ glogit)[:, None],
    'logit_bias': glogit.sum(),
  }
  return loss, (of_params, g[: len(bottom)], g[len(bottom) :].T.reshape(vectors.shape))


def close(found, wanted, epsilon):
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
    np.testing.assert_allclose(a, b, rtol=0, atol=epsilon * np.abs(b).max())


def compare(shape, dtype):
  """Beside XLA; operands of products are rounded alike, but where a sum comes out on the other side it shows."""
  arrays = operands(shape)
  found, wanted = (loss_and_gradients(kernels, shape, dtype, arrays) for kernels in (NATIVE, XLA))
  close(found, wanted, {'float32': 1e-5, 'bfloat16': 2e-2}[dtype])


@pytest.mark.parametrize('shape', SHAPES)
def test_is_numpy(shape):
  arrays = operands(shape)
  close(loss_and_gradients(NATIVE, shape, 'float32', arrays), expected(*arrays), 1e-5)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('shape', SHAPES)
def test_is_the_form_in_xla(shape, dtype):
  compare(shape, dtype)


@pytest.mark.parametrize('logit', [-200.0, 200.0, np.nan])
def test_logits_of_any_size(logit):
  shape = SHAPES[3]
  params, *others = operands(shape)
  arrays = ({**params, 'logit_bias': jnp.float32(logit)}, *others)
  found, wanted = (loss_and_gradients(kernels, shape, 'float32', arrays) for kernels in (NATIVE, XLA))
  np.testing.assert_allclose(found[0], wanted[0], rtol=1e-5)
  np.testing.assert_allclose(found[1][0]['logit_bias'], wanted[1][0]['logit_bias'], rtol=1e-5)


def test_dot_is_left_to_the_layers():
  spec = ModelSpec((16, 8), (32,), True, 'dot', 0, 'float32', 'float32')
  rng = np.random.default_rng(0)
  dense, vectors = jnp.float32(rng.normal(size=(64, 13))), jnp.float32(rng.normal(size=(64, 26, 8)))
  label, weight = jnp.float32(rng.integers(0, 2, 64)), jnp.ones(64)
  params = DLRM(spec).init(jax.random.key(0), dense, vectors, weight, False)['params']
  inputs = Activations(jnp.asarray(rng.normal(size=(8, 64)), jnp.float32)), vectors, label, weight
  found, wanted = (
    DLRM(spec, kernels).apply({'params': params}, *inputs, jnp.float32(64), method='loss')
    for kernels in (NATIVE, XLA)
  )
  np.testing.assert_allclose(found, wanted, rtol=1e-5)


DIGEST = """
import hashlib
import jax, numpy as np
from dlrm_jax.native import build
from tests.model import test_top as t
build.load()
shape = (16, 26, 16, (128, 64), 2112)  # 5 slices with one thread, 3 with two, 2 with more
for dtype in ('float32', 'bfloat16'):
  for _ in range(10):
    found = t.loss_and_gradients(t.NATIVE, shape, dtype, t.operands(shape))
    print(hashlib.sha256(b''.join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(found))).hexdigest())
"""


def test_bits_do_not_depend_on_threads(repository):
  digests = [stdout.split() for stdout in outputs_on_threads(DIGEST, repository, 1, 2, 5, 16)]
  assert {len(printed) for printed in digests} == {20}
  assert len(set().union(*digests)) == 2  # of either dtype
