"""Sums as sums.py promises them, in numpy: an oracle to the bit."""

import numpy as np


def tree_sum(terms):
  """The sum of arrays, as a tree: the left side has as many as the largest power of two below their number."""
  if len(terms) == 1:
    return terms[0]
  left = 1 << (len(terms) - 1).bit_length() - 1
  return tree_sum(terms[:left]) + tree_sum(terms[left:])


def merge_sum(place, values, places, leaf):
  """f32[places, D]: of each place the sum of the values f32[N, D] there, leaf by leaf in order, then as a tree."""
  leaves = []
  for first in range(0, max(len(place), 1), leaf):
    sums = np.zeros((places + 1, values.shape[1]), np.float32)
    np.add.at(sums, place[first : first + leaf], values[first : first + leaf])
    leaves.append(sums[:places])
  return tree_sum(leaves)
