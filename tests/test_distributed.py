"""Real processes that sum over each other: started from the environment, killed, stopped, cut off, asked to stop."""

import contextlib
import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from dlrm_jax import distributed
from dlrm_jax.cluster import Cluster, NothingToDo, from_environment
from dlrm_jax.distributed import LOST, STUCK
from dlrm_jax.spec import SpecError
from tests.helpers import free_port, ours

# Without what JAX, imported by other tests, has put there.
ENVIRON = {name: value for name, value in os.environ.items() if name != 'TF_CPP_MIN_LOG_LEVEL'}
TOO_LATE = 30  # seconds, in which all must have ended after one was lost


def tf_config(kind='worker', index=0, **cluster):
  cluster = cluster or {'chief': ['a:1'], 'worker': ['b:2', 'c:3'], 'ps': ['d:4']}
  return {'TF_CONFIG': json.dumps({'cluster': cluster, 'task': {'type': kind, 'index': index}})}


@pytest.mark.parametrize(
  ('environ', 'cluster'),
  [
    ({}, None),
    ({'TF_CONFIG': ''}, None),
    ({'JOB_COMPLETION_INDEX': '3'}, None),
    (ours(), Cluster('h:9', 4, 2)),
    (ours('[fd00::1]:9'), Cluster('[fd00::1]:9', 4, 2)),
    (ours(index=None) | {'JOB_COMPLETION_INDEX': '3'}, Cluster('h:9', 4, 3)),
    (ours() | {'JOB_COMPLETION_INDEX': '3'}, Cluster('h:9', 4, 2)),
    (ours(processes='1', index='0'), None),
    (tf_config('chief'), Cluster('a:1', 3, 0)),
    (tf_config('worker', 0), Cluster('a:1', 3, 1)),
    (tf_config('worker', 1), Cluster('a:1', 3, 2)),
    (tf_config('worker', 1, worker=['b:2', 'c:3']), Cluster('b:2', 2, 1)),
    (tf_config('worker', '1', worker=['b:2', 'c:3']), Cluster('b:2', 2, 1)),
    (tf_config('worker', 0, worker=['b:2'], ps=['d:4']), None),
    (tf_config('chief', 0, chief=['a:1'], worker=['b:2']), Cluster('a:1', 2, 0)),
  ],
)
def test_a_cluster_from_the_environment(environ, cluster):
  assert from_environment(environ) == cluster


@pytest.mark.parametrize(
  ('environ', 'words'),
  [
    (ours(index=None), ['DLRM_PROCESS_ID is not set', 'JOB_COMPLETION_INDEX']),
    (ours(coordinator=None), ['DLRM_COORDINATOR is not set']),
    (ours(processes=None), ['DLRM_NUM_PROCESSES is not set']),
    (ours(index='4'), ['DLRM_PROCESS_ID=4', 'from 0 to 3']),
    (ours(index=None) | {'JOB_COMPLETION_INDEX': '7'}, ['JOB_COMPLETION_INDEX=7', 'from 0 to 3']),
    (ours(index='-1'), ['DLRM_PROCESS_ID=-1']),
    (ours(index='x'), ["DLRM_PROCESS_ID='x'", 'whole number']),
    (ours(processes='0', index='0'), ['DLRM_NUM_PROCESSES=0', 'at least 1']),
    (ours('h'), ["'h'", 'host:port']),
    (ours(':9'), ["':9'", 'host:port']),
    (ours('h:99999'), ['h:99999', 'host:port']),
    (ours() | tf_config(), ['TF_CONFIG and DLRM_COORDINATOR', 'unset one']),
    ({'TF_CONFIG': '{'}, ['TF_CONFIG', 'not JSON']),
    ({'TF_CONFIG': '[]'}, ['TF_CONFIG', 'wrong type']),
    ({'TF_CONFIG': '{}'}, ["'cluster' is missing"]),
    ({'TF_CONFIG': '{"cluster": {"worker": ["a:1"]}}'}, ["'task' is missing"]),
    ({'TF_CONFIG': '{"cluster": {"worker": ["a:1"]}, "task": {"type": "worker"}}'}, ["'index' is missing"]),
    ({'TF_CONFIG': '{"cluster": [], "task": {"type": "worker", "index": 0}}'}, ['wrong type']),
    (tf_config('worker', 0, worker=7), ['wrong type']),
    (tf_config('worker', 'x'), ['wrong type']),
    (tf_config('worker', 2), ['no worker 2', 'only 2']),
    (tf_config('chief', 0, worker=['a:1', 'b:2']), ['no chief 0']),
    (tf_config('worker', 0, ps=['d:4']), ["'worker' has no hosts"]),
    (tf_config('worker', 0, worker=['a', 'b:1']), ["'a'", 'host:port']),
    (tf_config('wroker'), ["'wroker' is unknown"]),
  ],
)
def test_too_little_or_too_much_is_one_line(environ, words):
  with pytest.raises(SpecError) as error:
    from_environment(environ)
  assert '\n' not in str(error.value)
  assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize('kind', ['ps', 'evaluator'])
def test_who_has_nothing_to_do_is_told_why_and_ends_well(kind, repository):
  with pytest.raises(NothingToDo, match='nothing to do'):
    from_environment(tf_config(kind))
  arguments = [sys.executable, '-m', 'dlrm_jax.main', '--config=configs/base.py']
  done = subprocess.run(
    arguments, cwd=repository, env=os.environ | tf_config(kind), capture_output=True, text=True, check=False
  )
  assert (done.returncode, done.stdout, done.stderr.count('\n')) == (0, '', 1)
  assert 'nothing to do' in done.stderr


@pytest.mark.parametrize(
  ('environ', 'fields', 'words'),
  [
    (ours(index='9'), [], 'DLRM_PROCESS_ID=9'),
    (ours(processes='17'), [], 'config.data.streams=16 cannot serve 17 processes.*streams=17 or more'),
    (ours(), ['data.workqueue=True', 'batch_size=3'], 'config.batch_size=3 cannot be shared by 4 processes'),
  ],
)
def test_a_wrong_cluster_ends_the_program_with_code_2(repository, environ, fields, words):
  arguments = [sys.executable, '-m', 'dlrm_jax.main', '--config=configs/base.py', *(f'--config.{f}' for f in fields)]
  done = subprocess.run(
    arguments, cwd=repository, env=os.environ | environ, capture_output=True, text=True, check=False
  )
  assert (done.returncode, done.stdout, done.stderr.count('\n')) == (2, '', 1)
  assert re.search(words, done.stderr)


class Toys:
  """Processes of tests/toy.py, their stdout and stderr in files."""

  def __init__(self, folder, repository, count, *arguments, host='127.0.0.1', prefix=(), **environ):
    self.folder, self.processes = folder, []
    self.where = where = f'{host}:{free_port()}'
    for index in range(count):
      command = [*(prefix[index] if prefix else ()), sys.executable, '-m', 'tests.toy', *map(str, arguments)]
      own = ours(where, str(count), str(index)) | environ
      with (folder / f'out{index}').open('w') as out, (folder / f'err{index}').open('w') as err:
        self.processes.append(subprocess.Popen(command, cwd=repository, env=ENVIRON | own, stdout=out, stderr=err))

  def read(self, name, index):
    return (self.folder / f'{name}{index}').read_text()

  def wait_for_step(self, step):
    end = time.monotonic() + 60
    while not all(f'step {step}\n' in self.read('err', index) for index in range(len(self.processes))):
      assert time.monotonic() < end, [self.read('err', index) for index in range(len(self.processes))]
      time.sleep(0.05)

  def codes(self, indices, seconds):
    """Exit codes of some; those still running by then have failed the test."""
    end = time.monotonic() + seconds
    return [self.processes[index].wait(max(0.1, end - time.monotonic())) for index in indices]

  def reason(self, index):
    """The one line that says why it ended."""
    (line,) = [line for line in self.read('err', index).splitlines() if not line.startswith('step ')]
    return line


@pytest.fixture
def toys(tmp_path, repository):
  started = []

  def start(count, *arguments, **options):
    started.append(Toys(tmp_path, repository, count, *arguments, **options))
    return started[-1]

  yield start
  for process in started[0].processes:
    with contextlib.suppress(ProcessLookupError):
      process.kill()
    process.wait()


@pytest.mark.parametrize('count', [2, pytest.param(4, marks=pytest.mark.slow)])
def test_they_start_sum_and_end_together_and_process_0_alone_writes_to_stdout(count, toys):
  run = toys(count, 10)
  assert run.codes(range(count), 60) == [0] * count
  assert run.read('out', 0) == '{"toy": true}\n'
  assert all(run.read('out', index) == '' for index in range(1, count))
  assert f'{count} processes' in run.read('err', 0)
  assert run.read('err', 1) == 'step 10\nended after step 10\n'


@pytest.mark.parametrize(
  ('victim', 'number', 'count', 'words'),
  [
    (1, signal.SIGKILL, 3, 'process 1 on 127.0.0.1 is gone'),
    (0, signal.SIGKILL, 3, 'process 0 on 127.0.0.1 is gone'),
    (1, signal.SIGSTOP, 2, 'process 1 on 127.0.0.1 gave no sign of life'),
    pytest.param(0, signal.SIGSTOP, 3, 'process 0 on 127.0.0.1 gave no sign of life', marks=pytest.mark.slow),
    pytest.param(3, signal.SIGSTOP, 4, 'process 3 on 127.0.0.1 gave no sign of life', marks=pytest.mark.slow),
  ],
)
def test_when_one_is_lost_all_others_end_with_one_line_that_names_it(victim, number, count, words, toys):
  run = toys(count, 100_000)
  run.wait_for_step(10)
  run.processes[victim].send_signal(number)
  others = [index for index in range(count) if index != victim]
  assert run.codes(others, TOO_LATE) == [LOST] * len(others)
  for index in others:
    lines = [line for line in run.read('err', index).splitlines() if not line.startswith('step ')]
    assert len(lines) == (2 if index == 0 else 1), lines  # of process 0, the line about its start too
    assert lines[-1].startswith('error: ')
    assert words in lines[-1]


def test_an_exception_in_one_ends_all_and_each_says_which_and_why(toys):
  run = toys(3, 100_000, 25)
  assert run.codes([0, 1, 2], TOO_LATE) == [LOST, 1, LOST]
  assert 'Traceback' in run.read('err', 1)
  assert run.read('err', 1).splitlines()[-1] == 'error: ValueError: the toy broke'
  assert run.reason(2) == 'error: process 1 failed: ValueError: the toy broke'


def test_a_stuck_step_ends_all_by_the_watchdog(toys):
  """One process is stuck in Python, so that its peers hear from it as ever; the others wait for it in a sum."""
  run = toys(2, 100_000, -1, 25, TOY_WATCHDOG='3')
  codes = run.codes([0, 1], TOO_LATE)
  assert STUCK in codes
  assert set(codes) <= {STUCK, LOST}
  assert any('no step was done for' in run.read('err', index).splitlines()[-1] for index in (0, 1))


@pytest.mark.parametrize('asked', [0, 1])
def test_a_polite_signal_to_one_stops_all_after_the_same_step(asked, toys, tmp_path):
  run = toys(3, 100_000, DLRM_HEARTBEAT=str(tmp_path / 'alive'))
  run.wait_for_step(20)
  run.processes[asked].send_signal(signal.SIGTERM)
  assert run.codes(range(3), TOO_LATE) == [128 + signal.SIGTERM] * 3
  ends = {run.read('err', index).splitlines()[-1] for index in range(3)}
  assert len(ends) == 1, ends
  assert ends.pop().startswith('ended after step ')
  assert (tmp_path / 'alive').exists()


def test_without_an_mpi_library_the_protocol_is_one_line_and_code_2(repository):
  code = 'from dlrm_jax.distributed import *\nwith joined(Cluster("127.0.0.1:9", 2, 0), "mpi"): pass'
  done = subprocess.run([sys.executable, '-c', code], cwd=repository, capture_output=True, text=True, check=False)
  assert done.returncode == 2
  assert done.stderr.count('\n') == 1
  assert 'MPITRAMPOLINE_LIB' in done.stderr


def assert_is_taken(where, repository):
  done = subprocess.run(
    [sys.executable, '-m', 'tests.toy', '1'], cwd=repository, env=ENVIRON | ours(where, '2', '0'), capture_output=True,
    text=True, check=False, timeout=60,
  )  # fmt: skip
  assert done.returncode == 1
  assert done.stderr.count('\n') == 1
  assert 'choose a port that is free' in done.stderr


def test_a_port_that_is_taken_is_one_line(repository):
  with socket.socket() as taken:
    taken.bind(('127.0.0.1', 0))
    taken.listen()
    assert_is_taken(f'127.0.0.1:{taken.getsockname()[1]}', repository)


def test_a_run_leaves_another_on_the_same_port_alone(toys, repository):
  run = toys(2, 300)
  run.wait_for_step(10)
  assert_is_taken(run.where, repository)
  assert run.codes([0, 1], TOO_LATE) == [0, 0]


def ip(*arguments):
  return subprocess.run(['ip', *arguments], capture_output=True, text=True, check=False)


@pytest.fixture
def namespaces():
  """A bridge with three network namespaces on it, 10.97.0.1 to 10.97.0.3; the prefixes of commands in them."""
  own = secrets.token_hex(3)  # anew each time, since what is deleted may be there a while longer
  names = [f'dlrm{own}n{index}' for index in range(3)]
  bridge, cables = f'br{own}', [f'v{own}n{index}' for index in range(3)]
  made = [ip('netns', 'add', name).returncode == 0 for name in names]
  try:
    if not all(made) or ip('link', 'add', bridge, 'type', 'bridge').returncode:
      pytest.skip('network namespaces may not be made here')
    ip('link', 'set', bridge, 'up')
    for index, (name, cable) in enumerate(zip(names, cables, strict=True)):
      ip('link', 'add', cable, 'type', 'veth', 'peer', 'name', 'eth0', 'netns', name)
      ip('link', 'set', cable, 'master', bridge, 'up')
      ip('-n', name, 'address', 'add', f'10.97.0.{index + 1}/24', 'dev', 'eth0')
      ip('-n', name, 'link', 'set', 'eth0', 'up')
      ip('-n', name, 'link', 'set', 'lo', 'up')
    yield names, cables
  finally:
    for name in names:
      ip('netns', 'del', name)
    ip('link', 'del', bridge)


@pytest.mark.parametrize('cut', [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_cut_link_ends_all_with_its_cause(cut, toys, namespaces):
  names, cables = namespaces
  run = toys(3, 100_000, host='10.97.0.1', prefix=[['ip', 'netns', 'exec', name] for name in names])
  run.wait_for_step(10)
  ip('link', 'set', cables[cut], 'down')
  assert run.codes(range(3), TOO_LATE) == [LOST] * 3
  for index in {0, 1, 2} - {cut}:
    assert f'process {cut} on 10.97.0.{cut + 1} gave no sign of life' in run.read('err', index).splitlines()[-1]
  assert 'gave no sign of life' in run.read('err', cut).splitlines()[-1]


@pytest.mark.slow
def test_a_link_that_is_cut_between_two_others_than_process_0_ends_all(toys, namespaces):
  """What heartbeats that go to process 0 alone would never show."""
  names, _ = namespaces
  run = toys(3, 100_000, host='10.97.0.1', prefix=[['ip', 'netns', 'exec', name] for name in names])
  run.wait_for_step(10)
  ip('-n', names[1], 'route', 'add', 'blackhole', '10.97.0.3/32')
  assert run.codes(range(3), TOO_LATE) == [LOST] * 3
  assert all('gave no sign of life' in run.read('err', index).splitlines()[-1] for index in range(3))


def test_new_threads_interrupt_no_other():
  done = threading.Event()

  def start():
    thread = threading.Thread(target=done.wait)
    thread.start()
    return thread

  thread = distributed.with_patient_threads(start)
  try:
    assert os.sched_getscheduler(thread.native_id) == os.SCHED_BATCH
    assert os.sched_getscheduler(threading.get_native_id()) == os.SCHED_OTHER
  finally:
    done.set()
    thread.join()
