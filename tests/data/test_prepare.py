"""The Kaggle train.txt to train and eval files, against plain Python."""

import csv
import json
import math
import os
import pty
import re
import subprocess
import sys
import termios
import tracemalloc

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from dlrm_jax.data import index, pipeline, prepare, split
from dlrm_jax.data.schema import CATEGORIES, COLUMNS, DataError


@pytest.fixture
def source(criteo, tmp_path):
  """A function that writes rows of strings as train.txt and returns its path."""

  def write(rows, end='\n', final=True):
    text = end.join('\t'.join(row) for row in rows) + (end if final else '')
    (tmp_path / 'train.txt').write_bytes(text.encode())
    return str(tmp_path / 'train.txt')

  return write


@pytest.fixture
def small_blocks(monkeypatch):
  """Blocks and chunks that a small test file has many of."""
  monkeypatch.setattr(prepare, 'BLOCK', 3000)
  monkeypatch.setattr(split, 'CHUNK', 64)


def expected_time_split(rows, train, evaluation):
  """The k-th row taken is the one at k / taken of the file, in whole numbers."""
  places = [k * len(rows) // (train + evaluation) for k in range(train + evaluation)]
  taken = [rows[i] for i in places]
  return taken[:train], taken[train:]


@pytest.mark.parametrize(
  ('total', 'train', 'evaluation'),
  [(300, 240, 60), (300, 80, 20), (300, 1, 1), (301, 100, 1), (300, 0, 50), (2, 0, 1), (299, 200, 98)],
)
@pytest.mark.usefixtures('small_blocks')
def test_time_split(criteo, source, tmp_path, total, train, evaluation):
  rows = criteo.rows(total)
  result = prepare.prepare(source(rows), str(tmp_path), train_rows=train, eval_rows=evaluation)
  expected = expected_time_split(rows, train or total - evaluation, evaluation)
  for name, part in zip(('train', 'eval'), expected, strict=True):
    assert criteo.read(tmp_path / f'{name}.csv') == part
    assert result[f'{name}_rows'] == len(part)
    assert result[f'{name}_click_rate'] == pytest.approx(sum(row[0] == '1' for row in part) / len(part))
    assert result[name] == str(tmp_path / f'{name}.csv')
  assert result['input_rows'] == total


@given(st.data())
@settings(max_examples=50, deadline=None)
def test_time_split_of_any_range(data):
  scale = data.draw(st.sampled_from([1, 10**6]))
  rows = data.draw(st.integers(2, 1000)) * scale
  train = data.draw(st.integers(1, rows - 1))
  evaluation = data.draw(st.integers(1, rows - train))
  start = data.draw(st.integers(0, rows - 1))
  stop = min(rows, start + data.draw(st.integers(1, 300)))
  taken = train + evaluation
  expected = []
  for row in range(start, stop):
    k = math.ceil(row * taken / rows) if scale == 1 else -(-row * taken // rows)
    hit = k < taken and k * rows // taken == row
    expected.append((split.TRAIN if k < train else split.EVAL) if hit else split.NOWHERE)
  assert split.time_split(rows, train, evaluation)(start, stop).tolist() == expected


@pytest.mark.parametrize(('train', 'evaluation'), [(240, 60), (100, 30), (0, 60), (1, 1)])
@pytest.mark.usefixtures('small_blocks')
def test_random_split_has_exact_sizes_and_keeps_the_order(criteo, source, tmp_path, train, evaluation):
  rows = criteo.rows(300)
  prepare.prepare(source(rows), str(tmp_path), train_rows=train, eval_rows=evaluation, split='random', seed=5)
  parts = [criteo.read(tmp_path / f'{name}.csv') for name in ('train', 'eval')]
  assert [len(part) for part in parts] == [train or 240, evaluation]
  numbers = [[int(row[1]) for row in part] for part in parts]
  assert not set(numbers[0]) & set(numbers[1])
  for part, number in zip(parts, numbers, strict=True):
    assert number == sorted(set(number))
    assert part == [rows[i] for i in number]


@pytest.mark.usefixtures('small_blocks')
def test_random_split_depends_on_the_seed_alone(criteo, source, tmp_path, monkeypatch):
  rows = criteo.rows(300)

  def bytes_of(seed, **how):
    prepare.prepare(
      source(rows, **how), str(tmp_path), train_rows=200, eval_rows=50, split='random', seed=seed, force=True
    )
    return (tmp_path / 'train.csv').read_bytes(), (tmp_path / 'eval.csv').read_bytes()

  first = bytes_of(7)
  assert bytes_of(7) == first
  assert bytes_of(8) != first
  monkeypatch.setattr(prepare, 'BLOCK', 1 << 20)
  assert bytes_of(7, end='\r\n', final=False) == first


def test_random_split_is_uniform(monkeypatch):
  """Each row, and each pair of rows across chunks, goes to training as often as chance says."""
  monkeypatch.setattr(split, 'CHUNK', 4)
  draws = np.array([split.random_split(10, 5, 2, seed)(0, 10) for seed in range(600)])
  assert ((draws == split.TRAIN).sum(axis=1) == 5).all()
  assert ((draws == split.EVAL).sum(axis=1) == 2).all()
  np.testing.assert_allclose((draws == split.TRAIN).mean(axis=0), 0.5, atol=0.08)
  np.testing.assert_allclose((draws == split.EVAL).mean(axis=0), 0.2, atol=0.08)
  for other in (1, 5, 9):
    both = ((draws[:, 0] == split.TRAIN) & (draws[:, other] == split.TRAIN)).mean()
    assert both == pytest.approx(5 / 10 * 4 / 9, abs=0.08)


def test_random_split_of_too_many_rows():
  with pytest.raises(DataError, match=r'fewer than 10\^9 rows, found 1000000000; pass --split time'):
    split.random_split(10**9, 5, 2)


@pytest.mark.parametrize('end', ['\n', '\r\n'])
@pytest.mark.parametrize('final', [True, False])
@pytest.mark.parametrize('block', [1000, 3000, 1 << 20])
def test_line_ends_and_blocks(criteo, source, tmp_path, monkeypatch, end, final, block):
  monkeypatch.setattr(prepare, 'BLOCK', block)
  rows = criteo.rows(40)
  prepare.prepare(source(rows, end, final), str(tmp_path), train_rows=30, eval_rows=10)
  assert criteo.read(tmp_path / 'train.csv') + criteo.read(tmp_path / 'eval.csv') == rows
  assert b'\r' not in (tmp_path / 'train.csv').read_bytes()


def test_any_string_without_comma_or_quote_is_an_id(criteo, source, tmp_path):
  rows = criteo.rows(20)
  rows[3][20], rows[4][39], rows[5][14], rows[6][15] = 'Grüße', 'a b;c', "it's", 'NULL'
  rows[7][1:14] = [str(-(2**63)), str(2**63 - 1), '0', *[''] * 10]
  prepare.prepare(source(rows), str(tmp_path), train_rows=10, eval_rows=10)
  assert criteo.read(tmp_path / 'train.csv') + criteo.read(tmp_path / 'eval.csv') == rows


def _parquet_value(name, field):
  return None if not field else field if name in CATEGORIES else int(field)


@pytest.mark.usefixtures('small_blocks')
def test_parquet(criteo, source, tmp_path, monkeypatch):
  monkeypatch.setattr(prepare, 'ROW_GROUP', 70)
  rows = criteo.rows(300)
  rows[3][20] = 'NULL'
  prepare.prepare(source(rows), str(tmp_path), 'parquet', train_rows=150, eval_rows=50)
  for name, part in zip(('train', 'eval'), expected_time_split(rows, 150, 50), strict=True):
    file = parquet.ParquetFile(tmp_path / f'{name}.parquet')
    groups = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
    assert groups == {'train': [70, 70, 10], 'eval': [50]}[name]
    table = file.read()
    assert table.column_names == list(COLUMNS)
    expected = [{name: _parquet_value(name, field) for name, field in zip(COLUMNS, row, strict=True)} for row in part]
    assert table.to_pylist() == expected


def test_the_reader_sees_the_same_batches_from_csv_and_parquet(criteo, source, tmp_path):
  path = source(criteo.rows(300))
  for file_format in ('csv', 'parquet'):
    prepare.prepare(path, str(tmp_path), file_format, train_rows=200, eval_rows=60)
  spec = criteo.spec(tmp_path)
  found = {}
  for file_format in ('csv', 'parquet'):
    train = index.index_files(f'train.{file_format}', str(tmp_path))
    evaluation = index.index_files(f'eval.{file_format}', str(tmp_path))
    assert (train.rows, evaluation.rows) == (200, 60)
    batches = pipeline.train_batches(train, spec, 32, seed=1)
    found[file_format] = (
      [next(batches)[0] for _ in range(7)],
      [b for b, _ in pipeline.eval_batches(evaluation, spec, 32)],
    )
  assert len(found['csv'][1]) == 2
  jax.tree.map(np.testing.assert_array_equal, found['csv'], found['parquet'])
  label, dense, bucket = criteo.expected(criteo.read(tmp_path / 'eval.csv')[:32])
  batch = found['csv'][1][0]
  np.testing.assert_array_equal(batch.label, label)
  np.testing.assert_allclose(batch.dense, dense, rtol=3e-7)
  np.testing.assert_array_equal(batch.bucket, bucket)


def changed(rows, line, field, value):
  """A copy of the rows in which one field is another; `line` counts from 1."""
  rows = [list(row) for row in rows]
  rows[line - 1][field] = value
  return rows


@pytest.mark.parametrize('block', [3000, 1 << 20])
@pytest.mark.parametrize('file_format', ['csv', 'parquet'])
@pytest.mark.parametrize(
  ('change', 'message'),
  [
    (lambda rows: changed(rows, 37, 20, 'a,b'), r"line 37, field C7: found b'a,b'; a comma, quote .* remove it"),
    (lambda rows: changed(rows, 37, 3, '1,5'), r"line 37, field I3: found b'1,5'; a comma"),
    (lambda rows: changed(rows, 36, 39, '"x'), r"line 36, field C26: found b'\"x'; a comma, quote"),
    (lambda rows: changed(rows, 36, 20, 'a\rb'), r"line 36, field C7: found b'a\\rb'; a comma, quote or carriage"),
    (lambda rows: changed(rows, 36, 20, 'a\0b'), 'line 36, field C7: found a NUL byte'),
    (lambda rows: changed(rows, 35, 0, '2'), "line 35, field label: found '2', expected 0 or 1"),
    (lambda rows: changed(rows, 35, 0, ''), "line 35, field label: found '', expected 0 or 1"),
    (lambda rows: changed(rows, 34, 13, 'x7'), "line 34, field I13: found 'x7', which is no number"),
    (lambda rows: changed(rows, 34, 13, '1.5'), "line 34, field I13: found b'1.5', expected an integer"),
    (lambda rows: changed(rows, 34, 13, str(2**63)), 'line 34, field I13: found .* does not fit 64 bits'),
    (lambda rows: [*rows[:36], rows[36][:-1], *rows[37:]], "line 37, .*found 39 columns .*Kaggle's test.txt"),
    (lambda rows: [*rows[:36], [*rows[36], ''], *rows[37:]], 'line 37, field C26: found 41 columns .*expected 40'),
    (lambda rows: [*rows[:36], [], *rows[36:]], 'line 37, field label: found a blank line; remove it'),
    (lambda rows: [list(COLUMNS), *rows], r'line 1, field label: found a header line \(label, I1, ...\); remove it'),
  ],
)
def test_bad_lines(criteo, source, tmp_path, capsys, monkeypatch, file_format, block, change, message):
  monkeypatch.setattr(prepare, 'BLOCK', block)
  path = source(change(criteo.rows(60)))
  arguments = ['--input', path, '--out', str(tmp_path / 'out'), '--train_rows', '40', '--eval_rows', '10']
  assert_refused([*arguments, '--format', file_format], capsys, f'error: {path}, {message}')
  assert os.listdir(tmp_path / 'out') == []


def assert_refused(arguments, capsys, message):
  """The command says one line on stderr that matches from its beginning, and fails."""
  assert prepare.main(arguments) == 1
  out, err = capsys.readouterr()
  assert out == ''
  assert err.count('\n') == 1
  assert re.match(message, err), err


def test_truncated_last_line(criteo, source, tmp_path, capsys):
  path = source(criteo.rows(60))
  with open(path, 'rb+') as file:
    file.truncate(os.path.getsize(path) - 150)
  message = f'error: {path}, line 60, .*: the file ends in the middle of a row; it was cut off'
  assert_refused(['--input', path, '--out', str(tmp_path), '--train_rows', '0', '--eval_rows', '10'], capsys, message)


def test_bytes_that_are_not_utf8(criteo, source, tmp_path, capsys):
  path = source(changed(criteo.rows(9), 4, 25, 'caf#'))
  data = (tmp_path / 'train.txt').read_bytes().replace(b'caf#', b'caf\xe9')
  (tmp_path / 'train.txt').write_bytes(data)
  message = f'error: {path}, line 4, field C12: found bytes that are not UTF-8'
  assert_refused(['--input', path, '--train_rows', '5', '--eval_rows', '1', '--out', str(tmp_path)], capsys, message)


def test_wrong_files(criteo, tmp_path, capsys):
  def assert_refuses(path, message):
    assert_refused(['--input', str(path), '--out', str(tmp_path / 'out')], capsys, message)

  assert_refuses(tmp_path / 'no.txt', "error: no file '.*no.txt'; get the data from http")
  (tmp_path / 'empty.txt').write_bytes(b'')
  assert_refuses(tmp_path / 'empty.txt', 'error: .*empty.txt is empty; unpack')
  path = criteo.write(tmp_path / 'a.csv', criteo.rows(5))
  assert_refuses(path, 'error: .*a.csv, line 1, .*found 1 columns .*but 40 separated by commas')
  (tmp_path / 'zeros').write_bytes(bytes(2 * prepare.BLOCK))
  assert_refuses(tmp_path / 'zeros', f'error: .*zeros, line 1: longer than {prepare.BLOCK} bytes')
  assert os.listdir(tmp_path / 'out') == []


def test_too_few_rows(criteo, source, tmp_path, capsys):
  path = source(criteo.rows(50))
  out = ['--input', path, '--out', str(tmp_path / 'out')]
  message = f'error: {path} has 50 rows, but train_rows=8000000 and eval_rows=2000000 are wanted; '
  advice = ['--train_rows', '0', '--eval_rows', '10']
  assert_refused(out, capsys, f'{message}pass {" ".join(advice)} for all of it')
  assert_refused([*out, '--train_rows', '0', '--eval_rows', '50'], capsys, '.*train_rows=the rest and eval_rows=50')
  assert prepare.main([*out, *advice]) == 0
  result = json.loads(capsys.readouterr().out)
  assert (result['train_rows'], result['eval_rows']) == (40, 10)


def test_overwrites_only_when_told_to(criteo, source, tmp_path, capsys):
  arguments = ['--input', source(criteo.rows(50)), '--out', str(tmp_path), '--train_rows', '40', '--eval_rows', '10']
  (tmp_path / 'eval.csv').write_text('mine')
  assert_refused(arguments, capsys, 'error: .*eval.csv would be overwritten; pass --force')
  assert (tmp_path / 'eval.csv').read_text() == 'mine'
  assert sorted(os.listdir(tmp_path)) == ['eval.csv', 'train.txt']
  bad = source(changed(criteo.rows(50), 49, 0, 'x'))
  assert prepare.main([*arguments, '--force']) == 1
  assert (tmp_path / 'eval.csv').read_text() == 'mine', bad
  source(criteo.rows(50))
  assert prepare.main([*arguments, '--force']) == 0
  assert len(criteo.read(tmp_path / 'eval.csv')) == 10
  assert sorted(os.listdir(tmp_path)) == ['eval.csv', 'train.csv', 'train.txt']


def test_interrupted(criteo, source, tmp_path, monkeypatch):
  """Whatever stops it, nothing half-written is left."""
  path = source(criteo.rows(50))

  def interrupt(*_):
    raise KeyboardInterrupt

  monkeypatch.setattr(prepare.CsvWriter, 'write', interrupt)
  with pytest.raises(KeyboardInterrupt):
    prepare.prepare(path, str(tmp_path), train_rows=40, eval_rows=10)
  assert os.listdir(tmp_path) == ['train.txt']


@pytest.mark.parametrize('change', [-1, 1])
def test_a_file_that_changes_is_refused(criteo, source, tmp_path, monkeypatch, change):
  path = source(criteo.rows(50))
  count = prepare._count_rows
  monkeypatch.setattr(prepare, '_count_rows', lambda *args: count(*args) + change)
  with pytest.raises(DataError, match='changed while it was read'):
    prepare.prepare(path, str(tmp_path), train_rows=20, eval_rows=10, split='random')
  assert os.listdir(tmp_path) == ['train.txt']


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [(['--eval_rows', '0'], '0 is less than 1'), (['--train_rows', '-1'], '-1 is less'), (['--seed', 'x'], "'x'")],
)
def test_wrong_arguments(capsys, arguments, message):
  with pytest.raises(SystemExit, match='2'):
    prepare.main(arguments)
  assert message in capsys.readouterr().err


def test_memory_does_not_grow_with_the_file(criteo, source, tmp_path, monkeypatch):
  monkeypatch.setattr(prepare, 'BLOCK', 1 << 14)
  peaks = []
  for copies in (1, 10):
    path = source(criteo.rows(400) * copies)
    tracemalloc.start()
    prepare.prepare(path, str(tmp_path), train_rows=0, eval_rows=100, force=True)
    peaks.append(tracemalloc.get_traced_memory()[1])
    tracemalloc.stop()
    del path
  assert peaks[1] < 1.5 * peaks[0] < 2e6


def test_command_line(criteo, source, tmp_path):
  """One line of JSON on stdout; a progress bar on stderr if that is a terminal, else nothing."""
  rows = criteo.rows(50)
  command = [sys.executable, '-m', 'dlrm_jax.data.prepare', '--input', source(rows), '--out', str(tmp_path)]
  command += ['--train_rows', '40', '--eval_rows', '10', '--force']
  quiet = subprocess.run(command, capture_output=True, text=True, check=True)
  assert quiet.stderr == ''
  result = json.loads(quiet.stdout)
  assert result['eval_click_rate'] == pytest.approx(sum(row[0] == '1' for row in rows[40:]) / 10)
  with open(tmp_path / 'train.csv', newline='') as file:
    assert list(csv.reader(file)) == rows[:40]
  controller, terminal = pty.openpty()
  termios.tcsetwinsize(terminal, (24, 80))
  subprocess.run(command, stdout=subprocess.DEVNULL, stderr=terminal, check=True)
  os.close(terminal)
  shown = os.read(controller, 10_000)
  os.close(controller)
  assert b'%' in shown
