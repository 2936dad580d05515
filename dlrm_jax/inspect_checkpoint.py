"""What is in a checkpoint: `python -m dlrm_jax.inspect_checkpoint result/run1 [--feature C3] [--parquet ids.parquet]`.

Its step, data position and config, its tables, and of each column the ids or rows: how many, how often and how lately
seen, how long their vectors. Reads the checkpoint alone, and never writes into its folder.
"""

import argparse
import contextlib
import json
import logging
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np

from configs import base
from dlrm_jax import spec as specs
from dlrm_jax.checkpoint.contents import Contents, Ids, Known, open_checkpoint
from dlrm_jax.checkpoint.same_model import CheckpointError, flat
from dlrm_jax.checkpoint.vectors import Export
from dlrm_jax.data.schema import CATEGORIES
from dlrm_jax.embeddings.directory import BYTES_PER_ROW
from dlrm_jax.upkeep import bytes_of, bytes_per_row

QUANTILES = {'min': 0, 'q25': 0.25, 'median': 0.5, 'q75': 0.75, 'max': 1}
Report = dict[str, Any]


def inspect(contents: Contents, chosen: set[int], top: int, export: Export | None = None) -> Report:
  """All that is told of a checkpoint and its chosen columns, in JSON's types. Tables are read one after another."""
  report = {
    'checkpoint': str(contents.path),
    'step': contents.step,
    'position': contents.position,
    'bytes': {name: bytes_of(tree) for name, tree in contents.shapes.items()},
    'config': differences(contents.config),
    'tables': {},
    'variables': {},
    'static': {},
  }
  for name, layout in contents.layout.items():
    columns = [column for column in layout.columns if column % len(CATEGORIES) in chosen]
    if not columns:
      continue
    known = contents.known(name) if contents.knows_ids(name) else None
    table = report['tables'][name] = table_of(contents, name, known)
    for part in contents.parts(name, columns, known):
      norm = part.norms()
      if known:
        of_part = variables_of(known, part.column, norm, top) | {'table': name}
        of_part['bytes'] = of_part['ids'] * table['bytes_per_row'] + (of_part['waiting'] or 0) * BYTES_PER_ROW
      else:
        of_part = {'rows': len(part.row), 'norm': summary(norm) | {'mean': mean(norm)}, 'table': name}
      report['variables' if known else 'static'][contents.name_of(part.column)] = of_part
      if export:
        export.write(part)
  return report


def differences(config: dict[str, Any]) -> Report:
  """The fields in which a saved config is not that of configs/base.py."""
  here, there = flat(config), flat(specs.to_dict(specs.from_config(base.get_config())))
  return {
    name: {'base': there.get(name), 'checkpoint': here.get(name)}
    for name in there | here
    if here.get(name) != there.get(name)
  }


def table_of(contents: Contents, name: str, known: Known | None) -> Report:
  """Of a table as a whole; bytes are those of the checkpoint, bytes per row those of training."""
  table = contents.shapes['tables'][name]
  rows, dim = table['value'].shape
  leaves = jax.tree_util.tree_leaves_with_path(table['slots'])
  report = {
    'kind': 'variables' if known else 'static',
    'columns': [contents.name_of(column) for column in contents.layout[name].columns],
    'rows': rows,
    'dim': dim,
    'dtype': dtype_of(table['value']),
    'bytes': bytes_of(table),
    'slots': {
      jax.tree_util.keystr(path, simple=True, separator='.'): {
        'shape': list(leaf.shape), 'dtype': dtype_of(leaf), 'bytes': bytes_of(leaf)
      }
      for path, leaf in leaves
    },
  }  # fmt: skip
  if not known:
    return report
  shapes = contents.shapes['known'][name]
  scratch = jax.ShapeDtypeStruct((rows,), np.int32)  # that training has and a checkpoint has not
  ids = sum(len(each.row) for each in known.ids.values())
  return report | {
    'bytes': bytes_of((table, shapes)),
    'bytes_per_row': bytes_per_row(rows, (table, shapes.get('widths', ()), scratch)),
    'ids': ids,
    'load': ids / known.rows,
    'waiting': sum(len(each.row) for each in known.waiting.values()) if known.waiting else None,
    'filter_bytes': bytes_of(shapes.get('filter', ())),
  }


def dtype_of(leaf: jax.ShapeDtypeStruct) -> str:
  """What the numbers of a table are: bfloat16 ones are saved as their bits (bits.py)."""
  return 'bfloat16' if leaf.dtype == np.uint16 else leaf.dtype.name


def variables_of(known: Known, column: int, norm: np.ndarray, top: int) -> Report:
  """Of one column's ids, whose vectors have these lengths."""
  ids = known.ids[column]
  return {
    'ids': len(ids.row),
    'waiting': len(known.waiting[column].row) if known.waiting else None,
    **{part: numbers[column] for part, numbers in known.counts.items()},
    'frequencies': histogram(ids.frequency),
    'version': summary(ids.version),
    'norm': summary(norm) | {'mean': mean(norm)},
    'top': most_frequent(ids, norm, top),
  }


def histogram(frequency: np.ndarray) -> dict[str, int]:
  """How many are at least 1, 2, 4, ... and less than twice that."""
  power = np.frexp(frequency.astype(np.float64))[1] - 1
  return {str(2**i): number for i, number in enumerate(np.bincount(power).tolist())}


def summary(values: np.ndarray) -> dict[str, float | None]:
  """Quantiles, each of them one of the values; None where there is none, or where it is not a finite number."""
  if not len(values):
    return dict.fromkeys(QUANTILES)
  return {name: finite(np.quantile(values, q, method='nearest').item()) for name, q in QUANTILES.items()}


def mean(values: np.ndarray) -> float | None:
  """None for no values."""
  return finite(values.mean(dtype=np.float64).item()) if len(values) else None


def finite(value: float) -> float | None:
  """JSON has no other numbers."""
  return value if np.isfinite(value) else None


def most_frequent(ids: Ids, norm: np.ndarray, top: int) -> list[Report]:
  """The first so many by frequency; of equals, those with the lower keys."""
  top = min(top, len(ids.row))
  if not top:
    return []
  least = np.partition(ids.frequency, -top)[-top]
  often = np.flatnonzero(ids.frequency >= least)
  order = often[np.lexsort((ids.key[often], -ids.frequency[often].astype(np.int64)))][:top]
  return [
    {
      'key': f'{ids.key[i]:016x}',
      'frequency': ids.frequency[i].item(),
      'version': ids.version[i].item(),
      'norm': finite(norm[i].item()),
    }
    for i in order
  ]


def text(report: Report) -> str:
  """The report for people."""
  position = json.dumps(report['position'])
  blocks = [lines([['checkpoint', report['checkpoint']], ['step', str(report['step'])], ['position', position]])]
  table = lambda title, header, rows: blocks.append(f'{title}\n{lines([header, *rows])}') if rows else None
  table('config, where it is not configs/base.py', ['field', 'base', 'checkpoint'], [
    [name, short(both['base']), short(both['checkpoint'])] for name, both in report['config'].items()
  ])  # fmt: skip
  table('saved', ['part', 'bytes'], list(report['bytes'].items()))
  table('tables', ['table', 'kind', 'rows', 'ids', 'load', 'waiting', 'dim', 'dtype', 'bytes', 'slots'], [
    [name, t['kind'], t['rows'], t.get('ids'), t.get('load'), t.get('waiting'), t['dim'], t['dtype'], t['bytes'],
     ' '.join(f'{slot}{part["shape"]}' for slot, part in t['slots'].items())]
    for name, t in report['tables'].items()
  ])  # fmt: skip
  counted = ['ids', 'waiting', 'lookups', 'admitted', 'refused', 'unplaced', 'evicted', 'bytes']
  variables, static = report['variables'].items(), report['static'].items()
  table('ids', ['column', *counted], [[c, *(v[part] for part in counted)] for c, v in variables])
  header = ['column', *QUANTILES]
  table('steps at which ids were last seen', header, [[c, *v['version'].values()] for c, v in variables])
  powers = [str(2**i) for i in range(max((len(v['frequencies']) for _, v in variables), default=0))]
  table('ids by how often they were seen: so often, up to twice that', ['column', *powers], [
    [c, *(v['frequencies'].get(power, 0) for power in powers)] for c, v in variables
  ])  # fmt: skip
  table('lengths of the vectors of ids', [*header, 'mean'], [[c, *v['norm'].values()] for c, v in variables])
  table('most frequent ids', ['column', 'key', 'frequency', 'version', 'norm'], [
    [c, *one.values()] for c, v in variables for one in v['top']
  ])  # fmt: skip
  table('lengths of the vectors of buckets', ['column', 'table', 'rows', *QUANTILES, 'mean'], [
    [c, v['table'], v['rows'], *v['norm'].values()] for c, v in static
  ])  # fmt: skip
  return '\n\n'.join(blocks)


def lines(rows: list[list[Any]]) -> str:
  """Rows of cells, the columns below each other: texts from the left, numbers from the right."""
  cells = [[f'{c:.4g}' if isinstance(c, float) else '-' if c is None else str(c) for c in row] for row in rows]
  widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
  right = [not isinstance(cell, str) for cell in rows[-1]]
  aligned = (
    '  '.join(c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True)) for row in cells
  )
  return '\n'.join(f'  {line}'.rstrip() for line in aligned)


def short(value: Any) -> str:
  """A value of a config in at most 60 characters."""
  line = json.dumps(value)
  return line if len(line) <= 60 else f'{line[:57]}...'


def main(arguments: list[str] | None = None) -> int:
  """The command: the report on stdout and 0, or one line on stderr and 1."""
  parser = argparse.ArgumentParser(prog='python -m dlrm_jax.inspect_checkpoint', description=__doc__.split('\n')[0])
  add = parser.add_argument
  add('checkpoint', type=Path, help='folder of a run, of its checkpoints, or of one of them')
  add('--step', type=int, help='of those in the folder; the newest unless given')
  add('--top', type=int, default=10, help='most frequent ids listed for each column (%(default)s)')
  add('--feature', choices=CATEGORIES, metavar='C1..C26', help='this column alone')
  add('--parquet', type=Path, help='write the vectors to this file, with their ids or buckets')
  add('--json', action='store_true', help='one document of JSON in place of tables')
  args = parser.parse_args(arguments)
  if args.top < 0:
    parser.error(f'argument --top: {args.top} is less than 0')
  jax.config.update('jax_platforms', 'cpu')  # an accelerator is another program's
  logging.getLogger('absl').setLevel(logging.ERROR)  # Orbax warns that what is opened to be read cannot be written
  columns = {CATEGORIES.index(args.feature)} if args.feature else set(range(len(CATEGORIES)))
  try:
    contents = open_checkpoint(args.checkpoint, args.step)
    with Export(args.parquet, contents) if args.parquet else contextlib.nullcontext() as export:
      report = inspect(contents, columns, args.top, export)
  except (CheckpointError, OSError) as error:
    print(f'error: {error}', file=sys.stderr)
    return 1
  print(json.dumps(report, allow_nan=False) if args.json else text(report))
  return 0


if __name__ == '__main__':
  sys.exit(main())
