"""Local processes under the launcher: their logs, cores, exit codes, restarts, and that none is ever left behind."""

import os
import signal
import subprocess
import sys
import time

import pytest

from dlrm_jax.launch import shares
from tests.helpers import result, small_command

# What each process runs in place of training; the launcher is told so in its own process.
LAUNCH = """
import sys
from dlrm_jax import launch
launch.GRACE = 3.0
sys.exit(launch.Launcher([sys.executable, *sys.argv[3:]], int(sys.argv[1])).run(int(sys.argv[2])))
"""
INDEX = "import os, sys, time; index = int(os.environ['DLRM_PROCESS_ID'])\n"


def launch(repository, processes, restarts, *command):
  arguments = [sys.executable, '-c', LAUNCH, str(processes), str(restarts), *command]
  return subprocess.Popen(arguments, cwd=repository, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def launched(repository, processes, restarts, *command, seconds=60):
  """(exit code, stdout, lines of stderr)."""
  process = launch(repository, processes, restarts, *command)
  out, err = process.communicate(timeout=seconds)
  return process.returncode, out, err.splitlines()


def read_until(stream, words):
  """Lines up to the first that has these words."""
  lines = []
  for line in stream:
    lines.append(line)
    if words in line:
      return lines
  raise AssertionError(lines)


def alive(pid):
  """Whether there is such a process, and not only its remains."""
  try:
    with open(f'/proc/{pid}/stat') as file:
      return file.read().rpartition(')')[2].split()[0] != 'Z'
  except FileNotFoundError:
    return False


@pytest.mark.parametrize(
  ('cores', 'processes', 'expected'),
  [
    ([0, 1], 1, [[0, 1]]),
    ([0, 1], 2, [[0], [1]]),
    ([0, 1], 5, [[0], [1], [0], [1], [0]]),
    ([2, 3, 6, 7, 8], 2, [[2, 3], [6, 7, 8]]),
    (list(range(8)), 3, [[0, 1], [2, 3, 4], [5, 6, 7]]),
  ],
)
def test_each_process_has_its_share_of_the_cores(cores, processes, expected):
  assert shares(cores, processes) == expected


def test_stdout_of_process_0_passes_through_and_all_else_is_prefixed(repository):
  code = INDEX + "print('out', index); print('err', index, file=sys.stderr)"
  exit_code, out, err = launched(repository, 3, 0, '-c', code)
  assert (exit_code, out) == (0, 'out 0\n')
  assert sorted(err) == ['[0] err 0', '[1] err 1', '[1] out 1', '[2] err 2', '[2] out 2']


def test_each_process_is_told_who_it_is_and_runs_on_its_cores(repository):
  code = INDEX + (
    "names = 'DLRM_COORDINATOR', 'DLRM_NUM_PROCESSES', 'DLRM_PROCESS_ID', 'NPROC', 'JAX_NUM_CPU_DEVICES'\n"
    'print(*(os.environ[name] for name in names), sorted(os.sched_getaffinity(0)), file=sys.stderr)'
  )
  exit_code, _, err = launched(repository, 2, 0, '-c', code)
  assert exit_code == 0
  where = {line.split()[1] for line in err}
  assert len(where) == 1
  assert where.pop().startswith('127.0.0.1:')
  for index, cores in enumerate(shares(sorted(os.sched_getaffinity(0)), 2)):
    (line,) = [line for line in err if line.startswith(f'[{index}] ')]
    assert line.split(maxsplit=2)[2] == f'2 {index} {len(cores)} 1 {cores}'


@pytest.mark.parametrize(('end', 'expected'), [('sys.exit(7)', 7), ('os.kill(os.getpid(), 9)', 137)])
def test_the_code_is_that_of_the_first_that_failed_and_the_others_are_ended(end, expected, repository):
  code = INDEX + f'if index == 1: {end}\ntime.sleep(100)'
  started = time.monotonic()
  exit_code, _, err = launched(repository, 3, 0, '-c', code)
  assert exit_code == expected
  assert time.monotonic() - started < 10
  assert [line for line in err if line.endswith('; ending the others')], err


def test_one_that_ended_because_of_another_hides_nothing(repository):
  code = INDEX + 'if index == 1: sys.exit(3)\nif index == 0:\n  time.sleep(0.5)\n  sys.exit(1)\ntime.sleep(100)'
  code = 'import signal; signal.signal(15, signal.SIG_IGN)\n' + code
  assert launched(repository, 3, 0, '-c', code, seconds=20)[0] == 1


def test_one_that_is_stopped_is_killed(repository):
  code = INDEX + (
    'if index == 1:\n  time.sleep(1)\n  sys.exit(3)\nif index == 2: os.kill(os.getpid(), 19)\ntime.sleep(100)'
  )
  assert launched(repository, 3, 0, '-c', code, seconds=20)[0] == 3


@pytest.mark.parametrize(('restarts', 'expected', 'starts'), [(0, 5, 1), (1, 5, 2), (2, 0, 3), (4, 0, 3)])
def test_it_restarts_all_after_a_failure_and_gives_up_in_the_end(restarts, expected, starts, tmp_path, repository):
  """Process 1 fails twice."""
  code = INDEX + (
    f'print("port", os.environ["DLRM_COORDINATOR"], file=sys.stderr); path = {str(tmp_path)!r} + f"/{{index}}"\n'
    'open(path, "a").write("x"); sys.exit(5 if index == 1 and os.path.getsize(path) < 3 else 0)'
  )
  exit_code, _, err = launched(repository, 2, restarts, '-c', code)
  assert exit_code == expected
  assert (tmp_path / '1').read_text() == 'x' * starts
  assert [line for line in err if line.startswith('launch: restart')] == [
    f'launch: restart {number} of {restarts}' for number in range(1, starts)
  ]
  assert len({line.split()[-1] for line in err if line.startswith('[1] port')}) == starts


@pytest.mark.parametrize('code', [2, 128 + signal.SIGTERM, 128 + signal.SIGINT])
def test_a_wrong_command_and_one_that_was_asked_to_stop_are_not_tried_again(code, repository):
  exit_code, _, err = launched(repository, 2, 3, '-c', f'import sys; sys.exit({int(code)})')
  assert exit_code == code
  assert not [line for line in err if 'restart' in line]


def test_the_run_goes_on_when_nobody_reads_what_it_says(repository):
  code = INDEX + "print('first', file=sys.stderr, flush=True)\nfor i in range(5000): print('x' * 100, file=sys.stderr)"
  with launch(repository, 2, 0, '-c', f"{code}\nif index == 0: print('done')") as process:
    read_until(process.stderr, 'first')
    process.stderr.close()
    try:
      assert process.wait(20) == 0
    finally:
      process.kill()
    assert process.stdout.read() == 'done\n'


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_goes_to_all_once_and_nothing_is_restarted(number, repository):
  """A second one would cut a save short: process 1 needs a second to end, after process 0 has."""
  code = INDEX + (
    'import signal; got = []\nfor n in (2, 15): signal.signal(n, lambda n, _: got.append(n))\n'
    'print("ready", file=sys.stderr, flush=True)\nwhile not got: time.sleep(0.01)\n'
    'time.sleep(index); print("got", got, file=sys.stderr); sys.exit(128 + got[0])'
  )
  process = launch(repository, 2, 3, '-c', code)
  for _ in range(2):
    read_until(process.stderr, 'ready')
  process.send_signal(number)
  _, err = process.communicate(timeout=20)
  assert process.returncode == 128 + number
  assert sorted(line for line in err.splitlines() if 'got' in line) == [f'[{i}] got [{int(number)}]' for i in (0, 1)]
  assert 'restart' not in err


def test_no_process_outlives_a_launcher_that_was_killed(repository):
  with launch(repository, 2, 0, '-c', INDEX + 'print(os.getpid(), file=sys.stderr); time.sleep(99)') as process:
    pids = [int(process.stderr.readline().split()[-1]) for _ in range(2)]
    assert all(alive(pid) for pid in pids)
    process.kill()
  end = time.monotonic() + 5
  while any(alive(pid) for pid in pids) and time.monotonic() < end:
    time.sleep(0.05)
  assert not any(alive(pid) for pid in pids)


@pytest.mark.parametrize(
  ('arguments', 'words'),
  [
    ([], '--processes'),
    (['--processes', '0'], 'must be at least 1'),
    (['--processes=2', '--max-restarts=-1'], 'must be at least 0'),
    (['--processes=2', '--config=x'], '--config=x'),
  ],
)
def test_a_wrong_command_line_says_what_is_wrong(arguments, words, repository):
  done = subprocess.run(
    [sys.executable, '-m', 'dlrm_jax.launch', *arguments], cwd=repository, capture_output=True, text=True, check=False
  )
  assert done.returncode == 2
  assert words in done.stderr


def test_a_run_of_one_process_is_the_program_itself(criteo, tmp_path, repository):
  fields = small_command(criteo, tmp_path)[3:]
  arguments = [sys.executable, '-m', 'dlrm_jax.launch', '--processes=1', '--max-restarts=1', '--', *fields]
  done = subprocess.run(arguments, cwd=repository, capture_output=True, text=True, check=False, timeout=120)
  assert done.returncode == 0, done.stderr
  assert result(done.stdout)['step'] == 19
  assert 'launch: without --config.checkpoint=DIR a restart begins anew' in done.stderr


def test_a_mistake_in_a_config_ends_all_with_code_2(repository):
  arguments = [sys.executable, '-m', 'dlrm_jax.launch', '--processes=2', '--max-restarts=2', '--', '--config=no.py']
  done = subprocess.run(arguments, cwd=repository, capture_output=True, text=True, check=False, timeout=60)
  assert done.returncode == 2
  assert 'restart 1' not in done.stderr


def test_real_processes_are_restarted_after_one_was_killed(repository):
  """The launcher with real collectives: the first time, process 1 is killed; then all stop politely."""
  process = launch(repository, 2, 1, '-m', 'tests.toy', '100000')
  read_until(process.stderr, 'step 20')
  with open(f'/proc/{process.pid}/task/{process.pid}/children') as children:
    os.kill(int(children.read().split()[1]), signal.SIGKILL)
  lines = read_until(process.stderr, 'restart 1 of 1')
  assert any('process 1 was ended by SIGKILL' in line for line in lines)
  read_until(process.stderr, 'step 20')
  process.terminate()
  out, err = process.communicate(timeout=30)
  assert process.returncode == 128 + signal.SIGTERM
  assert out == '{"toy": true}\n'
  ends = {line.partition('] ')[2] for line in err.splitlines() if 'ended after step' in line}
  assert len(ends) == 1, err


