"""What the experiments share: children one at a time, the peers, the data, the machine, tables and records.

Nothing here imports JAX at the top: the program that starts the others stays small, so that a child's peak memory,
which the kernel counts from what its parent had, is the child's own.
"""

import argparse
import concurrent.futures
import contextlib
import datetime
import importlib
import importlib.metadata
import itertools
import json
import multiprocessing
import os
import platform
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dlrm_jax import memory
from dlrm_jax.cores import usable_cores

ROOT = Path(__file__).resolve().parent.parent
RECORDS = ROOT / 'experiments' / 'records'
CORES = len(usable_cores())
LEARNING_RATE = 0.002  # of all systems: the default of configs/base.py
ENVIRONMENT = {memory.TUNABLES: f'{memory.HUGE_PAGES}=1'}  # of all systems, as main.py has it
FLAGS = ('amx_bf16', 'avx512_bf16')  # of the processor: what makes bfloat16 products fast


class Failed(RuntimeError):
  """A child that did not succeed; the message is one line, without paths or addresses."""


class Peer(NamedTuple):
  """Another implementation in a folder of peers/, with requirements.txt and an environment of its own in .venv."""

  name: str
  folder: str
  module: str  # what must be imported, and whose version is told
  script: str = 'run.py'
  version: str = ''  # of Python, such as 3.7; the one that runs this if empty

  @property
  def path(self) -> Path:
    """The folder."""
    return ROOT / 'experiments' / 'peers' / self.folder

  @property
  def python(self) -> Path:
    """Python of the environment."""
    return self.path / '.venv' / 'bin' / 'python'


TWIN = Peer('PyTorch', 'pytorch', 'torch', script='twin.py')
FBGEMM = Peer('PyTorch + FBGEMM', 'fbgemm', 'fbgemm_gpu')
TENSORFLOW_2 = Peer('TensorFlow 2', 'tensorflow2', 'tensorflow')
TENSORFLOW_1 = Peer('TensorFlow 1.15.5', 'tensorflow1', 'tensorflow', version='3.7')


def load_before() -> float:
  """How much else the machine does, for the record; says so where it is too much to time anything."""
  load = round(os.getloadavg()[0], 2)
  if load > 0.5:
    say(f'warning: the machine is busy (load average {load}): no rate of this run means anything')
  return load


def parser(kind: str, description: str, record: bool = True) -> argparse.ArgumentParser:
  """The options that all programs have."""
  form = argparse.RawDescriptionHelpFormatter
  out = argparse.ArgumentParser(prog=f'experiments.{kind}', description=description, formatter_class=form)
  text = 'rows of every column, or full (19,044,490 in all; the default)'
  out.add_argument('--buckets', type=buckets, default=0, help=text)
  if record:
    out.add_argument('--record', type=Path, help=f'file to write (experiments/records/{kind}_<date>.json)')
  # A SIGTERM is to end the program as Ctrl-C does: its child goes, too, and gigabytes of temporary files.
  signal.signal(signal.SIGTERM, signal.default_int_handler)
  return out


def run(command: Sequence[str | Path]) -> tuple[dict[str, Any], float]:
  """The JSON in the last line that a command prints, and its peak memory in GB. Failed with its last words."""
  with tempfile.TemporaryFile('w+') as errors:
    child = subprocess.Popen(command, cwd=ROOT, env=of_child(), stdout=subprocess.PIPE, stderr=errors, text=True)
    try:
      with child.stdout:
        output = child.stdout.read()
      _, status, usage = os.wait4(child.pid, 0)  # unlike getrusage: of this child alone
    except BaseException:
      child.kill()
      child.wait()
      raise
    child.returncode = os.waitstatus_to_exitcode(status)
    errors.seek(0)
    text = errors.read()
  if child.returncode:
    raise Failed(f'exit code {child.returncode}: {last_words(text)}')
  return json.loads(output.splitlines()[-1]), usage.ru_maxrss * 1024 / 1e9


def in_process(function: Callable[..., Any], *arguments: Any, environment: Mapping[str, str] | None = None) -> Any:
  """`function(*arguments)` in a fresh process that ends with it. Failed with the last words of its exception.

  environment: variables that the process has beside those of this one.
  """
  spawn = multiprocessing.get_context('spawn')
  with variables(of_child(environment)), concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as pool:
    try:
      return pool.submit(function, *arguments).result()
    except Exception as error:
      raise Failed(last_words(f'{type(error).__name__}: {error}')) from error


def of_child(more: Mapping[str, str] | None = None) -> dict[str, str]:
  """The environment of a child: this process's own, and `more`, before what all systems have."""
  return {**ENVIRONMENT, **os.environ, **(more or {})}


@contextlib.contextmanager
def variables(values: Mapping[str, str]) -> Iterator[None]:
  """Environment variables for as long as it lasts."""
  before = dict(os.environ)
  os.environ.update(values)
  try:
    yield
  finally:
    for name in values:
      os.environ.pop(name)
      if name in before:
        os.environ[name] = before[name]


def own_peak() -> float:
  """Peak memory of this process in GB."""
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def last_words(text: str) -> str:
  """The last line of an error that says something, without what belongs to one machine: addresses and folders."""
  lines = [line.strip() for line in text.splitlines() if line.strip() and '[notice]' not in line] or ['no message']
  line = re.sub(r'\w+://\S+', 'an address', lines[-1])
  return re.sub(r"(?<![\w.])/[^\s,;:'\"]*/", '', line)


def install(peer: Peer) -> str:
  """Version of the module of a peer, whose environment is made if need be. Failed if it cannot be made."""
  ask = [peer.python, '-c', f'import {peer.module} as module; print(module.__version__)']
  if not peer.python.exists() or subprocess.run(ask, capture_output=True).returncode:
    say(f'installing {peer.name}')
    pip = [peer.python, '-m', 'pip', 'install', '--quiet', '--disable-pip-version-check']
    venv = [interpreter(peer.version), '-m', 'venv', peer.path / '.venv']
    for command in (venv, [*pip, '-r', peer.path / 'requirements.txt']):
      done = subprocess.run(command, capture_output=True, text=True)
      if done.returncode:
        raise Failed(f'not installed: {last_words(done.stdout + done.stderr)}')
  done = subprocess.run(ask, capture_output=True, text=True)
  if done.returncode:
    raise Failed(f'not installed: {last_words(done.stderr)}')
  return done.stdout.split()[-1]


def interpreter(version: str) -> str:
  """A Python of this version (such as 3.7) that runs; this one if it is empty. Failed if there is none."""
  if not version:
    return sys.executable
  found = [shutil.which(f'python{version}')]
  if shutil.which('pyenv'):
    root = subprocess.run(['pyenv', 'root'], capture_output=True, text=True).stdout.strip()
    found += sorted(str(path) for path in Path(root, 'versions').glob(f'{version}*/bin/python'))
  for python in filter(None, found):  # what pyenv puts on the path may be there and yet not run
    if not subprocess.run([python, '-c', ''], capture_output=True).returncode:
      return python
  raise Failed(f'no Python {version}')


def run_peer(peer: Peer, mode: str, **flags: Any) -> tuple[dict[str, Any], float]:
  """`run` of a peer with these flags, on all cores. A flag that is True is bare, one that is False is left out."""
  flags |= {'mode': mode, 'threads': CORES, 'learning_rate': LEARNING_RATE}
  words = []
  for name, value in flags.items():
    if value is not False:
      words += [f'--{name}'] if value is True else [f'--{name}', str(value)]
  return run([peer.python, peer.path / peer.script, *words])


def words(text: str) -> tuple[str, ...]:
  """What commas part."""
  return tuple(text.split(','))


def numbers(text: str) -> tuple[int, ...]:
  """Whole numbers separated by commas."""
  return tuple(int(word) for word in text.split(','))


def buckets(text: str) -> int:
  """The value of --buckets: rows of every column, or 0 for 'full'."""
  return 0 if text == 'full' else int(text)


def dlrm_jax(config: str, data: Path, output: Path, rows: int, batch_size: int, *flags: str) -> list[str]:
  """The command that trains with Adam on a folder of CSVs. rows: of every column, or 0 for those of configs/base.py."""
  if rows:
    flags = (*flags, f'--config.embedding.buckets=({rows},)')
  return [
    *(sys.executable, '-m', 'dlrm_jax.main', f'--config=configs/{config}.py', '--config.optimizer.name=adam'),
    f'--config.optimizer.learning_rate={LEARNING_RATE}',
    *(f'--config.data_location={data}', f'--config.output_dir={output}', f'--config.batch_size={batch_size}', *flags),
  ]


def make_spec(config: str, data: Path, rows: int, batch_size: int, /, **fields: Any) -> Any:
  """The `Spec` that the command of `dlrm_jax` has; `fields` are others of its config, nested ones as dictionaries."""
  from dlrm_jax import spec as specs

  values = importlib.import_module(f'configs.{config}').get_config()
  values.optimizer.name, values.optimizer.learning_rate = 'adam', LEARNING_RATE
  values.update({'data_location': str(data), 'batch_size': batch_size, **fields})
  if rows:
    values.embedding.buckets = (rows,)
  return specs.from_config(values)


def export(spec: Any, steps: int, folder: Path) -> int:
  """Writes the first `steps` training batches and, unless `no_eval`, all evaluation rows as arrays for the twin.

  Runs in a process of its own; memory is that of the loader. Returns the rows of the training data, of which
  one epoch at most is written.
  """
  from dlrm_jax import sources
  from dlrm_jax.data import pipeline

  opened = sources.open_sources(spec)
  rows = min(opened.train.rows, steps * spec.batch_size)
  batches = pipeline.train_batches(opened.train, opened.reading, spec.batch_size, spec.seed)
  write_arrays(folder, 'train', rows, itertools.islice(batches, pipeline.batches_per_epoch(rows, spec.batch_size)))
  batches.close()
  if opened.eval:
    batches = pipeline.eval_batches(opened.eval, opened.reading, spec.batch_size)
    write_arrays(folder, 'eval', opened.eval.rows, batches)
  return opened.train.rows


def write_arrays(folder: Path, split: str, rows: int, batches: Iterable[tuple[Any, Any]]) -> None:
  """label f32[rows], dense f32[rows, 13], bucket u32[rows, 26] of pairs of a batch and its state, without padding."""
  import numpy as np

  shapes = {'label': ('f4', (rows,)), 'dense': ('f4', (rows, 13)), 'bucket': ('u4', (rows, 26))}
  arrays = {
    name: np.lib.format.open_memmap(folder / f'{split}_{name}.npy', 'w+', dtype, shape)
    for name, (dtype, shape) in shapes.items()
  }
  start = 0
  for batch, _ in batches:
    real = batch.weight > 0
    stop = start + int(real.sum())
    for name, array in arrays.items():
      array[start:stop] = getattr(batch, name)[real]
    start = stop
  if start != rows:
    raise ValueError(f'the batches have {start} rows of {split} data, not {rows}')


def check_data(folder: Path, *names: str) -> Path:
  """The folder as an absolute path. Ends the program with one line if a file is missing in it."""
  for name in names:
    if not (folder / name).is_file():
      raise SystemExit(
        f'error: no {name} in {folder}; make some data: python -m dlrm_jax.data.synthetic --rows 8000000 --out {folder}'
      )
  return folder.resolve()


def add_data(parser: argparse.ArgumentParser, rows: int) -> None:
  """The options that `find_data` needs."""
  parser.add_argument('--data', type=Path, help='folder with train.csv')
  parser.add_argument('--rows', type=int, default=rows, help=f'rows to make without --data ({rows:,})')


def find_data(folder: Path | None, rows: int, temporary: Path) -> Path:
  """The folder, which must have a train.csv; without one, that of `rows` synthetic rows made in a temporary folder."""
  if folder:
    return check_data(folder, 'train.csv')
  say(f'making {rows:,} rows of data')
  flags = ('--rows', str(rows), '--eval_rows', '1', '--out', temporary / 'data')
  run([sys.executable, '-m', 'dlrm_jax.data.synthetic', *flags])
  return temporary / 'data'


def about_data(folder: Path) -> dict[str, Any] | None:
  """What the synthetic generator wrote about the data (seed, rows, best possible AUC); None for other data."""
  path = folder / 'synthetic.json'
  return json.loads(path.read_text()) if path.exists() else None


def about_machine(torch: str | None) -> dict[str, Any]:
  """Processor, memory, date and versions, for a record."""
  processor, flags = parse_cpuinfo(Path('/proc/cpuinfo').read_text())
  return {
    'processor': processor,
    **flags,
    'cores': CORES,
    'memory_gib': round(os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30, 1),
    'date': datetime.date.today().isoformat(),
    'python': platform.python_version(),
    'jax': importlib.metadata.version('jax'),
    'torch': torch,
  }


def parse_cpuinfo(text: str) -> tuple[str, dict[str, bool]]:
  """The processor's name and which of FLAGS it has, from the text of /proc/cpuinfo."""
  fields = {}
  for line in text.splitlines():
    name, _, value = line.partition(':')
    fields.setdefault(name.strip(), value.strip())
  has = fields.get('flags', '').split()
  return fields.get('model name', platform.machine()), {flag: flag in has for flag in FLAGS}


def machine_line(machine: dict[str, Any]) -> str:
  """`about_machine` as a line of text."""
  words = [f'{machine["processor"]}, {machine["cores"]} cores, {machine["memory_gib"]} GiB']
  words += [f'{flag} {"yes" if machine[flag] else "no"}' for flag in FLAGS]
  words += [machine['date'], *(f'{name} {machine[name] or "not installed"}' for name in ('python', 'jax', 'torch'))]
  return ', '.join(words)


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
  """A Markdown table; the first column is text, the others are numbers."""
  lines = [header, ['---'] + ['---:'] * (len(header) - 1), *rows]
  return '\n'.join(f'| {" | ".join(line)} |' for line in lines)


def record_path(kind: str, path: Path | None) -> Path:
  """Where a record goes: the path asked for, or experiments/records/<kind>_<date>.json."""
  return path or RECORDS / f'{kind}_{datetime.date.today().isoformat()}.json'


def write_record(path: Path, record: dict[str, Any]) -> None:
  """The record as JSON."""
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(json.dumps(record, indent=2) + '\n')


def finish(kind: str, record: dict[str, Any], text: str, path: Path | None) -> None:
  """Prints the result and writes its record (see `record_path`)."""
  print(text, machine_line(record['machine']), sep='\n\n')
  path = record_path(kind, path)
  write_record(path, record)
  say(f'record in {path}')


def say(text: str) -> None:
  """A line of progress on stderr."""
  print(text, file=sys.stderr, flush=True)
