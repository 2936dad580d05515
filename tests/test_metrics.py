"""Metrics against scikit-learn, and against TensorFlow's formula written out."""

import itertools

import numpy as np
import pytest
from sklearn import metrics as sk

from dlrm_jax import metrics


def examples(n=5000, seed=0, digits=8):
  rng = np.random.default_rng(seed)
  logit = np.round(rng.normal(-1, 1.5, n), digits)
  return logit, (rng.random(n) < metrics.sigmoid(logit)).astype(np.float64)


@pytest.mark.parametrize('digits', [8, 1, 0])  # 0: nearly all are ties
def test_auc_and_log_loss_equal_scikit_learn(digits):
  logit, label = examples(digits=digits)
  result = metrics.evaluate(logit, label)
  assert result['auc'] == pytest.approx(sk.roc_auc_score(label, logit), abs=1e-12)
  assert result['log_loss'] == pytest.approx(sk.log_loss(label, metrics.sigmoid(logit)), abs=1e-12)
  assert result['accuracy'] == sk.accuracy_score(label, metrics.sigmoid(logit) > 0.5)
  rate = label.mean()
  entropy = sk.log_loss(label, np.full_like(label, rate))
  assert result['normalized_entropy'] == pytest.approx(result['log_loss'] / entropy)
  assert result['calibration'] == pytest.approx(metrics.sigmoid(logit).mean() / rate)
  assert result['examples'] == len(label)


def test_auc_1000_is_the_trapezoid_sum_over_the_seeds_thresholds():
  logit, label = examples(2000, digits=3)
  probability = metrics.sigmoid(logit).astype(np.float32)
  thresholds = np.array([-1e-7, *[i / 999 for i in range(1, 999)], 1 + 1e-7], np.float32)
  rates = []
  for threshold in thresholds:
    above = probability > threshold
    rates.append(
      ((label[above].sum() + 1e-6) / (label.sum() + 1e-6), (1 - label[above]).sum() / ((1 - label).sum() + 1e-6))
    )
  area = sum((f0 - f1) * (t0 + t1) / 2 for (t0, f0), (t1, f1) in itertools.pairwise(rates))
  assert metrics.auc_1000(metrics.sigmoid(logit), label) == pytest.approx(area, abs=1e-12)
  assert area == pytest.approx(metrics.auc(logit, label), abs=1e-3)


@pytest.mark.parametrize('label', [0.0, 1.0])
def test_one_class_only_gives_none_never_nan(label):
  result = metrics.evaluate(np.array([0.5, -1.0]), np.full(2, label))
  assert result['auc'] is None
  assert result['auc_1000'] is None
  assert result['normalized_entropy'] is None
  assert (result['calibration'] is None) == (label == 0)
  assert result['log_loss'] > 0


@pytest.mark.parametrize('logit', [[], [np.nan, 1.0], [np.inf, 0.0]])
def test_nothing_to_compute_gives_none(logit):
  result = metrics.evaluate(np.array(logit), np.arange(len(logit)) % 2.0)
  assert result.pop('examples') == len(logit)
  assert set(result.values()) == {None}


def test_extreme_logits_do_not_overflow():
  result = metrics.evaluate(np.array([800.0, -800.0, 800.0, -800.0]), np.array([1.0, 0.0, 0.0, 1.0]))
  assert result['log_loss'] == pytest.approx(400)
  assert result['auc'] == pytest.approx(0.5)
