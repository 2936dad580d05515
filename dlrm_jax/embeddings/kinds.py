"""What differs between the kinds of tables, behind one set of functions, bound once in a program.

`resolve` is a training step's: it may admit ids, count them and begin their rows. `find` is evaluation's: it changes
nothing. Both give `Found`, from which `lookup` makes vectors and `update` knows where gradients go.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jaxtyping import Float, Int32

from dlrm_jax.embeddings import exchange, tables
from dlrm_jax.embeddings.adaptive import initial_from, shared_rows
from dlrm_jax.embeddings.admission import Admission
from dlrm_jax.embeddings.counts import counted, no_counts
from dlrm_jax.embeddings.directory import PAGE_ROWS, Ids, Shard, find, make_directory, owned, rows_of, whole_pages
from dlrm_jax.embeddings.directory import WHOLE as DIRECTORY
from dlrm_jax.embeddings.dynamic import initial_vectors, make_table, start_rows, take
from dlrm_jax.embeddings.layout import TableLayout
from dlrm_jax.embeddings.width import blocks_of, make_widths, mask
from dlrm_jax.native.directory import DirectoryKernels
from dlrm_jax.native.rows import RowKernels
from dlrm_jax.optim import bits
from dlrm_jax.sharding import ALONE, CUT, WHOLE, Axis
from dlrm_jax.spec import COLUMNS, EmbeddingSpec
from dlrm_jax.structs import Batch, Directory, Table, Vocabulary

Tables = dict[str, Table]
Vocabularies = dict[str, Vocabulary]


# Devices from which on `exchange` auto is all_to_all.
MANY_DEVICES = 8
# Arrays of a `Vocabulary` that are not by row.
SHARED = ('counts', 'least')


class Found(NamedTuple):
  """Where the lookups of a batch go: of the examples of all devices, but only to the rows that this device has."""

  # By table: i32[B, columns], numbered from this device's first row; or, where lookups are routed, an `exchange.Route`.
  rows: dict[str, Any]
  mask: Any = ()  # f32[b, 26, D], what vectors of this device's examples are multiplied by; () for nothing


@dataclasses.dataclass(frozen=True)
class Static:
  """A fixed number of rows for each column; an id's row is its bucket."""

  spec: EmbeddingSpec
  layout: tables.Layout
  tx: optax.GradientTransformation
  update_table: Callable[..., Table]  # (table, row i32[N], gradient f32[N, D], step=i32[]) -> table
  rows: RowKernels
  seed: int
  axis: Axis

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
        rows[name] = exchange.route(self.axis, table.rows, table.resolve(batch.bucket, batch.weight))
      else:
        rows[name] = self.here(name, table.rows, table.resolve(all_.bucket, all_.weight))
    return Found(rows)

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
    return tables.lookup(self.layout, tables_, found.rows, self.read)

  def read(self, name: str, value: Array, where: Any) -> Float[Array, 'B columns D']:
    """Vectors of this device's lookups in one table."""
    read = lambda row: bits.widen(self.rows.read(value, row))
    if isinstance(where, exchange.Route):
      return exchange.lookup(self.axis, where, *value.shape, read)
    return self.mine(name, read(where))

  def update(self, tables_: Tables, found: Found, gradient: Float[Array, 'B F D'], step: Int32[Array, '']) -> Tables:
    """The tables after the gradients of what was looked up."""
    return self.updated(self.layout, tables_, found, gradient, step)

  def updated(
    self, layout: tables.Layout, tables_: Tables, found: Found, gradient: Float[Array, 'B F D'], step: Array
  ) -> Tables:
    """The tables of a layout."""
    everyones = self.axis.gather(gradient)

    def update(name: str, table: Table, of: Callable[[Array], Array]) -> Table:
      size, dim = table.value.shape
      first = self.axis.index() * size if self.is_cut(name) else 0
      apply = lambda row, grad: self.update_table(table, row, grad, step=step, first=first)
      where = found.rows[name]
      if isinstance(where, exchange.Route):
        return exchange.update(self.axis, where, size, of(gradient), apply)
      return apply(where.reshape(-1), of(everyones).reshape(-1, dim))

    return tables.update(layout, update, tables_)


@dataclasses.dataclass(frozen=True)
class Dynamic(Static):
  """Embedding variables: a row for every id that is admitted. Of `layout`, only the columns count."""

  admission: Admission
  directories: DirectoryKernels

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

  def is_routed(self, name: str) -> bool:
    """See `Static.is_routed`: an id's row is known only where it is."""
    return False

  def shard(self, name: str) -> Shard:
    """Which part of a directory this device has."""
    return Shard(self.axis.index(), self.axis.size) if self.is_cut(name) else DIRECTORY

  def resolve(
    self, tables_: Tables, known: Vocabularies, batch: Batch, step: Int32[Array, '']
  ) -> tuple[Tables, Vocabularies, Found]:
    """See `Static.resolve`."""
    batch, tables_, known, rows = self.everyones(batch), dict(tables_), dict(known), {}
    for name, table in self.layout.items():
      ids, old, shard = ids_of(batch, table), known[name], self.shard(name)
      wanted = wanted_of(batch, table) & owned(ids, shard)
      directory, remembered, found = self.admission.resolve(old.directory, old.filter, ids, wanted, step, shard)
      initial = self.initial(name, tables_, ids, batch)
      tables_[name] = start_rows(self.tx, tables_[name], found.row, found.fresh, found.count, initial, self.rows)
      counts = jax.tree.map(jnp.add, old.counts, counted(table.columns, ids, wanted, found))
      new = old.replace(directory=directory, filter=remembered, counts=counts)
      known[name] = together(self.axis, old, new) if self.is_cut(name) else new
      rows[name] = found.row.reshape(batch.weight.shape[0], -1)
    return tables_, known, self.found(known, batch, rows)

  def find(self, known: Vocabularies, batch: Batch) -> Found:
    """See `Static.find`."""
    batch, rows = self.everyones(batch), {}
    for name, table in self.layout.items():
      ids, wanted = ids_of(batch, table), wanted_of(batch, table)
      row = find(known[name].directory, ids, wanted, self.directories, self.shard(name))
      rows[name] = row.reshape(batch.weight.shape[0], -1)
    return self.found(known, batch, rows)

  def found(self, known: Vocabularies, batch: Batch, rows: dict[str, Array]) -> Found:
    """What the own rows of a batch's lookups come to."""
    if self.spec.width.name == 'full':
      return Found(rows)
    most = self.spec.width.blocks
    # An id without a row lacks no block, nor does one for the devices that do not have its row.
    lacks = {}
    for name, row in rows.items():
      blocks = blocks_of(known[name].directory, known[name].widths, row.reshape(-1))
      lacks[name] = self.mine(name, most - blocks.reshape(row.shape))
    blocks = most - tables.in_order(self.layout, lacks)
    width = mask(blocks.reshape(-1), most, self.spec.dim)
    return Found(rows, width.reshape(*blocks.shape, self.spec.dim))

  def initial(self, name: str, tables_: Tables, ids: Ids, batch: Batch) -> Callable[[Array], Array]:
    """First vectors, by lanes."""
    return lambda lane: initial_vectors(self.seed, take(ids, lane), self.spec.dim)

  def lookup(self, tables_: Tables, found: Found) -> Float[Array, 'B 26 D']:
    """See `Static.lookup`."""
    return masked(super().lookup(tables_, found), found.mask)

  def update(self, tables_: Tables, found: Found, gradient: Float[Array, 'B 26 D'], step: Int32[Array, '']) -> Tables:
    """See `Static.update`."""
    return tables_ | super().update(tables_, found, masked(gradient, found.mask), step)


@dataclasses.dataclass(frozen=True)
class Adaptive(Dynamic):
  """An id without a row of its own shares that of its bucket, in a static table beside; its own row starts from it."""

  def init(self) -> tuple[Tables, Vocabularies]:
    """See `Static.init`."""
    own, known = super().init()
    return own | self.init_static(self.shared), known

  @property
  def shared(self) -> tables.Layout:
    """The static tables."""
    return {shared_name(name): table for name, table in self.layout.items()}

  def parts(self, name: str) -> int:
    """See `Static.parts`."""
    return self.shared[name].parts if name in self.shared else super().parts(name)

  def found(self, known: Vocabularies, batch: Batch, rows: dict[str, Array]) -> Found:
    """See `Dynamic.found`."""
    found, shared = super().found(known, batch, rows), {}
    for name, table in self.layout.items():
      own = rows[name] < rows_of(known[name].directory)
      if self.is_cut(name):
        own = self.axis.sum(own.astype(jnp.int32)) > 0
      row = shared_rows(own, table.resolve(batch.bucket, batch.weight), table.rows)
      shared[shared_name(name)] = self.here(shared_name(name), table.rows, row)
    return found._replace(rows=rows | shared)

  def initial(self, name: str, tables_: Tables, ids: Ids, batch: Batch) -> Callable[[Array], Array]:
    """See `Dynamic.initial`."""
    shared, table = shared_name(name), self.layout[name]
    hash_row = table.resolve(batch.bucket, batch.weight)
    if not self.is_cut(shared):
      return initial_from(tables_[shared].value, hash_row.reshape(-1), self.rows)
    # They may be on any device, and each will need those of its own new ids.
    row = self.here(shared, table.rows, hash_row).reshape(-1)
    vectors = self.axis.sum(bits.widen(self.rows.read(tables_[shared].value, row)))
    return lambda lane: vectors.at[lane].get(mode='fill', fill_value=0)

  def lookup(self, tables_: Tables, found: Found) -> Float[Array, 'B 26 D']:
    """See `Static.lookup`."""
    return super().lookup(tables_, found) + tables.lookup(self.shared, tables_, found.rows, self.read)

  def update(self, tables_: Tables, found: Found, gradient: Float[Array, 'B 26 D'], step: Int32[Array, '']) -> Tables:
    """See `Static.update`."""
    own = super().update(tables_, found, gradient, step)
    return own | self.updated(self.shared, tables_, found, gradient, step)


def shared_name(name: str) -> str:
  """Of the static table beside a dynamic one."""
  return f'shared_{name}'


def ids_of(batch: Batch, table: TableLayout) -> Ids:
  """The ids of a batch's lookups in a table, examples one after another."""
  columns = jnp.array(table.columns, jnp.uint32)
  key = batch.key if len(table.columns) == batch.key.shape[1] else batch.key[:, list(table.columns)]
  return Ids(key.reshape(-1, 2), jnp.tile(columns, batch.weight.shape[0]))


def wanted_of(batch: Batch, table: TableLayout) -> Array:
  """Which of these are of examples, not of padding: bool[N]."""
  return jnp.repeat(batch.weight > 0, len(table.columns))


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
