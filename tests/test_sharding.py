"""One device, two and four give the same numbers; the tables, given the same gradients, the same bits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlrm_jax import bits
from dlrm_jax.embeddings import exchange
from dlrm_jax.embeddings.layout import BLOCK, PARTS, TableLayout
from dlrm_jax.native import build
from dlrm_jax.program import make_program
from dlrm_jax.sharding import CUT, FEW, NAME, WHOLE, Axis
from dlrm_jax.state import abstract_state, init_state, state_placing, state_specs
from dlrm_jax.step import jit_predict, jit_train_step
from dlrm_jax.structs import Batch
from tests.helpers import devices, small_spec

COUNTER = {'embedding__admission__name': 'counter', 'embedding__admission__threshold': 3}
ROOM = {'embedding__rows': 48 * 512, 'embedding__admission__expected_ids': 48 * 512}
# So large that it is cut.
BLOOM = {'embedding__admission__name': 'counting_bloom', 'embedding__admission__expected_ids': 200_000}
GATHER = {'embedding__exchange': 'gather'}
DYNAMIC = {'embedding__kind': 'dynamic'} | ROOM | GATHER
CUT_ALL = {'embedding__shard_mb': 0.0} | GATHER
ROUTED = {'embedding__exchange': 'all_to_all'}
CASES = {
  'held by all': {},
  'static': CUT_ALL,
  'bfloat16': CUT_ALL | {'embedding__dtype': 'bfloat16'},
  'all rows': CUT_ALL | {'optimizer__table_update': 'all', 'optimizer__name': 'adam'},
  'network': CUT_ALL | {'model__shard_kb': 0.01, 'optimizer__name': 'adagraddecay'},
  'dot, slices': CUT_ALL | {'model__interaction': 'dot', 'micro_batch': 2},
  'all to all': CUT_ALL | ROUTED,
  'all to all, counter': DYNAMIC | COUNTER | ROUTED,
  'all to all, adaptive': DYNAMIC | COUNTER | CUT_ALL | ROUTED | {'embedding__kind': 'adaptive'},
  'multi-hash': CUT_ALL | {'embedding__kind': 'multi_hash', 'embedding__multi_hash__full_below': 0},
  'dynamic': DYNAMIC,
  'counter': DYNAMIC | COUNTER,
  'bloom': DYNAMIC | COUNTER | BLOOM,
  'width': DYNAMIC | {'embedding__width__name': 'dynamic', 'embedding__width__every': 3},
  'adaptive': DYNAMIC | COUNTER | CUT_ALL | {'embedding__kind': 'adaptive'},
}


def make_batch(seed, size=32, padding=3):
  """Long-tailed ids, the same ones again and again; the last examples are padding."""
  rng = np.random.default_rng(seed)
  number = rng.zipf(1.3, (size, 26)).astype(np.uint32) % 200
  weight = np.ones(size, np.float32)
  weight[size - padding :] = 0
  return Batch(
    label=(rng.random(size) < 0.3).astype(np.float32),
    dense=rng.normal(size=(size, 13)).astype(np.float32),
    bucket=number % 50,
    weight=weight,
    key=np.stack([number * np.uint32(2654435761), number * np.uint32(40503) + np.uint32(7)], axis=-1),
  )


@functools.cache
def trained(case, number):
  """(losses, state, logits) after eight steps on so many devices."""
  spec = small_spec('data', 'result', **CASES[case])
  program = make_program(spec, devices(number))
  put = functools.partial(program.axis.put, multiple=spec.micro_batch)
  state, step, losses = init_state(program), jit_train_step(program), []
  for seed in range(8):
    state, metrics = step(state, put(make_batch(seed)))
    losses.append(float(metrics['loss']))
  logit, _, weight = jax.device_get(jit_predict(program)(state, put(make_batch(9))))
  return losses, jax.device_get(state), logit[weight > 0]


QUICK = ('counter',)


@pytest.mark.parametrize(
  ('case', 'number'),
  [
    *(pytest.param(case, 4, marks=() if case in QUICK else pytest.mark.slow) for case in CASES),
    pytest.param('counter', 2, marks=pytest.mark.slow),
  ],
)
def test_training_does_not_depend_on_the_number_of_devices(case, number):
  losses, state, logit = trained(case, 1)
  other_losses, other, other_logit = trained(case, number)
  np.testing.assert_allclose(other_losses[0], losses[0], rtol=1e-6)
  np.testing.assert_allclose(other_losses, losses, rtol=1e-5)
  np.testing.assert_allclose(other_logit, logit, atol=1e-4)
  # Who has which row, how often it was seen and what was counted does not even differ by rounding.
  jax.tree.map(np.testing.assert_array_equal, other.known, state.known)


SAME_BITS = {
  'static': {'micro_batch': 2},
  'gather': CASES['static'] | {'optimizer__name': 'adagrad', 'model__dtype': 'bfloat16'},
  'bfloat16': CASES['bfloat16'] | ROUTED,
  'all rows': CASES['all rows'] | ROUTED,
  'network': CASES['network'] | ROUTED,
  'dot': {'model__interaction': 'dot', 'optimizer__name': 'adam'},
  'multi-hash': CASES['multi-hash'] | ROUTED | {'optimizer__name': 'gradientdescent'},
  'counter': CASES['counter'] | ROUTED,
  'width': CASES['width'] | ROUTED,
  'adaptive': CASES['adaptive'] | ROUTED,
}


@pytest.mark.skipif(not build.load().ready, reason=build.load().note)
@pytest.mark.parametrize(
  'case', [pytest.param(case, marks=() if case in ('static', 'counter') else pytest.mark.slow) for case in SAME_BITS]
)
def test_training_has_the_same_bits_on_any_number_of_devices(case):
  """If each has a power of two of leaves of examples, see sums.py."""
  fields, results = {'embedding__shard_mb': 0.0} | SAME_BITS[case], []
  slices = fields.get('micro_batch', 1)
  for number in (1, 2, 4):
    program = make_program(small_spec('data', 'result', **fields), devices(number))
    state, step, losses = init_state(program), jit_train_step(program), []
    for seed in range(4):
      batch = make_batch(seed, size=512 * slices, padding=200)
      state, metrics = step(state, program.axis.put(batch, multiple=slices))
      losses.append(float(metrics['loss']))
    state = state.replace(tables={name: (table.value, table.slots) for name, table in state.tables.items()})
    results.append(jax.device_get((losses, state)))
  for other in results[1:]:
    jax.tree.map(np.testing.assert_array_equal, other, results[0])


def lookup_and_update(program, state, batch, gradient):
  """The vectors of a batch, and the tables after a gradient of them, by the functions of a step."""

  def work(state, batch, gradient):
    tables, known, found = program.embeddings.resolve(state.tables, state.known, batch, state.step)
    vectors = program.embeddings.lookup(tables, found)
    return vectors, program.embeddings.update(tables, found, gradient, state.step), known

  specs_ = state_specs(program)
  over = program.axis.over(work, (specs_, CUT, CUT), (CUT, specs_.tables, specs_.known))
  return jax.jit(over)(state, batch, gradient)


@pytest.mark.parametrize(
  ('case', 'optimizer'),
  [
    *(
      pytest.param('static', name, marks=pytest.mark.slow)
      for name in ('adam', 'adagraddecay', 'adagrad', 'gradientdescent')
    ),
    *((case, 'adamasync') for case in ('static', 'dynamic')),
    *(pytest.param(case, 'adamasync', marks=pytest.mark.slow) for case in ('bfloat16', 'adaptive')),
  ],
)
def test_lookup_and_update_have_the_same_bits_on_any_number_of_devices(case, optimizer):
  spec = small_spec('data', 'result', **CASES[case], optimizer__name=optimizer)
  gradients = np.random.default_rng(1).normal(size=(2, 32, 26, 8)).astype(np.float32)
  results = []
  for number in (1, 2, 4) if case == 'static' else (1, 4):
    program = make_program(spec, devices(number))
    state, vectors = init_state(program), []
    for seed, gradient in enumerate(gradients):
      got, tables, known = lookup_and_update(program, state, program.axis.put(make_batch(seed)), gradient)
      state = state.replace(tables=tables, known=known)
      vectors.append(got)
    tables = {name: (table.value, table.slots) for name, table in tables.items()}  # the scratch is nobody's business
    results.append(jax.device_get((vectors, tables, known)))
  for result in results[1:]:
    jax.tree.map(np.testing.assert_array_equal, result, results[0])


def rounds_of(program, state, batch):
  """Of the lookups of a batch, table by table."""
  find = lambda known, batch: [where.rounds for where in program.embeddings.find(known, batch).rows.values()]
  over = program.axis.over(find, (state_specs(program).known, CUT), WHOLE)
  return [int(rounds) for rounds in jax.jit(over)(state.known, batch)]


# Things that a box holds, of the 60 or so that a device has for an owner, and the rounds that this makes.
BOXES = {'one round': (104, {1}), 'two rounds': (45, {2}), 'many rounds': (5, {11, 12})}


@pytest.mark.parametrize(('case', 'box'), [
  pytest.param(case, box, marks=() if (case, box) in (('static', 'many rounds'), ('adaptive', 'two rounds'))
               else pytest.mark.slow)
  for case in ('static', 'bfloat16', 'dynamic', 'counter', 'bloom', 'width', 'adaptive') for box in BOXES
])  # fmt: skip
def test_all_to_all_is_gather_but_for_the_order_of_sums(case, box, monkeypatch):
  size, rounds = BOXES[box]
  monkeypatch.setattr(exchange, 'capacity', lambda lookups, devices: size)
  gradients = np.random.default_rng(1).normal(size=(2, 32, 26, 8)).astype(np.float32)
  results = []
  for how in ('gather', 'all_to_all', 'all_to_all'):
    program = make_program(small_spec('data', 'result', **CASES[case] | {'embedding__exchange': how}), devices(4))
    assert program.embeddings.is_routed('fused') == (how == 'all_to_all')
    state = init_state(program)
    for seed, gradient in enumerate(gradients):
      vectors, tables, known = lookup_and_update(program, state, program.axis.put(make_batch(seed)), gradient)
      state = state.replace(tables=tables, known=known)
    if how == 'all_to_all':
      assert rounds_of(program, state, program.axis.put(make_batch(0)))[0] in rounds
    numbers = {name: bits.widen((table.value, table.slots)) for name, table in tables.items()}
    results.append(jax.device_get((vectors, numbers, known)))
  gathered, routed, again = results
  jax.tree.map(np.testing.assert_array_equal, routed, again)
  close = {'rtol': 2**-7, 'atol': 1e-3} if case == 'bfloat16' else {'rtol': 1e-5, 'atol': 1e-6}
  jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, **close), gathered[:2], routed[:2])
  # Which ids have which rows does not depend on it.
  jax.tree.map(np.testing.assert_array_equal, gathered[2], routed[2])
  if known:
    assert known['fused'].counts.admitted.sum() > 100


@pytest.mark.parametrize(
  'kind', ['dynamic', *(pytest.param(kind, marks=pytest.mark.slow) for kind in ('static', 'adaptive'))]
)
def test_all_to_all_copies_no_table(kind):
  fields = {'embedding__kind': kind, 'embedding__buckets': (40_000,), 'embedding__rows': 26 * 40_000}
  fields |= COUNTER if kind == 'adaptive' else {}
  program = make_program(small_spec('data', 'result', **fields, embedding__exchange='all_to_all'), devices(4))
  assert program.embeddings.is_routed('fused')
  state = abstract_state(program)
  memory = jit_train_step(program).lower(state, jax.eval_shape(lambda: make_batch(0))).compile().memory_analysis()
  a_part = state.tables['fused'].value.size * 4 / 4
  assert memory.temp_size_in_bytes < a_part / 2


@pytest.mark.parametrize('case', ['static', pytest.param('counter', marks=pytest.mark.slow)])
@pytest.mark.parametrize('native', [True, False])
def test_logits_have_the_same_bits_on_any_number_of_devices(case, native):
  fields = CASES[case] | {'native': native, 'model__bottom_mlp': (64, 32), 'model__top_mlp': (64, 32)}
  alone = make_program(small_spec('data', 'result', **fields))
  state, step = init_state(alone), jit_train_step(alone)
  for seed in range(3):
    state, _ = step(state, make_batch(seed))
  state, batches, logits = jax.device_get(state), [make_batch(seed, size=64) for seed in range(4)], []
  for number in (1, 2, 4):
    program, parts = make_program(small_spec('data', 'result', **fields), devices(number)), []
    placed, predict = jax.device_put(state, state_placing(program)), jit_predict(program)
    for first in range(0, 4, number):  # every device has one of the batches
      batch = jax.tree.map(lambda *leaves: np.concatenate(leaves), *batches[first : first + number])
      parts.append(np.asarray(predict(placed, program.axis.put(batch))[0]))
    logits.append(np.concatenate(parts))
  np.testing.assert_array_equal(logits[0], logits[1])
  np.testing.assert_array_equal(logits[0], logits[2])


def test_lookups_are_routed_unless_that_is_slow_to_compile():
  def routed(number, **fields):
    spec = small_spec('data', 'result', embedding__shard_mb=0.0, **fields)
    embeddings = make_program(spec, Axis(jax.sharding.AbstractMesh((number,), (NAME,)))).embeddings
    return {embeddings.is_routed(name) for name in embeddings.names}

  assert routed(2) == routed(8) == routed(8, embedding__fusion=False) == {True}
  assert routed(4, embedding__fusion=False) == routed(8, embedding__exchange='gather') == {False}
  assert routed(2, embedding__fusion=False, embedding__exchange='all_to_all') == {True}


def test_every_device_has_an_equal_part_of_the_rows():
  program = make_program(small_spec('data', 'result', **DYNAMIC), devices(4))
  state = init_state(program)
  for leaf in (state.tables['fused'].value, state.tables['fused'].slots.m, state.known['fused'].directory.entry):
    assert {shard.data.shape[0] for shard in leaf.addressable_shards} == {leaf.shape[0] // 4}
  assert all(shard.data.shape == state.params['logit_kernel'].shape
             for shard in state.params['logit_kernel'].addressable_shards)  # fmt: skip


def test_large_parameters_and_their_slots_are_cut():
  program = make_program(small_spec('data', 'result', model__shard_kb=0.4), devices(4))
  state = init_state(program)
  for name, whole in state.params['bottom_mlp'].items():
    large = whole.size * 4 >= 0.4 * 1024 and whole.shape[0] % 4 == 0
    for leaf in (whole, state.opt_state.m['bottom_mlp'][name]):
      assert {shard.data.shape[0] for shard in leaf.addressable_shards} == {leaf.shape[0] // (4 if large else 1)}
  assert state.params['bottom_mlp']['kernel_1'].addressable_shards[0].data.shape == (4, 8)


@pytest.mark.parametrize('parts', [1, PARTS])
def test_every_row_has_a_place_of_its_own(parts):
  layout = TableLayout((3, 4, 9), (70_000, 3, 1000), parts)
  row = jnp.arange(71_003)
  place = np.asarray(layout.dealt(row))
  assert len(set(place.tolist())) == 71_003
  assert place.max() < layout.rows
  column, bucket = layout.origin(jnp.asarray(place))
  np.testing.assert_array_equal(column, np.repeat([3, 4, 9], layout.buckets))
  np.testing.assert_array_equal(bucket, np.concatenate([np.arange(n) for n in layout.buckets]))


@pytest.mark.parametrize('number', [2, 4, 10])
def test_rows_are_dealt_out_evenly(number):
  # The first column has nearly all rows, the others nearly all lookups.
  layout = TableLayout((0, 1, 2), (1_000_000, 8 * BLOCK * number, 3), PARTS)
  place = np.asarray(layout.dealt(jnp.arange(1_000_000, sum(layout.buckets) - 3)))
  owners = np.bincount(place // (layout.rows // number), minlength=number)
  assert owners.max() <= owners.mean() + 2 * BLOCK


def test_where_parts_cannot_be_equal_every_device_has_all():
  spec = small_spec('data', 'result', **CUT_ALL)
  axis = Axis(jax.sharding.AbstractMesh((7,), (NAME,)))
  assert not make_program(spec, axis).embeddings.is_cut('fused')
  assert make_program(spec, Axis(jax.sharding.AbstractMesh((5,), (NAME,)))).embeddings.is_cut('fused')


def test_arrays_do_not_depend_on_the_number_of_devices():
  spec = small_spec('data', 'result', **CASES['adaptive'])
  one, four = (make_program(spec, devices(number)) for number in (1, 4))
  assert jax.tree.map(lambda leaf: leaf.shape, abstract_state(one)) == jax.tree.map(
    lambda leaf: leaf.shape, abstract_state(four)
  )
  jax.tree.map(np.testing.assert_array_equal, *(jax.device_get(init_state(program).tables) for program in (one, four)))


def test_specs_name_every_array_of_a_state():
  program = make_program(small_spec('data', 'result', **CASES['width']), devices(4))
  named = state_specs(program)
  assert jax.tree.structure(named) == jax.tree.structure(abstract_state(program))
  assert named.known['fused'].counts.asked == WHOLE
  assert named.known['fused'].widths.mean == CUT


def test_batches_are_padded_to_what_the_devices_can_share_out():
  batch = make_batch(0, size=30)
  put = devices(4).put(batch, multiple=2)
  assert put.label.shape == (32,)
  np.testing.assert_array_equal(put.weight[:30], batch.weight)
  assert not np.asarray(put.weight[30:]).any()
  stack = devices(4).put(jax.tree.map(lambda leaf: np.stack([leaf, leaf]), batch), multiple=2, stacked=True)
  jax.tree.map(lambda leaves, leaf: np.testing.assert_array_equal(leaves, np.stack([leaf, leaf])), stack, put)


@pytest.mark.parametrize('number', [2, 4])
@pytest.mark.parametrize('size', [3, FEW - 2, FEW])
def test_sums_of_few_and_of_many_numbers_are_those_of_numpy_with_their_gradients(number, size):
  """The gradient is what all devices alike ask of the sum; of what each uses for itself, the sum of what they ask."""
  axis, rng = devices(number), np.random.default_rng(7)
  many, two = rng.normal(size=(number, size)).astype(np.float32), rng.normal(size=(number, 2)).astype(np.float32)
  asked = rng.normal(size=(number, size)).astype(np.float32)

  def both(many, two, asked):
    sums, vjp = jax.vjp(lambda many, two: axis.sum_flat({'a': many[0], 'b': two[0]}), many, two)
    _, vjp_of_each = jax.vjp(axis.to_each, (many[0], two[0]))
    return sums, vjp({'a': jnp.ones(size), 'b': two[0]}), vjp_of_each((asked[0], two[0]))[0]

  sums, (of_many, of_two), (of_each, of_each_two) = axis.over(both, CUT, (WHOLE, CUT, WHOLE))(many, two, asked)
  np.testing.assert_allclose(sums['a'], many.sum(0), rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(sums['b'], two.sum(0), rtol=1e-5, atol=1e-5)
  np.testing.assert_array_equal(of_many, np.ones((number, size)))
  np.testing.assert_array_equal(of_two, two)
  np.testing.assert_allclose(of_each, asked.sum(0), rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(of_each_two, two.sum(0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('number', [2, 4])
@pytest.mark.parametrize('size', [3, FEW + 3])
def test_sums_of_bfloat16_messages_are_those_of_rounded_numbers(number, size):
  """All devices have the same sum, in float32, of what each rounds; shared out among many, it is rounded once more."""
  axis, many = devices(number), np.random.default_rng(8).normal(size=(number, size)).astype(np.float32)
  rounded = lambda values: values.astype(jnp.bfloat16).astype(np.float32)
  sums = axis.over(lambda many: axis.sum_flat([many[0]], 'bfloat16')[0][None], CUT, CUT)(many)
  expected = functools.reduce(np.add, rounded(many))
  if number > 2 and size > FEW:
    expected = rounded(expected)
  np.testing.assert_array_equal(sums, np.tile(expected, (number, 1)))


@pytest.mark.parametrize(('number', 'shard_kb'), [(2, 0.0), (4, 0.01)])
def test_bfloat16_messages_round_the_gradients_of_the_network_alone(number, shard_kb):
  def step(dtype):
    fields = CUT_ALL | {'optimizer__name': 'gradientdescent', 'optimizer__learning_rate': 1.0}
    spec = small_spec('data', 'result', model__reduce_dtype=dtype, model__shard_kb=shard_kb, **fields)
    program = make_program(spec, devices(number))
    before = init_state(program)
    params = jax.device_get(before.params)
    after, metrics = jit_train_step(program)(before, program.axis.put(make_batch(0)))
    gradient = jax.tree.map(np.subtract, params, jax.device_get(after.params))
    return float(metrics['loss']), gradient, jax.device_get(after.tables)

  (loss, exact, tables), (other_loss, rounded, other_tables) = step('float32'), step('bfloat16')
  assert other_loss == loss
  jax.tree.map(np.testing.assert_array_equal, other_tables, tables)
  for one, other in zip(jax.tree.leaves(exact), jax.tree.leaves(rounded), strict=True):
    np.testing.assert_allclose(other, one, atol=2**-7 * np.abs(one).max())
  assert any((one != other).any() for one, other in zip(jax.tree.leaves(exact), jax.tree.leaves(rounded), strict=True))
