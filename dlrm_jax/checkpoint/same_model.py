"""Whether a checkpoint is of the configured model."""

from typing import Any

from dlrm_jax import spec as specs

# Of embedding variables alone.
KEYED_FIELDS = ('embedding.admission', 'embedding.width')
# What of admission may change from run to run.
_THRESHOLD = 'embedding.admission.threshold'
_FILTER = tuple(f'embedding.admission.{name}' for name in ('expected_ids', 'error_rate', 'bits'))
FREE_FIELDS_OF_ADMISSION = {
  'always': (_THRESHOLD, *_FILTER),
  'counter': (_THRESHOLD, *_FILTER),
  'counting_bloom': (_THRESHOLD,),
}
# What fixes the shapes of the state. A checkpoint that differs here is of another model.
MODEL_FIELDS = (
  'model',
  'embedding.kind',
  'embedding.dim',
  'embedding.dtype',
  'embedding.buckets',
  'embedding.fusion',
  'embedding.shard_mb',
  'optimizer.name',
  'optimizer.weight_decay',
  'embedding.multi_hash',
  *KEYED_FIELDS,
)
# How a model computes, not what it is: bf16 may go on from f32.
FREE_FIELDS = ('model.dtype', 'model.reduce_dtype', 'model.shard_kb', 'embedding.width.every')


class CheckpointError(ValueError):
  """A checkpoint that cannot be used; the message is one line for the user."""


def check_same_model(saved: dict[str, Any], current: dict[str, Any], where: str) -> None:
  """Raises CheckpointError naming the first field in which a checkpoint's model differs from the configured one."""
  saved, current = flat(saved), flat(current)
  keyed = current['embedding.kind'] in specs.KEYED
  for name in current:
    if name in FREE_FIELDS_OF_ADMISSION[current['embedding.admission.name']]:
      continue
    if name.startswith(KEYED_FIELDS) and not keyed:
      continue
    if name.startswith('embedding.multi_hash') and current['embedding.kind'] != 'multi_hash':
      continue
    if name in ('embedding.buckets', 'embedding.shard_mb') and current['embedding.kind'] == 'dynamic':
      continue
    then, now = saved.get(name), current[name]
    if name == 'optimizer.weight_decay':  # whether there is any: an optimizer with it has one more part
      then, now = bool(then), bool(now)
    of_model = any(name == field or name.startswith(field + '.') for field in MODEL_FIELDS)
    if of_model and name not in FREE_FIELDS and then != now:
      raise CheckpointError(
        f'{where} is a checkpoint of another model: config.{name} is {saved.get(name)} there and {current[name]} here; '
        f'set it to the same, or config.checkpoint to another folder'
      )


def flat(tree: dict[str, Any], prefix: str = '') -> dict[str, Any]:
  """The fields of a config by their dotted names; tuples as lists, which is what JSON has."""
  fields = {}
  for name, value in tree.items():
    if isinstance(value, dict):
      fields |= flat(value, f'{prefix}{name}.')
    else:
      fields[prefix + name] = list(value) if isinstance(value, tuple) else value
  return fields
