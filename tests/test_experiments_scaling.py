"""The cost model by hand-computed numbers, what it is fitted to, the network between namespaces, and the tables."""

import json
import math
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from dlrm_jax.embeddings import exchange, layout
from dlrm_jax.sharding import CUT, NAME, WHOLE
from experiments import common, scaling, scaling_model, scaling_tables
from experiments.scaling_model import Carried, Cost, Network
from experiments.scaling_network import Unavailable, namespaces
from tests.helpers import devices

FREE = Cost(0, 0)


def test_what_most_steps_leave_out_is_not_counted():
  axis = devices(4)

  def step(x):
    with jax.named_scope(exchange.SELDOM):
      return jax.lax.fori_loop(0, jnp.int32(x[0]), lambda _, x: axis.swap(x), x)

  text = compiled(axis, step, CUT, CUT, jnp.ones(16))
  assert 'all-to-all(' in text
  assert scaling_model.SELDOM == exchange.SELDOM
  assert scaling_model.count(text) == Carried(0, 0)


def compiled(axis, step, in_specs, out_specs, *arguments):
  return jax.jit(axis.over(step, in_specs, out_specs)).lower(*arguments).compile().as_text()


def test_what_is_sent_is_counted_with_its_bytes():
  axis = devices(4)

  def step(x, y):
    return axis.sum(x), axis.gather(y), axis.scatter_sum(jnp.tile(x, (4, 1))), axis.swap(jnp.tile(y, 8))

  text = compiled(axis, step, (CUT, CUT), (WHOLE, WHOLE, CUT, CUT), jnp.ones((12, 5)), jnp.ones(8, jnp.int32))
  # The sum of 15 numbers, of all devices; 8 of all together; 4 times 15; 16.
  assert scaling_model.count(text) == Carried(4, 4 * (4 * 15 + 8 + 4 * 15 + 16))


def test_a_large_sum_is_sent_in_parts():
  axis = devices(4)
  text = compiled(axis, axis.sum, WHOLE, WHOLE, jnp.ones(10_001))
  assert scaling_model.count(text) == Carried(2, 4 * 2 * 10_004)


def test_a_loop_counts_once():
  axis = devices(2)
  step = lambda x, rounds: jax.lax.fori_loop(0, rounds[0], lambda _, x: axis.swap(x), axis.swap(x))
  text = compiled(axis, step, (CUT, WHOLE), CUT, jnp.ones(20), jnp.ones(1, jnp.int32))
  assert scaling_model.count(text) == Carried(2, 80)


def test_other_collectives_are_no_part_of_the_model():
  axis = devices(2)
  text = compiled(axis, lambda x: jax.lax.psum(x, NAME), CUT, WHOLE, jnp.ones(20))
  with pytest.raises(ValueError, match='all-reduce'):
    scaling_model.count(text)


def test_a_process_keeps_its_own_part():
  assert scaling_model.sent(1200, 2) == 600
  assert scaling_model.sent(1200, 10) == 1080


def test_costs_are_fitted_to_two_sizes():
  cost = scaling_model.fit((1000, 5e-5 + 500 * 1e-9), (2_000_000, 5e-5 + 1_000_000 * 1e-9))
  assert cost == pytest.approx(Cost(5e-5, 1e-9))
  assert scaling_model.fit((1000, 3e-4), (2000, 1e-4)) == Cost(3e-4, 0)  # noise, not a gain


def test_a_step_by_hand():
  carried, cost = Carried(3, 400_000), Cost(2e-4, 2e-9)
  # Of 4 processes: 3 x 3 messages, which wait three times, and 0.3 MB.
  cores, wire = 9 * 2e-4 + 0.6e-3, 3 * 1e-3 + 3e5 / 1e8
  of = lambda cores_, network: scaling_model.step_seconds(20e-3, carried, cost, 4, cores_, network)
  assert of(4, Network()) == pytest.approx(20e-3 + cores)
  assert of(2, Network()) == pytest.approx(2 * (20e-3 + cores))
  assert of(8, Network(1e8, 1e-3)) == pytest.approx(20e-3 + cores + wire)


def test_tables_are_cut_where_the_model_says_so():
  assert layout.PARTS == scaling.PARTS


def test_growth_is_as_measured_and_then_goes_on_in_a_line():
  seconds = {1: 2.0, 2: 3.0, 4: 5.0, 10: 6.5}
  assert scaling_model.growth(seconds, 4) == 3.0
  assert scaling_model.growth(seconds, 100) == pytest.approx(6.5 + 90 * 0.25 - 2.0)


def record():
  """Of two cores, where a step costs its work, and what it sends only what a network takes for it."""
  sent, half = {'512': Carried(1, 100)}, {'512': Carried(1, 50)}
  rates = {'1': [512.0], '2': [960.0, 800.0, 900.0], '4': [1024.0], 'apart': [1024.0]}
  routed = {'2': [500.0], '4': [600.0]}
  return {
    'devices': (2, 4, 10),
    'speed': {
      'baseline, all_to_all, 512': {name: [rate / 2 for rate in of] for name, of in rates.items()},
      'base, all_to_all, 512': rates, 'base, gather, 512': routed, 'bf16, all_to_all, 512': rates,
    },
    'collectives': {
      'baseline, all_to_all': {'2': sent, '4': sent, '10': sent},
      'base, all_to_all': {'2': sent, '4': sent, '10': sent},
      'base, gather': {'2': sent, '4': sent, '10': sent},
      'bf16, all_to_all': {'2': half, '4': half, '10': half},
    },
    'tables': {
      'baseline, all_to_all': {'1': 1.0, '2': 1.0, '4': 1.0, '10': 1.0},
      'base, all_to_all': {'1': 1.0, '2': 1.0, '4': 1.25, '10': 1.25},
      'base, gather': {'1': 1.0, '2': 2.0, '4': 2.0, '10': 2.0},
    },
    'loopback': {'cost': FREE},
    'network': {
      'config': 'base', 'share': 512, 'cost': FREE, 'speed': {'1 Gbit/s, 0.5 ms': {'2': [1000.0], '4': [1100.0]}},
    },
  }  # fmt: skip


def test_predictions_stand_beside_what_was_measured():
  predicted = scaling_tables.predictions(record())
  rows = {(row['config'], row['exchange'], row['processes'], row['where']): row for row in predicted}
  two = rows['base', 'all_to_all', 2, 'loopback']
  assert (two['measured'], two['predicted']) == (900, 1024)  # a second each, and 512 examples
  assert two['error'] == pytest.approx(1024 / 900 - 1)
  # Two share a core, and the tables' part takes a quarter of a second more.
  assert rows['bf16', 'all_to_all', 4, 'loopback']['predicted'] == pytest.approx(4 * 512 / 2.5)
  assert rows['base', 'gather', 2, 'loopback']['predicted'] == pytest.approx(2 * 512 / 2)
  assert rows['base', 'all_to_all', 2, 'namespaces']['predicted'] == pytest.approx(1024 / (1 + 0.5e-3 + 50 / 125e6))
  wire = 0.1e-3 + 0.9 * 100 / 1.25e9
  assert rows['base', 'all_to_all', 10, 'machines']['predicted'] == pytest.approx(5120 / (1.25 + wire))
  assert rows['base', 'gather', 10, 'machines']['predicted'] == pytest.approx(5120 / (2 + wire))
  assert rows['base', 'all_to_all', 10, 'machines']['measured'] is None
  assert ('base', 'none', 10, 'machines') not in rows


def test_the_tables_say_what_is_measured_and_by_which_exchange():
  text = scaling_tables.render(json.loads(json.dumps(record())))
  assert '| base | all_to_all | 512 | 512 | 900 | 1,024 | 1,024 | 1.76 | 1.14 |' in text
  assert '| base | gather | 512 |  | 500 | 600 |  |  | 1.20 |' in text
  assert '| base | all_to_all | 512 | 2, loopback | no limit, 0 ms | 900 | 1,024 | +14% |' in text
  assert '| base | all_to_all | 10 | 512 | 1 | 0.00 |' in text
  assert '| 2 processes | dlrm_jax | gloo | all_to_all | FP32 | 900 (2.00x) | measured |' in text
  place = '10 machines of one core, 10 Gbit/s, 0.1 ms'
  assert f'| {place} | dlrm_jax | gloo | all_to_all | FP32+BF16 | 4,096 (1.60x) | predicted |' in text
  assert "| dlrm_jax, the community's settings | gloo | all_to_all | FP32 | 450 (baseline) | measured |" in text


def test_without_namespaces_the_tables_say_so():
  text = scaling_tables.render(record() | {'network': {'skipped': 'no network namespaces: ip netns: refused'}})
  assert 'no network namespaces: ip netns: refused' in text
  assert 'Gbit/s, 0.5 ms' not in text


@pytest.fixture
def joined():
  """Two namespaces and the network between them, in a function of its limits."""
  try:
    with namespaces(1, Network()):
      pass
  except Unavailable as reason:
    pytest.skip(str(reason))
  return lambda network: namespaces(2, network)


PAIR = """
import os, socket, sys, time
if os.environ['DLRM_PROCESS_ID'] == '0':
  listening = socket.create_server(('10.97.0.1', 6000)); end, _ = listening.accept()
  end.sendall(end.recv(1))
  while end.recv(1 << 20): pass
  end.sendall(b'x'); end.close()
  time.sleep(0.2)
else:
  for _ in range(100):
    try: end = socket.create_connection(('10.97.0.1', 6000)); break
    except ConnectionRefusedError: time.sleep(0.05)
  begin = time.perf_counter(); end.sendall(b'x'); end.recv(1); turn = time.perf_counter() - begin
  begin = time.perf_counter(); end.sendall(bytes(5_000_000)); end.shutdown(1); end.recv(1)
  print(turn, time.perf_counter() - begin)
"""


def test_a_network_takes_as_long_as_it_says_and_nothing_of_it_is_left(joined):
  """One byte there and back takes two delays, 5 MB their size over the bandwidth, or a little more."""
  with joined(Network(bandwidth=25e6, delay=0.02)) as inside:
    command = [*inside, sys.executable, '-c', PAIR]
    processes = [
      subprocess.Popen(command, env={'PATH': '/usr/sbin:/usr/bin:/sbin:/bin', 'DLRM_PROCESS_ID': str(index)},
                       stdout=subprocess.PIPE, text=True)
      for index in (0, 1)
    ]  # fmt: skip
    names = subprocess.run(['ip', 'netns', 'list'], capture_output=True, text=True, check=True).stdout
    own = inside[-1].split('ip netns exec ')[1].split('$')[0]
    assert own in names
    _, text = (process.communicate(timeout=30)[0] for process in processes)
  turn, bulk = map(float, text.split())
  assert 0.04 <= turn < 0.2
  assert 0.24 <= bulk < 1
  assert own not in subprocess.run(['ip', 'netns', 'list'], capture_output=True, text=True, check=True).stdout


def test_namespaces_go_when_what_runs_in_them_fails(joined):
  def run():
    with joined(Network()) as inside:
      own.append(inside[-1].split('ip netns exec ')[1].split('$')[0])
      raise common.Failed('exit code 1')

  own: list[str] = []
  with pytest.raises(common.Failed):
    run()
  (own,) = own
  assert own not in subprocess.run(['ip', 'netns', 'list'], capture_output=True, text=True, check=True).stdout
  assert own not in subprocess.run(['ip', 'link'], capture_output=True, text=True, check=True).stdout


def test_a_network_tells_its_limits():
  assert str(Network(1.25e9, 1e-4)) == '10 Gbit/s, 0.1 ms'
  assert str(Network(math.inf)) == 'no limit, 0 ms'
