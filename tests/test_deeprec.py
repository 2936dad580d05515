"""Old command lines: defaults as in the seed's README, each flag with its effect, each mistake with its fix."""

import json
import shlex

import pytest

from configs import base, deeprec
from dlrm_jax import spec as specs

# From the seed's README, except the learning rate: 0.1 there, 0.01 in its script and here.
SEED_DEFAULTS = {
  'bf16': False, 'emb_fusion': True, 'op_fusion': True, 'optimizer': 'adamasync', 'smartstaged': True, 'micro_batch': 0,
  'ev': False, 'adaptive_emb': False, 'ev_elimination': None, 'ev_filter': None, 'dynamic_ev': False,
  'incremental_ckpt': 0, 'workqueue': False, 'protocol': 'grpc', 'data_location': './data', 'steps': 0,
  'no_eval': False, 'batch_size': 512, 'output_dir': './result', 'checkpoint': '', 'save_steps': 0, 'seed': 2021,
  'timeline': 0, 'keep_checkpoint_max': 1, 'learning_rate': 0.01, 'interaction_op': 'cat', 'inter': 0, 'intra': 0,
  'input_layer_partitioner': 8, 'dense_layer_partitioner': 16, 'tf': False,
  'deep_dropout': None,  # of its script alone, which makes nothing of it
}  # fmt: skip


def spec_of(flags):
  return specs.from_config(deeprec.get_config(flags))


def test_flags_and_defaults_are_the_seeds():
  assert vars(deeprec.parser().parse_args([])) == SEED_DEFAULTS


def test_without_flags_only_buckets_learning_rate_and_partitioner_differ_from_base():
  ours, theirs = specs.to_dict(specs.from_config(base.get_config())), specs.to_dict(spec_of(''))
  assert theirs['embedding'].pop('buckets') == (10_000,) * 26
  assert ours['embedding'].pop('buckets') != (10_000,) * 26
  assert theirs['optimizer'].pop('learning_rate') == 0.01
  assert ours['optimizer'].pop('learning_rate') < 0.01
  assert (ours['model'].pop('shard_kb'), theirs['model'].pop('shard_kb')) == (0, 16)
  assert ours == theirs


@pytest.mark.parametrize(
  ('flags', 'field', 'value'),
  [
    ('--bf16', 'model.dtype', 'bfloat16'),
    ('--bf16', 'model.reduce_dtype', 'bfloat16'),
    ('--bf16=false', 'model.dtype', 'float32'),
    ('--bf16 \\\n  --steps 5', 'steps', 5),
    ('--emb_fusion false', 'embedding.fusion', False),
    ('--op_fusion=False', 'op_fusion', False),
    ('--smartstaged 0', 'smartstaged', False),
    ('--incremental_ckpt=60', 'delta_seconds', 60.0),
    ('--micro_batch=4', 'micro_batch', 4),
    ('--micro_batch=0', 'micro_batch', 1),
    ('--no_eval', 'no_eval', True),
    ('--data_location "/a b"', 'data_location', '/a b'),
    ('--output_dir=/o', 'output_dir', '/o'),
    ('--checkpoint=/c', 'checkpoint', '/c'),
    ('--steps 7', 'steps', 7),
    ('--batch_size=64', 'batch_size', 64),
    ('--save_steps=9', 'save_steps', 9),
    ('--seed=3', 'seed', 3),
    ('--timeline=5', 'timeline', 5),
    ('--keep_checkpoint_max=0', 'keep_checkpoint_max', 0),
    ('--keep_checkpoint_max=2', 'keep_checkpoint_max', 2),
    ('--learning_rate=0.5', 'optimizer.learning_rate', 0.5),
    ('--interaction_op=dot', 'model.interaction', 'dot'),
    ('--inter=2', 'inter', 2),
    ('--intra=1', 'intra', 1),
    *[(f'--optimizer={name}', 'optimizer.name', name) for name in ('adam', 'adagraddecay', 'gradientdescent')],
    ('--ev_filter=None --ev=false', 'embedding.kind', 'static'),
    ('--ev', 'embedding.kind', 'dynamic'),
    ('--adaptive_emb', 'embedding.kind', 'adaptive'),
    ('--adaptive_emb', 'embedding.admission.threshold', 8),
    ('--adaptive_emb --ev_filter=cbf', 'embedding.admission.name', 'counting_bloom'),
    ('--dynamic_ev', 'embedding.width.name', 'dynamic'),
    ('--ev --ev_filter=counter', 'embedding.admission.name', 'counter'),
    ('--ev --ev_filter=cbf', 'embedding.admission.threshold', 3),
    ('--ev --dynamic_ev --ev_elimination=gstep', 'embedding.eviction.name', 'global_step'),
    ('--ev --ev_elimination=l2', 'embedding.eviction.every', 1000),
    ('--ev --ev_elimination=l2 --save_steps=70', 'embedding.eviction.every', 70),
    ('--ev --tf', 'embedding.kind', 'static'),
    ('--tf --ev_filter=counter', 'embedding.kind', 'static'),
    ('--workqueue', 'data.workqueue', True),
    ('--workqueue --tf', 'data.workqueue', False),
    *[(f'--protocol={name}', 'protocol', 'gloo') for name in ('grpc', 'grpc++', 'star_server')],
    ('--input_layer_partitioner=3', 'embedding.shard_mb', 3.0),
    ('--dense_layer_partitioner=7', 'model.shard_kb', 7.0),
  ],
)
def test_a_flag_changes_its_field(flags, field, value):
  spec = specs.to_dict(spec_of(flags))
  for part in field.split('.'):
    spec = spec[part]
  assert spec == value


def test_tf_wins_over_the_features_it_turns_off():
  spec = spec_of('--tf --bf16 --optimizer=adagrad --micro_batch=4 --smartstaged=true --learning_rate=0.2')
  assert (spec.model.dtype, spec.optimizer.name, spec.optimizer.table_update) == ('float32', 'adam', 'all')
  assert (spec.micro_batch, spec.smartstaged, spec.embedding.fusion) == (1, False, False)
  assert spec.optimizer.learning_rate == 0.2


def test_what_has_no_effect_says_so(caplog):
  assert spec_of('--deep_dropout=0.5') == spec_of('')
  (record,) = caplog.records
  assert record.message == '--deep_dropout has no effect here, as it has none in DeepRec'


def test_what_an_old_protocol_stands_for_is_said_once(caplog):
  deeprec.get_config('')
  assert caplog.text == ''
  deeprec.get_config('--protocol=star_server')
  (record,) = caplog.records
  assert '--protocol=star_server' in record.message
  assert 'Gloo' in record.message


@pytest.mark.parametrize(
  ('cluster', 'workers'),
  [
    ({'chief': ['a:1'], 'worker': ['b:1', 'c:1'], 'ps': ['d:1']}, 3),
    ({'worker': ['b:1', 'c:1'], 'ps': ['d:1']}, 2),
    ({'worker': ['b:1']}, 1),
    ({'worker': [f'b:{port}' for port in range(1, 31)]}, 30),
    (7, 1),  # main says what is wrong
  ],
)
def test_under_tf_config_the_batch_size_is_that_of_a_worker(cluster, workers, monkeypatch, caplog):
  monkeypatch.setenv('TF_CONFIG', json.dumps({'cluster': cluster, 'task': {'type': 'worker', 'index': 0}}))
  spec = spec_of('--batch_size=64')
  assert spec.batch_size == 64 * workers
  assert spec.data.streams == max(16, workers)
  assert (f'multiplied by the {workers} workers' in caplog.text) == (workers > 1)


@pytest.mark.parametrize(
  ('flags', 'words'),
  [
    ('--evv', ['--evv', 'known are', '--ev_filter']),
    ('--optimizer=adamw', ['adamw', 'adagraddecay']),
    ('--batch_size=x', ["'x'", '--batch_size']),
    ('--smartstaged=perhaps', ['perhaps', '--smartstaged']),
    ('--steps', ['--steps']),
    ('--steps "3', ['No closing quotation', '--steps']),
    ('--bat=3', ['--bat=3']),
    ('--ev --adaptive_emb', ['--ev', '--adaptive_emb', 'leave one out']),
    ('--ev_filter=cbf', ['--ev_filter=cbf', 'needs --ev']),
    ('--ev_elimination=l2', ['--ev_elimination=l2', 'needs --ev']),
    ('--protocol=http', ['--protocol', 'star_server']),
  ],
)
def test_a_mistake_is_one_line(flags, words):
  with pytest.raises(ValueError, match=r'configs/deeprec\.py') as error:
    deeprec.get_config(flags)
  assert '\n' not in str(error.value)
  assert all(word in str(error.value) for word in words), str(error.value)


def test_every_flag_can_be_written_with_a_space_or_an_equals_sign():
  values = {'optimizer': 'adam', 'interaction_op': 'dot', 'protocol': 'grpc'}
  values |= {'ev_filter': 'counter', 'ev_elimination': 'l2'}
  for name, default in SEED_DEFAULTS.items():
    value = values.get(name, 'true' if isinstance(default, bool) else '3')
    one, two = (deeprec.parser().parse_args(shlex.split(f'--{name}{sign}{value}')) for sign in '= ')
    assert vars(one) == vars(two)
    assert str(getattr(one, name)).lower() in (value, f'{value}.0')
