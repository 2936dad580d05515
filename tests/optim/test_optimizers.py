import decimal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dlrm_jax.optim import OPTIMIZERS, dense_transform, optimizer
from dlrm_jax.optim.adam import bias_correction
from tests.optim import reference

SHAPES = {'kernel': (3, 4), 'bias': (4,), 'scale': ()}


def random_tree(rng):
  return {name: rng.normal(size=shape) for name, shape in SHAPES.items()}


def f32(tree):
  return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)


@pytest.mark.parametrize('lr', [0.03, lambda count: 0.1 / (1 + count)], ids=['number', 'schedule'])
@pytest.mark.parametrize('case', reference.CASES)
def test_fifty_steps_equal_numpy(case, lr):
  rng = np.random.default_rng(0)
  tx = reference.make(case, lr)
  expected = random_tree(rng)
  expected_state = {name: reference.init(case, w) for name, w in expected.items()}
  params = f32(expected)
  state = tx.init(params)
  update = jax.jit(tx.update)
  for t in range(1, 51):
    grads = random_tree(rng)
    rate = lr(t - 1) if callable(lr) else lr
    for name, g in grads.items():
      expected[name], expected_state[name] = reference.step(case, expected[name], g, expected_state[name], t, rate)
    updates, state = update(f32(grads), state, params)
    params = optax.apply_updates(params, updates)
  jax.tree.map(lambda w, e: np.testing.assert_allclose(w, e, rtol=2e-5, atol=2e-5), params, expected)
  for name, slots in expected_state.items():
    for slot, value in slots.items():
      found = getattr(state, slot)[name]
      np.testing.assert_allclose(found, value[..., :1] if slot == 'q' and name == 'kernel' else value, rtol=1e-4)
  assert state.count == 50


@pytest.mark.parametrize('name', ['adam', 'adamasync'])
def test_epsilon_is_where_tensorflow_puts_it(name):
  g, lr = 1e-7, 0.1
  expected = -lr * np.sqrt(0.001) / 0.1 * (0.1 * g) / (np.sqrt(0.001) * g + 1e-8)

  def first_update(tx):
    w = jnp.zeros([])
    return tx.update(jnp.asarray(g), tx.init(w), w)[0]

  np.testing.assert_allclose(first_update(OPTIMIZERS[name](lr)), expected, rtol=1e-5)
  assert abs(first_update(optax.adam(lr))) > 3 * abs(expected)


@pytest.mark.parametrize(('b1', 'b2'), [(0.9, 0.999), (0.0, 0.99), (0.99, 0.9999)])
def test_bias_correction_is_exact_in_float32_at_any_count(b1, b2):
  for count in [1, 2, 3, 10, 100, 1000, 10_000, 1_000_000, 20_000_000, 2**31 - 1]:
    p1, p2 = (decimal.Decimal(b) ** count for b in (b1, b2))
    expected = float((1 - p2).sqrt() / (1 - p1))
    np.testing.assert_allclose(bias_correction(jnp.asarray(count), b1, b2), expected, rtol=5e-7)


@pytest.mark.parametrize('case', reference.CASES)
def test_the_count_saturates_instead_of_turning_negative(case):
  tx = reference.make(case, 0.1)
  w = jnp.ones((2, 3))
  state = tx.init(w)._replace(count=jnp.asarray(2**31 - 1, jnp.int32))
  updates, state = tx.update(w, state, w)
  assert state.count == 2**31 - 1
  assert np.isfinite(updates).all()


@pytest.mark.parametrize('case', reference.CASES)
def test_a_gradient_of_zero_is_no_nan(case):
  tx = reference.make(case, 0.1)
  w = jnp.ones((2, 3))
  updates, _ = tx.update(jnp.zeros_like(w), tx.init(w), w)
  np.testing.assert_array_equal(updates, 0)


def test_weight_decay_is_decoupled_follows_the_schedule_and_spares_biases():
  rng = np.random.default_rng(1)
  params = f32(random_tree(rng))

  def lr(count):
    return 0.1 / (1 + count)

  plain = OPTIMIZERS['adam'](lr)
  decayed = dense_transform(plain, lr, weight_decay=0.5)
  plain_state, state = plain.init(params), decayed.init(params)
  for t in range(3):
    grads = f32(random_tree(rng))
    expected, plain_state = plain.update(grads, plain_state, params)
    updates, state = decayed.update(grads, state, params)
    expected['kernel'] -= lr(t) * 0.5 * params['kernel']
    jax.tree.map(lambda u, e: np.testing.assert_allclose(u, e, rtol=1e-6), updates, expected)
    params = optax.apply_updates(params, updates)
  jax.tree.map(np.testing.assert_array_equal, state[0], plain_state)  # the moments never saw it


def test_no_weight_decay_is_the_transformation_itself():
  tx = OPTIMIZERS['adagrad'](0.1)
  assert dense_transform(tx, 0.1) is tx


def test_errors_name_the_value_and_what_is_allowed():
  with pytest.raises(ValueError, match=r"'lion'.*adagrad.*adagraddecay.*adam.*adamasync.*gradientdescent"):
    optimizer('lion', 0.1)
  for name, options in [
    ('adam', {'b1': 1.0}),
    ('adamasync', {'b2': -0.1}),
    ('adagrad', {'initial_accumulator': 0.0}),
    ('adagraddecay', {'initial_accumulator': -1.0}),
    ('adagraddecay', {'decay_steps': 0}),
    ('adagraddecay', {'decay_rate': 1.0}),
  ]:
    ((key, value),) = options.items()
    with pytest.raises(ValueError, match=rf'{name}: {key}={value} must'):
      optimizer(name, 0.1, **options)
  with pytest.raises(ValueError, match='weight_decay=-1'):
    dense_transform(optimizer('adam', 0.1), 0.1, -1.0)
