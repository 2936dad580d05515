"""What differs between the kinds of tables, behind one set of functions, bound once in a program.

`resolve` is a training step's: it may admit ids, count them and begin their rows. `find` is evaluation's: it changes
nothing. Both give `Found`, from which `lookup` makes vectors and `update` knows where gradients go.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jaxtyping import Bool, Float, Int32

from dlrm_jax.embeddings import exchange, tables
from dlrm_jax.embeddings.admission import Admission, Resolved
from dlrm_jax.embeddings.counts import admitted_of, lookups_of, no_counts
from dlrm_jax.embeddings.directory import (
  PAGE_ROWS,
  Ids,
  Shard,
  Times,
  find,
  make_directory,
  owned,
  rows_of,
  whole_pages,
)
from dlrm_jax.embeddings.directory import WHOLE as DIRECTORY
from dlrm_jax.embeddings.dynamic import initial_vectors, make_table, start_rows, take
from dlrm_jax.embeddings.layout import TableLayout
from dlrm_jax.embeddings.width import blocks_of, make_widths, mask
from dlrm_jax.native.directory import DirectoryKernels
from dlrm_jax.native.exchange import ExchangeKernels
from dlrm_jax.native.rows import RowKernels
from dlrm_jax.optim import bits
from dlrm_jax.sharding import ALONE, CUT, WHOLE, Axis, after
from dlrm_jax.spec import COLUMNS, EmbeddingSpec
from dlrm_jax.structs import Batch, Counts, Directory, Table, Vocabulary

Tables = dict[str, Table]
Vocabularies = dict[str, Vocabulary]
# (table, known, ids, times, seeds) -> (table, known, Resolved): see `Dynamic.claimed`.
Claim = Callable[[Table, Vocabulary, Ids, Times, Sequence[Array]], tuple[Table, Vocabulary, Resolved]]

# Devices from which on `exchange` auto is all_to_all.
MANY_DEVICES = 8
# Arrays of a `Vocabulary` that are not by row.
SHARED = ('counts', 'least')


class Found(NamedTuple):
  """Where the lookups of a batch go: of the examples of all devices, but only to the rows that this device has."""

  # By table: i32[B, columns], numbered from this device's first row; or, where lookups are routed, an `exchange.Route`.
  rows: dict[str, Any]
  mask: Any = ()  # f32[b, 26, D], what vectors of this device's examples are multiplied by; () for nothing

  def after(self, others: Any) -> 'Found':
    """The same, but nothing is sent before the others are there, see `sharding.after`."""
    return self._replace(rows={name: exchange.in_turn(where, others) for name, where in self.rows.items()})


@dataclasses.dataclass(frozen=True)
class Static:
  """A fixed number of rows for each column; an id's row is its bucket."""

  spec: EmbeddingSpec
  layout: tables.Layout
  tx: optax.GradientTransformation
  update_table: Callable[..., Table]  # (table, row i32[N], gradient f32[N, D], step=i32[]) -> table
  directories: DirectoryKernels
  exchanges: ExchangeKernels
  seed: int
  axis: Axis

  @property
  def rows(self) -> RowKernels:
    """What reads and writes rows."""
    return self.exchanges.rows

  def init(self) -> tuple[Tables, Vocabularies]:
    """Before the first step."""
    return self.init_static(self.layout), {}

  def init_static(self, layout: tables.Layout) -> Tables:
    """The static tables of a layout."""
    dim, dtype = self.spec.dim, self.spec.dtype
    return {
      name: tables.init_table(table, dim, self.tx, self.seed, dtype, self.axis if self.is_cut(name) else ALONE)
      for name, table in layout.items()
    }

  def is_cut(self, name: str) -> bool:
    """Whether every device has a part of a table, not all of it."""
    return self.axis.size > 1 and self.parts(name) % self.axis.size == 0

  def parts(self, name: str) -> int:
    """Into how many equal parts a table can be cut."""
    return self.layout[name].parts

  def specs(self, tables_: Tables, known: Vocabularies) -> tuple[Any, Any]:
    """Of each array of `init`, whether it is cut: the same trees, of `PartitionSpec`s."""

    def spec(name: str, path: Any, leaf: Any) -> Any:
      cut = self.is_cut(name) and leaf.ndim and not any(getattr(key, 'name', '') in SHARED for key in path)
      return CUT if cut else WHOLE

    of = lambda name, part: jax.tree_util.tree_map_with_path(functools.partial(spec, name), part)
    return tuple({name: of(name, part) for name, part in tree.items()} for tree in (tables_, known))

  def resolve(
    self, tables_: Tables, known: Vocabularies, batch: Batch, step: Int32[Array, '']
  ) -> tuple[Tables, Vocabularies, Found]:
    """A training step's lookups of this device's batch. The tables are ready for `lookup` then."""
    return tables_, known, self.find(known, batch)

  def find(self, known: Vocabularies, batch: Batch) -> Found:
    """Evaluation's lookups: nothing changes."""
    all_, rows = self.everyones(batch), {}
    for name, table in self.layout.items():
      if self.is_routed(name):
        row = table.resolve(batch.bucket, batch.weight)
        rows[name] = exchange.route(self.axis, table.rows, row, self.exchanges)
      else:
        rows[name] = self.here(name, table.rows, table.resolve(all_.bucket, all_.weight))
    return Found(rows)

  def on_the_way(self, name: str, rows: int, row: Int32[Array, 'b columns']) -> Any:
    """Lookups of this device's examples in a whole table of so many rows, as `Found.rows` has them."""
    if self.is_routed(name):
      return exchange.route(self.axis, rows, row, self.exchanges)
    return self.here(name, rows, self.axis.gather(row))

  @property
  def takes_turns(self) -> bool:
    """Whether lookups and updates have loops in which devices send, see `sharding.after`."""
    return any(map(self.is_routed, self.names))

  @property
  def names(self) -> list[str]:
    """Of all tables."""
    return list(self.layout)

  def is_routed(self, name: str) -> bool:
    """Whether lookups go to the device that has their row; otherwise, all go to all."""
    wanted = self.spec.exchange
    return self.is_cut(name) and (wanted == 'all_to_all' or (wanted == 'auto' and self.axis.size >= MANY_DEVICES))

  def everyones(self, batch: Batch) -> Batch:
    """The ids of all devices' batches."""
    bucket, key, weight = self.axis.gather((batch.bucket, batch.key, batch.weight))
    return batch.replace(bucket=bucket, key=key, weight=weight)

  def here(self, name: str, rows: int, row: Int32[Array, 'B columns']) -> Int32[Array, 'B columns']:
    """Rows of a whole table, which has so many, as rows of this device's part, where other devices' rows are none."""
    if not self.is_cut(name):
      return row
    size = rows // self.axis.size
    row -= self.axis.index() * size
    return jnp.where((row >= 0) & (row < size), row, size)

  def mine(self, name: str, values: Array) -> Array:
    """What was read for everyone's lookups in a table, zeros where it was not here, as what this device's came to."""
    return self.axis.scatter_sum(values) if self.is_cut(name) else self.axis.own(values)

  def lookup(self, tables_: Tables, found: Found) -> Float[Array, 'B F D']:
    """Vectors of this device's examples, columns in natural order; no row reads as zero."""
    return self.looked_up(self.layout, tables_, found)

  def looked_up(self, layout: tables.Layout, tables_: Tables, found: Found) -> Float[Array, 'B F D']:
    """In the tables of a layout, one after another."""
    parts, sent = {}, ()
    for name in layout:
      where = exchange.in_turn(found.rows[name], sent)
      parts[name] = self.read(name, tables_[name].value, where)
      sent = parts[name] if isinstance(where, exchange.Route) else sent
    return tables.in_order(layout, parts)

  def read(self, name: str, value: Array, where: Any) -> Float[Array, 'B columns D']:
    """Vectors of this device's lookups in one table."""
    return self.ask(name, where, len(value), lambda row: bits.widen(self.rows.read(value, row)))

  def ask(self, name: str, where: Any, size: int, read: Callable[[Array], Array]) -> Float[Array, 'b columns D']:
    """What `read` gives for rows of this device's part of a table, which has `size`, zeros for no row: f32[..., D] of
    i32[...]; for the lookups of this device, whoever has their rows."""
    if isinstance(where, exchange.Route):
      return exchange.lookup(self.axis, where, size, read, self.exchanges)
    return self.mine(name, read(where))

  def update(self, tables_: Tables, found: Found, gradient: Float[Array, 'B F D'], step: Int32[Array, '']) -> Tables:
    """The tables after the gradients of what was looked up."""
    return self.updated(self.layout, tables_, found, gradient, step)

  def updated(
    self, layout: tables.Layout, tables_: Tables, found: Found, gradient: Float[Array, 'B F D'], step: Array
  ) -> Tables:
    """The tables of a layout, one after another."""
    everyones = () if all(map(self.is_routed, layout)) else self.axis.gather(gradient)
    out, sent = {}, everyones
    for name, of in layout.items():
      table, where = tables_[name], exchange.in_turn(found.rows[name], sent)
      size, dim = table.value.shape
      first = self.axis.index() * size if self.is_cut(name) else 0
      apply = functools.partial(self.update_table, step=step, first=first)
      if isinstance(where, exchange.Route):
        out[name] = exchange.update(
          self.axis, where, table, tables.of_columns(gradient, of.columns), apply, self.exchanges
        )
        sent = bits.widen(out[name].value[:1])
      else:
        out[name] = apply(table, where.reshape(-1), tables.of_columns(everyones, of.columns).reshape(-1, dim))
    return out


@dataclasses.dataclass(frozen=True)
class Dynamic(Static):
  """Embedding variables: a row for every id that is admitted. Of `layout`, only the columns count."""

  admission: Admission

  def init(self) -> tuple[Tables, Vocabularies]:
    """See `Static.init`."""
    known = {name: self.vocabulary(name, self.first_rows(name)) for name in self.layout}
    own = {
      name: make_table(rows_of(vocabulary.directory), self.spec.dim, self.tx, self.spec.dtype)
      for name, vocabulary in known.items()
    }
    return own, known

  def first_rows(self, name: str) -> int:
    """Rows of a table at the start, of all devices together."""
    return whole_pages(max(self.spec.rows * len(self.layout[name].columns) // COLUMNS, 1))

  def parts(self, name: str) -> int:
    """See `Static.parts`. Growth doubles it."""
    return math.gcd(self.first_rows(name) // PAGE_ROWS, self.admission.parts)

  def vocabulary(self, name: str, rows: int) -> Vocabulary:
    """A device's part of an empty one of so many rows."""
    devices, width = self.axis.size if self.is_cut(name) else 1, self.spec.width
    directory = make_directory(rows // devices)
    widths = make_widths(directory, width.blocks) if width.name == 'dynamic' else ()
    counts = no_counts(len(self.layout[name].columns))
    return Vocabulary(directory=directory, filter=self.admission.init(devices), widths=widths, counts=counts)

  def shard(self, name: str) -> Shard:
    """Which part of a directory this device has."""
    return Shard(self.axis.index(), self.axis.size) if self.is_cut(name) else DIRECTORY

  def resolve(
    self, tables_: Tables, known: Vocabularies, batch: Batch, step: Int32[Array, '']
  ) -> tuple[Tables, Vocabularies, Found]:
    """See `Static.resolve`."""
    tables_, known, rows, all_ = dict(tables_), dict(known), {}, self.everyones(batch)
    sent = self.sent(() if all(map(self.is_routed, self.layout)) else all_.weight)
    for name in self.layout:
      old, seeds = known[name], self.seeds(name, tables_, batch, sent)
      claim = functools.partial(self.claimed, name, step, functools.partial(self.begin, name, tables_))
      if self.is_routed(name):
        own = batch.replace(key=after(batch.key, (sent, seeds)))
        tables_[name], new, rows[name] = self.resolve_routed(name, tables_[name], old, own, seeds, claim)
        known[name] = together(self.axis, old, new)
        sent = known[name].counts.lookups
      else:
        seeds = self.axis.gather(seeds)
        tables_[name], new, rows[name] = self.resolve_everyones(name, tables_[name], old, all_, seeds, claim)
        known[name] = together(self.axis, old, new) if self.is_cut(name) else new
        sent = (sent, self.sent(seeds))
    return tables_, known, self.found(known, batch, rows, sent)

  def sent(self, arrays: Any) -> Any:
    """What the next loop waits for; () where devices send nothing in loops."""
    return arrays if self.takes_turns else ()

  def resolve_everyones(
    self, name: str, table: Table, known: Vocabulary, batch: Batch, seeds: Sequence[Array], claim: Claim
  ) -> tuple[Table, Vocabulary, Int32[Array, 'B columns']]:
    """A table, what it knows and the rows in it, where every device sees the lookups of all. So are batch and seeds."""
    columns = self.layout[name].columns
    ids, wanted = wanted_ids(batch, self.layout[name])
    wanted &= owned(ids, self.shard(name))
    table, known, found = claim(table, known, ids, wanted, seeds)
    known = with_lookups(known, lookups_of(len(columns), wanted, found.refused, found.unplaced))
    return table, known, found.row.reshape(-1, len(columns))

  def resolve_routed(
    self, name: str, table: Table, known: Vocabulary, batch: Batch, seeds: Sequence[Array], claim: Claim
  ) -> tuple[Table, Vocabulary, exchange.Route]:
    """A table, what it knows and the way to its rows, where a device sees the lookups of its own ids."""
    columns, none = self.layout[name].columns, rows_of(known.directory)
    ids, wanted = wanted_ids(batch, self.layout[name])
    way, distinct = exchange.route_ids(self.axis, ids, wanted, len(columns), self.exchanges)

    def answer(state: tuple[Table, Vocabulary], received: list[Array]) -> tuple[Any, Array]:
      key, feature, times, *seeds = received
      table, known, found = claim(*state, Ids(key, feature), times, seeds)
      # Two numbers past the last row say why there is none.
      return (table, known), jnp.where(found.unplaced, none + 1, jnp.where(found.refused, none, found.row))

    sent = *take(ids, distinct.lane), distinct.times, *(seed[distinct.lane] for seed in seeds)
    nobody, sent = jnp.full_like(way.row, none), [(part, 0) for part in sent]
    (table, known), row = exchange.hand_over(self.axis, way, sent, (table, known), answer, nobody, self.exchanges)
    said = exchange.by_lookup(way, row, none).reshape(-1)
    known = with_lookups(known, lookups_of(len(columns), wanted, wanted & (said == none), said == none + 1))
    return table, known, way._replace(row=jnp.minimum(row, none))

  def claimed(
    self,
    name: str,
    step: Int32[Array, ''],
    begin: Callable[..., Array],
    table: Table,
    known: Vocabulary,
    ids: Ids,
    times: Times,
    seeds: Sequence[Array],
  ) -> tuple[Table, Vocabulary, Resolved]:
    """Rows of this device's ids, with first vectors where they are new."""
    shard = self.shard(name)
    directory, remembered, found = self.admission.resolve(known.directory, known.filter, ids, times, step, shard)
    initial = lambda lane: begin(*(part.at[lane].get(mode='fill', fill_value=0) for part in (*ids, *seeds)))
    table = start_rows(self.tx, table, found.row, found.fresh, found.count, initial, self.rows)
    admitted = known.counts.admitted + admitted_of(self.layout[name].columns, ids, found)
    counts = known.counts.replace(admitted=admitted)
    return table, known.replace(directory=directory, filter=remembered, counts=counts), found

  def seeds(self, name: str, tables_: Tables, batch: Batch, sent: Any) -> tuple[Array, ...]:
    """What `begin` needs besides the ids, by this device's lookups, to be asked for after what was sent: [N, ...]."""
    return ()

  def begin(self, name: str, tables_: Tables, key: Array, feature: Array) -> Float[Array, 'K D']:
    """First vectors of ids."""
    return initial_vectors(self.seed, Ids(key, feature), self.spec.dim)

  def find(self, known: Vocabularies, batch: Batch) -> Found:
    """See `Static.find`."""
    rows, all_ = {}, self.everyones(batch)
    sent = self.sent(() if all(map(self.is_routed, self.layout)) else all_.weight)
    for name, table in self.layout.items():
      if self.is_routed(name):
        own = batch.replace(key=after(batch.key, sent))
        rows[name] = self.find_routed(name, known[name].directory, own)
        sent = rows[name].row
      else:
        ids, wanted = wanted_ids(all_, table)
        row = find(known[name].directory, ids, wanted, self.directories, self.shard(name))
        rows[name] = row.reshape(-1, len(table.columns))
    return self.found(known, batch, rows, sent)

  def find_routed(self, name: str, directory: Directory, batch: Batch) -> exchange.Route:
    """The way to the rows in a table, see `resolve_routed`."""
    columns, none = self.layout[name].columns, rows_of(directory)
    ids, wanted = wanted_ids(batch, self.layout[name])
    way, distinct = exchange.route_ids(self.axis, ids, wanted, len(columns), self.exchanges)

    def look(state: tuple[()], received: list[Array]) -> tuple[Any, Array]:
      key, feature, times = received
      return state, find(directory, Ids(key, feature), times > 0, self.directories, self.shard(name))

    sent = [(part, 0) for part in (*take(ids, distinct.lane), distinct.times)]
    _, row = exchange.hand_over(self.axis, way, sent, (), look, jnp.full_like(way.row, none), self.exchanges)
    return way._replace(row=row)

  def found(self, known: Vocabularies, batch: Batch, rows: dict[str, Any], sent: Any) -> Found:
    """What the own rows of a batch's lookups come to, after what was sent."""
    if self.spec.width.name == 'full':
      return Found(rows).after(sent)
    most = self.spec.width.blocks
    # An id without a row lacks no block, nor does one for the devices that do not have its row.
    lacks = {}
    for name, where in rows.items():
      blocks = functools.partial(blocks_of, known[name].directory, known[name].widths)
      lack = lambda row, blocks=blocks: (most - blocks(row.reshape(-1))).reshape(*row.shape, 1).astype(jnp.float32)
      where = exchange.in_turn(where, sent)
      lacks[name] = self.ask(name, where, rows_of(known[name].directory), lack)[..., 0]
      sent = lacks[name] if isinstance(where, exchange.Route) else sent
    blocks = most - tables.in_order(self.layout, lacks).astype(jnp.int32)
    width = mask(blocks.reshape(-1), most, self.spec.dim)
    return Found(rows, width.reshape(*blocks.shape, self.spec.dim)).after(sent)

  def lookup(self, tables_: Tables, found: Found) -> Float[Array, 'B 26 D']:
    """See `Static.lookup`."""
    return masked(super().lookup(tables_, found), found.mask)

  def update(self, tables_: Tables, found: Found, gradient: Float[Array, 'B 26 D'], step: Int32[Array, '']) -> Tables:
    """See `Static.update`."""
    return tables_ | super().update(tables_, found, masked(gradient, found.mask), step)


@dataclasses.dataclass(frozen=True)
class Adaptive(Dynamic):
  """An id has a row of its own from its n-th sighting on, for which `admission` is a counter. Before, it shares that of
  its bucket, in a static table beside; its own row starts from it."""

  def init(self) -> tuple[Tables, Vocabularies]:
    """See `Static.init`."""
    own, known = super().init()
    return own | self.init_static(self.shared), known

  @property
  def names(self) -> list[str]:
    """See `Static.names`."""
    return [*self.layout, *self.shared]

  @property
  def shared(self) -> tables.Layout:
    """The static tables."""
    return {shared_name(name): table for name, table in self.layout.items()}

  def parts(self, name: str) -> int:
    """See `Static.parts`."""
    return self.shared[name].parts if name in self.shared else super().parts(name)

  def found(self, known: Vocabularies, batch: Batch, rows: dict[str, Any], sent: Any) -> Found:
    """See `Dynamic.found`."""
    found, shared = super().found(known, batch, rows, sent), {}
    sent = self.sent((sent, found.mask))
    for name, table in self.layout.items():
      own = self.has_row(name, rows[name], rows_of(known[name].directory))
      # A lookup has a row in one of the tables at most, and as no row reads as zero, its vector is the sum of both.
      row = jnp.where(own, table.rows, table.resolve(batch.bucket, batch.weight))
      shared[shared_name(name)] = self.on_the_way(shared_name(name), table.rows, after(row, sent))
    return found._replace(rows=found.rows | shared).after(shared)

  def has_row(self, name: str, where: Any, none: int) -> Bool[Array, 'b columns']:
    """Which lookups of this device have a row in a table."""
    if isinstance(where, exchange.Route):
      return exchange.by_lookup(where, where.row < none)
    return self.mine(name, (where < none).astype(jnp.int32)) > 0

  def seeds(self, name: str, tables_: Tables, batch: Batch, sent: Any) -> tuple[Array, ...]:
    """See `Dynamic.seeds`: the shared rows, or their vectors, where other devices may have those."""
    shared, table = shared_name(name), self.layout[name]
    row, value = table.resolve(batch.bucket, batch.weight), tables_[shared].value
    if not self.is_cut(shared):
      return (row.reshape(-1),)
    where = self.on_the_way(shared, table.rows, after(row, sent))
    return (self.read(shared, value, where).reshape(-1, self.spec.dim),)

  def begin(self, name: str, tables_: Tables, key: Array, feature: Array, seed: Array) -> Float[Array, 'K D']:
    """See `Dynamic.begin`: an id goes on from its shared row."""
    shared = shared_name(name)
    return seed if self.is_cut(shared) else bits.widen(self.rows.read(tables_[shared].value, seed))

  def lookup(self, tables_: Tables, found: Found) -> Float[Array, 'B 26 D']:
    """See `Static.lookup`."""
    own = super().lookup(tables_, found)
    return own + self.looked_up(self.shared, tables_, found.after(own))

  def update(self, tables_: Tables, found: Found, gradient: Float[Array, 'B 26 D'], step: Int32[Array, '']) -> Tables:
    """See `Static.update`."""
    own = super().update(tables_, found, gradient, step)
    sent = [bits.widen(own[name].value[:1]) for name in self.layout]
    return own | self.updated(self.shared, tables_, found.after(sent), gradient, step)


def shared_name(name: str) -> str:
  """Of the static table beside a dynamic one."""
  return f'shared_{name}'


def wanted_ids(batch: Batch, table: TableLayout) -> tuple[Ids, Bool[Array, 'N']]:
  """The ids of a batch's lookups in a table, examples one after another, and which of these are no padding."""
  columns = jnp.array(table.columns, jnp.uint32)
  key = batch.key if len(table.columns) == batch.key.shape[1] else batch.key[:, list(table.columns)]
  ids = Ids(key.reshape(-1, 2), jnp.tile(columns, batch.weight.shape[0]))
  return ids, jnp.repeat(batch.weight > 0, len(table.columns))


def with_lookups(known: Vocabulary, more: Counts) -> Vocabulary:
  """With these counted too."""
  return known.replace(counts=jax.tree.map(jnp.add, known.counts, more))


def together(axis: Axis, old: Vocabulary, new: Vocabulary) -> Vocabulary:
  """What the devices, each of which looked at its own ids, know of all of them."""
  directories = [new.directory, new.filter] if isinstance(new.filter, Directory) else [new.directory]
  before = [old.directory, old.filter][: len(directories)]
  more = axis.sum((
    [directory.used - then.used for directory, then in zip(directories, before, strict=True)],
    jax.tree.map(jnp.subtract, new.counts, old.counts),
  ))  # fmt: skip
  directories = [
    directory.replace(used=then.used + used) for directory, then, used in zip(directories, before, more[0], strict=True)
  ]
  return new.replace(
    directory=directories[0],
    filter=directories[1] if len(directories) > 1 else new.filter,
    counts=jax.tree.map(jnp.add, old.counts, more[1]),
  )


def masked(vectors: Float[Array, 'B F D'], mask: Any) -> Float[Array, 'B F D']:
  """Vectors, or gradients, where the mask is 1."""
  return vectors * mask if isinstance(mask, Array) else vectors
