"""Rows packed in C++, beside numpy and beside Python's own remainder."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dlrm_jax.data import encode
from dlrm_jax.data.schema import DataSpec
from dlrm_jax.native import build

pytestmark = pytest.mark.skipif(not build.load().ready, reason=build.load().note)
HASHES = st.integers(0, 2**64 - 1) | st.sampled_from([0, 1, 2**63, 2**64 - 1])
BUCKETS = st.integers(1, 2**32 - 1) | st.sampled_from([1, 2, 3, 10_000, 2**31, 2**32 - 1])


def columns(rows, hashes, seed=0):
  rng = np.random.default_rng(seed)
  return encode.Columns(
    label=rng.integers(0, 2, rows, dtype=np.uint8),
    integers=[rng.normal(size=rows).astype(np.float32) * 100 for _ in range(13)],
    missing=rng.integers(0, 1 << 13, rows).astype(np.uint16),
    hashes=list(np.resize(np.array(hashes, np.uint64), (26, rows))),
    good=rng.random(rows) < 0.8,
  )


@given(st.integers(0, 200), st.lists(HASHES, min_size=1), st.lists(BUCKETS, min_size=26, max_size=26))
@settings(max_examples=100, deadline=None)
def test_a_bucket_is_the_remainder(rows, hashes, buckets):
  data = columns(rows, hashes)
  packed = encode.encode(data, DataSpec('', tuple(buckets)))
  for i, (column, number) in enumerate(zip(data.hashes, buckets, strict=True), encode.BUCKET.start):
    remainders = [int(value) % number for value in column]
    assert packed[:, i].tolist() == np.where(data.good, remainders, 0).tolist()


@pytest.mark.parametrize('keys', [False, True])
@pytest.mark.parametrize('transform', ['log', 'minmax', 'none'])
@pytest.mark.parametrize('rows', [0, 1, 63, 64, 5000])
def test_all_of_a_row(rows, transform, keys):
  data = columns(rows, np.random.default_rng(1).integers(0, 2**64, 999, dtype=np.uint64))
  spec = DataSpec('', (10_000,) * 26, dense_transform=transform, keys=keys)
  # As the cache gives them: parts of longer columns.
  part = slice(rows // 3, rows)
  integers, hashes = ([values[part] for values in column] for column in (data.integers, data.hashes))
  some = encode.Columns(data.label[part], integers, data.missing[part], hashes, data.good[part])
  native, plain = (encode.encode(some, dataclasses.replace(spec, native=native)) for native in (True, False))
  assert native.dtype == np.uint32
  np.testing.assert_array_equal(native, plain)
