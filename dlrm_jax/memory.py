"""How this process gets its memory from the system: in huge pages, and kept when it is freed."""

import ctypes
import os
import sys

# The environment in which glibc asks for huge pages wherever it gets memory; before 2.35 it ignores it.
TUNABLES, HUGE_PAGES = 'GLIBC_TUNABLES', 'glibc.malloc.hugetlb'
# The one of jemalloc, and what DeepRec's program has there: freed memory is kept for 20 seconds.
CONF, KEPT = 'MALLOC_CONF', 'background_thread:true,metadata_thp:auto,dirty_decay_ms:20000,muzzy_decay_ms:20000'
# mallopt's numbers and what they are set to.
MALLOC = {'M_ARENA_MAX': (-8, 1), 'M_MMAP_MAX': (-4, 0), 'M_TRIM_THRESHOLD': (-1, 2**31 - 1)}


def restart_with_settings() -> None:
  """Starts the command of this process anew with what allocators read when they start, unless that is set already.

  glibc: huge pages. A step reads and writes rows all over the tables. With pages of 4 KB the processor has to look up
  where nearly each of them is: rows that no cache holds take three times as long. jemalloc, if LD_PRELOAD names it:
  that it keeps what is freed, see `keep_freed_memory`.
  """
  if sys.platform != 'linux':
    return
  missing, tunables = {}, os.environ.get(TUNABLES, '')
  if HUGE_PAGES not in tunables:
    missing[TUNABLES] = ':'.join(filter(None, [tunables, f'{HUGE_PAGES}=1']))
  if 'jemalloc' in os.environ.get('LD_PRELOAD', '') and CONF not in os.environ:
    missing[CONF] = KEPT
  if missing:
    os.environ.update(missing)
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
