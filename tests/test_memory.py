"""Real processes, and what the system says of their memory."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from dlrm_jax import memory

CODE = """
import os, sys
from dlrm_jax import memory
memory.restart_with_settings()
memory.keep_freed_memory()
held = bytearray(b'1') * (64 << 20)
print(sys.argv[1:], open('/proc/self/smaps_rollup').read(), os.environ.get('MALLOC_CONF'))
"""
THP = Path('/sys/kernel/mm/transparent_hugepage/enabled')


def said(repository: Path, **environment: str) -> str:
  """What a process that holds 64 MB says, once it has been started anew."""
  base = {name: value for name, value in os.environ.items() if name not in (memory.TUNABLES, memory.CONF)}
  command = [sys.executable, '-c', CODE, '--an', 'argument of its own']
  done = subprocess.run(command, cwd=repository, env=base | environment, capture_output=True, text=True, check=True)
  assert done.stdout.startswith("['--an', 'argument of its own']")  # it got what it was started with
  return done.stdout.strip()


def huge_mb(repository: Path, **environment: str) -> float:
  """What it has in huge pages."""
  return int(re.search(r'AnonHugePages: *(\d+) kB', said(repository, **environment))[1]) / 1024


@pytest.mark.skipif(not THP.exists() or '[madvise]' not in THP.read_text(), reason='no huge pages, or for all')
def test_memory_comes_in_huge_pages_unless_told_not_to(repository):
  assert huge_mb(repository) >= 32
  assert huge_mb(repository, GLIBC_TUNABLES='glibc.malloc.check=0') >= 32  # others of glibc's are kept
  assert huge_mb(repository, GLIBC_TUNABLES=f'{memory.HUGE_PAGES}=0') < 4


@pytest.mark.skipif(sys.platform != 'linux', reason='LD_PRELOAD is for Linux')
def test_jemalloc_is_told_to_keep_memory_unless_told_otherwise(repository):
  jemalloc = {'LD_PRELOAD': 'libjemalloc.so.none'}  # which the system's loader complains of, and goes on
  assert said(repository, **jemalloc).endswith(memory.KEPT)
  assert said(repository, **jemalloc, GLIBC_TUNABLES=f'{memory.HUGE_PAGES}=0').endswith(memory.KEPT)
  assert said(repository, **jemalloc, MALLOC_CONF='narenas:1').endswith('narenas:1')
  assert said(repository).endswith('None')
