"""Small random files in the Criteo format, and a reader of them in plain Python: the oracle of these tests."""

import csv
import math
import random

import numpy as np
import pytest

from dlrm_jax.data.schema import CATEGORIES, DENSE_MIN, DENSE_RANGE, INTEGERS, DataSpec
from dlrm_jax.embeddings.hashing import fingerprint64

BUCKETS = tuple(7 + 1000 * i for i in range(26))

TRANSFORMS = {
  'log': lambda x, i: math.copysign(math.log1p(abs(x)), x),
  'minmax': lambda x, i: (x - DENSE_MIN[i]) / DENSE_RANGE[i],
  'none': lambda x, i: x,
}


class Criteo:
  """Writes rows of strings, and says what they mean."""

  buckets = BUCKETS

  def fingerprint(self, string):
    """The whole hash of a category."""
    return fingerprint64(string.encode() or b' ')

  def rows(self, count, first=0, seed=0):
    """Random rows; I1 is the number of the row, so that it can be told from all others."""
    rng = random.Random(seed)
    return [self._row(rng, first + i) for i in range(count)]

  def _row(self, rng, number):
    integers = ['' if rng.random() < 0.3 else str(rng.choice([-3, 0, 1, 17, 2**31, 2**40])) for _ in INTEGERS]
    ids = ['' if rng.random() < 0.2 else f'{rng.randrange(2**32):08x}' for _ in CATEGORIES]
    return [str(rng.randrange(2)), str(number), *integers[1:], *ids]

  def write(self, path, rows, end='\n', final=True):
    """Rows as a file of lines; `final` says whether a line end follows the last one."""
    text = end.join(','.join(row) for row in rows) + (end if final else '')
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return str(path)

  def read(self, path):
    """The rows of a file, by Python's csv module."""
    with open(path, newline='', encoding='utf-8') as file:
      return list(csv.reader(file))

  def expected(self, rows, transform='log'):
    """Label f32[N], dense f32[N, 13] and bucket u32[N, 26], one field after the other."""
    function = TRANSFORMS[transform]
    label = [float(row[0]) for row in rows]
    dense = [[function(float(x), i) if x else 0.0 for i, x in enumerate(row[1:14])] for row in rows]
    bucket = [[fingerprint64(x.encode() or b' ') % b for x, b in zip(row[14:], BUCKETS, strict=True)] for row in rows]
    return np.array(label, np.float32), np.array(dense, np.float32), np.array(bucket, np.uint32)

  def spec(self, location, **changes):
    """A reader's settings for such files."""
    settings = {'location': str(location), 'buckets': BUCKETS, 'streams': 4, 'shuffle_rows': 5, 'threads': 0}
    return DataSpec(**settings | changes)


@pytest.fixture(scope='session')
def criteo():
  """Writer and oracle."""
  return Criteo()
