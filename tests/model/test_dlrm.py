"""The network against an independent one in numpy: forward pass, gradients by hand-written back-propagation."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base
from dlrm_jax import spec as specs
from dlrm_jax import sums
from dlrm_jax.model.dlrm import DLRM
from dlrm_jax.model.loss import cross_entropy

B, F, D = 24, 26, 16


class Reference:
  """The DLRM, batch-major, float64, with every derivative written out."""

  def __init__(self, params, interaction):
    self.p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    self.interaction = interaction

  def loss(self, dense, vectors, label, weight):
    self.back, total = [], weight.sum()
    h = dense.astype(np.float64)
    p = self.p['bottom_mlp']
    for i in range(4):
      h = self.batch_norm(self.relu(self.dense(h, p, i, 'bottom_mlp')), p, i, weight)
    z = self.interact(h, vectors.astype(np.float64))
    for i in range(2):
      z = self.relu(self.dense(z, self.p['top_mlp'], i, 'top_mlp'))
    logit = z @ self.p['logit_kernel'][:, 0] + self.p['logit_bias']
    probability = 1 / (1 + np.exp(-logit))
    loss = -(weight * (label * np.log(probability) + (1 - label) * np.log(1 - probability))).sum() / total
    g_logit = weight * (probability - label) / total
    grads = {'bottom_mlp': {}, 'top_mlp': {}, 'logit_bias': g_logit.sum()}
    grads['logit_kernel'] = (z * g_logit[:, None]).sum(0)[:, None]
    g = g_logit[:, None] * self.p['logit_kernel'][:, 0]
    for step in reversed(self.back):
      g = step(g, grads)
    return loss, grads, logit

  def dense(self, h, p, i, name):
    def back(g, grads):
      grads[name][f'kernel_{i}'] = h.T @ g
      grads[name][f'bias_{i}'] = g.sum(0)
      return g @ p[f'kernel_{i}'].T

    self.back.append(back)
    return h @ p[f'kernel_{i}'] + p[f'bias_{i}']

  def relu(self, h):
    self.back.append(lambda g, _: g * (h > 0))
    return np.maximum(h, 0)

  def batch_norm(self, h, p, i, weight):
    w = (weight / weight.sum())[:, None]
    mean = (w * h).sum(0)
    deviation = 1 / np.sqrt((w * (h - mean) ** 2).sum(0) + 1e-3)
    normal = (h - mean) * deviation

    def back(g, grads):
      grads['bottom_mlp'][f'gamma_{i}'] = (g * normal).sum(0)
      grads['bottom_mlp'][f'beta_{i}'] = g.sum(0)
      g = g * p[f'gamma_{i}']
      return deviation * (g - w * g.sum(0) - w * normal * (g * normal).sum(0))

    self.back.append(back)
    return normal * p[f'gamma_{i}'] + p[f'beta_{i}']

  def interact(self, bottom, vectors):
    if self.interaction == 'cat':

      def back(g, grads):
        grads['vectors'] = g[:, bottom.shape[1] :].reshape(vectors.shape)
        return g[:, : bottom.shape[1]]

      self.back.append(back)
      return np.concatenate([bottom, vectors.reshape(len(vectors), -1)], axis=1)
    features = np.concatenate([bottom[:, None], vectors], axis=1)
    pairs = [(i, j) for i in range(F + 1) for j in range(i)]

    def back(g, grads):
      g_features = np.zeros_like(features)
      g_features[:, 0] = g[:, :D]
      for n, (i, j) in enumerate(pairs):
        g_features[:, i] += g[:, D + n, None] * features[:, j]
        g_features[:, j] += g[:, D + n, None] * features[:, i]
      grads['vectors'] = g_features[:, 1:]
      return g_features[:, 0]

    self.back.append(back)
    return np.concatenate([bottom, np.stack([(features[:, i] * features[:, j]).sum(1) for i, j in pairs], 1)], axis=1)


def make(interaction='cat', **changes):
  spec = specs.from_config(base.get_config()).model
  return DLRM(dataclasses.replace(spec, interaction=interaction, **changes))


def examples(seed=0, padding=5):
  rng = np.random.default_rng(seed)
  weight = np.ones(B, np.float32)
  weight[B - padding :] = 0
  dense, vectors = rng.normal(size=(B, 13)), rng.normal(size=(B, F, D)) / 4
  label = rng.random(B) < 0.3
  return tuple(jnp.asarray(leaf, jnp.float32) for leaf in (dense, vectors, label, weight))


def init(model, dense, vectors, weight):
  variables = model.init(jax.random.key(1), dense, vectors, weight, train=True)
  # Away from the symmetric start, so that biases, gamma and beta matter.
  shake = lambda leaf: leaf + 0.1 * jax.random.normal(jax.random.key(leaf.size), leaf.shape)
  return {**variables, 'params': jax.tree.map(shake, variables['params'])}


@pytest.mark.parametrize('interaction', ['cat', 'dot'])
def test_forward_and_gradients_equal_the_numpy_network(interaction):
  model = make(interaction)
  dense, vectors, label, weight = examples()
  variables = init(model, dense, vectors, weight)

  def loss(params, vectors):
    logit, _ = model.apply({**variables, 'params': params}, dense, vectors, weight, train=True, mutable=['batch_stats'])
    return cross_entropy(logit, label, weight, weight.sum()), logit

  (value, logit), grads = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(variables['params'], vectors)
  expected, expected_grads, expected_logit = Reference(variables['params'], interaction).loss(
    *(np.asarray(leaf) for leaf in (dense, vectors, label, weight))
  )
  np.testing.assert_allclose(value, expected, rtol=1e-5)
  np.testing.assert_allclose(logit, expected_logit, atol=2e-5)
  expected_vectors = expected_grads.pop('vectors')
  np.testing.assert_allclose(grads[1], expected_vectors, atol=2e-6)
  jax.tree.map(lambda got, want: np.testing.assert_allclose(got, want, atol=5e-6, rtol=1e-3), grads[0], expected_grads)


@pytest.mark.parametrize('examples', [512, 312, 77])
@pytest.mark.parametrize('parts', [2, 4])
def test_the_losses_of_parts_of_a_batch_add_up_to_that_of_the_batch_to_the_bit(parts, examples):
  rng = np.random.default_rng(examples)
  weight, total = jnp.asarray(np.arange(512) < examples, jnp.float32), jnp.float32(examples)
  for _ in range(20):
    batch = jnp.asarray(rng.normal(size=512), jnp.float32), jnp.asarray(rng.random(512) < 0.3, jnp.float32), weight
    cut = zip(*(jnp.split(leaf, parts) for leaf in batch), strict=True)
    assert sums.of_terms([cross_entropy(*part, total) for part in cut]) == cross_entropy(*batch, total)


def test_padding_changes_no_loss_gradient_or_statistic():
  model = make()
  dense, vectors, label, weight = examples(padding=5)
  variables = init(model, dense, vectors, weight)

  def run(n, fill):
    d, v = dense.at[B - 5 :].set(fill)[:n], vectors.at[B - 5 :].set(fill)[:n]
    y, w = label.at[B - 5 :].set(1)[:n], weight[:n]

    def loss(params):
      logit, new = model.apply({**variables, 'params': params}, d, v, w, train=True, mutable=['batch_stats'])
      return cross_entropy(logit, y, w, w.sum()), new

    return jax.jit(jax.value_and_grad(loss, has_aux=True))(variables['params'])

  close = lambda a, b: jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6), a, b)
  close(run(B, 0.0), run(B, 9.0))
  close(run(B, 9.0), run(B - 5, 0.0))


def test_dead_layer_of_the_seed_is_alive():
  model = make()
  dense, vectors, label, weight = examples()
  variables = init(model, dense, vectors, weight)
  loss = lambda params: cross_entropy(
    model.apply({**variables, 'params': params}, dense, vectors, weight, train=False), label, weight, weight.sum()
  )
  assert np.abs(jax.grad(loss)(variables['params'])['top_mlp']['kernel_0']).max() > 0


@pytest.mark.parametrize(('interaction', 'parameters'), [('cat', 353_281), ('dot', 320_001)])
def test_size_of_the_network(interaction, parameters):
  model = make(interaction)
  dense, vectors, _, weight = examples()
  params = model.init(jax.random.key(0), dense, vectors, weight, train=True)['params']
  count = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))
  assert count(params['bottom_mlp']) == 155_984 + 1_696
  assert count(params) - count(params['bottom_mlp']) == parameters


def test_running_statistics_evaluate_properly_after_one_batch_and_after_many():
  model = make()
  dense, vectors, _, weight = examples(padding=0)
  variables = init(model, dense, vectors, weight)
  logit, new = model.apply(variables, dense, vectors, weight, train=True, mutable=['batch_stats'])
  variables = {**variables, **new}
  # Debiased: after one batch, the running statistics are that batch's.
  np.testing.assert_allclose(model.apply(variables, dense, vectors, weight, train=False), logit, atol=1e-4)
  weights = []
  for step in range(5):
    batch = examples(seed=step, padding=0)[0]
    weights.append(0.01 * 0.99 ** (4 - step))
    _, new = model.apply(variables, batch, vectors, weight, train=True, mutable=['batch_stats'])
    variables = {**variables, **new}
  first = jax.nn.relu(
    jnp.stack([examples(seed=s, padding=0)[0] for s in range(5)]) @ variables['params']['bottom_mlp']['kernel_0']
    + variables['params']['bottom_mlp']['bias_0'][None, None]
  )
  start = jax.nn.relu(
    dense @ variables['params']['bottom_mlp']['kernel_0'] + variables['params']['bottom_mlp']['bias_0'][None]
  )
  means = np.concatenate([start[None], first]).mean(axis=1)
  weights = np.array([0.01 * 0.99**5, *weights])
  running = variables['batch_stats']['bottom_mlp']['running_0']
  np.testing.assert_allclose(running['mean'] / running['mass'], weights @ means / weights.sum(), rtol=1e-4, atol=1e-6)


def test_batch_norm_off_has_no_statistics_and_no_scale():
  model = make(batch_norm=False)
  dense, vectors, _, weight = examples()
  variables = model.init(jax.random.key(0), dense, vectors, weight, train=True)
  assert set(variables) == {'params'}
  assert not any(name.startswith('gamma') for name in variables['params']['bottom_mlp'])


def test_bfloat16_rounds_the_operands_of_the_mlps_and_nothing_else():
  dense, vectors, _, weight = examples()
  variables = init(make(), dense, vectors, weight)
  apply = lambda model: model.apply(variables, dense, vectors, weight, train=True, mutable=['batch_stats'])[0]
  exact, rounded = apply(make()), apply(make(dtype='bfloat16'))
  assert rounded.dtype == jnp.float32
  assert 1e-4 < np.abs(exact - rounded).max() < 0.1
  forward = jax.jit(lambda v: make(dtype='bfloat16').apply(v, dense, vectors, weight, train=False))
  text = forward.lower(variables).as_text()
  dots = [line for line in text.splitlines() if 'dot_general' in line]
  half = [line for line in dots if 'bf16' in line]
  assert len(half) == 6
  assert all('xf32>' in line.partition('->')[2] for line in half)
