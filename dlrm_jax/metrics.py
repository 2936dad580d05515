"""How good predictions are: exact over all rows, in float64. A figure that cannot be computed is None, never NaN."""

import numpy as np
from jaxtyping import Float

Logits = Float[np.ndarray, 'N']
Labels = Float[np.ndarray, 'N']


def evaluate(logit: Logits, label: Labels) -> dict[str, float | int | None]:
  """All metrics of a set of examples, from logits and labels of 0 and 1."""
  logit, label = logit.astype(np.float64), label.astype(np.float64)
  if not len(logit) or not np.isfinite(logit).all():
    names = ('auc', 'auc_1000', 'accuracy', 'log_loss', 'normalized_entropy', 'calibration')
    return {**dict.fromkeys(names), 'examples': len(logit)}
  probability = sigmoid(logit)
  loss, rate = log_loss(logit, label), label.mean()
  entropy = -(rate * np.log(rate) + (1 - rate) * np.log1p(-rate)) if 0 < rate < 1 else None
  return {
    'auc': auc(logit, label),
    'auc_1000': auc_1000(probability, label),
    'accuracy': float(((probability > 0.5) == (label > 0.5)).mean()),
    'log_loss': loss,
    'normalized_entropy': None if entropy is None else float(loss / entropy),
    'calibration': float(probability.mean() / rate) if rate else None,
    'examples': len(logit),
  }


def sigmoid(logit: Logits) -> Logits:
  """Probabilities, without overflow."""
  return np.exp(-np.logaddexp(0, -logit))


def log_loss(logit: Logits, label: Labels) -> float:
  """Mean cross entropy in nats."""
  return float(np.mean(np.logaddexp(0, logit) - label * logit))


def auc(score: Logits, label: Labels) -> float | None:
  """Exact area under the ROC curve: the chance that a click scores above a non-click, ties counting half."""
  positives = int(label.sum())
  negatives = len(label) - positives
  if not positives or not negatives:
    return None
  order = np.argsort(score, kind='stable')
  score, label = score[order], label[order]
  last = np.append(np.flatnonzero(np.diff(score)), len(score) - 1)  # last place of each run of equal scores
  clicks = np.diff(np.cumsum(label)[last], prepend=0)
  others = np.diff(last, prepend=-1) - clicks
  below = np.cumsum(others) - others
  return float((clicks * (below + others / 2)).sum() / positives / negatives)


def auc_1000(probability: Logits, label: Labels) -> float | None:
  """The seed's AUC: trapezoids between 1000 thresholds (TensorFlow 1.15's tf.metrics.auc, num_thresholds=1000)."""
  positives, negatives = label.sum(), (1 - label).sum()
  if not positives or not negatives:
    return None
  thresholds = np.concatenate([[-1e-7], np.arange(1, 999) / 999, [1 + 1e-7]]).astype(np.float32)
  # How many thresholds each prediction is above: float32 against float32, as there.
  above = np.searchsorted(thresholds, probability.astype(np.float32), side='left')
  curve = lambda weight: np.cumsum(np.bincount(above, weight, minlength=1001)[::-1])[::-1][1:]
  # The small constant is TensorFlow's; it keeps its rates finite.
  true, false = (curve(label) + 1e-6) / (positives + 1e-6), curve(1 - label) / (negatives + 1e-6)
  return float(np.sum((false[:-1] - false[1:]) * (true[:-1] + true[1:]) / 2))
