"""Runs of several real processes: the numbers of one process, the same rows, checkpoints for any number of them."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from dlrm_jax.checkpoint.full import Checkpoints
from dlrm_jax.distributed import LOST
from dlrm_jax.embeddings import directory as directories
from dlrm_jax.native import build
from dlrm_jax.program import make_program
from tests.helpers import SMALL, devices, execute, free_port, ours, result, small_command, small_spec, with_small_files

needs_kernels = pytest.mark.skipif(not build.load().ready, reason=build.load().note)
CUT = {'embedding.shard_mb': 0.0, 'data.shuffle_rows': 0, 'log_every': 1}
KINDS = {
  'static': {'model.shard_kb': 0.4},
  'dynamic': {
    'embedding.kind': 'dynamic', 'embedding.rows': 4 * 512, 'embedding.admission.name': 'counter',
    'embedding.admission.threshold': 2, 'embedding.admission.expected_ids': 4 * 512,
  },
}  # fmt: skip


def launched(data, folder, processes, *launcher, **fields):
  """The command line of a small run of so many processes in `folder`."""
  fields = SMALL | CUT | {'data_location': data, 'checkpoint': folder} | {
    name.replace('__', '.'): value for name, value in fields.items()
  }  # fmt: skip
  flags = [f'--config.{name}={value}' for name, value in fields.items()]
  start = [sys.executable, '-m', 'dlrm_jax.launch', '--processes', str(processes), *launcher]
  return [*start, '--', '--config=configs/base.py', *flags]


def together(commands, repository):
  """(exit code, stderr) of the processes of a run, each with a command of its own."""
  where, started = f'127.0.0.1:{free_port()}', []
  for index, command in enumerate(commands):
    environ = os.environ | ours(where, str(len(commands)), str(index))
    started.append(subprocess.Popen(command, cwd=repository, env=environ, stderr=subprocess.PIPE, text=True))
  told = [process.communicate(timeout=60)[1] for process in started]
  return [(process.returncode, err) for process, err in zip(started, told, strict=True)]


def losses(folder):
  """The loss of each step."""
  records = map(json.loads, (folder / 'metrics.jsonl').read_text().splitlines())
  return {record['step']: record['loss'] for record in records if record['kind'] == 'train'}


def restored(folder, axis=None, **fields):
  """The newest state and position of a run."""
  fields = CUT | {name.replace('__', '.'): value for name, value in fields.items()}
  program = make_program(small_spec('data', 'result', **fields), axis or devices(1))
  with Checkpoints(folder / 'checkpoints', 1) as checkpoints:
    found = checkpoints.restore(program)
  return jax.device_get(arrays(found.state)), found.position


def ids_of(directory):
  """{id: (frequency, last step)}."""
  (key, feature), frequency, version = jax.device_get(directories.entries(directory))
  return {
    (*key[row].tolist(), int(feature[row])): (int(frequency[row]), int(version[row]))
    for row in np.flatnonzero(frequency)
  }


def arrays(state):
  """What counts of a state."""
  return state.replace(tables={name: table.replace(scratch=0) for name, table in state.tables.items()})


@pytest.mark.slow
@pytest.mark.parametrize('kind', KINDS)
def test_two_processes_do_what_one_does_and_their_checkpoint_serves_any_number(criteo, tmp_path, repository, kind):
  printed = {}
  for processes in (1, 2):
    code, out, err = execute(launched(criteo, tmp_path / str(processes), processes, **KINDS[kind]), repository)
    assert code == 0, err
    printed[processes] = result(out)
  one, two = (list(losses(tmp_path / str(processes)).values()) for processes in (1, 2))
  assert len(one) == len(two) == 19
  np.testing.assert_allclose(two[0], one[0], rtol=1e-6)
  np.testing.assert_allclose(two, one, rtol=1e-3)
  assert printed[2]['auc'] == pytest.approx(printed[1]['auc'], abs=0.005)

  state, position = restored(tmp_path / '2', **KINDS[kind])
  on_four, _ = restored(tmp_path / '2', devices(4), **KINDS[kind])
  jax.tree.map(np.testing.assert_array_equal, state, on_four)
  assert position == restored(tmp_path / '1', **KINDS[kind])[1]
  alone, _ = restored(tmp_path / '1', **KINDS[kind])
  # Whatever their order in the buckets is.
  for directory in ('directory', 'filter') if state.known else ():
    one, other = (ids_of(getattr(each.known['fused'], directory)) for each in (state, alone))
    assert one == other

  # The same checkpoint, evaluated by other numbers of processes.
  for processes in (1, 3):
    code, out, err = execute(launched(criteo, tmp_path / '2', processes, **KINDS[kind]), repository)
    assert code == 0, err
    assert 'nothing to train' in err
    assert result(out)['auc'] == pytest.approx(printed[2]['auc'], abs=1e-12)
    # XLA rounds some logits in their last bit otherwise where a step is for several devices.
    assert result(out)['log_loss'] == pytest.approx(printed[2]['log_loss'], abs=1e-7)


LEAVES = {'batch_size': 512, 'epochs': 6, 'embedding.buckets': (50,), 'save_steps': 5, 'keep_checkpoint_max': 9}


@needs_kernels
@pytest.mark.parametrize('kind', [pytest.param('static', marks=pytest.mark.slow), 'dynamic'])
def test_any_numbers_of_processes_one_after_another_give_the_bits_of_one(criteo, tmp_path, repository, kind):
  """Batches are four leaves of sums, two batches an epoch, the second mostly padding."""
  fields, folders = KINDS[kind] | LEAVES, (tmp_path / 'one', tmp_path / 'parts')
  code, out, err = execute(launched(criteo, folders[0], 1, **fields), repository)
  assert code == 0, err
  for processes, steps in ((4, 3), (1, 8), (2, 0)):
    code, other, err = execute(launched(criteo, folders[1], processes, **fields, steps=steps), repository)
    assert code == 0, err
  one, parts = map(losses, folders)
  assert one == parts
  assert list(parts) == list(range(1, 13))
  (state, position), (alone, position_alone) = (restored(folder, **KINDS[kind]) for folder in folders)
  assert position == position_alone
  jax.tree.map(np.testing.assert_array_equal, state, alone)
  for name in ('auc', 'log_loss'):
    assert result(other)[name] == pytest.approx(result(out)[name], abs=1e-12 if name == 'auc' else 1e-7)


def test_where_one_process_misses_a_file_all_use_the_checkpoint_before(criteo, tmp_path, repository):
  fields = {'steps': 4, 'save_steps': 2, 'keep_checkpoint_max': 2, 'no_eval': True}
  assert execute(launched(criteo, tmp_path, 2, **fields), repository)[0] == 0
  expected, _ = restored(tmp_path)
  # Mostly its rows of the table, which the other process does not read; what comes after them, both may.
  path = max((tmp_path / 'checkpoints/4/state/ocdbt.process_1').rglob('*'), key=lambda path: path.stat().st_size)
  os.truncate(path, path.stat().st_size * 2 // 3)
  code, _, err = execute(launched(criteo, tmp_path, 2, **fields), repository)
  assert code == 0, err
  assert 'checkpoints/4 cannot be read' in err
  assert 'resumed from step 2' in err
  assert [path.name[:9] for path in (tmp_path / 'checkpoints').glob('damaged-*')] == ['damaged-4']
  jax.tree.map(np.testing.assert_array_equal, restored(tmp_path)[0], expected)


@pytest.mark.slow
def test_another_number_of_processes_goes_on_at_the_right_row(criteo, tmp_path, repository):
  folder, whole = tmp_path / 'parts', tmp_path / 'whole'
  assert execute(launched(criteo, whole, 1, epochs=2), repository)[0] == 0
  for processes, steps in ((2, 7), (1, 15), (3, 24), (2, 0)):
    code, _, err = execute(launched(criteo, folder, processes, epochs=2, steps=steps, no_eval=True), repository)
    assert code == 0, err
  parts, expected = losses(folder), losses(whole)
  assert list(parts) == list(expected) == list(range(1, 39))
  np.testing.assert_allclose(list(parts.values()), list(expected.values()), rtol=2e-3)
  assert restored(folder)[1] == restored(whole)[1]


@pytest.mark.parametrize('processes', [pytest.param(1, marks=pytest.mark.slow), 2])
def test_the_work_queue_of_several_processes_brings_every_row(criteo, tmp_path, repository, processes):
  code, out, err = execute(
    launched(criteo, tmp_path / 'run', processes, data__workqueue=True, data__slice_rows=50, epochs=2), repository
  )
  assert code == 0, err
  state, position = restored(tmp_path / 'run')
  assert (position['epoch'], position['position']) == (2, 0)
  assert result(out)['step'] == int(state.step) >= 38
  assert result(out)['auc'] > 0.7


def test_a_bad_row_in_one_process_of_a_work_queue_is_told_once_by_each(criteo, tmp_path, repository):
  lines = (criteo / 'train.csv').read_text().splitlines(keepends=True)
  lines[555] = lines[555].replace(',', ',x', 1)
  (tmp_path / 'train.csv').write_text(''.join(lines))
  fields = {'data__workqueue': True, 'data__slice_rows': 50, 'no_eval': True}
  code, out, err = execute(launched(tmp_path, tmp_path / 'run', 2, **fields), repository)
  assert (code, out) == (1, '')
  assert 'Traceback' not in err
  assert all(re.search(rf'\[{index}\] error: .*train.csv, line 556, field I1: found', err) for index in (0, 1)), err


def test_processes_that_see_other_data_say_so(criteo, tmp_path, repository):
  """Each would wait for batches that the other does not have."""
  lines = (criteo / 'train.csv').read_text().splitlines(keepends=True)
  for rows in (600, 400):
    (tmp_path / str(rows)).mkdir()
    (tmp_path / str(rows) / 'train.csv').write_text(''.join(lines[:rows]))
  commands = [small_command(tmp_path / str(rows), tmp_path / 'result', no_eval=True) for rows in (600, 400)]
  for code, err in together(commands, repository):
    assert code in (1, LOST)  # who is told first
    assert re.search(r'error: .*config.data.train has [46]00 rows in process [01] and [46]00 in process [01]', err), err


def test_a_checkpoint_that_one_process_cannot_write_ends_all(criteo, tmp_path, repository):
  """As on a full disk; the files of its part of the state are larger than it may write."""
  fields = CUT | {'embedding.buckets': (5000,), 'checkpoint': tmp_path, 'save_steps': 3, 'no_eval': True}
  command = small_command(criteo, tmp_path, **fields)
  ended = together([command, with_small_files(command)], repository)
  assert [code for code, _ in ended] == [3, 1]
  for _, err in ended:
    (line,) = [line for line in err.splitlines() if line.startswith('error: ')]  # steps may still be logged after it
    assert 'a checkpoint cannot be written to' in line
    assert 'Traceback' not in err, err


@pytest.mark.slow
def test_a_signal_to_the_launcher_stops_all_with_a_checkpoint_to_the_same_bits(criteo, tmp_path, repository):
  whole, folder = tmp_path / 'whole', tmp_path / 'parts'
  assert execute(launched(criteo, whole, 2, epochs=20), repository)[0] == 0
  process = subprocess.Popen(
    launched(criteo, folder, 2, epochs=20), cwd=repository, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
  )
  wait_for(lambda: (folder / 'metrics.jsonl').exists() and len(losses_so_far(folder)) > 5, process)
  process.send_signal(signal.SIGTERM)
  assert process.wait(timeout=120) == 128 + signal.SIGTERM
  assert 5 < restored(folder)[0].step < 380
  assert execute(launched(criteo, folder, 2, epochs=20), repository)[0] == 0
  jax.tree.map(np.testing.assert_array_equal, restored(folder)[0], restored(whole)[0])
  assert losses(folder) == losses(whole)


def losses_so_far(folder):
  return [line for line in (folder / 'metrics.jsonl').read_text().splitlines() if line.endswith('}')]


def wait_for(condition, process, seconds=180):
  end = time.monotonic() + seconds
  while not condition():
    assert process.poll() is None, 'ended before its time'
    assert time.monotonic() < end, 'took too long'
    time.sleep(0.02)


def test_a_killed_process_goes_on_from_what_changed_to_the_same_bits(criteo, tmp_path, repository):
  """Kill -9 of one of two as soon as there is a checkpoint of what changed."""
  fields = {
    'epochs': 60, 'delta_seconds': 0.2, 'keep_checkpoint_max': 2, 'embedding__buckets': (2000,),
    'model__dtype': 'bfloat16', 'model__reduce_dtype': 'bfloat16',
  }  # fmt: skip
  whole, folder = tmp_path / 'whole', tmp_path / 'killed'
  assert execute(launched(criteo, whole, 2, **fields | {'delta_seconds': 0}), repository)[0] == 0
  process = subprocess.Popen(
    launched(criteo, folder, 2, '--max-restarts', '9', **fields), cwd=repository, stdout=subprocess.DEVNULL,
    stderr=subprocess.PIPE, text=True,
  )  # fmt: skip
  steps = lambda: {int(path.name) for path in (folder / 'checkpoints/deltas').glob('*') if path.name.isdigit()}
  wait_for(steps, process)
  seen = max(steps())
  os.kill(children(process.pid)[1], signal.SIGKILL)
  _, err = process.communicate(timeout=300)
  assert process.returncode == 0, err
  (resumed,) = re.findall(r'resumed from step (\d+)', err)
  assert int(resumed) >= seen
  jax.tree.map(np.testing.assert_array_equal, restored(folder, **fields), restored(whole, **fields))
  assert losses(folder) == losses(whole)


@pytest.mark.slow
@pytest.mark.parametrize(
  'saves', [{'save_steps': 20}, {'delta_seconds': 0.3, 'keep_checkpoint_max': 2, 'embedding__buckets': (2000,)}]
)
def test_kills_at_random_moments_lose_and_repeat_nothing(criteo, tmp_path, repository, saves):
  """Twenty kill -9 of any process, also of process 0, by a timer; the launcher starts all again from the checkpoint."""
  fields = {'epochs': 240, 'eval_every': 0, **saves}
  whole, folder = tmp_path / 'whole', tmp_path / 'killed'
  assert execute(launched(criteo, whole, 2, **fields), repository)[0] == 0
  rng, kills = random.Random(0), 0
  process = subprocess.Popen(
    launched(criteo, folder, 2, '--max-restarts', '40', **fields), cwd=repository, stdout=subprocess.PIPE,
    stderr=subprocess.DEVNULL, text=True,
  )  # fmt: skip
  while kills < 20 and process.poll() is None:
    time.sleep(rng.uniform(3, 10))
    running = children(process.pid)
    if running:
      os.kill(rng.choice(running), signal.SIGKILL)
      kills += 1
  out, _ = process.communicate(timeout=900)
  assert process.returncode == 0
  assert kills == 20, 'the run was too short'
  assert result(out)['step'] == fields['epochs'] * 19
  jax.tree.map(np.testing.assert_array_equal, restored(folder, **fields)[0], restored(whole, **fields)[0])
  assert restored(folder, **fields)[1] == restored(whole, **fields)[1]
  assert losses(folder) == losses(whole)


def children(parent):
  """Processes of this program that another one started."""
  search = ['pgrep', '-P', str(parent), '-f', 'dlrm_jax.main']
  listed = subprocess.run(search, capture_output=True, text=True, check=False)
  return [int(number) for number in listed.stdout.split()]
