"""One process at a time, of those that share a file or folder."""

import fcntl
import logging
import math
import time


def wait_for_lock(descriptor: int, work: str, seconds: float = math.inf) -> bool:
  """Whether this process has the lock of an open file or folder, until it closes it or ends.

  Waits while another has it, `seconds` at most; a line of log says what for: `work`, which the other does. False, too,
  where the file system has no locks.
  """
  said, until = False, time.monotonic() + seconds
  while True:
    try:
      fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
      return True
    except BlockingIOError:
      if not said:
        logging.getLogger(__name__).info('waiting for the process that %s', work)
      said = True
    except OSError:
      return False
    if time.monotonic() > until:
      return False
    time.sleep(0.1)
