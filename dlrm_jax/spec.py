"""An experiment as frozen dataclasses. Every user error of a config is raised here, once, naming field, value and fix.

Nothing here imports JAX: the number of its threads is read from a spec before JAX starts.
"""

import dataclasses
import difflib
import math
from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict

COLUMNS = 26
MOST_THREADS = 4096
MOST_EXAMPLES = (2**31 - 1) // COLUMNS  # of a batch: its lookups are numbered in 32 bits
KEYED = ('dynamic', 'adaptive')  # kinds of tables that know ids by their whole fingerprints
MOST_STEPS = 2**27  # that a directory of ids can tell apart

TYPE_NAMES = {
  int: 'a whole number',
  float: 'a number',
  bool: 'True or False',
  str: 'a text',
  tuple[int, ...]: 'whole numbers, such as (512, 256)',
}

Check = tuple[Callable[[Any], bool], str]


class SpecError(ValueError):
  """A config that cannot be run; the message is one line for the user."""


def _field(check: Check) -> Any:
  return dataclasses.field(metadata={'check': check})


def _one_of(*names: str) -> Any:
  return _field((lambda value: value in names, f'must be one of {", ".join(names)}'))


def _at_least(low: float) -> Any:
  return _field((lambda value: value >= low and math.isfinite(value), f'must be at least {low}'))


def _above(low: float) -> Any:
  return _field((lambda value: value > low and math.isfinite(value), f'must be greater than {low}, and finite'))


def _between(low: float, high: float) -> Any:
  return _field((lambda value: low <= value < high, f'must be at least {low} and less than {high}'))


def _whole(low: int) -> Any:
  return _field((lambda value: low <= value < 2**31, f'must be at least {low} and less than 2**31'))


def _each_at_least(low: int, text: str) -> Any:
  return _field((lambda values: len(values) > 0 and min(values) >= low, text))


@dataclasses.dataclass(frozen=True)
class DataSpec:
  """Where the rows come from and in which order."""

  train: str = _field((bool, 'must name a file or glob'))
  eval: str = _field((bool, 'must name a file or glob'))
  streams: int = _at_least(1)
  shuffle_rows: int = _field((lambda rows: rows == 0 or rows >= 20000, 'must be 0 (file order) or at least 20000'))
  workqueue: bool
  slice_rows: int = _at_least(1)
  dense_transform: str = _one_of('log', 'minmax', 'none')
  on_bad_row: str = _one_of('error', 'skip')
  cache: bool


@dataclasses.dataclass(frozen=True)
class ModelSpec:
  """The network between integers, vectors and logit."""

  bottom_mlp: tuple[int, ...] = _each_at_least(1, 'must be one or more layer sizes of at least 1')
  top_mlp: tuple[int, ...] = _each_at_least(1, 'must be one or more layer sizes of at least 1')
  batch_norm: bool
  interaction: str = _one_of('cat', 'dot')
  shard_kb: float = _at_least(0)
  dtype: str = _one_of('float32', 'bfloat16')
  reduce_dtype: str = _one_of('float32', 'bfloat16')


@dataclasses.dataclass(frozen=True)
class AdmissionSpec:
  """Which ids get a row of their own."""

  name: str = _one_of('always', 'counter', 'counting_bloom')
  threshold: int = _between(2, 2**31)
  expected_ids: int = _between(1, 2**30)
  error_rate: float = _field((lambda rate: 0 < rate < 1, 'must be between 0 and 1'))
  bits: int = _field((lambda bits: bits in (8, 16, 32), 'must be 8, 16 or 32'))


@dataclasses.dataclass(frozen=True)
class EvictionSpec:
  """Which ids lose their rows, and when."""

  name: str = _one_of('never', 'global_step', 'l2')
  steps_to_live: int = _between(1, MOST_STEPS)
  l2: float = _above(0)
  every: int = _at_least(0)


@dataclasses.dataclass(frozen=True)
class WidthSpec:
  """How much of its vector an id has."""

  name: str = _one_of('full', 'dynamic')
  blocks: int = _at_least(2)
  every: int = _at_least(0)


@dataclasses.dataclass(frozen=True)
class MultiHashSpec:
  """How two rows make a vector, and how many there are."""

  operation: str = _one_of('add', 'mul', 'concat')
  remainder_rows: int = _between(0, 2**31)
  full_below: int = _between(0, 2**31)


@dataclasses.dataclass(frozen=True)
class EmbeddingSpec:
  """The embedding tables."""

  kind: str = _one_of('static', 'multi_hash', *KEYED)
  dim: int = _whole(1)
  buckets: tuple[int, ...] = _field(
    (
      lambda sizes: len(sizes) in (1, COLUMNS) and min(sizes) >= 1 and sum(sizes) * COLUMNS < 2**31 * len(sizes),
      f'must be one number or {COLUMNS} numbers of at least 1, less than 2**31 rows in all',
    )
  )
  dtype: str = _one_of('float32', 'bfloat16')
  fusion: bool
  l2: float = _at_least(0)
  shard_mb: float = _at_least(0)
  exchange: str = _one_of('auto', 'gather', 'all_to_all')
  multi_hash: MultiHashSpec
  rows: int = _between(1, 2**30)
  memory_gb: float = _at_least(0)
  at_limit: str = _one_of('refuse', 'evict')
  admission: AdmissionSpec
  eviction: EvictionSpec
  width: WidthSpec


@dataclasses.dataclass(frozen=True)
class OptimizerSpec:
  """The optimizer of dense parameters and table rows, and the schedule of its learning rate."""

  name: str = _one_of('adam', 'adamasync', 'adagraddecay', 'adagrad', 'gradientdescent')
  learning_rate: float = _above(0)
  warmup_steps: int = _whole(0)
  decay: str = _one_of('constant', 'linear', 'cosine', 'exponential', 'polynomial')
  decay_start: int = _whole(0)
  decay_steps: int = _whole(0)
  final_factor: float = _field((lambda factor: 0 <= factor <= 1, 'must be from 0 to 1'))
  weight_decay: float = _at_least(0)
  b1: float = _between(0, 1)
  b2: float = _between(0, 1)
  eps: float = _above(0)
  rmsprop: bool
  initial_accumulator: float = _above(0)
  accumulator_decay_steps: int = _whole(1)
  accumulator_decay_rate: float = _field((lambda rate: 0 < rate < 1, 'must be between 0 and 1'))
  table_update: str = _one_of('touched', 'all')


@dataclasses.dataclass(frozen=True)
class Spec:
  """One experiment, checked. configs/base.py says what each field means."""

  data_location: str = _field((bool, 'must name a folder'))
  output_dir: str = _field((bool, 'must name a folder'))
  checkpoint: str
  seed: int = _field((lambda seed: 0 <= seed < 2**32, 'must be from 0 to 2**32 - 1'))
  batch_size: int = _field((lambda size: 1 <= size <= MOST_EXAMPLES, f'must be at least 1 and at most {MOST_EXAMPLES}'))
  steps: int = _at_least(0)
  epochs: int = _at_least(1)
  micro_batch: int = _at_least(1)
  no_eval: bool
  eval_every: int = _at_least(0)
  log_every: int = _at_least(1)
  save_steps: int = _at_least(0)
  delta_seconds: float = _at_least(0)
  keep_checkpoint_max: int = _at_least(0)
  timeline: int = _at_least(0)
  smartstaged: bool
  op_fusion: bool
  native: bool
  inter: int = _between(0, MOST_THREADS)
  intra: int = _between(0, MOST_THREADS)
  protocol: str = _one_of('gloo', 'mpi')
  watchdog_seconds: int = _at_least(0)
  data: DataSpec
  model: ModelSpec
  embedding: EmbeddingSpec
  optimizer: OptimizerSpec


def from_config(config: ConfigDict) -> Spec:
  """The spec of a config. Raises SpecError for unknown, missing and wrong fields and for what does not fit together."""
  spec = _build(Spec, config, 'config')
  if len(spec.embedding.buckets) == 1:
    buckets = spec.embedding.buckets * COLUMNS
    spec = dataclasses.replace(spec, embedding=dataclasses.replace(spec.embedding, buckets=buckets))
  _check_together(spec)
  _check_embedding(spec)
  every = lambda part: dataclasses.replace(part, every=part.every or spec.save_steps)
  embedding = spec.embedding
  embedding = dataclasses.replace(embedding, eviction=every(embedding.eviction), width=every(embedding.width))
  return dataclasses.replace(spec, embedding=embedding)


def check_processes(spec: Spec, processes: int) -> None:
  """SpecError if so many processes cannot share the data."""
  if spec.data.workqueue:
    check_shares(spec.batch_size, processes)
  else:
    check_streams(spec.data.streams, processes)


def check_shares(batch_size: int, processes: int) -> None:
  """SpecError if a batch of a work queue has less than an example for each process."""
  if batch_size < processes:
    raise SpecError(
      f'config.batch_size={batch_size} cannot be shared by {processes} processes: each needs an example of every '
      f'batch; set batch_size={processes} or more'
    )


def check_streams(streams: int, processes: int) -> None:
  """SpecError if there are fewer streams than processes."""
  if streams < processes:
    raise SpecError(
      f'config.data.streams={streams} cannot serve {processes} processes: every process needs a stream; set '
      f'data.streams={processes} or more, or start at most {streams} processes'
    )


def to_dict(spec: Spec) -> dict[str, Any]:
  """The spec as nested dictionaries of JSON's types."""
  return dataclasses.asdict(spec)


def field_type(name: str) -> Any:
  """Type of a field by its dotted name, such as optimizer.name. SpecError if there is none."""
  kind, path = Spec, 'config'
  for part in name.split('.'):
    fields = _fields(kind) if dataclasses.is_dataclass(kind) else {}
    if part not in fields:
      raise _unknown(path, part, fields)
    kind, path = fields[part].type, f'{path}.{part}'
  return kind


def check_override(name: str, value: str | None) -> None:
  """Raises SpecError if there is no such field, or if the text cannot be read as a value of its type."""
  kind = field_type(name)
  if dataclasses.is_dataclass(kind):
    raise SpecError(f'config.{name}: has fields of its own; set one of {", ".join(_fields(kind))}')
  readable = {
    int: lambda: int(value, 0),
    float: lambda: float(value),
    bool: lambda: value is None or {'true': 1, 't': 1, '1': 1, 'false': 0, 'f': 0, '0': 0}[value.lower()],
    str: lambda: value,
    tuple[int, ...]: lambda: [int(item) for item in value.strip('() ,').split(',')],
  }
  try:
    readable[kind]()
  except (KeyError, ValueError):
    raise SpecError(f'config.{name}={value!r}: must be {TYPE_NAMES[kind]}') from None


def _fields(kind: type) -> dict[str, dataclasses.Field]:
  return {field.name: field for field in dataclasses.fields(kind)}


def _unknown(path: str, name: str, fields: Any) -> SpecError:
  near = difflib.get_close_matches(name, fields, n=1)
  known = f'known are {", ".join(fields)}' if fields else f'{path} is a value'
  return SpecError(f'{path}.{name}: no such field; ' + (f'did you mean {path}.{near[0]}?' if near else known))


def _build(kind: type, config: ConfigDict, path: str) -> Any:
  fields = _fields(kind)
  for name in config:
    if name not in fields:
      raise _unknown(path, name, fields)
  missing = [name for name in fields if name not in config]
  if missing:
    raise SpecError(f'{path}.{missing[0]}: missing; start from configs/base.py, which has every field')
  return kind(**{name: _value(field, config[name], f'{path}.{name}') for name, field in fields.items()})


def _value(field: dataclasses.Field, value: Any, path: str) -> Any:
  if dataclasses.is_dataclass(field.type):
    if not isinstance(value, ConfigDict):
      raise SpecError(f'{path}={value!r}: must be a ConfigDict with its own fields')
    return _build(field.type, value, path)
  value = _typed(field.type, value, path)
  if 'check' in field.metadata:
    holds, text = field.metadata['check']
    if not holds(value):
      raise SpecError(f'{path}={value!r}: {text}')
  return value


def _typed(kind: Any, value: Any, path: str) -> Any:
  is_int = isinstance(value, int) and not isinstance(value, bool)
  if kind is float and is_int:
    return float(value)
  if kind == tuple[int, ...]:
    if isinstance(value, (tuple, list)) and all(isinstance(item, int) and not isinstance(item, bool) for item in value):
      return tuple(value)
    raise SpecError(f'{path}={value!r}: must be {TYPE_NAMES[kind]}')
  if isinstance(value, kind) and (kind is not int or is_int):
    return value
  raise SpecError(f'{path}={value!r}: must be {TYPE_NAMES[kind]}')


def _check_together(spec: Spec) -> None:
  if spec.model.interaction == 'dot' and spec.model.bottom_mlp[-1] != spec.embedding.dim:
    raise SpecError(
      f'config.model.bottom_mlp={spec.model.bottom_mlp}: with interaction dot its last layer must be as wide as the '
      f'vectors; set it or config.embedding.dim={spec.embedding.dim}'
    )
  if spec.embedding.dtype == 'bfloat16' and spec.optimizer.table_update == 'all':
    raise SpecError(
      "config.embedding.dtype='bfloat16': rounds the rows that a batch touches, so it needs "
      "config.optimizer.table_update='touched'"
    )
  if spec.batch_size % spec.micro_batch:
    low = max(1, spec.batch_size // spec.micro_batch) * spec.micro_batch
    raise SpecError(
      f'config.batch_size={spec.batch_size}: must be a multiple of micro_batch={spec.micro_batch}; try {low}'
    )
  if spec.optimizer.decay != 'constant' and spec.optimizer.decay_steps == 0:
    raise SpecError(f'config.optimizer.decay_steps=0: decay {spec.optimizer.decay!r} needs its number of steps')
  if 0 < spec.optimizer.decay_start < spec.optimizer.warmup_steps:
    raise SpecError(
      f'config.optimizer.decay_start={spec.optimizer.decay_start}: lies in the warm-up; must be 0 or at least '
      f'warmup_steps={spec.optimizer.warmup_steps}'
    )
  if spec.optimizer.decay == 'exponential' and spec.optimizer.final_factor == 0:
    raise SpecError('config.optimizer.final_factor=0.0: an exponential decay never reaches 0; set a positive share')


def _check_embedding(spec: Spec) -> None:
  """What embedding variables need, and what static tables cannot have."""
  embedding = spec.embedding
  admission, eviction, width = embedding.admission, embedding.eviction, embedding.width
  if embedding.kind not in KEYED:
    for name, value, only in (
      ('admission.name', admission.name, 'always'),
      ('eviction.name', eviction.name, 'never'),
      ('width.name', width.name, 'full'),
    ):
      if value != only:
        raise SpecError(
          f'config.embedding.{name}={value!r}: tables of kind {embedding.kind!r} know no ids; set it to {only!r}, or '
          f"config.embedding.kind='dynamic'"
        )
    if embedding.kind == 'multi_hash':
      _check_multi_hash(embedding)
    return
  if spec.steps >= MOST_STEPS:
    raise SpecError(f'config.steps={spec.steps}: a directory of ids counts less than {MOST_STEPS} steps; set fewer')
  if spec.optimizer.table_update == 'all':
    raise SpecError(
      f"config.optimizer.table_update='all': tables of kind {embedding.kind!r} have rows without ids, which must not "
      "move; set it to 'touched'"
    )
  if embedding.kind == 'adaptive' and admission.name == 'always':
    raise SpecError(
      "config.embedding.admission.name='always': kind 'adaptive' counts ids until they get a row of their own; set it "
      "to 'counter' or 'counting_bloom'"
    )
  if admission.name == 'counting_bloom':
    _check_bloom(admission)
  if width.name == 'dynamic' and embedding.dim % width.blocks:
    raise SpecError(f'config.embedding.width.blocks={width.blocks}: must divide dim={embedding.dim}; set one that does')
  for name, part, off in (('eviction', eviction, 'never'), ('width', width, 'full')):
    if part.name != off and not part.every and not spec.save_steps:
      raise SpecError(
        f'config.embedding.{name}.every=0: stands for config.save_steps, which is 0 too, so it would never happen; set '
        'either to a number of steps'
      )
  if embedding.at_limit == 'evict' and not embedding.memory_gb:
    raise SpecError(
      "config.embedding.at_limit='evict': there is no limit to reach; set config.embedding.memory_gb to one"
    )


def _check_multi_hash(embedding: EmbeddingSpec) -> None:
  joined, total = embedding.multi_hash.operation == 'concat', sum(embedding.buckets)
  if joined and embedding.dim % 2:
    raise SpecError(
      f"config.embedding.dim={embedding.dim}: multi_hash.operation='concat' joins two halves; set an even number"
    )
  # A column may keep a row for each id, of concat twice, else with one more.
  if total >= (2**30 if joined else 2**31 - COLUMNS):
    raise SpecError(
      f'config.embedding.buckets: {total} in all, which multi_hash.operation={embedding.multi_hash.operation!r} could '
      'make 2**31 rows or more; set fewer'
    )


def _check_bloom(admission: AdmissionSpec) -> None:
  hashes = math.ceil(-math.log2(admission.error_rate))
  if admission.threshold + hashes >= 2**admission.bits:
    raise SpecError(
      f'config.embedding.admission.bits={admission.bits}: too few for a counter up to threshold={admission.threshold} '
      f'with {hashes} hash functions; set {16 if admission.threshold + hashes < 2**16 else 32}'
    )
  if -math.log(admission.error_rate) / math.log(2) ** 2 * admission.expected_ids >= 2**31 - 2**8:
    raise SpecError(
      f'config.embedding.admission.expected_ids={admission.expected_ids}: a filter of error rate '
      f'{admission.error_rate} would have 2**31 counters or more; lower it or raise error_rate'
    )
