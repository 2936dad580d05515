"""The optimizers once more, in plain numpy: the oracle of the tests."""

import numpy as np

from dlrm_jax.optim import OPTIMIZERS

B1, B2, EPS, A0 = 0.9, 0.999, 1e-8, 0.1


def sgd(w, g, state, t, lr):
  return w - lr * g, state


def adagrad(w, g, state, t, lr):
  a = state['a'] + g**2
  return w - lr * g / np.sqrt(a), {'a': a}


def adagrad_decay(w, g, state, t, lr, decay_steps=7, decay_rate=0.6):
  due = t // decay_steps > state['q']
  a = np.where(due, np.maximum(decay_rate * state['a'], A0), state['a']) + g**2
  return w - lr * g / np.sqrt(a), {'a': a, 'q': state['q'] + due}


def adam(w, g, state, t, lr):
  m, v = B1 * state['m'] + (1 - B1) * g, B2 * state['v'] + (1 - B2) * g**2
  return w - lr * np.sqrt(1 - B2**t) / (1 - B1**t) * m / (np.sqrt(v) + EPS), {'m': m, 'v': v}


def rmsprop(w, g, state, t, lr):
  v = B2 * state['v'] + (1 - B2) * g**2
  m = B1 * state['m'] + lr * g / np.sqrt(v + EPS)
  return w - m, {'m': m, 'v': v}


# case -> (name, options, numpy step, slots)
CASES = {
  'gradientdescent': ('gradientdescent', {}, sgd, ''),
  'adagrad': ('adagrad', {}, adagrad, 'a'),
  'adagraddecay': ('adagraddecay', {'decay_steps': 7, 'decay_rate': 0.6}, adagrad_decay, 'aq'),
  'adam': ('adam', {}, adam, 'mv'),
  'adamasync': ('adamasync', {}, adam, 'mv'),
  'adamasync_rmsprop': ('adamasync', {'rmsprop': True}, rmsprop, 'mv'),
}


def make(case, lr):
  """The transformation of a case."""
  name, options, _, _ = CASES[case]
  return OPTIMIZERS[name](lr, **options)


def init(case, w):
  """The first numpy slots of a case."""
  start = {'a': np.full_like(w, A0), 'q': np.zeros_like(w, dtype=int), 'm': np.zeros_like(w), 'v': np.zeros_like(w)}
  return {slot: start[slot] for slot in CASES[case][3]}


def step(case, w, g, state, t, lr):
  """One step, the t-th from 1, on every element."""
  return CASES[case][2](w, g, state, t, lr)


def step_rows(case, w, state, t, lr, row, grad, l2=0.0):
  """One step of only the rows in `row`, duplicates summed, rows outside of the table left out."""
  ok = (row >= 0) & (row < len(w))
  g, touched = np.zeros_like(w), np.zeros((len(w), 1), bool)
  np.add.at(g, row[ok], grad[ok])
  touched[row[ok]] = True
  new_w, new_state = step(case, w, g + l2 * w, state, t, lr)
  return np.where(touched, new_w, w), {k: np.where(touched, new_state[k], state[k]) for k in state}


def assert_state(slots, expected, atol):
  """Holds the JAX slots against the numpy ones; a period counter is one per row."""
  for slot, value in expected.items():
    found = np.asarray(getattr(slots, slot))
    np.testing.assert_allclose(found, value[..., :1] if slot == 'q' and value.ndim > 1 else value, rtol=atol, atol=atol)
