"""Orders and reused memory, against plain indexing."""

import numpy as np

from dlrm_jax.data.shuffle import Memory, reorder, seeded_order


def test_an_order_is_a_permutation_that_its_numbers_alone_decide():
  keys = [(seed, epoch, number) for seed in (0, 2**32 - 1) for epoch in range(3) for number in range(1, 4)]
  orders = [seeded_order(key, 50).tolist() for key in keys]
  assert all(sorted(order) == list(range(50)) for order in orders)
  assert len(set(map(tuple, orders))) == len(keys)
  assert orders == [seeded_order(key, 50).tolist() for key in keys]


def test_reordered_rows_are_in_other_memory_and_the_first_is_used_again():
  memory = Memory(3)
  rows = memory.take(4)
  rows[:] = np.arange(12).reshape(4, 3)
  before, order = rows.copy(), np.array([2, 0, 3, 1])
  after = reorder(rows, order, memory)
  np.testing.assert_array_equal(after, before[order])
  again = memory.take(2)
  assert np.shares_memory(again, rows)
  assert not np.shares_memory(again, after)
  memory.give(again)
  assert memory.take(4).shape == (4, 3)
  assert memory.take(4).shape == (4, 3)
