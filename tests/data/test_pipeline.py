"""The order of batches against a list of rows and the rule of `layout` written out."""

import collections
import itertools
import subprocess
import sys
import threading

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import csv as arrow_csv

from dlrm_jax.data import pipeline
from dlrm_jax.data.cache import index_cached
from dlrm_jax.data.index import index_files
from dlrm_jax.data.layout import Layout
from dlrm_jax.data.pipeline import batches_per_epoch, eval_batches, permutation, train_batches
from dlrm_jax.data.schema import COLUMNS, DataError
from tests.data.numbered import counted, numbers


def epoch_of(index, spec, size, seed=0, **processes):
  """The first epoch, as numbers of rows of each batch."""
  iterator = train_batches(index, spec, size, seed, **processes)
  return [numbers(next(iterator)[0]) for _ in range(batches_per_epoch(index.rows, size))]


def order_by_rule(rows, streams, shuffle_rows, seed, epoch):
  """The order of an epoch, position after position, from the definition."""
  layout = Layout(rows, streams, shuffle_rows)
  shuffled = []
  first = 0
  for stream in range(streams):
    count = len(range(stream, rows, streams))
    part = np.arange(first, first + count)
    first += count
    for window in [w for w in layout.schedule() if w.stream == stream]:
      within = part[window.start : window.stop].copy()
      part[window.start : window.stop] = within[permutation(seed, epoch, window)] if shuffle_rows else within
    shuffled.append(part)
  return [int(shuffled[p % streams][p // streams]) for p in range(rows)]


def in_places(order, start, size, rows, streams):
  """Rows of a batch as its examples: where every stream has as many places, stream by stream."""
  positions = range(start, min(start + size, rows))
  if size % streams == 0 and start % streams == 0:
    positions = sorted(positions, key=lambda p: (p % streams, p))
  return [order[p] for p in positions]


@settings(max_examples=50, deadline=None)
@given(
  rows=st.integers(1, 150),
  streams=st.integers(1, 9),
  size=st.integers(1, 70),
  shuffle_rows=st.integers(0, 20),
  seed=st.integers(0, 3),
)
def test_batches_are_the_positions_of_the_rule(criteo, rows, streams, size, shuffle_rows, seed):
  spec = criteo.spec('', streams=streams, shuffle_rows=shuffle_rows)
  iterator = train_batches(counted(rows), spec, size, seed)
  for epoch in range(2):
    order = order_by_rule(rows, streams, shuffle_rows, seed, epoch)
    assert sorted(order) == list(range(rows))
    for start in range(0, rows, size):
      batch, state = next(iterator)
      assert numbers(batch) == in_places(order, start, size, rows, streams)
      assert batch.label.shape == (size,)
      last = start + size >= rows
      assert state == {'epoch': epoch + last, 'position': 0 if last else start + size}
      assert state == iterator.get_state()


@settings(max_examples=25, deadline=None)
@given(
  rows=st.integers(1, 200),
  streams=st.integers(1, 12),
  size=st.integers(1, 50),
  processes=st.integers(1, 4),
)
def test_processes_share_the_same_global_batches(criteo, rows, streams, size, processes):
  processes = min(processes, streams)
  spec = criteo.spec('', streams=streams)
  whole = train_batches(counted(rows), spec, size, 1)
  parts = [train_batches(counted(rows), spec, size, 1, i, processes) for i in range(processes)]
  for _ in range(2 * batches_per_epoch(rows, size)):
    batch, state = next(whole)
    shares = [next(part) for part in parts]
    assert collections.Counter(numbers(batch)) == collections.Counter(n for b, _ in shares for n in numbers(b))
    assert {s['position'] for _, s in shares} == {state['position']}
    assert len({b.label.shape for b, _ in shares}) == 1
    if size % streams == 0 and streams % processes == 0:
      for name in ('label', 'dense', 'bucket', 'weight'):
        joined = np.concatenate([getattr(b, name) for b, _ in shares])
        np.testing.assert_array_equal(joined, getattr(batch, name))


@pytest.mark.parametrize(
  ('streams', 'processes', 'size', 'local'), [(16, 4, 512, 128), (16, 3, 512, 192), (4, 4, 1, 1)]
)
def test_local_size(streams, processes, size, local):
  assert {Layout(1000, streams, 5, i, processes).local_size(size) for i in range(processes)} == {local}


@pytest.mark.parametrize('process', [(0, 1), (0, 3), (2, 3)])
def test_resume_at_every_cut_equals_uninterrupted(criteo, process):
  rows, size = 110, 7  # one cut is at position 105, after which the first process has nothing more of the epoch
  spec = criteo.spec('', streams=11, shuffle_rows=3)
  whole = train_batches(counted(rows), spec, size, 3, *process)
  uninterrupted = [next(whole) for _ in range(3 * batches_per_epoch(rows, size))]
  state = {'epoch': 0, 'position': 0}
  for cut, (_, after) in enumerate(uninterrupted[:-4]):
    resumed = train_batches(counted(rows), spec, size, 3, *process, state=state)
    for batch, expected_state in uninterrupted[cut : cut + 4]:
      again, again_state = next(resumed)
      assert again_state == expected_state
      np.testing.assert_array_equal(again.label, batch.label)
      np.testing.assert_array_equal(again.weight, batch.weight)
    state = after


@settings(max_examples=25, deadline=None)
@given(
  rows=st.integers(1, 200),
  cut=st.integers(0, 20),
  sizes=st.tuples(st.integers(1, 40), st.integers(1, 40)),
  processes=st.tuples(st.integers(1, 4), st.integers(1, 4)),
)
def test_resume_with_other_batches_and_processes_loses_and_repeats_nothing(criteo, rows, cut, sizes, processes):
  spec = criteo.spec('', streams=6)
  cut = min(cut, batches_per_epoch(rows, sizes[0]) - 1)
  seen, states = [], []
  for i in range(processes[0]):
    iterator = train_batches(counted(rows), spec, sizes[0], 5, i, processes[0])
    seen += [n for _ in range(cut) for n in numbers(next(iterator)[0])]
    states.append(iterator.get_state())
  assert all(state == states[0] for state in states)
  for i in range(processes[1]):
    iterator = train_batches(counted(rows), spec, sizes[1], 5, i, processes[1], state=states[0])
    while iterator.get_state()['epoch'] == 0:
      seen += numbers(next(iterator)[0])
  assert sorted(seen) == list(range(rows))


def test_set_state_reads_only_what_is_current(criteo):
  index = counted(100_000)
  spec = criteo.spec('', streams=4, shuffle_rows=1000)
  iterator = train_batches(index, spec, 100, 0, state={'epoch': 7, 'position': 60_000})
  next(iterator)
  reads = index.files[0].reads
  assert len(reads) == 4
  assert all(stop - start == 1000 for start, stop in reads)


@pytest.mark.parametrize('rows', [1, 20_479, 20_480, 100_000, 1_000_003])
def test_windows_cover_each_stream_and_are_large(rows):
  layout = Layout(rows, 16, 20_480)
  for stream in range(16):
    windows = [w for w in layout.schedule() if w.stream == stream]
    ends = [0] + [w.stop for w in windows]
    assert [w.start for w in windows] == ends[:-1]
    assert ends[-1] == layout.stream_rows(stream)
    if layout.stream_rows(stream) > 20_480:
      assert min(w.stop - w.start for w in windows) >= 20_480
      assert max(w.stop - w.start for w in windows) < 3 * 20_480


def test_windows_of_streams_do_not_end_together():
  ends = [window.stop for window in Layout(16 * 200_000, 16, 20_480).schedule() if window.stop < 190_000]
  assert len(set(ends)) == len(ends)


def test_seed_and_epoch_change_the_order_and_nothing_else_does(criteo):
  spec = criteo.spec('', shuffle_rows=20)
  same, again = (epoch_of(counted(200), spec, 10, seed=1) for _ in range(2))
  other = epoch_of(counted(200), spec, 10, seed=2)
  assert same == again
  assert same != other
  iterator = train_batches(counted(200), spec, 200, 1)
  assert numbers(next(iterator)[0]) != numbers(next(iterator)[0])


@pytest.mark.parametrize('threads', [1, 2])
def test_threads_change_nothing_and_end(criteo, threads):
  before = set(threading.enumerate())
  spec = criteo.spec('')
  iterator = train_batches(counted(300), criteo.spec('', threads=threads), 7, 1)
  batches = [numbers(next(iterator)[0]) for _ in range(batches_per_epoch(300, 7))]
  assert batches == epoch_of(counted(300), spec, 7, seed=1)
  iterator.close()
  for thread in set(threading.enumerate()) - before:
    thread.join(10)
    assert not thread.is_alive()


def test_skipped_rows_are_padding_and_counted(criteo):
  bad = [3, 4, 77]
  spec = criteo.spec('')
  good = train_batches(counted(100), spec, 9, 1)
  skipping = train_batches(counted(100, bad), spec, 9, 1)
  for _ in range(batches_per_epoch(100, 9)):
    assert numbers(next(skipping)[0]) == [n for n in numbers(next(good)[0]) if n not in bad]
  assert skipping.skipped_rows == 3
  assert good.skipped_rows == 0


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 200), size=st.integers(1, 60), processes=st.integers(1, 4))
def test_evaluation_is_the_files_order_in_shares(criteo, rows, size, processes):
  spec = criteo.spec('')
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(pipeline, 'READ_ROWS', 32)  # some of the batches larger, some smaller than what is read at once
    shares = [list(eval_batches(counted(rows), spec, size, i, processes)) for i in range(processes)]
  for t, batches in enumerate(zip(*shares, strict=True)):
    assert [n for b, _ in batches for n in numbers(b)] == list(range(t * size, min((t + 1) * size, rows)))
    assert {b.weight.shape for b, _ in batches} == {(-(-size // processes),)}
  assert len(shares[0]) == batches_per_epoch(rows, size)


def test_evaluation_counts_skipped_rows(criteo):
  iterator = eval_batches(counted(100, bad=[5, 99]), criteo.spec(''), 30)
  seen = [n for batch, _ in iterator for n in numbers(batch)]
  assert seen == [n for n in range(100) if n not in (5, 99)]
  assert iterator.skipped_rows == 2


def test_evaluation_resumes(criteo):
  iterator = eval_batches(counted(10_000), criteo.spec(''), 300)
  states = [state for _, state in iterator]
  iterator.set_state(states[20])
  assert numbers(next(iterator)[0]) == list(range(6300, 6600))
  iterator.set_state(states[-1])
  assert list(iterator) == []


def test_more_processes_than_streams():
  with pytest.raises(ValueError, match=r'data.streams=4 cannot serve 5 processes.*set data.streams=5'):
    Layout(100, 4, 5, 0, 5)


def test_position_beyond_the_data(criteo):
  with pytest.raises(DataError, match='row 100 of an epoch, but the data has 50 rows'):
    train_batches(counted(50), criteo.spec(''), 5, 0, state={'epoch': 0, 'position': 100})


def test_batches_own_their_memory(criteo):
  """Placing a batch on a CPU device may share its memory, so it must never be written again."""
  iterator = train_batches(counted(100), criteo.spec(''), 10, 0)
  first, second = next(iterator)[0], next(iterator)[0]
  for one in (first.label, first.dense, first.bucket, first.weight):
    assert one.flags.c_contiguous
    assert not any(np.shares_memory(one, two) for two in (second.label, second.dense, second.bucket, second.weight))


@pytest.mark.parametrize('processes', [1, 3])
def test_files_to_batches(criteo, tmp_path, processes):
  """Three uneven files, end to end: every row once, with its own label, integers and buckets."""
  rows = []
  for name, count in [('a.csv', 61), ('b.csv', 1), ('c.csv', 140)]:
    part = criteo.rows(count, first=len(rows), seed=len(rows))
    criteo.write(tmp_path / name, part)
    rows += part
  label, dense, bucket = criteo.expected(rows, 'none')
  index = index_files('*.csv', str(tmp_path))
  spec = criteo.spec(tmp_path, dense_transform='none')
  seen = []
  for i in range(processes):
    iterator = train_batches(index, spec, 16, 4, i, processes)
    for _ in range(batches_per_epoch(len(rows), 16)):
      batch, _ = next(iterator)
      real = batch.weight == 1
      number = batch.dense[real, 0].astype(int)
      np.testing.assert_array_equal(batch.label[real], label[number])
      np.testing.assert_array_equal(batch.dense[real], dense[number])
      np.testing.assert_array_equal(batch.bucket[real], bucket[number])
      assert not batch.bucket[~real].any()
      assert not batch.dense[~real].any()
      seen += number.tolist()
  assert sorted(seen) == list(range(len(rows)))


PEAK_MEMORY = """
import resource, sys
from dlrm_jax.data.index import index_files
from dlrm_jax.data.pipeline import train_batches
from dlrm_jax.data.schema import DataSpec
index = index_files(sys.argv[1], '')
iterator = train_batches(index, DataSpec('', (1000,) * 26, shuffle_rows=2048), 512, 0)
while next(iterator)[1]['epoch'] == 0:
  pass
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10)
"""


@pytest.mark.slow
@pytest.mark.parametrize('suffix', ['csv', 'parquet'])
def test_memory_does_not_grow_with_the_file(criteo, tmp_path, suffix, repository):
  """Peak memory of an epoch, in MiB, of 200,000 rows (48 MB of CSV) and of ten times as many."""
  rows = criteo.rows(10_000)
  peaks = []
  for name, copies in [('small', 20), ('large', 200)]:
    path = tmp_path / f'{name}.{suffix}'
    if suffix == 'csv':
      text = '\n'.join(','.join(row) for row in rows) + '\n'
      with open(path, 'w') as file:
        file.writelines(text for _ in range(copies))
    else:
      block = arrow_csv.read_csv(
        criteo.write(tmp_path / 'block.csv', rows), arrow_csv.ReadOptions(column_names=COLUMNS)
      )
      with pq.ParquetWriter(path, block.schema) as writer:
        for _ in range(copies):
          writer.write_table(block)
    command = [sys.executable, '-c', PEAK_MEMORY, str(path)]
    peaks.append(int(subprocess.run(command, capture_output=True, check=True, cwd=repository).stdout))
    path.unlink()
  assert peaks[1] - peaks[0] < 40


@pytest.mark.parametrize('cache', [False, True])
@pytest.mark.parametrize('processes', [1, 2])
def test_keys_are_the_whole_fingerprints_and_come_only_when_asked_for(criteo, tmp_path, processes, cache):
  rows = criteo.rows(40)
  criteo.write(tmp_path / 'train.csv', rows)
  plain, keyed = (criteo.spec(tmp_path, keys=keys) for keys in (False, True))
  index = index_cached('train.csv', keyed, str(tmp_path)) if cache else index_files('train.csv', str(tmp_path))
  ids = {}
  for make, arguments in ((train_batches, (8, 3)), (eval_batches, (8,))):
    for process in range(processes):
      share = {'process_index': process, 'process_count': processes}
      without, given = (make(index, spec, *arguments, **share) for spec in (plain, keyed))
      for (bare, _), (batch, _) in zip(itertools.islice(without, 5), itertools.islice(given, 5), strict=True):
        assert bare.key is None
        for name in ('label', 'dense', 'bucket', 'weight'):
          np.testing.assert_array_equal(getattr(bare, name), getattr(batch, name))
        whole = batch.key[..., 0].astype(np.uint64) | batch.key[..., 1].astype(np.uint64) << np.uint64(32)
        np.testing.assert_array_equal(whole % np.array(plain.buckets, np.uint64), batch.bucket)
        assert not batch.key[batch.weight == 0].any()
        ids.setdefault(make, []).extend(map(tuple, whole[batch.weight > 0].tolist()))
  expected = sorted(tuple(criteo.fingerprint(x) for x in row[14:]) for row in rows)
  assert sorted(ids[train_batches]) == sorted(ids[eval_batches]) == expected
