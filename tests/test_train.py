"""Whole runs in this process: what they learn, what they leave behind, and that stopping changes no bit."""

import dataclasses
import json
import math
import os
import shutil
import signal
import struct
import time
import warnings

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore
from tensorboardX.proto.event_pb2 import Event, SessionLog

from dlrm_jax import train, watchdog
from dlrm_jax.checkpoint import full
from dlrm_jax.checkpoint.same_model import CheckpointError
from dlrm_jax.data.schema import DataError
from dlrm_jax.distributed import Members
from tests.helpers import small_spec

STEPS = 19  # of an epoch
QUEUE = {'data__workqueue': True, 'data__slice_rows': 70}  # nine slices of 66 or 67 rows


def run(capsys, spec):
  train.run(spec)
  (line,) = capsys.readouterr().out.splitlines()
  return json.loads(line)


def state_of(folder, step):
  """All arrays of a checkpoint, by plain Orbax."""
  with ocp.CheckpointManager(folder / 'checkpoints') as manager, warnings.catch_warnings():
    warnings.filterwarnings('ignore', 'Sharding info')  # one device here and there
    return manager.restore(step, args=ocp.args.Composite(state=ocp.args.PyTreeRestore())).state


def assert_same(one, other):
  jax.tree.map(np.testing.assert_array_equal, one, other)


def test_a_run_learns_and_leaves_everything_it_promises(criteo, tmp_path, capsys):
  result = run(capsys, small_spec(criteo, tmp_path, epochs=3))
  assert result['step'] == 3 * STEPS
  assert result['auc'] > 0.8
  assert result['log_loss'] < 0.68
  assert result['samples_per_second'] > 0
  assert {'accuracy', 'normalized_entropy', 'calibration', 'auc_1000', 'output_dir'} <= set(result)
  (folder,) = tmp_path.iterdir()
  assert folder.name.startswith('model_DLRM_')
  assert str(folder) == result['output_dir']
  assert json.loads((folder / 'config.json').read_text())['epochs'] == 3
  lines = [json.loads(line) for line in (folder / 'metrics.jsonl').read_text().splitlines()]
  assert [line['step'] for line in lines if line['kind'] == 'train'] == [*range(5, 57, 5), 57]
  assert lines[-1]['kind'] == 'eval'
  assert lines[-1]['auc'] == result['auc']
  assert lines[-1]['examples'] == 200
  assert lines[0]['loss'] > lines[-2]['loss']
  assert list(folder.glob('events.out.tfevents.*'))
  assert [path.name for path in (folder / 'checkpoints').iterdir()] == ['57']


def test_the_metrics_are_those_of_the_predictions_on_every_row(criteo, tmp_path, capsys):
  one = run(capsys, small_spec(criteo, tmp_path, batch_size=32, checkpoint=str(tmp_path / 'c')))
  # 200 rows are 6.25 batches of 32 and one padded batch of 256: the same rows count, each once.
  other = run(capsys, small_spec(criteo, tmp_path, batch_size=256, checkpoint=str(tmp_path / 'c')))
  for name in ('auc', 'log_loss', 'accuracy', 'calibration'):
    assert one[name] == pytest.approx(other[name], rel=1e-5)


def test_same_seed_same_bits_whether_staged_or_not(criteo, tmp_path, capsys):
  for name, smartstaged in (('a', True), ('b', True), ('c', False)):
    run(capsys, small_spec(criteo, tmp_path, checkpoint=str(tmp_path / name), no_eval=True, smartstaged=smartstaged))
  states = [state_of(tmp_path / name, STEPS) for name in 'abc']
  assert_same(states[0], states[1])
  assert_same(states[0], states[2])


@pytest.mark.parametrize(
  ('optimizer', 'queue'),
  [
    ('adamasync', {}), ('adamasync', QUEUE),
    *(pytest.param(name, {}, marks=pytest.mark.slow) for name in ('adagraddecay', 'gradientdescent')),
  ],
)
def test_stopped_and_resumed_gives_the_bits_of_an_unstopped_run(criteo, tmp_path, capsys, optimizer, queue):
  fields = {'optimizer__name': optimizer, 'optimizer__warmup_steps': 7, 'no_eval': True, **queue}
  run(capsys, small_spec(criteo, tmp_path, checkpoint=str(tmp_path / 'a'), steps=30, **fields))
  for steps in (1, 18, 19, 20, 30):  # around the end of an epoch
    result = run(capsys, small_spec(criteo, tmp_path, checkpoint=str(tmp_path / 'b'), steps=steps, **fields))
    assert result['step'] == steps
  assert_same(state_of(tmp_path / 'a', 30), state_of(tmp_path / 'b', 30))
  lines = [json.loads(line)['step'] for line in (tmp_path / 'b' / 'metrics.jsonl').read_text().splitlines()]
  assert lines == sorted(set(lines))


def test_a_run_that_only_evaluates_is_alive_all_the_while(criteo, tmp_path, capsys, monkeypatch):
  spec = small_spec(criteo, tmp_path, checkpoint=str(tmp_path / 'run'))
  run(capsys, spec)
  heartbeat = tmp_path / 'alive'
  monkeypatch.setenv('DLRM_HEARTBEAT', str(heartbeat))
  monkeypatch.setattr(watchdog, 'TICK', 0.01)
  monkeypatch.setattr(watchdog, 'TOUCH', 0.01)
  evaluation_of, before = train.evaluation_of, []

  def slow(job):
    before.append(heartbeat.stat().st_mtime_ns)
    time.sleep(0.5)
    return evaluation_of(job)

  monkeypatch.setattr(train, 'evaluation_of', slow)
  run(capsys, spec)
  assert heartbeat.stat().st_mtime_ns > before[0] + 2e8


def test_resuming_a_finished_run_says_so_and_evaluates(criteo, tmp_path, capsys, caplog):
  spec = small_spec(criteo, tmp_path, checkpoint=str(tmp_path / 'a'))
  first = run(capsys, spec)
  caplog.set_level('INFO')
  again = run(capsys, spec)
  assert f'already at step {STEPS}' in caplog.text
  assert again['step'] == STEPS
  assert again['auc'] == first['auc']
  assert again['samples_per_second'] is None


@pytest.mark.parametrize('queue', [{}, QUEUE])
def test_more_epochs_go_on_where_the_run_ended(criteo, tmp_path, capsys, queue):
  run(capsys, small_spec(criteo, tmp_path, checkpoint=str(tmp_path / 'a'), no_eval=True, **queue))
  result = run(capsys, small_spec(criteo, tmp_path, checkpoint=str(tmp_path / 'a'), no_eval=True, epochs=2, **queue))
  run(capsys, small_spec(criteo, tmp_path, checkpoint=str(tmp_path / 'b'), no_eval=True, epochs=2, **queue))
  assert result['step'] == 2 * STEPS
  assert_same(state_of(tmp_path / 'a', 2 * STEPS), state_of(tmp_path / 'b', 2 * STEPS))


def test_checkpoints_every_save_steps_and_only_the_newest_are_kept(criteo, tmp_path, capsys):
  fields = {'save_steps': 4, 'keep_checkpoint_max': 2, 'no_eval': True}
  spec = small_spec(criteo, tmp_path, checkpoint=str(tmp_path / 'a'), **fields)
  result = run(capsys, spec)
  assert sorted(path.name for path in (tmp_path / 'a/checkpoints').iterdir()) == ['16', '19']
  assert not {'auc', 'log_loss'} & set(result)
  run(capsys, small_spec(criteo, tmp_path, checkpoint=str(tmp_path / 'b'), **fields | {'keep_checkpoint_max': 0}))
  assert {path.name for path in (tmp_path / 'b/checkpoints').iterdir()} == {'4', '8', '12', '16', '19'}


def test_saving_while_training_goes_on_saves_the_state_of_that_step(criteo, tmp_path, capsys):
  fields = {'no_eval': True, 'keep_checkpoint_max': 5}
  run(capsys, small_spec(criteo, tmp_path, checkpoint=str(tmp_path / 'a'), save_steps=8, **fields))
  run(capsys, small_spec(criteo, tmp_path, checkpoint=str(tmp_path / 'b'), steps=8, **fields))
  assert_same(state_of(tmp_path / 'a', 8), state_of(tmp_path / 'b', 8))


def test_a_damaged_checkpoint_is_put_aside_and_the_one_before_it_is_used(criteo, tmp_path, capsys, caplog):
  fields = {'save_steps': 10, 'keep_checkpoint_max': 3, 'no_eval': True}
  spec = small_spec(criteo, tmp_path, checkpoint=str(tmp_path / 'a'), **fields)
  run(capsys, spec)
  expected = state_of(tmp_path / 'a', STEPS)
  for path in (tmp_path / f'a/checkpoints/{STEPS}/state').rglob('*'):
    if path.is_file():
      path.write_bytes(path.read_bytes()[:10])
  assert run(capsys, spec)['step'] == STEPS
  assert 'put aside' in caplog.text
  assert list((tmp_path / 'a/checkpoints').glob(f'damaged-{STEPS}-*'))
  assert_same(state_of(tmp_path / 'a', STEPS), expected)


def test_a_checkpoint_in_which_one_bit_differs_is_put_aside(criteo, tmp_path, capsys, caplog):
  fields = {'save_steps': 10, 'keep_checkpoint_max': 3, 'no_eval': True}
  spec = small_spec(criteo, tmp_path, checkpoint=str(tmp_path / 'a'), **fields)
  run(capsys, spec)
  expected = state_of(tmp_path / 'a', STEPS)
  value = np.asarray(expected['tables']['fused']['value'])
  database = {'driver': 'ocdbt', 'base': f'file://{tmp_path}/a/checkpoints/{STEPS}/state'}
  stored = tensorstore.open({'driver': 'zarr3', 'kvstore': {**database, 'path': 'tables.fused.value/'}}).result()
  stored[0, 1] = (value[0, 1].view(np.uint32) ^ np.uint32(1)).view(np.float32)
  assert not np.array_equal(state_of(tmp_path / 'a', STEPS)['tables']['fused']['value'], value)
  assert run(capsys, spec)['step'] == STEPS
  assert 'the numbers of tables.fused.value are not those that were saved' in caplog.text
  assert list((tmp_path / 'a/checkpoints').glob(f'damaged-{STEPS}-*'))
  assert_same(state_of(tmp_path / 'a', STEPS), expected)


@pytest.mark.parametrize(
  ('item', 'old', 'new'), [('position', '"epoch":1', '"epoch":0'), ('config', '"dim":8', '"dim":9')]
)
def test_a_checkpoint_whose_position_or_config_differs_is_put_aside(item, old, new, criteo, tmp_path, capsys, caplog):
  fields = {'save_steps': 10, 'keep_checkpoint_max': 3, 'no_eval': True}
  spec = small_spec(criteo, tmp_path, checkpoint=str(tmp_path / 'a'), **fields)
  run(capsys, spec)
  expected = state_of(tmp_path / 'a', STEPS)
  path = tmp_path / f'a/checkpoints/{STEPS}/{item}/metadata'
  text = path.read_text().replace(': ', ':')
  assert old in text
  path.write_text(text.replace(old, new))
  assert run(capsys, spec)['step'] == STEPS
  assert 'its position or its config is not what was saved' in caplog.text
  assert list((tmp_path / 'a/checkpoints').glob(f'damaged-{STEPS}-*'))
  assert_same(state_of(tmp_path / 'a', STEPS), expected)


def test_a_stop_saves_nothing_whose_loss_is_not_finite(criteo, tmp_path, capsys, monkeypatch):
  fields = {'checkpoint': str(tmp_path / 'a'), 'no_eval': True}
  run(capsys, small_spec(criteo, tmp_path, steps=5, **fields))
  monkeypatch.setattr(Members, 'stop', lambda self, step, received=0: signal.SIGTERM if step == 12 else 0)
  diverges = {'optimizer__learning_rate': 1e30, 'log_every': 1000, 'epochs': 9}
  with pytest.raises(train.TrainingError, match='diverged'):
    train.run(small_spec(criteo, tmp_path, **fields, **diverges))
  assert [path.name for path in (tmp_path / 'a/checkpoints').iterdir()] == ['5']


def test_a_signal_during_the_last_save_is_heard_after_it(criteo, tmp_path, capsys, monkeypatch):
  save = train.Run.save

  def interrupted(job, changes=False):
    os.kill(os.getpid(), signal.SIGTERM)
    save(job, changes)

  monkeypatch.setattr(train.Run, 'save', interrupted)
  with pytest.raises(train.Stopped) as stopped:
    train.run(small_spec(criteo, tmp_path, checkpoint=str(tmp_path / 'a')))
  assert stopped.value.number == signal.SIGTERM
  assert [path.name for path in (tmp_path / 'a/checkpoints').iterdir()] == [str(STEPS)]


def test_events_have_every_scalar_and_a_damaged_line_of_metrics_is_left_out(criteo, tmp_path, capsys):
  spec = small_spec(criteo, tmp_path, checkpoint=str(tmp_path / 'a'), steps=10)
  run(capsys, spec)
  metrics = tmp_path / 'a/metrics.jsonl'
  lines = metrics.read_text().splitlines(keepends=True)
  metrics.write_text(lines[0] + 'garbage}\n' + '{"step": null}\n' + ''.join(lines[1:]) + '{"step": 3')
  run(capsys, dataclasses.replace(spec, steps=15))
  records = [json.loads(line) for line in metrics.read_text().splitlines()]
  assert [record['step'] for record in records if record['kind'] == 'train'] == [5, 10, 15]
  found, starts = {}, []
  for path in sorted((tmp_path / 'a').glob('events.out.tfevents.*'), key=lambda path: path.stat().st_mtime):
    for event in events_of(path):
      found |= {(event.step, value.tag): value.simple_value for value in event.summary.value}
      starts += [event.step] if event.session_log.status == SessionLog.START else []
  expected = {
    (record['step'], f'{record["kind"]}/{name}'): np.float32(value)
    for record in records
    for name, value in record.items()
    if name not in ('step', 'kind', 'time') and value is not None
  }
  assert found == expected
  assert starts == [11]


def events_of(path):
  """Of an event file: records of length u64, its sum u32, so many bytes, their sum u32."""
  data = path.read_bytes()
  while data:
    (size,) = struct.unpack('<Q', data[:8])
    yield Event.FromString(data[12 : 12 + size])
    data = data[16 + size :]


def test_a_checkpoint_that_another_process_cannot_read_is_put_aside(criteo, tmp_path, capsys, caplog, monkeypatch):
  fields = {'save_steps': 10, 'keep_checkpoint_max': 3, 'no_eval': True}
  spec = small_spec(criteo, tmp_path, checkpoint=str(tmp_path / 'a'), **fields)
  run(capsys, spec)
  expected = state_of(tmp_path / 'a', STEPS)
  answers = iter([1, 0, 0])  # to whether it read, then of the one before: whether it read, whether digests are equal
  monkeypatch.setattr(full, 'of_all', lambda number: [number, next(answers)])
  assert run(capsys, spec)['step'] == STEPS
  assert f'{STEPS} cannot be read: process 1 cannot read it' in caplog.text
  assert list((tmp_path / 'a/checkpoints').glob(f'damaged-{STEPS}-*'))
  assert next(answers, None) is None
  assert_same(state_of(tmp_path / 'a', STEPS), expected)


def test_a_checkpoint_of_before_there_were_digests_opens(criteo, tmp_path, capsys):
  spec = small_spec(criteo, tmp_path, checkpoint=str(tmp_path / 'a'), no_eval=True)
  run(capsys, spec)
  shutil.rmtree(tmp_path / f'a/checkpoints/{STEPS}/digest')
  assert run(capsys, spec)['step'] == STEPS
  assert (tmp_path / f'a/checkpoints/{STEPS}').exists()


def test_when_no_checkpoint_can_be_read_the_run_does_not_start_anew(criteo, tmp_path, capsys):
  spec = small_spec(criteo, tmp_path, checkpoint=str(tmp_path / 'a'), no_eval=True)
  run(capsys, spec)
  for path in (tmp_path / f'a/checkpoints/{STEPS}').rglob('*'):
    if path.is_file():
      path.write_bytes(b'')
  with pytest.raises(CheckpointError, match='can be read'):
    train.run(spec)
  assert (tmp_path / f'a/checkpoints/{STEPS}').exists()


def test_tables_larger_than_the_memory_end_before_they_are_made(criteo, tmp_path):
  with pytest.raises(train.TrainingError, match=r'GB.*config\.embedding\.buckets'):
    train.run(small_spec(criteo, tmp_path, no_eval=True, embedding__buckets=(4_000_000,), embedding__dim=4096))


@pytest.mark.parametrize(
  ('field', 'value'),
  [
    ('embedding__dtype', 'bfloat16'),
    ('model__top_mlp', (8,)),
    ('embedding__buckets', (60,)),
    ('optimizer__name', 'adagrad'),
    ('optimizer__weight_decay', 0.01),
    ('embedding__fusion', False),
  ],
)
def test_a_checkpoint_of_another_model_is_one_clear_line(criteo, tmp_path, capsys, field, value):
  run(capsys, small_spec(criteo, tmp_path, checkpoint=str(tmp_path / 'a'), no_eval=True, steps=2))
  with pytest.raises(CheckpointError) as error:
    train.run(small_spec(criteo, tmp_path, checkpoint=str(tmp_path / 'a'), no_eval=True, **{field: value}))
  assert f'config.{field.replace("__", ".")}' in str(error.value)
  assert '\n' not in str(error.value)


@pytest.mark.parametrize(
  ('workqueue', 'field', 'value'),
  [
    *[(False, field, value) for field, value in (('data__streams', 2), ('data__workqueue', True))],
    *[(True, field, value) for field, value in (('data__slice_rows', 99), ('data__workqueue', False))],
    *[(on, field, value) for on in (False, True) for field, value in (('seed', 7), ('data__shuffle_rows', 0))],
  ],
)
def test_another_order_of_the_data_in_mid_epoch_is_refused(criteo, tmp_path, capsys, workqueue, field, value):
  fields = {'checkpoint': str(tmp_path / 'a'), 'no_eval': True, 'data__workqueue': workqueue}
  run(capsys, small_spec(criteo, tmp_path, **fields, steps=2))
  with pytest.raises(DataError, match=rf'at row 64 .*config\.{field.replace("__", r".")}=') as error:
    train.run(small_spec(criteo, tmp_path, **fields | {field: value}))
  assert '\n' not in str(error.value)


def test_at_the_end_of_an_epoch_streams_and_queue_may_take_turns(criteo, tmp_path, capsys):
  for epochs, workqueue in ((1, True), (2, False), (3, True)):
    fields = {'no_eval': True, 'epochs': epochs, 'data__workqueue': workqueue, 'data__slice_rows': 70}
    result = run(capsys, small_spec(criteo, tmp_path, checkpoint=str(tmp_path / 'a'), **fields))
    assert result['step'] == epochs * STEPS


def test_other_data_starts_the_queue_anew(criteo, tmp_path, capsys, caplog):
  """A checkpoint in the middle of one file, and a file of half the rows the next day."""
  caplog.set_level('INFO')
  fields = {'checkpoint': str(tmp_path / 'a'), 'no_eval': True, **QUEUE}
  run(capsys, small_spec(criteo, tmp_path, **fields, steps=7))
  folder = tmp_path / 'next'
  folder.mkdir()
  (folder / 'train.csv').write_text(''.join((criteo / 'train.csv').read_text().splitlines(True)[:300]))
  assert run(capsys, small_spec(folder, tmp_path, **fields))['step'] == 7 + 10
  assert 'saw 600 rows of data, here are 300' in caplog.text


def test_evaluation_during_training_changes_nothing(criteo, tmp_path, capsys):
  run(capsys, small_spec(criteo, tmp_path, checkpoint=str(tmp_path / 'a'), eval_every=4))
  run(capsys, small_spec(criteo, tmp_path, checkpoint=str(tmp_path / 'b'), no_eval=True))
  assert_same(state_of(tmp_path / 'a', STEPS), state_of(tmp_path / 'b', STEPS))
  lines = [json.loads(line) for line in (tmp_path / 'a/metrics.jsonl').read_text().splitlines()]
  assert [line['step'] for line in lines if line['kind'] == 'eval'] == [4, 8, 12, 16, 19]


def test_an_evaluation_that_was_cut_off_is_made_when_the_run_goes_on(criteo, tmp_path, capsys, monkeypatch):
  spec = small_spec(criteo, tmp_path, checkpoint=str(tmp_path / 'a'), eval_every=4, save_steps=4)
  evaluation_of = train.evaluation_of

  def cut_off_at_8(job):
    if job.step == 8:
      job.checkpoints.wait()
      raise KeyboardInterrupt
    return evaluation_of(job)

  monkeypatch.setattr(train, 'evaluation_of', cut_off_at_8)
  with pytest.raises(KeyboardInterrupt):
    train.run(spec)
  monkeypatch.setattr(train, 'evaluation_of', evaluation_of)
  run(capsys, spec)
  run(capsys, small_spec(criteo, tmp_path, checkpoint=str(tmp_path / 'b'), eval_every=4))
  evaluations = [
    [(line['step'], line['log_loss']) for line in map(json.loads, path.read_text().splitlines()) if 'auc' in line]
    for path in (tmp_path / 'a/metrics.jsonl', tmp_path / 'b/metrics.jsonl')
  ]
  assert [step for step, _ in evaluations[0]] == [4, 8, 12, 16, STEPS]
  assert evaluations[0] == evaluations[1]


def test_divergence_ends_with_advice_and_leaves_no_checkpoint_of_it(criteo, tmp_path):
  fields = {'optimizer__name': 'gradientdescent', 'optimizer__learning_rate': 1e30, 'model__batch_norm': False}
  with pytest.raises(train.TrainingError, match='learning_rate'):
    train.run(small_spec(criteo, tmp_path, checkpoint=str(tmp_path / 'a'), save_steps=5, **fields))
  for path in (tmp_path / 'a/checkpoints').iterdir():
    leaves = jax.tree.leaves(state_of(tmp_path / 'a', int(path.name)))
    assert all(np.isfinite(leaf).all() for leaf in leaves)


def test_a_run_from_the_queue_learns_whether_staged_or_not(criteo, tmp_path, capsys):
  results = []
  for name, smartstaged in (('a', True), ('b', False)):
    fields = {'checkpoint': str(tmp_path / name), 'smartstaged': smartstaged, 'epochs': 3, **QUEUE}
    results.append(run(capsys, small_spec(criteo, tmp_path, **fields)))
  assert results[0]['auc'] > 0.8
  assert_same(*(state_of(tmp_path / name, 3 * STEPS) for name in 'ab'))


def test_few_steps_have_no_rate_and_one_class_no_auc(criteo, tmp_path, capsys):
  ones = tmp_path / 'ones'
  ones.mkdir()
  (ones / 'train.csv').write_text((criteo / 'train.csv').read_text())
  (ones / 'eval.csv').write_text(''.join('1' + line[1:] for line in (criteo / 'eval.csv').read_text().splitlines(True)))
  result = run(capsys, small_spec(ones, tmp_path, steps=3))
  assert result['samples_per_second'] is None
  assert result['auc'] is None
  assert math.isfinite(result['log_loss'])


def test_timeline_leaves_a_profile(criteo, tmp_path, capsys):
  run(capsys, small_spec(criteo, tmp_path, checkpoint=str(tmp_path / 'a'), timeline=10, no_eval=True))
  assert list((tmp_path / 'a/timeline').rglob('*.trace.json.gz'))
  assert list((tmp_path / 'a/timeline').rglob('*.xplane.pb'))


def test_skipped_rows_are_counted_and_told_once(criteo, tmp_path, capsys, caplog):
  folder = tmp_path / 'bad'
  folder.mkdir()
  lines = (criteo / 'train.csv').read_text().splitlines(keepends=True)
  lines[40], lines[300] = '2' + lines[40][1:], 'what\n'
  (folder / 'train.csv').write_text(''.join(lines))
  (folder / 'eval.csv').write_text((criteo / 'eval.csv').read_text())
  with pytest.raises(DataError, match=r'train\.csv.*line 41'):
    train.run(small_spec(folder, tmp_path / 'o', no_eval=True))
  assert run(capsys, small_spec(folder, tmp_path / 'o', data__on_bad_row='skip', epochs=3))['skipped_rows'] == 3 * 2
  told = [message for message in caplog.messages if message.startswith('skipped: ')]
  assert len(told) == len(set(told)) > 0
