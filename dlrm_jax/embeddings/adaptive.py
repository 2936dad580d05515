"""Embedding variables beside static tables: rare ids share rows, frequent ones have their own."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int32

from dlrm_jax import bits
from dlrm_jax.embeddings import exchange, tables
from dlrm_jax.embeddings.directory import rows_of
from dlrm_jax.embeddings.dynamic import Dynamic
from dlrm_jax.embeddings.static import Found, Tables, Vocabularies
from dlrm_jax.sharding import after
from dlrm_jax.structs import Batch


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
