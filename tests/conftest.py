"""Types and shapes of public functions are checked while tests run; silent broadcasting between ranks is an error."""

import contextlib
import random
import tempfile

import jax
import pytest
from jaxtyping import install_import_hook

# Not structs.py, since trees of shapes have its types too, nor spec.py, which checks the values of users itself.
CHECKED = [
  'dlrm_jax.embeddings', 'dlrm_jax.evaluate', 'dlrm_jax.metrics', 'dlrm_jax.model', 'dlrm_jax.optim',
  'dlrm_jax.program', 'dlrm_jax.state', 'dlrm_jax.step', 'dlrm_jax.data', 'dlrm_jax.native', 'dlrm_jax.sharding',
  'dlrm_jax.words', 'dlrm_jax.bits',
]  # fmt: skip
install_import_hook(CHECKED, 'beartype.beartype')
jax.config.update('jax_numpy_rank_promotion', 'raise')
jax.config.update('jax_num_cpu_devices', 4)  # for the tests that ask for more than one


# Most of the time of these tests is compilation, and many compile the same program.
_cache = tempfile.TemporaryDirectory(prefix='dlrm_jax_tests_')
jax.config.update('jax_compilation_cache_dir', _cache.name)
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.1)


MOST_MAPS = 20_000  # of the 65,530 areas of memory that Linux gives a process; a compiled program has some


@pytest.fixture(autouse=True)
def few_programs():
  """After a test, compiled programs are given up if there are many: with too many, LLVM aborts the process."""
  yield
  with contextlib.suppress(FileNotFoundError), open('/proc/self/maps') as maps:
    if sum(1 for _ in maps) > MOST_MAPS:
      jax.clear_caches()


@pytest.fixture(autouse=True)
def alone(monkeypatch):
  """Runs inside this process have one device, as they have outside of it."""
  from dlrm_jax import sharding, train

  monkeypatch.setattr(train, 'all_devices', lambda: sharding.ALONE)


@pytest.fixture(scope='session')
def repository(pytestconfig):
  return pytestconfig.rootpath


@pytest.fixture(scope='session')
def criteo(tmp_path_factory):
  """A folder with train.csv (600 rows) and eval.csv (200): the click depends on C1."""
  folder = tmp_path_factory.mktemp('criteo')
  rng = random.Random(0)
  for name, rows in (('train', 600), ('eval', 200)):
    (folder / f'{name}.csv').write_text(''.join(criteo_row(rng) for _ in range(rows)))
  return folder


def criteo_row(rng):
  """One line of a Criteo CSV."""
  category, integer = rng.randrange(4), rng.randrange(10)
  label = int(rng.random() < (0.05, 0.2, 0.7, 0.95)[category])
  others = [str(rng.randrange(100)) if rng.random() < 0.8 else '' for _ in range(12)]
  ids = [f'{rng.randrange(30):08x}' if rng.random() < 0.9 else '' for _ in range(25)]
  return ','.join([str(label), str(integer), *others, f'{category:08x}', *ids]) + '\n'
