"""The kernels are built once for what they were built from, and a run goes on without them where they cannot be had."""

import fcntl
import json
import os
import shutil
import subprocess
import sys
import threading

import jax
import numpy as np
import pytest

from dlrm_jax.native import build
from tests.helpers import execute, result, small_command

needs_compiler = pytest.mark.skipif(not build.load().ready, reason=build.load().note)
LOAD = 'from dlrm_jax.native import build; print(*build.load(), sep="|")'


def load_in(repository, cache, **environment):
  """(ready, note) of another process with its own cache folder."""
  command = [sys.executable, '-c', LOAD]
  code, stdout, stderr = execute(command, repository, XDG_CACHE_HOME=str(cache), **environment)
  assert code == 0, stderr
  ready, note = stdout.strip().split('|')
  return ready == 'True', note


@pytest.fixture(scope='module')
def built(tmp_path_factory, repository):
  """A cache folder that was empty when two processes began, of which one has built the kernels for both."""
  cache = tmp_path_factory.mktemp('cache')
  command = [sys.executable, '-c', LOAD]
  environment = {'XDG_CACHE_HOME': str(cache), 'PATH': '/usr/local/bin:/usr/bin:/bin'}
  both = [subprocess.Popen(command, cwd=repository, env=environment, stdout=subprocess.PIPE, text=True) for _ in 'ab']
  said = sorted(process.communicate(timeout=300)[0] for process in both)
  assert said[0].startswith('True|C++ kernels, built in'), said
  assert said[1].startswith('True|C++ kernels: '), said
  return cache


@needs_compiler
def test_one_whole_file_is_kept_and_used_again(built, repository):
  (library,) = (built / 'dlrm_jax').iterdir()
  assert load_in(repository, built) == (True, f'C++ kernels: {library}')


@needs_compiler
@pytest.mark.slow
def test_half_a_file_is_built_again(built, repository, tmp_path):
  shutil.copytree(built, tmp_path, dirs_exist_ok=True)
  (library,) = (tmp_path / 'dlrm_jax').iterdir()
  whole = library.read_bytes()
  library.write_bytes(whole[: len(whole) // 2])
  ready, note = load_in(repository, tmp_path)
  assert ready
  assert 'built in' in note
  assert len(library.read_bytes()) == len(whole)


@needs_compiler
@pytest.mark.slow
def test_a_cache_that_cannot_be_written_is_no_obstacle(repository):
  ready, note = load_in(repository, '/dev/null/cache')
  assert ready
  assert 'not kept, since /dev/null/cache/dlrm_jax cannot be written' in note


@pytest.fixture
def taken(tmp_path):
  """A descriptor by which another holds the turn of tmp_path."""
  descriptor = os.open(tmp_path, os.O_RDONLY)
  fcntl.flock(descriptor, fcntl.LOCK_EX)
  yield descriptor
  os.close(descriptor)


def test_a_turn_begins_when_that_of_another_ends(taken, tmp_path):
  order = []

  def end_turn():
    order.append('ended')
    fcntl.flock(taken, fcntl.LOCK_UN)

  timer = threading.Timer(0.3, end_turn)
  timer.start()
  with build.one_at_a_time(tmp_path):
    order.append('begun')
  timer.join()
  assert order == ['ended', 'begun']


def test_a_turn_that_does_not_end_is_not_waited_for_for_ever(taken, tmp_path, monkeypatch, caplog):
  monkeypatch.setattr(build, 'TURN_SECONDS', 0.2)
  caplog.set_level('INFO')
  with build.one_at_a_time(tmp_path):
    assert 'waiting for the process that builds the C++ kernels' in caplog.text


def test_no_compiler(repository, tmp_path):
  ready, note = load_in(repository, tmp_path, PATH=str(tmp_path), CXX='')
  assert not ready
  assert note == 'XLA alone, no C++ kernels: no C++ compiler, looked for c++, g++, clang++; install g++ or set CXX'
  ready, note = load_in(repository, tmp_path, CXX='no-such-compiler')
  assert not ready
  assert 'looked for no-such-compiler' in note


def test_a_compiler_that_fails(repository, tmp_path):
  compiler = tmp_path / 'compiler'
  compiler.write_text('#!/bin/sh\necho "rows.cc:1: error: no such luck" >&2\necho more >&2\nexit 1\n')
  compiler.chmod(0o755)
  ready, note = load_in(repository, tmp_path, CXX=str(compiler))
  assert not ready
  assert note == f'XLA alone, no C++ kernels: {compiler} failed: rows.cc:1: error: no such luck'
  assert not [path for path in (tmp_path / 'dlrm_jax').iterdir() if path.suffix == '.so']


def test_the_key_names_source_compiler_and_processor(tmp_path):
  compiler, source = tmp_path / 'compiler', tmp_path / 'rows.cc'
  compiler.write_text('#!/bin/sh\necho version 1\n')
  compiler.chmod(0o755)
  source.write_text('int a;')
  key = lambda processor='avx2': build.cache_key([str(compiler)], tmp_path, lambda: processor)
  keys = [key(), key('avx512')]
  source.write_text('int b;')
  keys.append(key())
  (tmp_path / 'rows.h').write_text('int c;')
  keys.append(key())
  assert key() == keys[-1]
  compiler.write_text('#!/bin/sh\necho version 2\n')
  keys.append(key())
  assert len(set(keys)) == len(keys)


def test_the_compiler_may_have_options(tmp_path, monkeypatch):
  monkeypatch.setenv('CXX', 'sh -x "-a b"')
  assert build.find_compiler() == [shutil.which('sh'), '-x', '-a b']
  monkeypatch.setenv('CXX', 'nowhere -x')
  with pytest.raises(build.BuildError, match='no C\\+\\+ compiler, looked for nowhere -x'):
    build.find_compiler()


def test_a_folder_that_may_not_be_read_or_does_not_exist_has_no_library(tmp_path, monkeypatch):
  monkeypatch.delenv('XDG_CACHE_HOME', raising=False)
  monkeypatch.setattr(build.Path, 'home', lambda: (_ for _ in ()).throw(RuntimeError('no home')))
  with pytest.raises(OSError, match='Not a directory'):
    build.cache_folder().mkdir(parents=True)
  assert not build.is_whole(build.cache_folder() / 'kernels.so')
  monkeypatch.setattr(build.Path, 'read_bytes', lambda path: (_ for _ in ()).throw(PermissionError(path)))
  assert not build.is_whole(tmp_path)


def test_not_wanted_or_not_a_cpu(monkeypatch):
  assert build.choose(False) == (False, 'XLA alone, no C++ kernels: config.native is False')
  monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
  ready, note = build.choose(True)
  assert not ready
  assert 'this runs on gpu' in note


def test_a_run_without_a_compiler_says_so_once_and_has_the_numbers_of_xla(criteo, tmp_path, repository):
  runs = {}
  for name, native, environment in (
    ('nothing', True, {'PATH': str(tmp_path), 'CXX': ''}),
    ('unwanted', False, {}),
  ):
    command = small_command(criteo, tmp_path / name, native=native)
    code, stdout, stderr = execute(command, repository, XDG_CACHE_HOME=str(tmp_path / 'cache'), **environment)
    assert code == 0, stderr
    assert len([line for line in stderr.splitlines() if 'kernels' in line]) == 1
    runs[name] = {key: value for key, value in result(stdout).items() if key in ('step', 'auc', 'loss', 'log_loss')}
  assert runs['nothing'] == runs['unwanted']
  assert len(runs['nothing']) >= 2


@pytest.mark.slow
@needs_compiler
def test_a_run_with_the_kernels_has_the_numbers_of_xla(criteo, tmp_path, repository):
  auc = []
  for native in (True, False):
    command = small_command(criteo, tmp_path / str(native), native=native, optimizer__name='adagrad')
    code, stdout, stderr = execute(command, repository)
    assert code == 0, stderr
    assert len([line for line in stderr.splitlines() if 'kernels' in line]) == 1
    auc.append(json.loads(stdout)['auc'])
  np.testing.assert_allclose(*auc, atol=1e-3)
