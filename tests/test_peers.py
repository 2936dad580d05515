"""Processes that watch each other: here threads, each with a socket on loopback; real ones in test_distributed.py."""

import random
import threading
import time

import pytest

from dlrm_jax.peers import LIMIT, Peers, listen


@pytest.fixture
def together():
  """Makes some that know each other; returns them and what each was told of a loss."""
  made = []

  def make(count):
    sockets = [listen('127.0.0.1') for _ in range(count)]
    addresses = {index: own.getsockname() for index, own in enumerate(sockets)}
    told = [[] for _ in range(count)]
    peers = [Peers('run', index, own, addresses, told[index].append) for index, own in enumerate(sockets)]
    made.extend(peers)
    return peers, told

  yield make
  for peers in made:
    peers.close()


def wait_for(condition, seconds):
  end = time.monotonic() + seconds
  while not condition() and time.monotonic() < end:
    time.sleep(0.01)
  return condition()


def loops(peers, last, signals, ahead, seed):
  """Training loops side by side, none more than `ahead` steps before another; how each ended: (step, signal)."""
  moved, at, ends = threading.Condition(), [0] * len(peers), [None] * len(peers)

  def loop(index):
    rng, step, stop = random.Random(seed * 100 + index), 0, 0
    while step < last and not (stop := peers[index].stop(step, signals.get((index, step), 0))):
      time.sleep(rng.random() * 0.002)
      with moved:
        step = at[index] = step + 1
        moved.notify_all()
        # As a collective: the others must come at least this far.
        while min(at) < step - ahead:
          assert moved.wait(20)
    with moved:
      ends[index] = step, stop
      at[index] = last + ahead  # nobody waits for one that has ended
      moved.notify_all()

  threads = [threading.Thread(target=loop, args=(index,)) for index in range(len(peers))]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join(30)
  return ends


@pytest.mark.parametrize('seed', range(8))
def test_all_stop_after_the_same_step_for_the_same_signal(together, seed):
  rng = random.Random(seed)
  count = rng.choice([2, 3, 5])
  asked = rng.randrange(60)
  signals = {(rng.randrange(count), asked): 15, (rng.randrange(count), asked + rng.randrange(3)): 2}
  ends = loops(together(count)[0], 100_000, signals, rng.choice([0, 1, 8]), seed)
  assert len(set(ends)) == 1, ends
  step, signal = ends[0]
  assert signal in (2, 15)
  assert asked <= step <= asked + 40


@pytest.mark.parametrize('before_the_end', range(4))
def test_a_signal_at_the_end_stops_all_or_none(together, before_the_end):
  peers, _ = together(3)
  ends = loops(peers, 20, {(1, 20 - before_the_end): 15}, 2, before_the_end)
  assert len(set(ends)) == 1, ends


def test_without_a_signal_nobody_stops_or_waits(together):
  (first, _), _ = together(2)
  assert [first.stop(step) for step in range(1000)] == [0] * 1000


def test_one_that_fails_tells_the_others_why(together):
  peers, told = together(3)
  peers[1].tell('process 1 failed: no disk')
  assert wait_for(lambda: told[0] and told[2], 5)
  assert {*told[0], *told[2]} == {'process 1 failed: no disk'}
  assert told[1] == []


def test_one_that_is_gone_is_named_within_seconds(together):
  peers, told = together(3)
  started = time.monotonic()
  peers[2].close()  # as when its process is killed: nobody listens there any more
  assert wait_for(lambda: told[0] and told[1], LIMIT / 2)
  assert all('process 2 on 127.0.0.1 is gone' in line for line in (told[0][0], told[1][0]))
  assert time.monotonic() - started > 1  # one refusal is not enough


def test_one_that_has_left_is_not_missed(together):
  peers, told = together(2)
  peers[1].leave()
  time.sleep(0.1)
  peers[1].close()
  time.sleep(4)
  assert told == [[], []]


def test_strangers_are_not_heard(together):
  peers, told = together(2)
  own = listen('127.0.0.1')
  stranger = Peers('another run', 1, own, {0: peers[0]._own.getsockname()}, [].append)
  stranger.tell('process 1 failed: in another run')
  for data in (b'', b'{', b'[1]', b'{"x": 1}', b'\xff' * 100):
    own.sendto(data, peers[0]._own.getsockname())
  stranger.close()
  time.sleep(1.5)
  assert told == [[], []]
  peers[1].tell('still here')
  assert wait_for(lambda: told[0], 5)
