"""Static tables; and with them, what every kind of tables is to a program.

`resolve` is a training step's: it may admit ids, count them and begin their rows. `find` is evaluation's: it changes
nothing. Both give `Found`, from which `lookup` makes vectors and `update` knows where gradients go.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jaxtyping import Float, Int32

from dlrm_jax import bits
from dlrm_jax.embeddings import exchange, tables
from dlrm_jax.embeddings.layout import of_columns
from dlrm_jax.native.directory import DirectoryKernels
from dlrm_jax.native.exchange import ExchangeKernels
from dlrm_jax.native.rows import RowKernels
from dlrm_jax.sharding import ALONE, CUT, WHOLE, Axis
from dlrm_jax.spec import EmbeddingSpec
from dlrm_jax.structs import Batch, Table, Vocabulary
from dlrm_jax.sums import LEAF

Tables = dict[str, Table]
Vocabularies = dict[str, Vocabulary]

# Devices from which on `exchange` auto is all_to_all for tables of a column each, too: 26 compile three times as long.
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
  update_table: Callable[..., Table]  # (table, row i32[N], gradient f32[N, D], step=i32[], leaf=) -> table
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
    return Found(rows).after(rows)

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
    if wanted == 'auto':
      wanted = 'all_to_all' if self.spec.fusion or self.axis.size >= MANY_DEVICES else 'gather'
    return self.is_cut(name) and wanted == 'all_to_all'

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
          self.axis, where, table, of_columns(gradient, of.columns), apply, self.exchanges
        )
        sent = bits.widen(out[name].value[:1])
      else:
        of_lanes = of_columns(everyones, of.columns).reshape(-1, dim)
        out[name] = apply(table, where.reshape(-1), of_lanes, leaf=LEAF * len(of.columns))
    return out
