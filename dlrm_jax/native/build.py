"""The C++ kernels: compiled at first use where a compiler exists, kept in the user's cache folder, known to XLA:CPU."""

import concurrent.futures
import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jaxlib

from dlrm_jax.cores import usable_cores
from dlrm_jax.locks import wait_for_lock

FOLDER = Path(__file__).parent
FLAGS = (
  *('-std=c++17', '-O3', '-march=native', '-DNDEBUG', '-w', '-fPIC', '-fno-strict-aliasing'),
  '-fno-math-errno',  # or a square root is a call, one number at a time
)
AT_ONCE = 4  # compilers at most, each of which takes up to 360 MB
TURN_SECONDS = 300.0  # that a process waits at most for another that builds the same
COMPILERS = ('c++', 'g++', 'clang++')
# What the kernels are called in XLA's programs, and in C++.
TARGETS = {
  'dlrm_rows_gather': 'DlrmRowsGather',
  'dlrm_rows_scatter': 'DlrmRowsScatter',
  'dlrm_rows_merge': 'DlrmRowsMerge',
  'dlrm_rows_gradientdescent': 'DlrmRowsGradientDescent',
  'dlrm_rows_adagrad': 'DlrmRowsAdagrad',
  'dlrm_rows_adagraddecay': 'DlrmRowsAdagradDecay',
  'dlrm_rows_adam': 'DlrmRowsAdam',
  'dlrm_rows_adamasync': 'DlrmRowsAdamAsync',
  'dlrm_rows_rmsprop': 'DlrmRowsRmsProp',
  'dlrm_parameters_gradientdescent': 'DlrmParametersGradientDescent',
  'dlrm_parameters_adagrad': 'DlrmParametersAdagrad',
  'dlrm_parameters_adagraddecay': 'DlrmParametersAdagradDecay',
  'dlrm_parameters_adam': 'DlrmParametersAdam',
  'dlrm_parameters_adamasync': 'DlrmParametersAdamAsync',
  'dlrm_parameters_rmsprop': 'DlrmParametersRmsProp',
  'dlrm_directory_find': 'DlrmDirectoryFind',
  'dlrm_directory_claim': 'DlrmDirectoryClaim',
  'dlrm_bloom_add': 'DlrmBloomAdd',
  'dlrm_exchange_meet': 'DlrmExchangeMeet',
  'dlrm_exchange_add': 'DlrmExchangeAdd',
  'dlrm_fence': 'DlrmFence',
  'dlrm_fold': 'DlrmFold',
  'dlrm_fold_backward': 'DlrmFoldBackward',
  'dlrm_transpose_float32_float32': 'DlrmTransposeFloatFloat',
  'dlrm_transpose_float32_bfloat16': 'DlrmTransposeFloatBFloat16',
  'dlrm_transpose_bfloat16_float32': 'DlrmTransposeBFloat16Float',
  'dlrm_dense_forward_float32': 'DlrmDenseForwardFloat',
  'dlrm_dense_backward_float32': 'DlrmDenseBackwardFloat',
  'dlrm_dense_forward_bfloat16': 'DlrmDenseForwardBFloat16',
  'dlrm_dense_backward_bfloat16': 'DlrmDenseBackwardBFloat16',
  'dlrm_top_float32': 'DlrmTopFloat',
  'dlrm_top_bfloat16': 'DlrmTopBFloat16',
}


_LOCK = threading.Lock()


class BuildError(RuntimeError):
  """The kernels cannot be had; the message is one line."""


class Native(NamedTuple):
  """Whether the C++ kernels can be used, and a line of log that says so or why not."""

  ready: bool
  note: str


def choose(wanted: bool) -> Native:
  """The C++ kernels, ready for XLA, if they are `wanted` and can be had."""
  if not wanted:
    return Native(False, 'XLA alone, no C++ kernels: config.native is False')
  if (backend := jax.default_backend()) != 'cpu':
    return Native(False, f'XLA alone in the step, C++ kernels to read data alone: this runs on {backend}, not on a CPU')
  return load()


def load() -> Native:
  """Builds the kernels if need be and makes them known to XLA, once in a process; from any thread."""
  with _LOCK:
    return _load()[0]


def library() -> ctypes.CDLL | None:
  """What `load` loads, for what is called without XLA; None if it cannot be had."""
  with _LOCK:
    return _load()[1]


@functools.cache
def _load() -> tuple[Native, ctypes.CDLL | None]:
  try:
    library, note = _library()
    for target, symbol in TARGETS.items():
      jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(getattr(library, symbol)), platform='cpu')
  except (BuildError, OSError, AttributeError) as error:
    return Native(False, f'XLA alone, no C++ kernels: {error}'), None
  return Native(True, note), library


def _library() -> tuple[ctypes.CDLL, str]:
  compiler = find_compiler()
  folder = cache_folder()
  path = folder / f'kernels-{cache_key(compiler)}.so'
  if is_whole(path):
    return _kept(path)
  started = time.perf_counter()
  try:
    folder.mkdir(parents=True, exist_ok=True)
    writable = os.access(folder, os.W_OK)
  except OSError:
    writable = False
  with one_at_a_time(folder) if writable else contextlib.nullcontext():
    if is_whole(path):  # by now
      return _kept(path)
    with tempfile.TemporaryDirectory(prefix='dlrm_jax_', dir=folder if writable else None) as build:
      built = Path(build) / path.name
      compile_to(built, compiler)
      seal(built)
      # Renamed whole: a process that did not wait for its turn sees all of the file or nothing.
      path = built.replace(path) if writable else built
      library = ctypes.CDLL(str(path))  # stays loaded even if the file goes
  where = path if writable else f'not kept, since {folder} cannot be written'
  return library, f'C++ kernels, built in {time.perf_counter() - started:.0f} s: {where}'


def cache_folder() -> Path:
  """Where the kernels are kept; for a user without a home, one that cannot be written."""
  try:
    return Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache') / 'dlrm_jax'
  except RuntimeError:
    return Path(os.devnull) / 'dlrm_jax'


def _kept(path: Path) -> tuple[ctypes.CDLL, str]:
  return ctypes.CDLL(str(path)), f'C++ kernels: {path}'


@contextlib.contextmanager
def one_at_a_time(folder: Path) -> Iterator[None]:
  """Of the processes that share a folder one after another, so that those of a launcher do not all build the same.

  The system ends the turn of one that dies. Who has waited TURN_SECONDS for one that is stopped, or whose file system
  has no locks, goes on without.
  """
  descriptor = os.open(folder, os.O_RDONLY)
  try:
    wait_for_lock(descriptor, f'builds the C++ kernels in {folder}', TURN_SECONDS)
    yield
  finally:
    os.close(descriptor)


def seal(path: Path) -> None:
  """Appends its digest to a library, which the system's loader does not look at."""
  with path.open('ab') as file:
    file.write(hashlib.sha256(path.read_bytes()).digest())


def is_whole(path: Path) -> bool:
  """Whether there is a library that was sealed. To load half of one would kill the process."""
  try:
    code = path.read_bytes()
  except OSError:
    return False
  return hashlib.sha256(code[:-32]).digest() == code[-32:]


def find_compiler() -> list[str]:
  """$CXX, which may have options, or the first C++ compiler in PATH. BuildError if there is none."""
  named = os.environ.get('CXX', '')
  for name, *options in [shlex.split(named)] if named.strip() else [[name] for name in COMPILERS]:
    found = shutil.which(name)
    if found:
      return [found, *options]
  raise BuildError(f'no C++ compiler, looked for {named or ", ".join(COMPILERS)}; install g++ or set CXX')


def cache_key(compiler: Sequence[str], folder: Path = FOLDER, processor: Callable[[], str] | None = None) -> str:
  """Of all that decides what the machine code is: a home folder may be shared by machines that differ."""
  parts = [path.name.encode() + path.read_bytes() for path in sources(folder)]
  version = _run([*compiler, '--version']).stdout
  settings = (*compiler, version, *FLAGS, jax.__version__, jaxlib.__version__, (processor or describe_processor)())
  return hashlib.sha256(b'\0'.join([*parts, *(item.encode() for item in settings)])).hexdigest()[:24]


def sources(folder: Path = FOLDER) -> list[Path]:
  """The C++ files, headers included."""
  return sorted([*folder.glob('*.cc'), *folder.glob('*.h')])


def describe_processor() -> str:
  """Model and instruction sets of this processor: what -march=native looks at."""
  words = [platform.system(), platform.machine(), platform.processor()]
  kept = ('vendor_id', 'cpu family', 'model', 'stepping', 'flags', 'Features', 'CPU ')
  try:
    first, _, _ = Path('/proc/cpuinfo').read_text().partition('\n\n')
  except OSError:
    return ' '.join([*words, platform.version()])
  return '\n'.join([*words, *(line for line in first.splitlines() if line.startswith(kept))])


def compile_to(path: Path, compiler: Sequence[str], folder: Path = FOLDER) -> None:
  """Compiles the C++ files, several at a time, into one library. BuildError, with the compiler's first complaint, if
  that fails."""
  files = [file for file in sources(folder) if file.suffix == '.cc']
  with tempfile.TemporaryDirectory(dir=path.parent) as build:
    objects = [Path(build) / f'{file.stem}.o' for file in files]
    command = [*compiler, *FLAGS, '-isystem', jax.ffi.include_dir()]
    compile_one = lambda file, into: _compile([*command, '-c', str(file), '-o', str(into)])
    with concurrent.futures.ThreadPoolExecutor(min(AT_ONCE, len(usable_cores()))) as pool:
      list(pool.map(compile_one, files, objects))
    _compile([*command, '-shared', *map(str, objects), '-o', str(path)])


def _compile(command: list[str]) -> None:
  done = _run(command)
  if done.returncode:
    lines = [line for line in done.stderr.splitlines() if 'error' in line] or done.stderr.splitlines() or ['?']
    raise BuildError(f'{command[0]} failed: {lines[0].strip()}')


def _run(command: list[str]) -> subprocess.CompletedProcess:
  # The C locale, so that an error is called one.
  environment = {**os.environ, 'LC_ALL': 'C'}
  return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
