"""What happens to embedding variables between steps: eviction, new widths, growth; and what is told of them.

All of it at fixed steps, from nothing but the state: a resumed run does what an unstopped one does.
"""

import dataclasses
import functools
import logging
from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from dlrm_jax.data.schema import CATEGORIES
from dlrm_jax.embeddings import directory as directories
from dlrm_jax.embeddings import width
from dlrm_jax.embeddings.eviction import EVICTIONS, evict_ids, least_recent
from dlrm_jax.embeddings.first_values import make_table
from dlrm_jax.embeddings.layout import TableLayout
from dlrm_jax.native.rows import xla_write
from dlrm_jax.program import Program
from dlrm_jax.sharding import ALONE
from dlrm_jax.spec import KEYED
from dlrm_jax.state import state_placing
from dlrm_jax.structs import Directory, Table, TrainState, Vocabulary

# Steps between looks at how full the directories are. A look waits for the step before it.
LOOK_EVERY = 20
# Where the least recently seen must go, this share of the rows stays.
KEPT_SHARE = 0.6
# What is held at most, in sizes of the tables: they and the copy that a save writes. Growth holds less, half as much
# again as the new tables.
PEAK = 2


class Upkeep:
  """Called with the state after a step, gives the state to go on with.

  Attributes:
    periods: it must be called after every step that is a multiple of one of these (0: never), and may be after others.
  """

  def __init__(self, program: Program) -> None:
    embedding = program.spec.embedding
    parameters = {'never': (), 'global_step': (embedding.eviction.steps_to_live,), 'l2': (embedding.eviction.l2,)}
    gone = EVICTIONS[embedding.eviction.name]
    gone = gone(*parameters[embedding.eviction.name])
    self._embedding = embedding
    self._features = {name: features_of(table) for name, table in program.embeddings.layout.items()}
    self._placing = state_placing(program)
    self._evict = self._jit(functools.partial(_evict, gone), donate_argnums=0)
    self._refresh = self._jit(_refresh, donate_argnums=0)
    self._drop = self._jit(_drop, static_argnums=1)
    self._grow = self._jit(grown_parts, 'tables', 'known', static_argnums=2)
    self._at_limit: set[str] = set()
    self._evict_every = embedding.eviction.every if embedding.eviction.name != 'never' else 0
    self._refresh_every = embedding.width.every if embedding.width.name == 'dynamic' else 0
    self.periods = (self._evict_every, self._refresh_every, LOOK_EVERY) if embedding.kind in KEYED else ()

  def _jit(self, function: Callable[..., Any], *parts: str, **options: Any) -> Callable[..., Any]:
    """`function` of a table's name and its arguments, compiled; it returns these parts of the state for that table."""
    parts = parts or ('known',)

    @functools.cache
    def compiled(name: str) -> Callable[..., Any]:
      out = self._placing and tuple(getattr(self._placing, part)[name] for part in parts)
      return jax.jit(function, out_shardings=out[0] if out and len(out) == 1 else out, **options)

    return lambda name, *arguments: compiled(name)(*arguments)

  def __call__(self, state: TrainState, step: int) -> TrainState:
    """Evicts, ends periods of widths and grows, where it is time."""
    if not state.known:
      return state
    if self._evict_every and step % self._evict_every == 0:
      before = _total(state.known, 'evicted')
      known = {
        name: self._evict(name, known, state.tables[name].value, state.step - 1, self._features[name])
        for name, known in state.known.items()
      }
      state = state.replace(known=known)
      logging.info('step %d: %d ids evicted', step, _total(known, 'evicted') - before)
    if self._refresh_every and step % self._refresh_every == 0:
      state = state.replace(known={name: self._refresh(name, known) for name, known in state.known.items()})
    if step % LOOK_EVERY == 0:
      full = {name: parts for name, known in state.known.items() if (parts := full_parts(known))}
      for name, parts in full.items():
        state = self._make_room(state, name, parts, step)
      known = {name: _asked(known) for name, known in state.known.items()}
      state = state.replace(known=known)
    return state

  def _make_room(self, state: TrainState, name: str, parts: list[str], step: int) -> TrainState:
    table, known = state.tables[name], state.known[name]
    more = bytes_of(
      [known.filter] * ('filter' in parts) + [(table, known.directory, known.widths)] * ('table' in parts)
    )
    need, limit = PEAK * (bytes_of((state.tables, state.known)) + more), self._embedding.memory_gb * 1e9
    if not limit or need <= limit:
      table, grown = self._grow(name, table, known, tuple(parts))
      before, after = directories_of(known), directories_of(grown)
      for part in parts:
        logging.info(
          'step %d: %s of %s is full with %d ids: from %d to %d rows', step, PARTS[part], name, int(before[part].used),
          directories.rows_of(before[part]), directories.rows_of(after[part]),
        )  # fmt: skip
      return state.replace(tables=state.tables | {name: table}, known=state.known | {name: grown})
    evicts = self._embedding.at_limit == 'evict'
    if name not in self._at_limit:
      self._at_limit.add(name)
      logging.warning(
        'step %d: %s is full, and to grow needs %.3f GB of config.embedding.memory_gb=%g: %s', step, name, need / 1e9,
        limit / 1e9, 'the ids unseen for longest go' if evicts else 'new ids without a place read as zero',
      )  # fmt: skip
    if evicts:
      known = self._drop(name, known, tuple(parts), self._features[name])
    return state.replace(known=state.known | {name: known})


PARTS = {'table': 'the table', 'filter': 'the directory of ids that wait'}


def _evict(gone: Any, known: Vocabulary, value: Array, step: Array, features: Array) -> Vocabulary:
  directory, remembered = evict_ids(gone, known.directory, known.filter, value, step)
  return _fewer(known.replace(filter=remembered), directory, features)


def _drop(known: Vocabulary, parts: tuple[str, ...], features: Array) -> Vocabulary:
  """Without the ids that were seen longest ago."""
  drop = lambda full: directories.evict(full, least_recent(full, int(KEPT_SHARE * directories.rows_of(full))))
  if 'filter' in parts:
    known = known.replace(filter=drop(known.filter))
  return _fewer(known, drop(known.directory), features) if 'table' in parts else known


def _fewer(known: Vocabulary, directory: Directory, features: Array) -> Vocabulary:
  gone = directories.gone_per_feature(known.directory, directory, features)
  counts = known.counts.replace(evicted=known.counts.evicted + gone)
  widths = known.widths and width.forget_free(directory, known.widths)
  return known.replace(directory=directory, widths=widths, counts=counts)


def _refresh(known: Vocabulary) -> Vocabulary:
  return known.replace(widths=width.refresh(known.directory, known.widths))


def _asked(known: Vocabulary) -> Vocabulary:
  asked = jnp.stack([known.counts.lookups, known.counts.unplaced])
  return known.replace(counts=known.counts.replace(asked=asked))


def directories_of(known: Vocabulary) -> dict[str, Directory]:
  """Those of `PARTS` that there are."""
  return {'table': known.directory} | ({'filter': known.filter} if isinstance(known.filter, Directory) else {})


def full_parts(known: Vocabulary) -> list[str]:
  """Which of `PARTS` must grow. Waits for the last step."""
  counts = jax.device_get(known.counts)
  lookups, unplaced = (
    sum((now - then).tolist()) for now, then in zip((counts.lookups, counts.unplaced), counts.asked, strict=True)
  )
  parts = directories_of(known)
  full = [part for part, directory in parts.items() if directories.is_full(directory, 1, 0)]
  if full or unplaced <= directories.FULL_SHARE * lookups:
    return full
  # What found no place does not say where: the fuller one it was.
  return [max(parts, key=lambda part: int(parts[part].used) / directories.rows_of(parts[part]))]


def grown_parts(table: Table, known: Vocabulary, parts: tuple[str, ...]) -> tuple[Table, Vocabulary]:
  """A table and what it knows with twice the room in some of `PARTS`."""
  if 'filter' in parts:
    known = known.replace(filter=directories.grow(known.filter))
  if 'table' in parts:
    pages, rows = known.directory.entry.shape[0], directories.rows_of(known.directory)
    grow = lambda leaf: directories.grow_rows(leaf, pages) if leaf.shape[:1] == (rows,) else leaf
    known = known.replace(directory=directories.grow(known.directory))
    if known.widths:
      widths = known.widths.replace(mean=grow(known.widths.mean), counted=grow(known.widths.counted))
      known = known.replace(widths=width.forget_free(known.directory, widths))
    table = jax.tree.map(grow, table)
  return table, known


def moved(program: Program, state: TrainState, parts: Collection[str]) -> tuple[TrainState, int]:
  """The state with the ids of some `PARTS` in directories of the capacity that the program's spec names, or as often
  twice that as they need; and how many found no place all the same."""
  embeddings = dataclasses.replace(program.embeddings, axis=ALONE)
  rows = {}
  for name, old in state.known.items():
    new = jax.eval_shape(functools.partial(embeddings.vocabulary, name, embeddings.first_rows(name)))
    now, first = directories_of(old), directories_of(new)
    for part in parts:
      rows[name, part] = directories.rows_of(first[part])
      while int(now[part].used) > directories.FULL_LOAD * rows[name, part]:
        rows[name, part] *= 2
  place = state_placing(program)
  out = place and (place.tables, place.known, None)
  move = jax.jit(functools.partial(_moved, embeddings, rows), out_shardings=out)
  tables, known, lost = move(state.tables, state.known)
  return state.replace(tables=state.tables | tables, known=known), int(lost)


def _moved(
  embeddings: Any,
  rows: dict[tuple[str, str], int],
  old_tables: dict[str, Table],
  old_known: dict[str, Vocabulary],
) -> tuple[dict[str, Table], dict[str, Vocabulary], Array]:
  """With what is in `rows`, of so many: (table, part)."""
  spec, tables, known, lost = embeddings.spec, dict(old_tables), dict(old_known), jnp.zeros((), jnp.int32)
  for name, old in old_known.items():
    if (name, 'table') in rows:
      new = embeddings.vocabulary(name, rows[name, 'table'])
      directory, row = directories.insert(new.directory, directories.entries(old.directory))
      lost += old.directory.used - directory.used
      table = make_table(directories.rows_of(directory), spec.dim, embeddings.tx, spec.dtype)
      # Where an entry was free, the row is past the end.
      shift = lambda leaf, empty, row=row: xla_write(empty, row, leaf) if leaf.ndim else leaf
      tables[name] = table.replace(**{
        part: jax.tree.map(shift, getattr(old_tables[name], part), getattr(table, part)) for part in ('value', 'slots')
      })  # fmt: skip
      widths = old.widths and old.widths.replace(
        mean=shift(old.widths.mean, new.widths.mean), counted=shift(old.widths.counted, new.widths.counted)
      )
      known[name] = known[name].replace(directory=directory, widths=widths)
    if (name, 'filter') in rows:
      empty = directories.make_directory(rows[name, 'filter'])
      remembered, _ = directories.insert(empty, directories.entries(old.filter))
      lost += old.filter.used - remembered.used
      known[name] = known[name].replace(filter=remembered)
  return tables, known, lost


def bytes_of(tree: Any) -> int:
  """Memory of the arrays of a tree, or of what their shapes say."""
  return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _total(known: dict[str, Vocabulary], name: str) -> int:
  return sum(sum(np.asarray(getattr(vocabulary.counts, name)).tolist()) for vocabulary in known.values())


def numbers_of(known: dict[str, Vocabulary]) -> dict[str, float | int]:
  """Of all directories together, for the log. Waits for the last step."""
  if not known:
    return {}
  numbers = {f'ids_{name}' if name in ('admitted', 'evicted') else f'lookups_{name}': _total(known, name)
             for name in ('admitted', 'evicted', 'refused', 'unplaced')}  # fmt: skip
  used = sum(int(vocabulary.directory.used) for vocabulary in known.values())
  rows = sum(directories.rows_of(vocabulary.directory) for vocabulary in known.values())
  return {'ids': used, 'load': used / rows, **numbers, 'ids_memory_gb': bytes_of(known) / 1e9}


def per_column(program: Program, state: TrainState) -> dict[str, float | int]:
  """Of each column, and the load of each table, for the record of an evaluation. Passes over all rows."""
  numbers = {}
  count = jax.jit(directories.ids_per_feature)
  for name, known in state.known.items():
    layout, counts = program.embeddings.layout[name], jax.device_get(known.counts)
    features = features_of(layout)
    parts = {'ids': count(known.directory, features)}
    if isinstance(known.filter, Directory):
      parts['waiting'] = count(known.filter, features)
    parts |= {part: getattr(counts, part) for part in ('lookups', 'admitted', 'refused', 'unplaced', 'evicted')}
    columns = [CATEGORIES[column] for column in layout.columns]
    for part, values in parts.items():
      numbers |= {f'{part}_{column}': value for column, value in zip(columns, np.asarray(values).tolist(), strict=True)}
    row = bytes_per_row(directories.rows_of(known.directory), (state.tables[name], known.widths))
    for column in columns:
      waiting = numbers.get(f'waiting_{column}', 0)
      numbers[f'memory_gb_{column}'] = (numbers[f'ids_{column}'] * row + waiting * directories.BYTES_PER_ROW) / 1e9
    numbers[f'load_{name}'] = int(known.directory.used) / directories.rows_of(known.directory)
  return numbers


def bytes_per_row(rows: int, tree: Any) -> int:
  """Memory of a row of a table of embedding variables: its id's, and that of the arrays in `tree` that are per row."""
  per_row = [leaf for leaf in jax.tree.leaves(tree) if leaf.shape[:1] == (rows,)]
  return bytes_of(per_row) // rows + directories.BYTES_PER_ROW


def features_of(layout: TableLayout) -> np.ndarray:
  """The columns of a table as directories store them, u32[columns]."""
  return np.array(layout.columns, np.uint32)
