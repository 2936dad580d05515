"""How this process gets its memory from the system: in huge pages, and kept when it is freed."""

import ctypes
import os
import sys

# The environment in which glibc asks for huge pages wherever it gets memory; before 2.35 it ignores it.
TUNABLES, HUGE_PAGES = 'GLIBC_TUNABLES', 'glibc.malloc.hugetlb'
# mallopt's numbers and what they are set to.
MALLOC = {'M_ARENA_MAX': (-8, 1), 'M_MMAP_MAX': (-4, 0), 'M_TRIM_THRESHOLD': (-1, 2**31 - 1)}


def restart_with_huge_pages() -> None:
  """Starts the command of this process anew with huge pages, unless it has them or was told not to.

  A step reads and writes rows all over the tables. With pages of 4 KB the processor has to look up where nearly each of
  them is: rows that no cache holds take three times as long. glibc decides when it starts, hence anew.
  """
  tunables = os.environ.get(TUNABLES, '')
  if sys.platform == 'linux' and HUGE_PAGES not in tunables:
    os.environ[TUNABLES] = ':'.join(filter(None, [tunables, f'{HUGE_PAGES}=1']))
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def keep_freed_memory() -> None:
  """Has glibc's malloc keep what is freed, for the next step to use.

  XLA:CPU allocates the scratch of a step anew each time. More than 32 MB would come from the system, which clears every
  page of it: a fifth of a step at batch 8192. One arena, since the others are given back whatever is asked.
  """
  mallopt = getattr(ctypes.CDLL(None), 'mallopt', None)  # only glibc has it
  if mallopt:
    for number, value in MALLOC.values():
      mallopt(number, value)
