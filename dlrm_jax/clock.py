"""When something is due that is asked for in seconds, alike in all processes."""

import math
import time

from dlrm_jax.sharding import of_first

FIRST = 20  # steps until the clock is looked at for the first time


class EverySeconds:
  """Steps after which so many seconds have passed, by the clock of process 0.

  To ask it makes all processes wait for the step before, so it is asked half way to where it would be due at the speed
  so far, and half way again: a few times each period, however short the steps are. The first ones may be begun long
  before they are done, and look fast, so it is asked after no more steps than there were.
  """

  def __init__(self, seconds: float, step: int) -> None:
    self._seconds = seconds
    self.restart(step)

  def restart(self, step: int) -> None:
    """The seconds begin after this step."""
    self._step, self._since, self._ask = step, time.monotonic(), step + FIRST

  def is_due(self, step: int) -> bool:
    """Whether they have passed, after a step that all processes have done; never if they are 0."""
    if not self._seconds or step < self._ask:
      return False
    passed, steps = time.monotonic() - self._since, step - self._step
    left = steps * max(self._seconds / passed - 1, 0) if passed else 2 * steps
    ask = of_first(math.ceil(min(left / 2, steps)))
    self._ask = step + ask
    return ask == 0
