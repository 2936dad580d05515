"""The program as users run it: one process, its streams and its exit code; real kills at any moment."""

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

from tests.helpers import command, execute, result, small_command, with_small_files
from tests.test_train import STEPS, state_of


def test_one_line_of_json_on_stdout_and_the_log_on_stderr(criteo, tmp_path, repository):
  code, out, err = execute(small_command(criteo, tmp_path), repository)
  assert code == 0, err
  assert result(out)['step'] == STEPS
  assert 'step 5 of 19' in err
  assert 'evaluation at step 19' in err


@pytest.mark.parametrize(
  ('arguments', 'words'),
  [
    (['--config=configs/nothing.py'], ['configs/nothing.py']),
    ([], ['--config=configs/']),
    (['--config=configs/base.py', '--config.batch_sise=3'], ['config.batch_sise', 'batch_size']),
    (['--config=configs/base.py', '--config.batch_size=many'], ["config.batch_size='many'", 'whole number']),
    (['--config=configs/base.py', '--config.model.dtype=half'], ["config.model.dtype='half'", 'bfloat16']),
    (['--config=configs/base.py', '--config.model=3'], ['config.model', 'fields of its own']),
    (['--config=configs/base.py', '--config.seed.x=3'], ['config.seed.x', 'no such field']),
    (['--config=configs/base.py', '--batch_size=3'], ['batch_size']),
    (['--config=configs/base.py', 'batch_size=3'], ['batch_size=3', '--config.field=value']),
    (['--config=configs/base.py', '--config.model.bottom_mlp[0]=5'], ['config.model.bottom_mlp[0]', 'no such field']),
    (['--config=configs/base.py', '--config.steps-x=5'], ['config.steps-x', 'did you mean config.steps?']),
    (["--config=configs/deeprec.py:--bf16 'x"], ['configs/deeprec.py', 'No closing quotation', "--bf16 'x"]),
    (['--config=configs/deeprec.py:--evv'], ['--evv', '--ev_filter']),
    (['--config=configs/deeprec.py:--optimizer=best'], ['best', 'adagraddecay']),
  ],
)
def test_a_wrong_command_is_one_line_and_exit_code_2(arguments, words, repository):
  code, out, err = execute([*command('x')[:3], *arguments], repository)
  assert (code, out) == (2, '')
  assert err.count('\n') == 1
  assert all(word in err for word in words), err


@pytest.mark.parametrize(
  ('text', 'words'),
  [
    ('config.optimzer.name = "adam"', ['line 4: AttributeError: ', 'Did you mean "optimizer"']),
    ('config.lock()\n  config.foo = 3', ['line 5: AttributeError: Key "foo" does not exist']),
    ('import nowhere', ["line 4: ModuleNotFoundError: No module named 'nowhere'"]),
    ('1 / 0', ['line 4: ZeroDivisionError: division by zero']),
    ('(', ['SyntaxError', 'line 4']),
  ],
)
def test_a_mistake_in_a_config_file_is_one_line_and_exit_code_2(text, words, tmp_path, repository):
  file = tmp_path / 'mine.py'
  begin = 'from configs import base\ndef get_config():\n  config = base.get_config()\n'
  file.write_text(f'{begin}  {text}\n  return config\n')
  code, out, err = execute([*command('x')[:3], f'--config={file}'], repository)
  assert (code, out) == (2, '')
  assert err.count('\n') == 1
  assert len(err) < 400
  assert 'mine.py' in err
  assert all(word in err for word in words), err


@pytest.mark.parametrize(
  ('train', 'words'),
  [
    (None, ['train.csv', 'no']),
    (b'', ['train.csv', 'empty']),
    (b'1,2,3\n', ['train.csv', 'line 1', '40']),
    (b'label,' + b','.join(b'x%d' % i for i in range(39)) + b'\n', ['line 1', 'header']),
    (b'\t'.join([b'1'] * 40) + b'\n', ['line 1', 'tab', 'dlrm_jax.data.prepare']),
    (b','.join([b'1'] * 40) + b'\n' + b'5,' + b','.join([b'1'] * 39) + b'\n', ['line 2', 'label', "'5'"]),
    (b','.join([b'1'] * 40) + b'\n' + b','.join([b'1'] * 20), ['line 2', '40']),
    (b','.join([b'1'] * 3 + [b'9' * 30] + [b'1'] * 36) + b'\n', ['line 1', 'I3', '64']),
    (b','.join([b'1'] * 39 + [b'\xff\xfe']) + b'\n', ['line 1', 'C26', 'UTF-8']),
  ],
)
def test_bad_data_is_one_line_naming_file_line_and_field(train, words, criteo, tmp_path, repository):
  folder = tmp_path / 'data'
  folder.mkdir()
  (folder / 'eval.csv').write_bytes((criteo / 'eval.csv').read_bytes())
  if train is not None:
    (folder / 'train.csv').write_bytes(train)
  code, out, err = execute(small_command(folder, tmp_path / 'out'), repository)
  assert (code, out) == (1, '')
  (line,) = [line for line in err.splitlines() if line.startswith('error: ')]
  assert 'Traceback' not in err
  assert all(word in line for word in words), line
  assert not (tmp_path / 'out').exists()


def test_a_checkpoint_that_cannot_be_written_is_one_line(criteo, tmp_path, repository):
  arguments = small_command(criteo, tmp_path, save_steps=5, **{'embedding.buckets': (5000,)})
  code, out, err = execute(with_small_files(arguments), repository)
  assert (code, out) == (1, '')
  assert len(re.findall('^error: a checkpoint cannot be written to ', err, re.MULTILINE)) == 1
  assert 'Traceback' not in err


def test_help_says_how_and_where_the_fields_are(repository):
  code, out, err = execute([*command('x')[:3], '--help'], repository)
  assert (code, err) == (0, '')
  assert '--config=configs/' in out
  assert 'configs/base.py has every field' in out


def test_an_interrupt_outside_of_the_loop_is_one_line(repository):
  code = (
    'import sys; from dlrm_jax import main, train\n'
    'def run(*_): raise KeyboardInterrupt\n'
    "train.run = run; sys.exit(main.main(['x', '--config=configs/base.py']))"
  )
  code, out, err = execute([sys.executable, '-c', code], repository)
  assert (code, out) == (130, '')
  assert err.count('\n') == 1
  assert err.startswith('error: interrupted')


def test_a_missing_folder_is_one_line(tmp_path, repository):
  code, out, err = execute(small_command(tmp_path / 'nowhere', tmp_path / 'out'), repository)
  assert (code, out) == (1, '')
  assert 'nowhere' in err
  assert 'Traceback' not in err


@pytest.mark.parametrize('number', [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_polite_signal_saves_and_the_resumed_run_has_the_same_bits(number, criteo, tmp_path, repository):
  fields = {'epochs': 60, 'no_eval': True, 'log_every': 20}
  arguments = small_command(criteo, tmp_path, **fields, checkpoint=tmp_path / 'a')
  process = subprocess.Popen(arguments, cwd=repository, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
  for line in process.stderr:
    if 'step 100 ' in line:
      process.send_signal(number)
      break
  out, err = process.communicate(timeout=60)
  assert process.returncode == 128 + number
  assert out == ''
  assert 'resume with' in err
  stopped = max(int(path.name) for path in (tmp_path / 'a/checkpoints').iterdir())
  assert 100 <= stopped < 60 * STEPS
  assert execute(arguments, repository)[0] == 0
  assert execute(small_command(criteo, tmp_path, **fields, checkpoint=tmp_path / 'b'), repository)[0] == 0
  states = [state_of(tmp_path / name, 60 * STEPS) for name in 'ab']
  jax.tree.map(np.testing.assert_array_equal, *states)


@pytest.mark.slow
def test_killed_at_random_moments_and_resumed_the_bits_are_those_of_an_unkilled_run(criteo, tmp_path, repository):
  """Kill -9 from outside, whatever the process is doing, until a run comes through."""
  fields = {'epochs': 80, 'save_steps': 60}  # one checkpoint is kept: it must never be gone before the next is safe
  assert execute(small_command(criteo, tmp_path, **fields, checkpoint=tmp_path / 'a'), repository)[0] == 0
  arguments = small_command(criteo, tmp_path, **fields, checkpoint=tmp_path / 'b')
  rng = random.Random(os.getpid())
  delays = []
  while True:
    # Ten kills somewhere between start and end; then it may end.
    process = subprocess.Popen(arguments, cwd=repository, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    if len(delays) < 10:
      delays.append(rng.uniform(1, 12))
      time.sleep(delays[-1])
      process.kill()
      process.communicate()
    else:
      out, err = process.communicate(timeout=120)
      assert process.returncode == 0, err
      break
  assert result(out.decode())['step'] == 80 * STEPS
  states = [state_of(tmp_path / name, 80 * STEPS) for name in 'ab']
  jax.tree.map(np.testing.assert_array_equal, *states)
  lines = [json.loads(line) for line in (tmp_path / 'b/metrics.jsonl').read_text().splitlines()]
  steps = [line['step'] for line in lines if line['kind'] == 'train']
  assert steps == sorted(set(steps)), delays


@pytest.mark.parametrize('count', [1, 3])
def test_intra_is_the_number_of_xla_threads(count, repository):
  code = """
import glob, sys
from dlrm_jax.main import set_threads
set_threads(int(sys.argv[1]))
import jax.numpy as jnp
(jnp.ones((500, 500)) @ jnp.ones((500, 500))).block_until_ready()
print([open(path).read().strip() for path in glob.glob('/proc/self/task/*/comm')].count('tf_XLAEigen'))
"""
  exit_code, out, err = execute([sys.executable, '-c', code, str(count)], repository)
  assert exit_code == 0, err
  assert int(out) == count
