import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlrm_jax.optim.schedules import DECAYS, schedule

LR, WARMUP, START, STEPS, END = 0.5, 4, 10, 20, 0.1

# What is left of the rate when a share x of the decay is over.
CURVES = {
  'constant': lambda x: 1.0,
  'linear': lambda x: 1 + (END - 1) * x,
  'cosine': lambda x: END + (1 - END) * (1 + np.cos(np.pi * x)) / 2,
  'exponential': lambda x: END**x,
  'polynomial': lambda x: END + (1 - END) * (1 - x) ** 2,
}


def rate(name, count, start):
  if count < WARMUP:
    return LR * (count + 1) / WARMUP
  return LR * CURVES[name](np.clip((count - start) / STEPS, 0, 1))


@pytest.mark.parametrize('start', [None, START])
@pytest.mark.parametrize('name', sorted(DECAYS))
def test_equals_the_curve_at_every_count(name, start):
  fn = jax.jit(schedule(name, LR, WARMUP, STEPS, start, END))
  counts = [*range(40), 10**6, 2**31 - 1]
  found = [fn(jnp.asarray(count, jnp.int32)) for count in counts]
  expected = [rate(name, count, WARMUP if start is None else start) for count in counts]
  np.testing.assert_allclose(found, expected, rtol=2e-6)
  assert found[0].dtype == jnp.float32
  assert found[0].shape == ()


def test_equals_the_policy_of_the_public_dlrm():
  # LRPolicyScheduler of facebookresearch/dlrm, restated: a linear warm-up, a plateau, (remaining share)^2.
  fn = schedule('polynomial', 1.0, warmup_steps=5, decay_start=8, decay_steps=10, power=2.0)
  for step_count in range(1, 18):
    if step_count < 5:
      expected = 1 - (5 - step_count) / 5
    elif step_count <= 8:
      expected = 1.0
    else:
      expected = ((8 + 10 - step_count) / 10) ** 2
    # It counts from 1 in the warm-up; its decay is one update ahead of ours.
    found = fn(jnp.asarray(step_count - 1 if step_count < 5 else step_count))
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_a_rate_that_never_changes_is_a_number():
  assert schedule('constant', 0.25) == 0.25


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    ({'name': 'step'}, r"'step'.*constant.*cosine.*exponential.*linear.*polynomial"),
    ({'name': 'constant', 'warmup_steps': -1}, 'warmup_steps=-1'),
    ({'name': 'linear'}, "decay_steps=0 of schedule 'linear'"),
    ({'name': 'linear', 'decay_steps': 5, 'warmup_steps': 9, 'decay_start': 3}, 'decay_start=3.*warmup_steps=9'),
    ({'name': 'exponential', 'decay_steps': 5}, 'end_factor=0.0'),
    ({'name': 'cosine', 'decay_steps': 5, 'end_factor': 2.0}, 'end_factor=2.0'),
  ],
)
def test_errors(arguments, message):
  with pytest.raises(ValueError, match=message):
    schedule(learning_rate=0.1, **arguments)
