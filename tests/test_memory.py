"""Real processes, and what the system says of their memory."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from dlrm_jax import memory

CODE = """
import sys
from dlrm_jax import memory
memory.restart_with_huge_pages()
memory.keep_freed_memory()
held = bytearray(b'1') * (64 << 20)
print(sys.argv[1:], open('/proc/self/smaps_rollup').read())
"""
THP = Path('/sys/kernel/mm/transparent_hugepage/enabled')


def huge_mb(repository: Path, **environment: str) -> float:
  """What a process that holds 64 MB has of them in huge pages, once it has been started anew."""
  base = {name: value for name, value in os.environ.items() if name != memory.TUNABLES}
  command = [sys.executable, '-c', CODE, '--an', 'argument of its own']
  done = subprocess.run(command, cwd=repository, env=base | environment, capture_output=True, text=True, check=True)
  assert done.stdout.startswith("['--an', 'argument of its own']")  # it got what it was started with
  return int(re.search(r'AnonHugePages: *(\d+) kB', done.stdout)[1]) / 1024


@pytest.mark.skipif(not THP.exists() or '[madvise]' not in THP.read_text(), reason='no huge pages, or for all')
def test_memory_comes_in_huge_pages_unless_told_not_to(repository):
  assert huge_mb(repository) >= 32
  assert huge_mb(repository, GLIBC_TUNABLES='glibc.malloc.check=0') >= 32  # others of glibc's are kept
  assert huge_mb(repository, GLIBC_TUNABLES=f'{memory.HUGE_PAGES}=0') < 4
