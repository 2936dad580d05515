"""Fingerprint64 against vectors of FarmHash itself.

The vectors were computed with pyfarmhash 0.5.1, Python bindings of google/farmhash (C++): `farmhash.fingerprint64`.
Those of `SPEC` are also TensorFlow's: `tf.strings.to_hash_bucket_fast(['Hello', 'TensorFlow', '2.x'], 3)` is [0, 2, 2]
in TensorFlow's documentation.
"""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dlrm_jax.embeddings.hashing import fingerprint64, fingerprint64_eight, fingerprint64_strings

TEXT = 'dlrm_jax: the quick brown fox jumps over the lazy dog; 0123456789 ' * 4

# Length of a prefix of TEXT, and its Fingerprint64.
PREFIXES = [
  (0, 11160318154034397263),
  (1, 4470636696479570465),
  (2, 17453926813363136043),
  (3, 385022246011126623),
  (4, 4451062948806103306),
  (7, 14087034418568495913),
  (8, 4316561720219594100),
  (9, 17276903337533776899),
  (16, 14116260055404230941),
  (17, 15475789690374970077),
  (32, 4694112810307600701),
  (33, 103787964572283974),
  (64, 10520853834511888795),
  (65, 13265483788415630293),
  (127, 14287784981049310537),
  (128, 13251806018207197535),
  (129, 11518554757274761260),
  (200, 4906954170566136510),
]

SPEC = {
  '68fd1e64': 7920289447977470598,
  '80e26c9b': 11379605520594866572,
  'fb936136': 8874981813069878764,
  ' ': 9003534451727337555,
}


@pytest.mark.parametrize(('length', 'expected'), PREFIXES)
def test_lengths(length, expected):
  assert fingerprint64(TEXT[:length].encode()) == expected
  assert fingerprint64_strings(pa.array([TEXT[:length]])).tolist() == [expected]


@pytest.mark.parametrize(('string', 'expected'), SPEC.items())
def test_vectors_of_the_spec(string, expected):
  assert fingerprint64(string.encode()) == expected


def test_documented_buckets_of_tensorflow():
  assert [fingerprint64(s) % 3 for s in (b'Hello', b'TensorFlow', b'2.x')] == [0, 2, 2]


@given(st.lists(st.binary(min_size=8, max_size=8)))
def test_eight_bytes_vectorised(strings):
  words = np.frombuffer(b''.join(strings), '<u8')
  assert fingerprint64_eight(words).tolist() == [fingerprint64(s) for s in strings]


@pytest.mark.parametrize('count', [16_383, 16_384, 16_385, 50_000])
def test_eight_bytes_in_more_than_one_block(count):
  words = np.random.default_rng(0).integers(0, 2**64, count, dtype=np.uint64)
  hashes = fingerprint64_eight(words)
  for i in [0, 1, 16_382, count // 2, count - 1]:
    assert hashes[i] == fingerprint64(words[i].tobytes())


KINDS = [pa.string(), pa.large_string(), pa.binary(), pa.large_binary()]


@pytest.mark.parametrize('kind', KINDS, ids=str)
@given(
  strings=st.lists(
    st.none() | st.text(max_size=20) | st.text('0123456789abcdef', min_size=8, max_size=8) | st.just(''), max_size=40
  ),
  start=st.integers(0, 3),
)
def test_columns(kind, strings, start):
  """Any mixture of lengths, with nulls and in the middle of an array."""
  values = [s if s is None else s.encode() for s in strings]
  column = pa.array(values, pa.binary()).cast(kind)[start:]
  expected = [fingerprint64(v or b'') for v in values[start:]]
  assert fingerprint64_strings(column).tolist() == expected


def test_value_of_the_empty_string_can_be_given():
  column = pa.array(['68fd1e64', '', None, 'ab'])
  expected = [SPEC['68fd1e64'], SPEC[' '], SPEC[' '], fingerprint64(b'ab')]
  assert fingerprint64_strings(column, empty=SPEC[' ']).tolist() == expected


def test_only_eight_bytes_and_missing():
  column = pa.array(['', '68fd1e64', '', '', 'fb936136', ''])
  assert fingerprint64_strings(column).tolist() == [
    PREFIXES[0][1], SPEC['68fd1e64'], PREFIXES[0][1], PREFIXES[0][1], SPEC['fb936136'], PREFIXES[0][1]
  ]  # fmt: skip
