import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlrm_jax.native import build
from dlrm_jax.optim import dense_transform
from dlrm_jax.optim.parameters import update_parameters
from tests.helpers import outputs_on_threads
from tests.optim import reference

# More than two pieces of a thread, and no whole number of vectors; a vector and some; less than one; one number.
SHAPES = {'kernel': (70, 303), 'bias': (303,), 'short': (5,), 'scale': ()}
LR = 0.03


def random_tree(rng):
  return {name: rng.normal(size=shape) for name, shape in SHAPES.items()}


def f32(tree):
  return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)


@pytest.fixture(autouse=True)
def kernels():
  assert build.load().ready


@pytest.mark.parametrize('lr', [LR, lambda count: LR / (1 + count)], ids=['number', 'schedule'])
@pytest.mark.parametrize('case', reference.CASES)
def test_the_kernel_equals_numpy(case, lr):
  rng = np.random.default_rng(0)
  tx, expected = reference.make(case, lr), random_tree(rng)
  slots = {name: reference.init(case, w) for name, w in expected.items()}
  params = f32(expected)
  state = tx.init(params)
  update = jax.jit(functools.partial(update_parameters, tx, native=True), donate_argnums=(1, 2))
  assert f'dlrm_parameters_{tx.rule.name}' in update.lower(params, state, params).as_text()
  for t in range(1, 21):  # two periods of the decay
    grads = random_tree(rng)
    rate = lr(t - 1) if callable(lr) else lr
    for name, g in grads.items():
      expected[name], slots[name] = reference.step(case, expected[name], g, slots[name], t, rate)
    params, state = update(f32(grads), state, params)
  for name, value in expected.items():
    np.testing.assert_allclose(params[name], value, rtol=2e-5, atol=2e-5)
    found = state._replace(**{slot: getattr(state, slot)[name] for slot in slots[name]})
    reference.assert_state(found, slots[name], 1e-4)
  assert state.count == 20


@pytest.mark.parametrize('case', reference.CASES)
def test_what_is_not_donated_is_left_as_it_is(case):
  tx, params = reference.make(case, LR), f32(random_tree(np.random.default_rng(1)))
  state = tx.init(params)
  before = jax.tree.map(np.array, (params, state))
  jax.block_until_ready(jax.jit(functools.partial(update_parameters, tx, native=True))(params, state, params))
  jax.tree.map(np.testing.assert_array_equal, (params, state), before)


def test_what_has_no_rule_is_done_without_the_kernel():
  params = f32(random_tree(np.random.default_rng(2)))
  tx = dense_transform(reference.make('adam', LR), LR, weight_decay=0.1)
  updates, state = tx.update(params, tx.init(params), params)
  found, found_state = update_parameters(tx, params, tx.init(params), params, native=True)
  jax.tree.map(np.testing.assert_array_equal, found, jax.tree.map(jnp.add, params, updates))
  jax.tree.map(np.testing.assert_array_equal, found_state, state)


LARGE = """
import hashlib, jax, numpy as np
from dlrm_jax.native import build
from dlrm_jax.optim import OPTIMIZERS
from dlrm_jax.optim.parameters import update_parameters
assert build.load().ready
rng = np.random.default_rng(0)
make = lambda: {'a': rng.normal(size=(301, 307)).astype('f'), 'b': rng.normal(size=50_003).astype('f')}
digest = hashlib.sha256()
for name in ('adamasync', 'adagraddecay'):
  tx, params, gradient = OPTIMIZERS[name](0.1), make(), make()
  new = jax.jit(lambda params: update_parameters(tx, gradient, tx.init(params), params, True))(params)
  for leaf in jax.tree.leaves(new):
    digest.update(np.asarray(leaf).tobytes())
print(digest.hexdigest())
"""


def test_the_number_of_threads_changes_no_bit(repository):
  assert len(set(outputs_on_threads(LARGE, repository, 1, 2, 5))) == 1
