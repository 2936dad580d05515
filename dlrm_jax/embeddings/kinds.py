"""What differs between the kinds of tables, behind one set of functions, bound once in a program.

`resolve` is a training step's: it may admit ids, count them and begin their rows. `find` is evaluation's: it changes
nothing. Both give `Found`, from which `lookup` makes vectors and `update` knows where gradients go.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jaxtyping import Float, Int32

from dlrm_jax.embeddings import tables
from dlrm_jax.embeddings.adaptive import initial_from, shared_rows
from dlrm_jax.embeddings.admission import Admission
from dlrm_jax.embeddings.counts import counted, no_counts
from dlrm_jax.embeddings.directory import Ids, find, make_directory, rows_of
from dlrm_jax.embeddings.dynamic import initial_vectors, make_table, start_rows, take
from dlrm_jax.embeddings.layout import TableLayout
from dlrm_jax.embeddings.width import blocks_of, make_widths, mask
from dlrm_jax.native.directory import DirectoryKernels
from dlrm_jax.native.rows import RowKernels
from dlrm_jax.spec import COLUMNS, EmbeddingSpec
from dlrm_jax.structs import Batch, Table, Vocabulary

Tables = dict[str, Table]
Vocabularies = dict[str, Vocabulary]


class Found(NamedTuple):
  """Where the lookups of a batch go."""

  rows: dict[str, Array]  # i32[B, columns] in each table
  mask: Any = ()  # f32[B, 26, D], what vectors are multiplied by; () for nothing


@dataclasses.dataclass(frozen=True)
class Static:
  """A fixed number of rows for each column; an id's row is its bucket."""

  spec: EmbeddingSpec
  layout: tables.Layout
  tx: optax.GradientTransformation
  update_table: Callable[..., Table]  # (table, row i32[N], gradient f32[N, D], step=i32[]) -> table
  rows: RowKernels
  seed: int

  def init(self) -> tuple[Tables, Vocabularies]:
    """Before the first step."""
    dim, dtype = self.spec.dim, self.spec.dtype
    return {name: tables.init_table(table, dim, self.tx, self.seed, dtype) for name, table in self.layout.items()}, {}

  def resolve(
    self, tables_: Tables, known: Vocabularies, batch: Batch, step: Int32[Array, '']
  ) -> tuple[Tables, Vocabularies, Found]:
    """A training step's lookups; kinds that know ids admit and count them, and begin the rows of new ones."""
    return tables_, known, self.find(known, batch)

  def find(self, known: Vocabularies, batch: Batch) -> Found:
    """Evaluation's lookups: nothing changes."""
    return Found(tables.resolve(self.layout, batch.bucket, batch.weight))

  def lookup(self, tables_: Tables, found: Found) -> Float[Array, 'B 26 D']:
    """Vectors, columns in natural order; no row reads as zero."""
    return tables.lookup(self.layout, tables_, found.rows, self.rows)

  def update(self, tables_: Tables, found: Found, gradient: Float[Array, 'B 26 D'], step: Int32[Array, '']) -> Tables:
    """The tables after the gradients of what was looked up."""
    update = lambda table, row, grad: self.update_table(table, row, grad, step=step)
    return tables.update(self.layout, update, tables_, found.rows, gradient)


@dataclasses.dataclass(frozen=True)
class Dynamic(Static):
  """Embedding variables: a row for every id that is admitted. Of `layout`, only the columns count."""

  admission: Admission
  directories: DirectoryKernels

  def init(self) -> tuple[Tables, Vocabularies]:
    """See `Static.init`."""
    known = {name: self.vocabulary(table) for name, table in self.layout.items()}
    own = {
      name: make_table(rows_of(vocabulary.directory), self.spec.dim, self.tx, self.spec.dtype)
      for name, vocabulary in known.items()
    }
    return own, known

  def vocabulary(self, table: TableLayout) -> Vocabulary:
    """An empty one with the table's share of the rows, or a few more."""
    columns, width = len(table.columns), self.spec.width
    directory = make_directory(max(self.spec.rows * columns // COLUMNS, 1))
    widths = make_widths(directory, width.blocks) if width.name == 'dynamic' else ()
    return Vocabulary(directory=directory, filter=self.admission.init(), widths=widths, counts=no_counts(columns))

  def resolve(
    self, tables_: Tables, known: Vocabularies, batch: Batch, step: Int32[Array, '']
  ) -> tuple[Tables, Vocabularies, Found]:
    """See `Static.resolve`."""
    tables_, known, rows = dict(tables_), dict(known), {}
    for name, table in self.layout.items():
      ids, wanted, old = ids_of(batch, table), wanted_of(batch, table), known[name]
      directory, remembered, found = self.admission.resolve(old.directory, old.filter, ids, wanted, step)
      initial = self.initial(name, tables_, ids, batch)
      tables_[name] = start_rows(self.tx, tables_[name], found.row, found.fresh, found.count, initial, self.rows)
      counts = jax.tree.map(jnp.add, old.counts, counted(table.columns, ids, wanted, found))
      known[name] = old.replace(directory=directory, filter=remembered, counts=counts)
      rows[name] = found.row.reshape(batch.weight.shape[0], -1)
    return tables_, known, self.found(known, batch, rows)

  def find(self, known: Vocabularies, batch: Batch) -> Found:
    """See `Static.find`."""
    rows = {
      name: find(known[name].directory, ids_of(batch, table), wanted_of(batch, table), self.directories)
      .reshape(batch.weight.shape[0], -1)
      for name, table in self.layout.items()
    }  # fmt: skip
    return self.found(known, batch, rows)

  def found(self, known: Vocabularies, batch: Batch, rows: dict[str, Array]) -> Found:
    """What the own rows of a batch's lookups come to."""
    if self.spec.width.name == 'full':
      return Found(rows)
    blocks = {
      name: blocks_of(known[name].directory, known[name].widths, row.reshape(-1)).reshape(row.shape)
      for name, row in rows.items()
    }
    blocks = tables.in_order(self.layout, blocks)
    width = mask(blocks.reshape(-1), self.spec.width.blocks, self.spec.dim)
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
    dim, dtype = self.spec.dim, self.spec.dtype
    return own | {n: tables.init_table(t, dim, self.tx, self.seed, dtype) for n, t in self.shared.items()}, known

  @property
  def shared(self) -> tables.Layout:
    """The static tables."""
    return {shared_name(name): table for name, table in self.layout.items()}

  def found(self, known: Vocabularies, batch: Batch, rows: dict[str, Array]) -> Found:
    """See `Dynamic.found`."""
    found = super().found(known, batch, rows)
    shared = {
      shared_name(name): shared_rows(
        rows[name], rows_of(known[name].directory), table.resolve(batch.bucket, batch.weight), table.rows
      )
      for name, table in self.layout.items()
    }
    return found._replace(rows=rows | shared)

  def initial(self, name: str, tables_: Tables, ids: Ids, batch: Batch) -> Callable[[Array], Array]:
    """See `Dynamic.initial`."""
    hash_row = self.layout[name].resolve(batch.bucket, batch.weight)
    return initial_from(tables_[shared_name(name)].value, hash_row.reshape(-1), self.rows)

  def lookup(self, tables_: Tables, found: Found) -> Float[Array, 'B 26 D']:
    """See `Static.lookup`."""
    return super().lookup(tables_, found) + tables.lookup(self.shared, tables_, found.rows, self.rows)

  def update(self, tables_: Tables, found: Found, gradient: Float[Array, 'B 26 D'], step: Int32[Array, '']) -> Tables:
    """See `Static.update`."""
    own = super().update(tables_, found, gradient, step)
    update = lambda table, row, grad: self.update_table(table, row, grad, step=step)
    return own | tables.update(self.shared, update, tables_, found.rows, gradient)


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


def masked(vectors: Float[Array, 'B F D'], mask: Any) -> Float[Array, 'B F D']:
  """Vectors, or gradients, where the mask is 1."""
  return vectors * mask if isinstance(mask, Array) else vectors


KINDS = {'static': Static, 'dynamic': Dynamic, 'adaptive': Adaptive}
