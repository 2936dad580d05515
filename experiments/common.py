"""What benchmark.py and quality.py share: children one at a time, the PyTorch twin, the machine, tables and records.

Nothing here imports JAX at the top: the program that starts the others stays small, so that a child's peak memory,
which the kernel counts from what its parent had, is the child's own.
"""

import argparse
import concurrent.futures
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
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PEER = ROOT / 'experiments' / 'peers' / 'pytorch'
CORES = len(os.sched_getaffinity(0))
LEARNING_RATE = 0.002  # of all systems: the default of configs/base.py
FLAGS = ('amx_bf16', 'avx512_bf16')  # of the processor: what makes bfloat16 products fast


class Failed(RuntimeError):
  """A child that did not succeed; the message is one line, without paths or addresses."""


def load_before() -> float:
  """How much else the machine does, for the record; says so where it is too much to time anything."""
  load = round(os.getloadavg()[0], 2)
  if load > 0.5:
    say(f'warning: the machine is busy (load average {load}): no rate of this run means anything')
  return load


def parser(kind: str, description: str) -> argparse.ArgumentParser:
  """The options that both programs have."""
  form = argparse.RawDescriptionHelpFormatter
  out = argparse.ArgumentParser(prog=f'experiments.{kind}', description=description, formatter_class=form)
  out.add_argument('--batch_size', type=int, default=512)
  out.add_argument('--buckets', type=buckets, default=0, help='rows of every column, or full (19,044,490 in all)')
  out.add_argument('--record', type=Path, help=f'file to write (experiments/records/{kind}_<date>.json)')
  # A SIGTERM is to end the program as Ctrl-C does: its child goes, too, and gigabytes of temporary files.
  signal.signal(signal.SIGTERM, signal.default_int_handler)
  return out


def run(command: Sequence[str | Path]) -> tuple[dict[str, Any], float]:
  """The JSON in the last line that a command prints, and its peak memory in GB. Failed with its last words."""
  with tempfile.TemporaryFile('w+') as errors:
    child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=errors, text=True)
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


def in_process(function: Callable[..., Any], *arguments: Any) -> Any:
  """`function(*arguments)` in a fresh process that ends with it. Failed with the last words of its exception."""
  spawn = multiprocessing.get_context('spawn')
  with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as pool:
    try:
      return pool.submit(function, *arguments).result()
    except Exception as error:
      raise Failed(last_words(f'{type(error).__name__}: {error}')) from error


def own_peak() -> float:
  """Peak memory of this process in GB."""
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def last_words(text: str) -> str:
  """The last line of an error that says something, without what belongs to one machine: addresses and folders."""
  lines = [line.strip() for line in text.splitlines() if line.strip() and '[notice]' not in line] or ['no message']
  line = re.sub(r'\w+://\S+', 'an address', lines[-1])
  return re.sub(r"(?<![\w.])/[^\s,;:'\"]*/", '', line)


def install_twin() -> tuple[Path, str]:
  """Python of the twin's environment, made if need be, and the version of torch in it. Failed if it cannot be made."""
  python = PEER / '.venv' / 'bin' / 'python'
  requirements = PEER / 'requirements.txt'
  ask = [python, '-c', 'import torch; print(torch.__version__)']
  if not python.exists() or subprocess.run(ask, capture_output=True).returncode:
    say('installing the PyTorch twin')
    pip = [python, '-m', 'pip', 'install', '--quiet', '--disable-pip-version-check', '-r', requirements]
    for command in ([sys.executable, '-m', 'venv', PEER / '.venv'], pip):
      done = subprocess.run(command, capture_output=True, text=True)
      if done.returncode:
        raise Failed(f'not installed: {last_words(done.stdout + done.stderr)}')
  done = subprocess.run(ask, capture_output=True, text=True)
  if done.returncode:
    raise Failed(f'not installed: {last_words(done.stderr)}')
  return python, done.stdout.strip()


def run_twin(python: Path, mode: str, **flags: Any) -> tuple[dict[str, Any], float]:
  """`run` of the twin with these flags, on all cores."""
  flags |= {'mode': mode, 'threads': CORES, 'learning_rate': LEARNING_RATE}
  words = [str(word) for name, value in flags.items() for word in (f'--{name}', value)]
  return run([python, PEER / 'twin.py', *words])


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


def make_spec(config: str, data: Path, rows: int, batch_size: int, **fields: Any) -> Any:
  """The `Spec` that the command of `dlrm_jax` has."""
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


def finish(kind: str, record: dict[str, Any], text: str, path: Path | None) -> None:
  """Prints the result and writes its record, by default to experiments/records/<kind>_<date>.json."""
  print(text, machine_line(record['machine']), sep='\n\n')
  path = path or ROOT / 'experiments' / 'records' / f'{kind}_{record["machine"]["date"]}.json'
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(json.dumps(record, indent=2) + '\n')
  say(f'record in {path}')


def say(text: str) -> None:
  """A line of progress on stderr."""
  print(text, file=sys.stderr, flush=True)
