"""The experiments of embedding variables: their pure parts, and what they measure at sizes that mean nothing."""

import argparse
import csv
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from dlrm_jax.data.synthetic import main as make_data
from dlrm_jax.program import make_program
from dlrm_jax.state import init_state
from dlrm_jax.upkeep import bytes_of
from experiments import common, drift, eviction, variables, variables_tables


@pytest.fixture(scope='module')
def data(tmp_path_factory):
  folder = tmp_path_factory.mktemp('data')
  make_data(['--rows', '2000', '--eval_rows', '1', '--out', str(folder)])
  return folder


@pytest.mark.parametrize('size', variables.SIZES)
def test_computed_memory_is_that_of_the_arrays(size):
  for name, system in variables.systems(size).items():
    program = make_program(common.make_spec('base', Path('d'), 0, 512, no_eval=True, embedding=system.fields))
    state = jax.eval_shape(lambda program=program: init_state(program))
    arrays = bytes_of((state.tables, state.known)) / 1e9
    assert variables.computed(program.spec.embedding) == pytest.approx(arrays, abs=1e-6), name


def test_runs_without_a_vocabulary_take_no_more_memory_than_static_tables():
  args = argparse.Namespace(data=Path('d'), buckets=0, batch_size=512, directory_rows=0, runs=variables.RUNS)
  memory = {}
  for name, (config, fields) in variables.runs(args).items():
    admission = {'expected_ids': fields.get('admission.expected_ids', 1)}
    nested = {'rows': fields['rows'], 'admission': admission} if fields else {}
    memory[name] = variables.computed(common.make_spec(config, Path('d'), 0, 512, embedding=nested).embedding)
  assert 0.99 < memory['dynamic'] / memory['static'] <= 1
  assert memory['counter of 3'] < memory['static']


@pytest.mark.slow
def test_speed_counts_new_ids_and_growths(data):
  fields = {'kind': 'dynamic', 'rows': 8192}
  of = variables.speed(fields, passes=1, data=data, batch_size=50, samples=2000)
  assert len(of.passes) == 2
  assert all(rate > 0 for rate in of.passes)
  ids = variables.distinct_ids(data)['ids']
  assert 0.8 * ids < of.new_share * 2000 * 26 <= ids  # while the tables are small, some find no place
  assert of.grown > 0
  assert of.growth_seconds > 0
  assert 0 < of.computed_gb < of.peak_gb


def test_ids_are_counted_by_column(data):
  with (data / 'train.csv').open() as file:
    columns = list(zip(*csv.reader(file), strict=True))[14:]
  expected = {'rows': 2000, 'ids': sum(len(set(column)) for column in columns)}
  assert variables.distinct_ids(data, batch_size=64, most=500) == expected


def test_speed_table_has_ratios_within_a_repetition():
  def one(filling, known, grown=0):
    return variables.Speed([filling, 1.0, known], 0.25, grown, 1.5 * grown, 3.7, 3.8, 4.9)._asdict()

  rows = {
    'static': {'0': one(10.0, 20.0), '1': one(20.0, 40.0), '2': one(40.0, 80.0)},
    'dynamic': {'0': one(5.0, 20.0, 2), '1': one(20.0, 30.0, 2)},
  }
  lines = variables_tables.render_speed('full, batch 512', rows).splitlines()
  assert lines[2] == '| static | 20 | 10-40 |  |  | 40 | 20-80 |  |  | 25.0% | 0 (0.0 s) | 3.70 | 3.80 | 4.90 |'
  dynamic = '| dynamic | 12 | 5-20 | 0.75 | 0.50-1.00 | 25 | 20-30 | 0.88 | 0.75-1.00 | 25.0% | 2 (3.0 s) '
  assert lines[3] == f'{dynamic}| 3.70 | 3.80 | 4.90 |'
  assert len({line.count('|') for line in lines}) == 1


def test_quality_table_holds_directories_against_the_plan():
  memory = {'computed_gb': 1, 'tables_gb': 2, 'peak_gb': 3}
  common_fields = {'auc': 0.8, 'log_loss': 0.45, 'samples_per_second': None, **memory}
  dynamic = {'ids': 990, 'load': 0.495, 'rows': 2000, 'first_rows': 1800, 'lookups_refused': 0, 'lookups_unplaced': 26}
  rows = {'static': common_fields, 'dynamic': common_fields | dynamic}
  rows['counter'] = rows['dynamic'] | {'lookups_refused': 7}
  quality, directory = variables_tables.render_quality(rows, {'rows': 100, 'ids': 1000}, None).split('\n\n')
  assert quality.splitlines()[2] == '| static | 0.80000 | 0.45000 |  | 1.00 | 2.00 | 3.00 |'
  assert directory.splitlines()[2] == (
    '| dynamic | 1,800 | 2,000 | 1,000 | 990 | 0.556 | 0.495 | < 0.0020% | 1.0000% | 1.0000% |'
  )
  assert directory.splitlines()[3] == '| counter | 1,800 | 2,000 |  | 990 |  | 0.495 |  |  | 1.0000% |'
  assert variables_tables.promised(0.9) == ''


def test_an_unknown_part_is_one_line(capsys):
  with pytest.raises(SystemExit):
    variables.main(['--parts', 'speed,price'])
  assert '--parts speed,price: must be of speed,quality' in capsys.readouterr().err


def ids_of(lines, column):
  return {line.split(',')[14 + column] for line in lines.decode().splitlines()}


def test_a_share_of_the_drifting_ids_dies_each_day(monkeypatch):
  monkeypatch.setattr(drift, 'SLOTS', 300)
  days, same = drift.Days(0.25, seed=1), drift.Days(0.25, seed=1)
  first, second = days.draw(20_000), days.draw(20_000)
  assert same.draw(20_000) == first
  for column in range(drift.COLUMNS):
    before, after = ids_of(first, column), ids_of(second, column)
    left = len(before & after) / len(before)
    assert left == pytest.approx(0.75, abs=0.08) if column in drift.DRIFTING else left == 1
  labels = [int(line[0]) for line in first.decode().splitlines()]
  assert 0.1 < np.mean(labels) < 0.5


@pytest.mark.slow  # two runs of the program
def test_the_program_trains_through_the_days(tmp_path, monkeypatch):
  monkeypatch.setattr(drift, 'SLOTS', 300)
  options = {'days': 6, 'steps_per_day': 8, 'batch_size': 64, 'days_to_live': 1, 'directory_rows': 4096}
  args = argparse.Namespace(**options, share=0.3, l2=0.1, seed=0)
  drift.write(args, tmp_path)
  results = {name: drift.train(args, name, tmp_path, tmp_path / name) for name in ('never', 'global_step')}
  never, old = (results[name]['days'] for name in ('never', 'global_step'))
  assert len(never) == len(old) == 6
  assert never[-1]['ids_evicted'] == 0 < old[-1]['ids_evicted']
  assert drift.growth(never, 'ids') > drift.growth(old, 'ids')
  assert all(0.1 < day['memory_gb'] < 10 for day in never + old)
  table, runs = drift.render(results).split('\n\n')
  assert len(table.splitlines()) == 2 + 6
  assert len(runs.splitlines()) == 2 + 2
  json.dumps(results)


def test_growth_is_that_of_the_second_half():
  days = [{'ids': ids} for ids in (1, 10, 15, 20)]
  assert drift.growth(days, 'ids') == 2


def test_eviction_table_is_beside_the_run_without():
  run = {'eviction': 'never', 'value': 0, 'auc': 0.8, 'log_loss': 0.45}
  run |= {'ids': 100, 'ids_admitted': 120, 'ids_evicted': 20}
  runs = [run, run | {'eviction': 'global_step', 'value': 50, 'auc': 0.79, 'ids': 25}]
  lines = eviction.render(runs, 200).splitlines()
  assert lines[2] == '| never | 0.80000 | +0.00000 | 0.45000 | 120 | 20 | 100 | 100% |'
  assert lines[3] == '| global_step 50 25% of the epoch | 0.79000 | -0.01000 | 0.45000 | 120 | 20 | 25 | 25% |'
