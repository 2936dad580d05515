"""python -m dlrm_jax.main --config=configs/bf16.py [--config.field=value ...]"""

import logging
import os
import re
import signal
import sys
import traceback
from collections.abc import Iterator

import ml_collections
from absl import flags
from ml_collections import ConfigDict, config_flags

from dlrm_jax import cluster as clusters
from dlrm_jax import distributed, memory
from dlrm_jax import spec as specs

FLAGS = flags.FLAGS
# DeepRec's memory optimizer watches the steps between these two; XLA plans its memory when it compiles.
WITHOUT_COUNTERPART = {'START_STATISTIC_STEP', 'STOP_STATISTIC_STEP'}
config_flags.DEFINE_config_file('config', None, 'Experiment file, for example configs/bf16.py.', lock_config=True)


def main(argv: list[str]) -> int:
  """Runs the experiment; the exit code is 0 only if everything was written."""
  if {'--help', '-h'} & set(argv[1:]):
    print(f'{__doc__}\n\nconfigs/base.py has every field with its unit, default and meaning.')
    return 0
  try:
    spec = specs.from_config(parse(argv))
    cluster = clusters.from_environment(os.environ)
    specs.check_processes(spec, cluster.processes if cluster else 1)
  except specs.SpecError as error:
    return fail(error, 2)
  except clusters.NothingToDo as reason:
    print(reason, file=sys.stderr)
    return 0
  prepare_process(spec.intra)
  if cluster:
    distributed.quiet()
  # Only now may JAX start.
  from dlrm_jax import train
  from dlrm_jax.checkpoint.same_model import CheckpointError
  from dlrm_jax.data.schema import DataError
  from dlrm_jax.logs import setup_logging

  setup_logging(cluster.index if cluster else 0)
  for name in WITHOUT_COUNTERPART & set(os.environ):
    logging.info('%s is set; it has no counterpart here and changes nothing', name)
  with distributed.joined(cluster, spec.protocol) as members:
    try:
      train.run(spec, members)
    except (CheckpointError, DataError, train.TrainingError, OSError) as error:
      return members.fail(error, 1)
    except MemoryError as error:
      return members.fail(f'there is not enough memory: {error}', 1)
    except KeyboardInterrupt:
      return members.fail('interrupted; what was saved before is good', 128 + signal.SIGINT)
    except train.Stopped as error:
      print(error, file=sys.stderr)
      return 128 + error.number
  return 0


def parse(argv: list[str]) -> ConfigDict:
  """The config that the command line names. SpecError, one line, for anything that cannot be understood."""
  try:
    for name, value in overrides(argv):
      specs.check_override(name, value)
    rest = FLAGS(argv)
    config = FLAGS.config
    list(config or ())  # a file that could not be loaded says so only when it is looked at
  except (flags.Error, ValueError, TypeError) as error:
    raise specs.SpecError(one_line(error)) from None
  except OSError as error:
    raise specs.SpecError(f'the config file cannot be read: {str(error).splitlines()[-1].strip()}') from None
  except Exception as error:  # whatever the code of a config file makes of a mistake
    raise specs.SpecError(f'{_place_of(error)}: {type(error).__name__}: {short(error)}') from None
  if len(rest) > 1:
    raise specs.SpecError(f'{rest[1]!r} is not a flag; fields are set with --config.field=value')
  if config is None:
    raise specs.SpecError('no experiment; name one with --config=configs/base.py')
  return config


def one_line(error: BaseException) -> str:
  """The message; where it holds the whole traceback of a config file, the last line of that."""
  text = str(error).strip()
  if 'Traceback' in text:
    return text.splitlines()[-1].partition(': ')[2]
  return ' '.join(text.split())


def short(error: BaseException) -> str:
  """The first words of a message, in one line."""
  text = str(error)
  if text[:1] == text[-1:] and text[:1] in ('"', "'"):  # that of a key
    text = text[1:-1].replace('\\n', ' ').replace("\\'", "'")
  return ' '.join(text.split())[:200]


def _place_of(error: BaseException) -> str:
  """File and line of the config in which an exception was raised."""
  frames = traceback.extract_tb(error.__traceback__)
  packages = os.path.dirname(os.path.dirname(ml_collections.__file__))
  own = [frame for frame in frames if not frame.filename.startswith((packages, '<')) and frame.filename != __file__]
  return f'{own[-1].filename}, line {own[-1].lineno}' if own else 'the config'


def overrides(argv: list[str]) -> Iterator[tuple[str, str | None]]:
  """Each (field, value) that the command line sets; None where a bare --config.field stands for True."""
  words = iter(argv[1:])
  for word in words:
    match = re.fullmatch(r'--?(?:no)?config\.([^=]*)(?:=(.*))?', word, re.DOTALL)
    if match:
      name, value = match.groups()
      if value is None and specs.field_type(name) is not bool:
        value = next(words, '')
      yield name, value


def prepare_process(threads: int) -> None:
  """All that must be set before JAX starts: the threads of XLA (0: one per core), and what becomes of freed memory."""
  set_threads(threads)
  memory.keep_freed_memory()


def set_threads(count: int) -> None:
  """Limits the threads of XLA, which reads this variable when it starts."""
  if count:
    os.environ['NPROC'] = str(count)


def fail(error: BaseException, code: int) -> int:
  """One line on stderr."""
  print(f'error: {error}', file=sys.stderr)
  return code


if __name__ == '__main__':
  memory.restart_with_settings()
  sys.exit(main(sys.argv))
