"""Embedding variables: tables in which ids get rows when they come."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int32

from dlrm_jax.embeddings import exchange, tables
from dlrm_jax.embeddings.admission import Admission, Resolved
from dlrm_jax.embeddings.counts import admitted_of, lookups_of, no_counts
from dlrm_jax.embeddings.directory import (
  PAGE_ROWS,
  WHOLE,
  Ids,
  Shard,
  Times,
  find,
  make_directory,
  owned,
  rows_of,
  whole_pages,
)
from dlrm_jax.embeddings.first_values import initial_vectors, make_table, start_rows, take
from dlrm_jax.embeddings.layout import TableLayout, of_columns
from dlrm_jax.embeddings.static import Found, Static, Tables, Vocabularies
from dlrm_jax.embeddings.width import blocks_of, make_widths, mask
from dlrm_jax.sharding import Axis, after
from dlrm_jax.spec import COLUMNS
from dlrm_jax.structs import Batch, Counts, Directory, Table, Vocabulary

# (table, known, ids, times, seeds) -> (table, known, Resolved): see `Dynamic.claimed`.
Claim = Callable[[Table, Vocabulary, Ids, Times, Sequence[Array]], tuple[Table, Vocabulary, Resolved]]


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
    return Shard(self.axis.index(), self.axis.size) if self.is_cut(name) else WHOLE

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
        sent = known[name].counts.lookups, rows[name].asked
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

    things = *take(ids, distinct.lane), distinct.times, *(seed[distinct.lane] for seed in seeds)
    (table, known), row = self.handed_over(way, things, (table, known), answer, none)
    said = exchange.by_lookup(way, row, none).reshape(-1)
    known = with_lookups(known, lookups_of(len(columns), wanted, wanted & (said == none), said == none + 1))
    return table, known, exchange.with_rows(self.axis, way, jnp.minimum(row, none), none, self.exchanges)

  def handed_over(
    self, way: exchange.Route, things: Sequence[Array], state: Any, take: Callable[..., Any], none: int
  ) -> tuple[Any, Int32[Array, 'K']]:
    """The owners' new state, and the rows that they answer to what this device sends, see `exchange.hand_over`."""
    send = exchange.send_things(self.axis, way, things, self.exchanges)
    nothing, nobody = (0,) * len(things), jnp.full_like(way.row, none)
    return exchange.hand_over(self.axis, way, send(0), send, nothing, state, take, nobody)

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
        sent = rows[name].asked
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

    _, row = self.handed_over(way, (*take(ids, distinct.lane), distinct.times), (), look, none)
    return exchange.with_rows(self.axis, way, row, none, self.exchanges)

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


def wanted_ids(batch: Batch, table: TableLayout) -> tuple[Ids, Bool[Array, 'N']]:
  """The ids of a batch's lookups in a table, examples one after another, and which of these are no padding."""
  columns = jnp.array(table.columns, jnp.uint32)
  key = of_columns(batch.key, table.columns)
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
