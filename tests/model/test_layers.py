"""The C++ layer against numpy and against the form in XLA, on each of its ways to multiply."""

import functools
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlrm_jax.model.layers import native_layer, xla_layer
from dlrm_jax.native import build
from tests.helpers import outputs_on_threads

NATIVE = build.choose(True)
needs_compiler = pytest.mark.skipif(not NATIVE.ready, reason=NATIVE.note)
# Features in and out, examples: whole panels, slices (512) and blocks (96), and what is left over of each.
SHAPES = [(13, 512, 128), (512, 256, 512), (64, 16, 64), (432, 512, 1088), (367, 100, 64), (7, 3, 100), (1, 1, 1)]
EPSILON = {'float32': 1e-6, 'bfloat16': 2**-7}  # relative to the largest entry; bfloat16 is rounded on the way


def operands(k, n, examples, dtype, seed=0):
  """kernel, bias, h, weight, and cotangents of y and both moments.

  Whole numbers, and half ones for the bias: no sum is rounded and none is 0, where ReLU would follow the rounding.
  """
  draw = functools.partial(np.random.default_rng(seed).integers, endpoint=True)
  kernel, bias, h = draw(-2, 2, (k, n)), draw(-3, 3, n) + 0.5, draw(-3, 3, (k, examples))
  weight = draw(0, 9, examples) > 0
  cotangents = draw(-3, 3, (n, examples)), draw(-3, 3, n), draw(-1, 1, n)
  arrays = jax.tree.map(jnp.float32, (kernel, bias, h, weight, cotangents))
  return *arrays[:2], arrays[2].astype(dtype), arrays[3], arrays[4]


def outputs_and_gradients(layer, kernel, bias, h, weight, cotangents, moments=True):
  """y, moments, and the gradients by kernel, bias and h."""
  dtype = h.dtype

  def run(kernel, bias, h):
    y, (total, square) = layer(kernel, bias, h, weight, dtype, moments)
    return y.astype(jnp.float32), total * moments, square * moments

  out, pull = jax.vjp(run, kernel, bias, h)
  return [np.asarray(leaf, np.float64) for leaf in (*out, *pull(cotangents))]


def expected(kernel, bias, h, weight, cotangents):
  """The same in numpy, float64."""
  kernel, bias, h, weight, gy, gtotal, gsquare = (
    np.asarray(x, np.float64) for x in (kernel, bias, h, weight, *cotangents)
  )
  y = np.maximum(kernel.T @ h + bias[:, None], 0)
  g = np.where(y > 0, gy + weight * (gtotal[:, None] + 2 * gsquare[:, None] * y), 0)
  return [y, (weight * y).sum(1), (weight * y * y).sum(1), h @ g.T, g.sum(1), kernel @ g]


def close(found, wanted, epsilon):
  for a, b in zip(found, wanted, strict=True):
    np.testing.assert_allclose(a, b, rtol=0, atol=epsilon * max(np.abs(b).max(), 1e-3))


@needs_compiler
@pytest.mark.parametrize('shape', SHAPES)
def test_is_numpy(shape):
  arrays = operands(*shape, jnp.float32)
  close(outputs_and_gradients(native_layer, *arrays), expected(*arrays), EPSILON['float32'])


@needs_compiler
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('moments', [True, False])
@pytest.mark.parametrize('shape', SHAPES)
def test_is_the_form_in_xla(shape, moments, dtype):
  arrays = operands(*shape, jnp.dtype(dtype), seed=1)
  found, wanted = (outputs_and_gradients(layer, *arrays, moments) for layer in (native_layer, xla_layer))
  close(found, wanted, EPSILON[dtype])


@needs_compiler
def test_sums_of_bfloat16_products_are_float32():
  # 4096 products of 1: a sum in bfloat16 would stop at 256.
  ones = jnp.ones((4096, 64), jnp.bfloat16)
  y, (total, _) = native_layer(jnp.ones((4096, 3)), jnp.zeros(3), ones, jnp.ones(64), jnp.bfloat16, True)
  assert (np.asarray(y, np.float32) == 4096).all()
  assert (np.asarray(total) == 4096 * 64).all()


@needs_compiler
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_a_nan_stays_a_nan(dtype):
  kernel, bias, h, weight, _ = operands(20, 7, 64, jnp.dtype(dtype))
  y, _ = native_layer(kernel, bias, h.at[3, 5].set(jnp.nan), weight, jnp.dtype(dtype), True)
  assert np.isnan(np.asarray(y, np.float32)[:, 5]).all()
  assert not np.isnan(np.asarray(y, np.float32)[:, 6]).any()


DIGEST = """
import hashlib
import numpy as np
from dlrm_jax.native import build
from tests.model.test_layers import native_layer, operands, outputs_and_gradients
import jax.numpy as jnp
build.load()
for dtype in (jnp.float32, jnp.bfloat16):
  kernel, *others = operands(367, 100, 2112, dtype)
  kernel *= np.float32(0.3)  # with thirds every sum is rounded, so its order shows
  for _ in range(20):
    out = outputs_and_gradients(native_layer, kernel, *others)
    print(hashlib.sha256(b''.join(leaf.tobytes() for leaf in out)).hexdigest())
"""


@needs_compiler
def test_bits_do_not_depend_on_threads(repository):
  digests = [stdout.split() for stdout in outputs_on_threads(DIGEST, repository, 1, 2, 5, 16)]
  assert {len(printed) for printed in digests} == {40}
  assert len(set().union(*digests)) == 2  # of either dtype


# The other ways to multiply, which this processor may lack or leave alone: the tiles of AMX are emulated, plain vectors
# run anywhere.
OTHERS = {
  'amx': '#define DLRM_EMULATE_AMX\n',
  'without tiles': '#undef __AMX_BF16__\n',
  'plain': '#undef __AMX_BF16__\n#undef __AVX512BF16__\n#undef __AVX512F__\n',
}
COMPARE = """
import sys
sys.path.insert(0, sys.argv[1])
import ctypes
import jax.numpy as jnp
from dlrm_jax.native import build
build._library = lambda: (ctypes.CDLL(sys.argv[2]), 'kernels of another processor')
from tests.model import test_layers as t, test_top
for shape in t.SHAPES:
  for dtype in ('float32', 'bfloat16'):
    arrays = t.operands(*shape, jnp.dtype(dtype), seed=2)
    found, wanted = (t.outputs_and_gradients(layer, *arrays) for layer in (t.native_layer, t.xla_layer))
    t.close(found, wanted, t.EPSILON[dtype])
for shape in test_top.SHAPES:
  test_top.compare(shape, 'bfloat16')
print('compared')
"""


@needs_compiler
@pytest.mark.slow  # each builds the kernels
@pytest.mark.parametrize('way', OTHERS)
def test_other_processors(way, tmp_path):
  folder = tmp_path / 'native'
  shutil.copytree(build.FOLDER, folder)
  core = folder / 'dense_core.h'
  core.write_text(OTHERS[way] + core.read_text())
  build.compile_to(tmp_path / 'kernels.so', build.find_compiler(), folder)
  command = [sys.executable, '-c', COMPARE, str(Path(__file__).parents[2]), str(tmp_path / 'kernels.so')]
  done = subprocess.run(command, capture_output=True, text=True, check=False)
  assert done.stdout == 'compared\n', done.stderr
