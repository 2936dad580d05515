"""Embedding variables in plain Python: dictionaries, and a loop over the lookups. What the array programs must equal.

An id is (low, high, feature). Where it may live is part of what is promised, so the hash is written here again.
"""

import math

import numpy as np

from tests.optim import reference as optimizers

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
    # So small that all of it is one region.
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
    seen = lambda lane: min(self.counters[at] for at in self.positions(ids[lane]))
    admitted = {lane for lane in unknown if seen(lane) == self.threshold}
    return sorted(admitted), [lane for lane in unknown if lane not in admitted], []


class Variables:
  """Ids with vectors, trained by an optimizer of tests/optim/reference.py: {id: [vector, slots]}.

  Without `initial` there are no vectors: what happens to ids does not depend on them, but for eviction by length.
  `shared`, of the adaptive kind: the rows {bucket: [vector, slots]}, of which an id has one before it has its own.
  """

  def __init__(self, ids, admission, initial=None, case='adagrad', rate=0.0, shared=None, bucket_of=None):
    self.ids, self.admission, self.case, self.rate = ids, admission, case, rate
    self.shared, self.bucket_of = shared, bucket_of
    self.initial = initial if shared is None else lambda id: shared[bucket_of(id)][0].copy()
    self.trained = {}
    self.steps = 0

  def lookup(self, ids, step):
    """(rows, fresh lanes, refused lanes, lanes without a place), for None in place of ids nothing."""
    unknown = [lane for lane, id in enumerate(ids) if id is not None and id not in self.ids.known]
    admitted, refused, unplaced = self.admission.admit(ids, unknown, step)
    allowed = {*admitted, *(lane for lane, id in enumerate(ids) if id in self.ids.known)}
    rows, fresh = self.ids.claim([id if lane in allowed else None for lane, id in enumerate(ids)], step)
    for lane in fresh:
      self.admission.moved(self.ids, ids[lane])
      if self.initial:
        vector = self.initial(ids[lane])
        self.trained[ids[lane]] = [vector, optimizers.init(self.case, vector)]
    unplaced = sorted([*unplaced, *(lane for lane in admitted if ids[lane] not in self.ids.known)])
    return rows, fresh, refused, unplaced

  def place(self, id):
    """The table that has an id's vector, and where in it; None if the id reads as zero."""
    if id in self.trained:
      return self.trained, id
    return None if self.shared is None or id is None else (self.shared, self.bucket_of(id))

  def vectors(self, ids, mask=1.0):
    """What evaluation sees. The mask, an array [N, D] or 1, is of the rows of the ids' own."""
    zero = np.zeros(len(self.initial((0, 0, 0))))
    mask = np.broadcast_to(mask, (len(ids), len(zero)))
    out = []
    for id, width in zip(ids, mask, strict=True):
      place = self.place(id)
      vector = place[0][place[1]][0] if place else zero
      out.append(vector * width if id in self.trained else vector)
    return np.stack(out)

  def update(self, ids, gradient, mask=1.0):
    """A training step."""
    self.steps += 1
    total = {}
    for id, g, width in zip(ids, gradient, np.broadcast_to(mask, gradient.shape), strict=True):
      if place := self.place(id):
        table, key = place
        own = table is self.trained
        total[own, key] = total.get((own, key), 0) + (g * width if own else g)
    for (own, key), g in total.items():
      table = self.trained if own else self.shared
      vector, slots = table[key]
      table[key] = [*optimizers.step(self.case, vector, g, slots, self.steps, self.rate)]

  def length(self, id):
    """Half of the squared length of an id's own vector."""
    return 0.5 * np.sum(self.trained[id][0] ** 2)

  def evict(self, name, parameter, step, short=None):
    """How many ids lost their rows. `short`, where vectors are not kept: the ids that 'l2' takes."""
    gone = {
      'never': lambda id: False,
      'global_step': lambda id: step - self.ids.known[id][2] > parameter,
      'l2': lambda id: id in short if short is not None else self.length(id) < parameter,
    }[name]
    out = [id for id in self.ids.known if gone(id)]
    for id in out:
      self.ids.forget(id)
      self.trained.pop(id, None)
    if name == 'global_step':
      self.admission.evict(step, parameter)
    return len(out)


class Widths:
  """How many of its blocks an id has: DeepRec's formulas (docs_en/Dynamic-dimension-Embedding-Variable.md)."""

  BETA, BASE = 0.9, 2.0

  def __init__(self, blocks):
    self.most, self.periods, self.least = blocks, 0, [0.0] * blocks
    self.mean, self.counted = {}, {}

  def refresh(self, known):
    """Ends a period."""
    self.periods += 1
    for id, (_, frequency, _) in known.items():
      self.mean[id] = self.BETA * self.mean.get(id, 0.0) + (1 - self.BETA) * (frequency - self.counted.get(id, 0))
      self.counted[id] = frequency
    ranked = sorted((mean for mean in self.mean.values() if mean > 1e-6), reverse=True)
    shares = [(self.BASE**k - 1) / (self.BASE ** (self.most + 1) - 1) for k in range(self.most, 0, -1)]
    ranks = [int(np.float32(share) * np.float32(len(ranked))) for share in shares]
    self.least = [ranked[rank] / (1 - self.BETA**self.periods) if rank < len(ranked) else 0.0 for rank in ranks]

  def forget(self, known):
    """After an eviction."""
    self.mean = {id: mean for id, mean in self.mean.items() if id in known}
    self.counted = {id: count for id, count in self.counted.items() if id in known}

  def blocks(self, known, id):
    """(fewest, most): which it is where a mean is at a limit, is a matter of rounding."""
    if id not in known:
      return self.most, self.most
    old, counted = self.mean.get(id, 0.0), self.counted.get(id, 0)
    before = old / (1 - self.BETA**self.periods) if self.periods else 0.0
    now = (self.BETA * old + (1 - self.BETA) * (known[id][1] - counted)) / (1 - self.BETA ** (self.periods + 1))
    mean = max(before, now)
    return tuple(sum(mean * scale >= least for least in self.least) for scale in (1 - 1e-4, 1 + 1e-4))


FULL_LOAD, FULL_SHARE, LOOK_EVERY = 0.75, 0.001, 20


class Program:
  """The embedding variables of a `Spec` over a run: what training does to them, and what happens between steps.

  Args:
    spec: an `EmbeddingSpec`.
    columns: of each table, by name.
    pages: of each table's first directory, by name.
    waiting: of each table's first directory of ids that wait, by name; for admission 'counter'.
    vectors: further arguments of `Variables`, by table; without them there are no vectors.
  """

  def __init__(self, spec, columns, pages, waiting, vectors=None):
    self.spec, self.columns = spec, columns
    admission = spec.admission
    share = -(-admission.expected_ids // len(columns))
    make = {
      'always': lambda name: Always(),
      'counter': lambda name: Counter(admission.threshold, waiting[name], 64, 8),
      'counting_bloom': lambda name: Bloom(admission.threshold, share, admission.error_rate),
    }[admission.name]
    vectors = vectors or {name: {} for name in columns}
    self.tables = {name: Variables(Ids(pages[name], 64, 8), make(name), **vectors[name]) for name in columns}
    self.widths = {name: Widths(spec.width.blocks) for name in columns}
    zero = {'lookups': 0, 'admitted': 0, 'refused': 0, 'unplaced': 0, 'evicted': 0}
    self.counts = {name: dict(zero) for name in columns}
    self.asked = {name: (0, 0) for name in columns}
    self.grown = 0

  def of_table(self, name, ids):
    """A table's lookups of a batch: ids is a list, by example, of (low, high, column) or None."""
    return [example[column] for example in ids for column in self.columns[name]]

  def lookup(self, ids, step):
    """Of each table (rows, fresh lanes) of a training step."""
    found = {}
    for name, table in self.tables.items():
      lanes, counts = self.of_table(name, ids), self.counts[name]
      rows, fresh, refused, unplaced = table.lookup(lanes, step)
      found[name] = rows, fresh
      more = {'lookups': sum(id is not None for id in lanes), 'admitted': len(fresh)}
      for key, number in {**more, 'refused': len(refused), 'unplaced': len(unplaced)}.items():
        counts[key] += number
    return found

  def upkeep(self, step, short=None):
    """What happens after so many steps. `short`: see `Variables.evict`, by table."""
    eviction, width = self.spec.eviction, self.spec.width
    parameter = {'never': 0, 'global_step': eviction.steps_to_live, 'l2': eviction.l2}[eviction.name]
    for name, table in self.tables.items():
      if eviction.name != 'never' and step % eviction.every == 0:
        self.counts[name]['evicted'] += table.evict(eviction.name, parameter, step - 1, short and short[name])
        self.widths[name].forget(table.ids.known)
      if width.name == 'dynamic' and step % width.every == 0:
        self.widths[name].refresh(table.ids.known)
      if step % LOOK_EVERY == 0:
        self.grow(name)

  def grow(self, name):
    table, counts = self.tables[name], self.counts[name]
    parts = [table.ids, *([table.admission.waiting] if isinstance(table.admission, Counter) else [])]
    full = [ids for ids in parts if len(ids.known) > FULL_LOAD * ids.rows]
    lookups, unplaced = counts['lookups'] - self.asked[name][0], counts['unplaced'] - self.asked[name][1]
    if not full and unplaced > FULL_SHARE * lookups:
      full = [max(parts, key=lambda ids: len(ids.known) / ids.rows)]
    for ids in full:
      ids.grow()
      self.grown += 1
    self.asked[name] = counts['lookups'], counts['unplaced']
