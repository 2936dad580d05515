"""Embedding variables in plain Python: dictionaries, and a loop over the lookups. What the array programs must equal.

An id is (low, high, feature). Where it may live is part of what is promised, so the hash is written here again.
"""

import math

import numpy as np

M32 = 2**32 - 1


def mix(x):
  x = (x ^ x >> 16) * 0x85EBCA6B & M32
  x = (x ^ x >> 13) * 0xC2B2AE35 & M32
  return x ^ x >> 16


def words(id):
  low, high, feature = id
  first = mix(low + (feature + 1) * 0x9E3779B9 & M32)
  second = mix(high ^ first)
  return second, mix(first + second * 0x85EBCA6B & M32)


class Ids:
  """Which id lives in which row: {id: [row, frequency, version]}."""

  def __init__(self, pages, buckets, ways):
    self.pages, self.buckets, self.ways = pages, buckets, ways
    self.known = {}
    self.taken = set()

  @property
  def rows(self):
    return self.pages * self.buckets * self.ways

  def bucket(self, id, attempt):
    word, other = words(id)
    page = word * self.pages >> 32
    return page * self.buckets + (other + (other >> 16 | 1) * attempt & M32) % self.buckets

  def find(self, ids):
    return [self.known[id][0] if id in self.known else self.rows for id in ids]

  def claim(self, ids, step):
    """Rows of the ids (None: not wanted), and the lanes of those that are new."""
    fresh = []
    for attempt in range(4):
      for lane, id in enumerate(ids):
        if id is None or id in self.known:
          continue
        first = self.bucket(id, attempt) * self.ways
        free = [row for row in range(first, first + self.ways) if row not in self.taken]
        if free:
          self.known[id] = [free[0], 0, step]
          self.taken.add(free[0])
          fresh.append(lane)
    for id in ids:
      if id in self.known:
        self.known[id][1:] = self.known[id][1] + 1, step
    return self.find(ids), sorted(fresh)

  def forget(self, id):
    self.taken.remove(self.known.pop(id)[0])

  def grow(self):
    """Twice the pages: every id stands in the same bucket and way of its new page."""
    self.pages *= 2
    page_rows = self.buckets * self.ways
    for id, entry in self.known.items():
      entry[0] = (words(id)[0] * self.pages >> 32) * page_rows + entry[0] % page_rows
    self.taken = {row for row, _, _ in self.known.values()}


class Always:
  def admit(self, ids, unknown, step):
    return unknown, [], []

  def moved(self, ids, id):
    pass

  def evict(self, step, steps_to_live):
    pass


class Counter(Always):
  def __init__(self, threshold, *shape):
    self.threshold, self.waiting = threshold, Ids(*shape)

  def admit(self, ids, unknown, step):
    """Lanes that are admitted, refused, without a place to be counted."""
    self.waiting.claim([id if lane in unknown else None for lane, id in enumerate(ids)], step)
    seen = lambda lane: self.waiting.known.get(ids[lane], (0, 0))[1]
    admitted = [lane for lane in unknown if seen(lane) >= self.threshold]
    refused = [lane for lane in unknown if 0 < seen(lane) < self.threshold]
    return admitted, refused, [lane for lane in unknown if seen(lane) == 0]

  def moved(self, ids, id):
    ids.known[id][1] = self.waiting.known[id][1]
    self.waiting.forget(id)

  def evict(self, step, steps_to_live):
    for id in [id for id, (_, _, version) in self.waiting.known.items() if step - version > steps_to_live]:
      self.waiting.forget(id)


class Bloom(Always):
  def __init__(self, threshold, expected, error):
    self.threshold = threshold
    self.hashes = math.ceil(math.log(error) / -math.log(2))
    self.size = math.ceil(-math.log(error) / math.log(2) ** 2 * expected)
    self.counters = [0] * self.size

  def positions(self, id):
    word, other = words(id)
    a, b = other ^ 0x5BD1E995, id[0] ^ word | 1
    return [(a + i * b & M32) * self.size >> 32 for i in range(self.hashes)]

  def admit(self, ids, unknown, step):
    for lane in unknown:
      for at in self.positions(ids[lane]):
        self.counters[at] = min(self.counters[at] + 1, self.threshold)
    admitted = [
      lane for lane in unknown if min(self.counters[at] for at in self.positions(ids[lane])) == self.threshold
    ]
    return admitted, [lane for lane in unknown if lane not in admitted], []


class Variables:
  """Ids with vectors, trained by Adagrad: {id: (vector, accumulator)}."""

  def __init__(self, ids, admission, initial, rate, accumulator):
    self.ids, self.admission, self.initial, self.rate, self.accumulator = ids, admission, initial, rate, accumulator
    self.trained = {}

  def lookup(self, ids, step):
    """(rows, fresh lanes, refused lanes, lanes without a place, vectors), for None in place of ids nothing."""
    unknown = [lane for lane, id in enumerate(ids) if id is not None and id not in self.ids.known]
    admitted, refused, unplaced = self.admission.admit(ids, unknown, step)
    wanted = [id if id in self.ids.known or lane in admitted else None for lane, id in enumerate(ids)]
    rows, fresh = self.ids.claim(wanted, step)
    for lane in fresh:
      self.admission.moved(self.ids, ids[lane])
      vector = self.initial(ids[lane])
      self.trained[ids[lane]] = [vector, np.full(vector.shape, self.accumulator)]
    unplaced = sorted([*unplaced, *(lane for lane in admitted if ids[lane] not in self.ids.known)])
    return rows, fresh, refused, unplaced, self.vectors(ids)

  def vectors(self, ids):
    """What evaluation sees."""
    dim = len(self.initial((0, 0, 0)))
    return np.stack([self.trained[id][0] if id in self.trained else np.zeros(dim) for id in ids])

  def update(self, ids, gradient):
    total = {}
    for id, g in zip(ids, gradient, strict=True):
      if id in self.trained:
        total[id] = total.get(id, 0) + g
    for id, g in total.items():
      vector, accumulator = self.trained[id]
      accumulator = accumulator + g * g
      self.trained[id] = [vector - self.rate * g / np.sqrt(accumulator), accumulator]

  def evict(self, name, parameter, step):
    """How many ids lost their rows."""
    gone = {
      'never': lambda id: False,
      'global_step': lambda id: step - self.ids.known[id][2] > parameter,
      'l2': lambda id: 0.5 * np.sum(self.trained[id][0] ** 2) < parameter,
    }[name]
    out = [id for id in self.ids.known if gone(id)]
    for id in out:
      self.ids.forget(id)
      del self.trained[id]
    if name == 'global_step':
      self.admission.evict(step, parameter)
    return len(out)
