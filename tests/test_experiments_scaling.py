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
from experiments.scaling_model import Cost, Network
from experiments.scaling_network import Unavailable, namespaces
from tests.helpers import devices

FREE = dict.fromkeys(scaling_model.KINDS, Cost(0, 0))


def test_what_most_steps_leave_out_is_not_counted():
  axis = devices(4)

  def step(x):
    with jax.named_scope(exchange.SELDOM):
      return jax.lax.fori_loop(0, jnp.int32(x[0]), lambda _, x: axis.swap(x), x)

  text = compiled(axis, step, CUT, CUT, jnp.ones(16))
  assert 'all-to-all(' in text
  assert scaling_model.SELDOM == exchange.SELDOM
  assert scaling_model.count(text) == {}


def compiled(axis, step, in_specs, out_specs, *arguments):
  return jax.jit(axis.over(step, in_specs, out_specs)).lower(*arguments).compile().as_text()


def test_collectives_are_counted_with_their_bytes():
  axis = devices(4)

  def step(x, y):
    return jax.lax.psum(x, NAME), axis.gather(y), axis.scatter_sum(jnp.tile(x, (4, 1))), axis.swap(jnp.tile(y, 8))

  text = compiled(axis, step, (CUT, CUT), (WHOLE, WHOLE, CUT, CUT), jnp.ones((12, 5)), jnp.ones(8, jnp.int32))
  assert scaling_model.count(text) == {
    'all-reduce': {'times': 1, 'bytes': 3 * 5 * 4},
    'all-gather': {'times': 1, 'bytes': 8 * 4},
    'reduce-scatter': {'times': 1, 'bytes': 3 * 5 * 4},
    'all-to-all': {'times': 1, 'bytes': 16 * 4},
  }


def test_a_loop_counts_once_and_a_condition_by_one_of_its_branches():
  axis = devices(2)

  def step(x, rounds):
    x = jax.lax.fori_loop(0, rounds[0], lambda _, x: axis.swap(x), x)
    return jax.lax.cond(rounds[0] > 1, lambda: jax.lax.psum(axis.swap(x), NAME), lambda: jax.lax.psum(x, NAME))

  text = compiled(axis, step, (CUT, WHOLE), CUT, jnp.ones(20), jnp.ones(1, jnp.int32))
  assert scaling_model.count(text) == {
    'all-reduce': {'times': 1, 'bytes': 40},
    'all-to-all': {'times': 2, 'bytes': 80},
  }


@pytest.mark.parametrize(
  ('kind', 'processes', 'messages', 'rounds', 'sent'),
  [
    ('all-reduce', 2, 2, 2, 1200),
    ('all-reduce', 4, 6, 6, 1800),
    ('all-gather', 2, 1, 1, 600),
    ('all-gather', 4, 3, 3, 900),
    ('reduce-scatter', 2, 1, 1, 1200),
    ('reduce-scatter', 10, 4, 4, 10800),
    ('all-to-all', 2, 1, 1, 600),
    ('all-to-all', 10, 9, 1, 1080),
  ],
)
def test_what_a_process_sends_for_1200_bytes_of_results(kind, processes, messages, rounds, sent):
  assert scaling_model.messages(kind, processes) == messages
  assert scaling_model.rounds(kind, processes) == rounds
  assert scaling_model.sent(kind, 1200, processes) == pytest.approx(sent)


def test_costs_are_fitted_to_two_sizes():
  """Between two processes an all-reduce is two messages, and sends as much as its result."""
  cost = scaling_model.fit('all-reduce', (1000, 2 * 5e-5 + 1000 * 1e-9), (2_000_000, 2 * 5e-5 + 2_000_000 * 1e-9))
  assert cost == pytest.approx(Cost(5e-5, 1e-9))
  assert scaling_model.fit('all-to-all', (1000, 3e-4), (2000, 1e-4)) == Cost(3e-4, 0)  # noise, not a gain


def test_a_step_by_hand():
  carried = {'all-reduce': {'times': 2, 'bytes': 1e6}, 'all-to-all': {'times': 3, 'bytes': 4e5}}
  costs = FREE | {'all-reduce': Cost(1e-4, 1e-9), 'all-to-all': Cost(2e-4, 2e-9)}
  # Of 4 processes, all-reduce: 2 x 6 messages, 1.5 MB; all-to-all: 3 x 3 messages in 3 rounds, 0.3 MB.
  cores = 12 * 1e-4 + 1.5e-3 + 9 * 2e-4 + 0.6e-3
  wire = 15 * 1e-3 + 1.8e6 / 1e8
  of = lambda cores_, network: scaling_model.step_seconds(20e-3, carried, costs, 4, cores_, network)
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
  """Of two cores, where a step costs its work, and its one all-reduce only what a network takes for it."""
  all_reduce = {'512': {'all-reduce': {'times': 1, 'bytes': 100}}}
  rates = {'1': [512.0], '2': [960.0, 800.0, 900.0], '4': [1024.0], 'apart': [1024.0]}
  routed = {'2': [500.0], '4': [600.0]}
  return {
    'devices': (2, 4, 10),
    'speed': {
      'baseline, gather, 512': {name: [rate / 2 for rate in of] for name, of in rates.items()},
      'base, gather, 512': rates, 'base, all_to_all, 512': routed, 'bf16, gather, 512': rates,
    },
    'collectives': {
      'baseline, gather': {'2': all_reduce, '4': all_reduce, '10': all_reduce},
      'base, gather': {'2': all_reduce, '4': all_reduce, '10': all_reduce},
      'base, all_to_all': {'2': all_reduce, '4': all_reduce, '10': all_reduce},
    },
    'tables': {
      'baseline, gather': {'1': 1.0, '2': 1.0, '4': 1.0, '10': 1.0},
      'base, gather': {'1': 1.0, '2': 1.0, '4': 1.25, '10': 2.0},
      'base, all_to_all': {'1': 1.0, '2': 2.0, '4': 2.0, '10': 1.25},
    },
    'loopback': {'costs': FREE},
    'network': {
      'config': 'base', 'share': 512, 'costs': FREE, 'speed': {'1 Gbit/s, 0.5 ms': {'2': [1000.0], '4': [1100.0]}},
    },
  }  # fmt: skip


def test_predictions_stand_beside_what_was_measured():
  predicted = scaling_tables.predictions(record())
  rows = {(row['config'], row['exchange'], row['processes'], row['where']): row for row in predicted}
  two = rows['base', 'gather', 2, 'loopback']
  assert (two['measured'], two['predicted']) == (900, 1024)  # a second each, and 512 examples
  assert two['error'] == pytest.approx(1024 / 900 - 1)
  # Two share a core, and the tables' part takes a quarter of a second more.
  assert rows['bf16', 'gather', 4, 'loopback']['predicted'] == pytest.approx(4 * 512 / 2.5)
  assert rows['base', 'all_to_all', 2, 'loopback']['predicted'] == pytest.approx(2 * 512 / 2)
  assert rows['base', 'gather', 2, 'namespaces']['predicted'] == pytest.approx(1024 / (1 + 2 * 0.5e-3 + 100 / 125e6))
  wire = 18 * 0.1e-3 + 2 * 0.9 * 100 / 1.25e9
  assert rows['base', 'gather', 10, 'machines']['predicted'] == pytest.approx(5120 / (2 + wire))
  assert rows['base', 'all_to_all', 10, 'machines']['predicted'] == pytest.approx(5120 / (1.25 + wire))
  assert rows['base', 'gather', 10, 'machines']['measured'] is None
  assert ('base', 'none', 10, 'machines') not in rows


def test_the_tables_say_what_is_measured_and_by_which_exchange():
  text = scaling_tables.render(json.loads(json.dumps(record())))
  assert '| base | gather | 512 | 512 | 900 | 1,024 | 1,024 | 1.76 | 1.14 |' in text
  assert '| base | all_to_all | 512 |  | 500 | 600 |  |  | 1.20 |' in text
  assert '| base | gather | 512 | 2, loopback | no limit, 0 ms | 900 | 1,024 | +14% |' in text
  assert '| base | gather | 10 | 512 | 1 x, 0.00 MB |  |  |  |' in text
  assert '| 2 processes | dlrm_jax | gloo | gather | FP32 | 900 (2.00x) | measured |' in text
  place = '10 machines of one core, 10 Gbit/s, 0.1 ms'
  assert f'| {place} | dlrm_jax | gloo | all_to_all | FP32+BF16 | 4,090 (1.60x) | predicted |' in text
  assert "| dlrm_jax, the community's settings | gloo | gather | FP32 | 450 (baseline) | measured |" in text


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
