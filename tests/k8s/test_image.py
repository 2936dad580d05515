"""The Dockerfile and .dockerignore: what goes in, who it runs as; without Docker, so by reading them."""

import ast
import fnmatch
import importlib.metadata
import re
import shlex
import subprocess
import sys

import pytest

from tests.k8s.checks import FOLDER, ROOT

TEST_TOOLS = {
  'beartype', 'hypothesis', 'jsonschema', 'kubernetes-validate', 'pytest', 'pytest-xdist', 'pyyaml', 'ruff',
  'scikit-learn',
}  # fmt: skip


def instructions(text):
  """(instruction, arguments) of each line, continued ones joined, comments left out."""
  lines = '\n'.join(line for line in text.splitlines() if not line.lstrip().startswith('#'))
  return [tuple(line.split(None, 1)) for line in re.sub(r'\\\n', ' ', lines).splitlines() if line.strip()]


def is_sent(path, ignore):
  """Whether a file of the repository is part of what Docker builds from; the last pattern that fits decides."""
  sent = True
  for pattern in (line for line in ignore.splitlines() if line and not line.startswith('#')):
    if any(fnmatch.fnmatch(str(place), pattern.removeprefix('!')) for place in (path, *path.parents)):
      sent = pattern.startswith('!')
  return sent


def complaints(text, ignore):
  """All that is wrong with the image."""
  steps = instructions(text)
  names = [name for name, _ in steps]
  users = [argument for name, argument in steps if name == 'USER']
  runs = ' ; '.join(argument for name, argument in steps if name == 'RUN')
  unknown = set(names) - {'FROM', 'COPY', 'RUN', 'WORKDIR', 'ENV', 'USER', 'ENTRYPOINT', 'CMD'}
  rules = [
    (not unknown, f'{unknown}: not used here'),
    (names.count('FROM') == 2, 'FROM: one stage to install, one to run'),
    (len(users) == 1 and bool(re.fullmatch(r'[1-9]\d*:[1-9]\d*', users[0])), f'USER {users}: numbers, not root'),
    (names[-3:] == ['USER', 'ENTRYPOINT', 'CMD'], 'USER must come last before ENTRYPOINT and CMD'),
    (all(argument.startswith('["') for _, argument in steps[-2:]), 'ENTRYPOINT, CMD: a shell would keep signals back'),
    ('--no-install-recommends' in runs, 'apt-get: --no-install-recommends is missing'),
    ('rm -rf /var/lib/apt/lists' in runs, 'apt-get: its lists stay in the image'),
    ('--no-cache-dir' in runs, 'pip: its cache stays in the image'),
    (not re.search(r'curl|wget|https?:', text), 'nothing comes from a URL'),
  ]
  rules += [from_rule(argument) for name, argument in steps if name == 'FROM']
  rules += [rule for name, argument in steps if name == 'COPY' for rule in copy_rules(argument, ignore)]
  return [complaint for holds, complaint in rules if not holds]


def from_rule(argument):
  """Of a base image: all three parts of the version and the release of Debian."""
  return re.match(r'python:3\.11\.\d+-slim-[a-z]+( |$)', argument) is not None, f'FROM {argument}: must be pinned'


def copy_rules(argument, ignore):
  """Of files that are copied: they are in the repository and are sent to Docker."""
  words = shlex.split(argument)
  if words[0].startswith('--from='):
    return
  for source in words[:-1]:
    path = (ROOT / source).resolve()
    inside = path.is_relative_to(ROOT) and path != ROOT
    yield inside and path.exists(), f'COPY {source}: must be a file or folder of the repository'
    yield inside and is_sent(path.relative_to(ROOT), ignore), f'COPY {source}: is left out by .dockerignore'


def files():
  return (FOLDER / 'Dockerfile').read_text(), (ROOT / '.dockerignore').read_text()


def test_the_image_holds():
  assert complaints(*files()) == []


@pytest.mark.parametrize(
  ('pattern', 'replacement', 'words'),
  [
    (r'USER .*\n', '', ['USER']),
    (r'USER .*', 'USER root', ['USER']),
    (r'USER .*', 'USER 0:0', ['USER']),
    (r'(USER .*\n)(ENTRYPOINT .*\n)', r'\2\1', ['USER must come last']),
    (r'FROM \S+', 'FROM python:3.11-slim', ['FROM', 'pinned']),
    (r'FROM \S+\n', 'FROM python:latest\n', ['FROM', 'pinned']),
    (r'FROM \S+\n', 'FROM python\n', ['FROM', 'pinned']),
    (r'COPY configs', 'COPY ../configs', ['COPY ../configs']),
    (r'COPY configs', 'COPY .', ['COPY .']),
    (r'COPY configs', 'COPY config', ['COPY config:']),
    (r'COPY configs', 'COPY experiments', ['COPY experiments', '.dockerignore']),
    (r'COPY configs configs', 'ADD https://example.org/configs.tar configs', ['ADD', 'URL']),
    (r'ENTRYPOINT .*', 'ENTRYPOINT python -m dlrm_jax.main', ['ENTRYPOINT']),
    (r' --no-install-recommends', '', ['--no-install-recommends']),
    (r' --no-cache-dir', '', ['pip']),
    (r' \\\n  && rm -rf /var/lib/apt/lists/\*', '', ['apt-get']),
    (r'CMD', 'CMDS', ['CMDS']),
  ],
)
def test_a_planted_error_is_caught(pattern, replacement, words):
  text, ignore = files()
  text, count = re.subn(pattern, replacement, text, count=1)
  assert count == 1
  found = '\n'.join(complaints(text, ignore))
  assert all(word in found for word in words), found


def test_nothing_but_the_program_is_sent_to_docker():
  _, ignore = files()
  tracked = subprocess.run(['git', 'ls-files'], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
  sent = {path for path in tracked if is_sent(ROOT.joinpath(path).relative_to(ROOT), ignore)}
  assert sent == {path for path in tracked if path.split('/')[0] in ('dlrm_jax', 'configs', 'requirements.txt')}
  for path in ('data/train.csv', 'result/x', '.venv/bin/python', '.git/config', 'dlrm_jax/__pycache__/a.pyc'):
    assert not is_sent(ROOT.joinpath(path).relative_to(ROOT), ignore), path


def packages(folder):
  """Names of the packages that the files of a folder import from outside."""
  found = set()
  for path in (ROOT / folder).rglob('*.py'):
    for node in ast.walk(ast.parse(path.read_text())):
      names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
      names += [node.module or ''] if isinstance(node, ast.ImportFrom) else []
      found |= {name.split('.')[0] for name in names}
  return found - set(sys.stdlib_module_names) - {'dlrm_jax', 'configs', ''}


def test_the_image_has_the_packages_that_the_program_imports_and_no_test_tools():
  text, _ = files()
  [expression] = re.findall(r"sed '([^']+)' requirements.txt", text)
  command = ['sed', expression, 'requirements.txt']
  lines = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
  installed = {line.split('==')[0].lower() for line in lines if line and not line.startswith('#')}
  everything = re.findall(r'^([\w.-]+)==', (ROOT / 'requirements.txt').read_text(), re.MULTILINE)
  assert {name.lower() for name in everything} - installed == TEST_TOOLS
  distributions = importlib.metadata.packages_distributions()
  for package in packages('dlrm_jax') | packages('configs'):
    assert {name.lower() for name in distributions[package]} & installed, package


def test_the_kernels_go_where_every_user_may_write():
  text, _ = files()
  [variables] = [argument for name, argument in instructions(text) if name == 'ENV']
  environment = dict(variable.split('=', 1) for variable in variables.split())
  assert environment['XDG_CACHE_HOME'].startswith('/tmp/')  # an emptyDir in all pods: see checks.pod_rules
