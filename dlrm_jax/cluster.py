"""Which processes make up a run, and which of them this is, from the environment."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from dlrm_jax.spec import SpecError

OURS = ('DLRM_COORDINATOR', 'DLRM_NUM_PROCESSES', 'DLRM_PROCESS_ID')
FIX = f'set {", ".join(OURS)} (on Kubernetes JOB_COMPLETION_INDEX will do for the last), or none of them'


class NothingToDo(Exception):
  """This process has no part in a run; the message, one line, says why."""


@dataclasses.dataclass(frozen=True)
class Cluster:
  """The processes of a run, and which of them this is."""

  coordinator: str  # host:port, of process 0
  processes: int
  index: int


def from_environment(environ: Mapping[str, str]) -> Cluster | None:
  """The cluster that DLRM_* or TF_CONFIG describe; None: one process. SpecError if they say too little or too much."""
  ours = [name for name in OURS if environ.get(name)]
  if environ.get('TF_CONFIG'):
    if ours:
      raise SpecError(f'TF_CONFIG and {ours[0]} are both set; unset one of them')
    cluster = _from_tensorflow(environ['TF_CONFIG'])
  elif ours:
    cluster = _from_ours(environ)
  else:
    return None
  return cluster if cluster.processes > 1 else None


def _from_ours(environ: Mapping[str, str]) -> Cluster:
  last = OURS[2] if environ.get(OURS[2]) else 'JOB_COMPLETION_INDEX'
  names = (*OURS[:2], last)
  missing = [name for name in names if not environ.get(name)]
  if missing:
    raise SpecError(f'{OURS[2] if missing[0] == last else missing[0]} is not set; {FIX}')
  processes, index = (_whole(name, environ[name]) for name in names[1:])
  if processes < 1:
    raise SpecError(f'DLRM_NUM_PROCESSES={processes}: must be at least 1')
  if not 0 <= index < processes:
    raise SpecError(f'{last}={index}: must be from 0 to {processes - 1}, since DLRM_NUM_PROCESSES={processes}')
  address(environ[OURS[0]], OURS[0])
  return Cluster(environ[OURS[0]], processes, index)


def _from_tensorflow(text: str) -> Cluster:
  """DeepRec's form: the chief, if there is one, and the workers become processes, in this order."""
  wrong = lambda what: SpecError(
    f'TF_CONFIG: {what}; it must be like {{"cluster": {{"worker": ["host:port", ...]}}, "task": {{"type": "worker", '
    '"index": 0}}'
  )
  try:
    config = json.loads(text)
    jobs, (kind, index) = config['cluster'], (config['task'][name] for name in ('type', 'index'))
    chiefs, workers = (list(jobs.get(job, ())) for job in ('chief', 'worker'))
    index = _whole('task index', index)
  except json.JSONDecodeError as error:
    raise wrong(f'not JSON ({error})') from None
  except KeyError as error:
    raise wrong(f'{error.args[0]!r} is missing') from None
  except (TypeError, AttributeError, SpecError):
    raise wrong('a part has the wrong type') from None
  if kind == 'ps':
    raise NothingToDo('TF_CONFIG: nothing to do for a parameter server: the workers hold the tables; it ends here')
  if kind == 'evaluator':
    raise NothingToDo('TF_CONFIG: nothing to do for an evaluator: the workers evaluate; it ends here')
  if kind not in ('chief', 'worker'):
    raise wrong(f'task type {kind!r} is unknown')
  if not chiefs + workers:
    raise wrong("'worker' has no hosts")
  own = chiefs if kind == 'chief' else workers
  if not 0 <= index < len(own):
    raise wrong(f'there is no {kind} {index}, only {len(own)} of them')
  for host in chiefs + workers:
    address(host, 'TF_CONFIG')
  return Cluster((chiefs + workers)[0], len(chiefs + workers), index + (len(chiefs) if kind == 'worker' else 0))


def _whole(name: str, value: Any) -> int:
  try:
    return int(value)
  except (TypeError, ValueError):
    raise SpecError(f'{name}={value!r}: must be a whole number') from None


def address(text: Any, name: str) -> tuple[str, int]:
  """Host and port of host:port, which stands in `name`. SpecError if it is anything else."""
  host, _, port = str(text).rpartition(':')
  if not host.strip('[]') or not port.isdecimal() or not 0 < int(port) < 2**16:
    raise SpecError(f'{name}: {text!r} must be host:port, such as 10.0.0.1:3333')
  return host.strip('[]'), int(port)
