"""Imports go one way, and no module does anything when it is imported."""

import ast
import subprocess
import sys

# Each may import only from those before it (and from its own group).
ORDER = [
  ['structs', 'spec', 'words', 'bits', 'sums', 'sharding', 'peers', 'watchdog', 'memory', 'cluster', 'cores', 'locks'],
  ['native'],
  ['optim', 'model', 'metrics'],
  ['embeddings'],
  ['data'],
  ['program', 'state', 'step', 'stretches', 'upkeep'],
  ['checkpoint', 'clock', 'distributed', 'evaluate', 'logs', 'sources'],
  ['train'],
  ['main', 'inspect_checkpoint', 'launch'],
]


def modules(repository):
  for path in sorted((repository / 'dlrm_jax').rglob('*.py')):
    yield path.relative_to(repository).with_suffix('').parts[1:], path


def imports(path):
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.ImportFrom) and node.module and node.module.split('.')[0] == 'dlrm_jax':
      parts = node.module.split('.')[1:]
      yield from [parts] if parts else [[alias.name] for alias in node.names]
    elif isinstance(node, ast.Import):
      yield from (alias.name.split('.')[1:] for alias in node.names if alias.name.startswith('dlrm_jax.'))


def test_imports_go_one_way(repository):
  rank = {name: number for number, names in enumerate(ORDER) for name in names}
  seen = set()
  for parts, path in modules(repository):
    if parts[0] == '__init__':
      continue
    seen.add(parts[0])
    for target in imports(path):
      assert rank[target[0]] <= rank[parts[0]], f'{path} imports dlrm_jax.{".".join(target)}'
  assert seen == set(rank)


def test_configs_import_only_ml_collections_the_standard_library_and_each_other(repository):
  for path in (repository / 'configs').glob('*.py'):
    for node in ast.walk(ast.parse(path.read_text())):
      names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
      names += [node.module] if isinstance(node, ast.ImportFrom) else []
      for name in names:
        root = name.split('.')[0]
        assert root in {'configs', 'ml_collections'} | sys.stdlib_module_names, f'{path} imports {name}'


def test_a_config_mistake_ends_before_jax_is_imported(repository):
  code = 'import sys; from dlrm_jax.main import main; print(main(["m", "--config=no.py"]), "jax" in sys.modules)'
  done = subprocess.run([sys.executable, '-c', code], cwd=repository, capture_output=True, text=True, check=True)
  assert done.stdout.split() == ['2', 'False']
  assert done.stderr.count('\n') == 1
