"""Every experiment in configs/ is valid, and every mistake is named in one line."""

import importlib
import json

import pytest
from ml_collections import ConfigDict

from configs import base
from dlrm_jax import spec as specs
from dlrm_jax.embeddings import directory

EXPERIMENTS = [
  'adagrad', 'adagraddecay', 'adam', 'adamasync', 'adaptive', 'base', 'baseline', 'bf16', 'bf16_tables', 'bloom',
  'counter', 'deeprec', 'dot', 'dynamic', 'expiring', 'gradientdescent', 'micro_batch', 'multi_hash', 'narrowing',
  'quickstart',
]  # fmt: skip


def test_the_list_of_experiments_is_complete(repository):
  assert sorted(path.stem for path in (repository / 'configs').glob('*.py') if path.stem != '__init__') == EXPERIMENTS


@pytest.mark.parametrize('name', EXPERIMENTS)
def test_each_experiment_is_valid_documented_and_a_diff_of_base(name):
  module = importlib.import_module(f'configs.{name}')
  assert len(module.__doc__) > 30
  spec = specs.from_config(module.get_config())
  assert len(spec.embedding.buckets) == 26
  changed = json.dumps(specs.to_dict(spec)) != json.dumps(specs.to_dict(specs.from_config(base.get_config())))
  assert changed == (name not in ('base', 'adamasync'))


def test_base_has_the_19_million_rows():
  assert sum(specs.from_config(base.get_config()).embedding.buckets) == 19_044_490


def test_a_single_number_of_buckets_stands_for_all_columns():
  config = base.get_config()
  config.embedding.buckets = (10,)
  assert specs.from_config(config).embedding.buckets == (10,) * 26


@pytest.mark.parametrize(
  ('field', 'value', 'words'),
  [
    ('batch_size', 0, ['config.batch_size=0', 'at least 1']),
    ('batch_size', 10**10, ['config.batch_size=10000000000', 'at most 82595524']),
    ('keep_checkpoint_max', -1, ['keep_checkpoint_max=-1', 'at least 0']),
    ('optimizer.warmup_steps', 2**31, ['optimizer.warmup_steps=2147483648', 'less than 2**31']),
    ('optimizer.accumulator_decay_steps', 0, ['accumulator_decay_steps=0', 'at least 1']),
    ('optimizer.learning_rate', float('inf'), ['learning_rate=inf', 'finite']),
    ('batch_size', 512.5, ['config.batch_size=512.5', 'whole number']),
    ('batch_size', True, ['config.batch_size=True', 'whole number']),
    ('batch_size', '512', ['config.batch_size', 'whole number']),
    ('smartstaged', 1, ['config.smartstaged=1', 'True or False']),
    ('seed', -1, ['config.seed=-1']),
    ('micro_batch', 3, ['micro_batch=3', 'try 510']),
    ('protocol', 'grpc', ["protocol='grpc'", 'gloo, mpi']),
    ('watchdog_seconds', -1, ['watchdog_seconds=-1', 'at least 0']),
    ('data_location', '', ['config.data_location', 'folder']),
    ('data.streams', 0, ['config.data.streams=0', 'at least 1']),
    ('data.shuffle_rows', 100, ['config.data.shuffle_rows=100', '20000']),
    ('data.slice_rows', 0, ['config.data.slice_rows=0', 'at least 1']),
    ('data.workqueue', 1, ['config.data.workqueue=1', 'True or False']),
    ('data.dense_transform', 'sqrt', ['dense_transform', 'log, minmax, none']),
    ('data.on_bad_row', 'ignore', ['on_bad_row', 'error, skip']),
    ('data.cache', 'yes', ['config.data.cache', 'True or False']),
    ('model.top_mlp', (), ['config.model.top_mlp=()']),
    ('model.top_mlp', (512, 'x'), ['config.model.top_mlp', 'whole numbers']),
    ('model.bottom_mlp', (512, 0), ['config.model.bottom_mlp', 'at least 1']),
    ('model.interaction', 'sum', ["interaction='sum'", 'cat, dot']),
    ('model.dtype', 'float16', ['dtype', 'float32, bfloat16']),
    ('model.reduce_dtype', 'float16', ['reduce_dtype', 'float32, bfloat16']),
    ('embedding.kind', 'magic', ['embedding.kind', 'static']),
    ('embedding.buckets', (1, 2), ['embedding.buckets', '26']),
    ('embedding.buckets', (2**31,), ['embedding.buckets', '2**31']),
    ('optimizer.name', 'adamw', ["optimizer.name='adamw'", 'adagraddecay']),
    ('optimizer.learning_rate', 0.0, ['learning_rate=0.0', 'greater than 0']),
    ('optimizer.learning_rate', float('nan'), ['learning_rate=nan']),
    ('optimizer.decay', 'linear', ['decay_steps=0', 'linear']),
    ('optimizer.b1', 1.0, ['optimizer.b1=1.0', 'less than 1']),
    ('optimizer.table_update', 'some', ['table_update', 'touched, all']),
    ('embedding.admission.threshold', 1, ['admission.threshold=1', 'at least 2']),
    ('embedding.admission.error_rate', 1.0, ['error_rate=1.0', 'between 0 and 1']),
    ('embedding.admission.bits', 12, ['bits=12', '8, 16 or 32']),
    ('embedding.admission.name', 'counter', ['admission.name', "'static'", "'dynamic'"]),
    ('embedding.eviction.name', 'l2', ['eviction.name', 'know no ids']),
    ('embedding.eviction.steps_to_live', 0, ['steps_to_live=0', 'at least 1']),
    ('embedding.width.name', 'dynamic', ['width.name', 'know no ids']),
    ('embedding.multi_hash.operation', 'sub', ["operation='sub'", 'add, mul, concat']),
    ('embedding.multi_hash.remainder_rows', -1, ['remainder_rows=-1', 'at least 0']),
    ('embedding.multi_hash.full_below', -1, ['full_below=-1', 'at least 0']),
    ('embedding.rows', 0, ['embedding.rows=0', 'at least 1']),
    ('embedding.memory_gb', -1.0, ['memory_gb=-1.0', 'at least 0']),
    ('embedding.at_limit', 'stop', ['at_limit', 'refuse, evict']),
    ('batch_sise', 3, ['config.batch_sise', 'no such field', 'batch_size']),
    ('model.widths', 3, ['config.model.widths', 'no such field']),
    ('model', 3, ['config.model=3', 'ConfigDict']),
  ],
)
def test_a_mistake_is_one_line_with_field_value_and_fix(field, value, words):
  config = base.get_config()
  *path, name = field.split('.')
  target = config
  for part in path:
    target = target[part]
  with target.ignore_type():
    target[name] = value
  with pytest.raises(specs.SpecError) as error:
    specs.from_config(config)
  assert '\n' not in str(error.value)
  assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize(
  ('fields', 'words'),
  [
    ({'kind': 'adaptive'}, ["admission.name='always'", 'adaptive', 'counter']),
    ({'admission.name': 'counting_bloom', 'admission.threshold': 250}, ['admission.bits=8', 'threshold=250', 'set 16']),
    ({'admission.name': 'counting_bloom', 'admission.expected_ids': 10**9}, ['expected_ids=1000000000', 'counters']),
    ({'eviction.name': 'l2'}, ['eviction.every=0', 'save_steps']),
    ({'width.name': 'dynamic'}, ['width.every=0', 'save_steps']),
    ({'width.name': 'dynamic', 'width.every': 5, 'width.blocks': 3}, ['width.blocks=3', 'dim=16']),
    ({'at_limit': 'evict'}, ["at_limit='evict'", 'memory_gb']),
  ],
)
def test_embedding_variables_that_do_not_fit_together(fields, words):
  config = base.get_config()
  config.update_from_flattened_dict({'embedding.kind': 'dynamic'} | {f'embedding.{n}': v for n, v in fields.items()})
  with pytest.raises(specs.SpecError) as error:
    specs.from_config(config)
  assert '\n' not in str(error.value)
  assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize(
  ('operation', 'fields', 'words'),
  [
    ('mul', {'admission.name': 'counter'}, ['admission.name', "'multi_hash'", "'always'"]),
    ('add', {'eviction.name': 'l2'}, ['eviction.name', "'never'"]),
    ('mul', {'width.name': 'dynamic'}, ['width.name', "'full'"]),
    ('concat', {'dim': 15}, ['embedding.dim=15', 'concat', 'even']),
    ('concat', {'buckets': (2**30 // 26 + 1,)}, ['embedding.buckets', 'concat', '2**31']),
    ('add', {'buckets': (1,) * 25 + (2**31 - 26 - 25,)}, ['embedding.buckets', 'add', '2**31']),
  ],
)
def test_multi_hash_tables_that_do_not_fit_together(operation, fields, words):
  config = base.get_config()
  config.embedding.kind, config.embedding.multi_hash.operation = 'multi_hash', operation
  specs.from_config(config)
  config.update_from_flattened_dict({f'embedding.{name}': value for name, value in fields.items()})
  with pytest.raises(specs.SpecError) as error:
    specs.from_config(config)
  assert '\n' not in str(error.value)
  assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize(('field', 'value'), [('steps', 2**27), ('optimizer.table_update', 'all')])
def test_embedding_variables_refuse_what_only_static_tables_can(field, value):
  config = base.get_config()
  config.update_from_flattened_dict({field: value})
  specs.from_config(config)
  config.embedding.kind = 'dynamic'
  with pytest.raises(specs.SpecError, match=field):
    specs.from_config(config)


def test_a_directory_counts_as_many_steps_as_the_spec_says():
  assert directory.MOST_STEPS == specs.MOST_STEPS


def test_evictions_are_as_frequent_as_full_checkpoints_unless_said_otherwise():
  config = base.get_config()
  config.update_from_flattened_dict({'embedding.kind': 'dynamic', 'embedding.eviction.name': 'l2', 'save_steps': 70})
  assert specs.from_config(config).embedding.eviction.every == 70
  config.embedding.eviction.every = 30
  assert specs.from_config(config).embedding.eviction.every == 30


def test_a_missing_field_points_to_base():
  config = base.get_config()
  del config.model['dtype']
  with pytest.raises(specs.SpecError, match=r'config\.model\.dtype: missing; start from configs/base\.py'):
    specs.from_config(config)
  with pytest.raises(specs.SpecError, match='missing'):
    specs.from_config(ConfigDict())


@pytest.mark.parametrize(
  ('dot', 'bottom', 'dim', 'fits'),
  [('dot', (64, 16), 16, True), ('dot', (64, 8), 16, False), ('cat', (64, 8), 16, True)],
)
def test_dot_needs_a_bottom_mlp_as_wide_as_the_vectors(dot, bottom, dim, fits):
  config = base.get_config()
  config.model.interaction, config.model.bottom_mlp, config.embedding.dim = dot, bottom, dim
  if fits:
    specs.from_config(config)
  else:
    with pytest.raises(specs.SpecError, match='bottom_mlp'):
      specs.from_config(config)
