"""How the processes of a run know that the others live, tell why they end, and agree to stop after the same step.

Each sends every other one a datagram a second. The runtime's own heartbeats know less: they go to process 0 alone, so
that a link cut between two others is never noticed, and what they notice ends a process with a stack trace.
"""

import contextlib
import dataclasses
import json
import math
import socket
import threading
import time
from collections.abc import Callable

PERIOD = 1.0  # seconds between datagrams
LIMIT = 15.0  # seconds of silence after which a process is taken for lost
# A port where nobody listens any more answers at once; two such answers in a row are believed.
REFUSED = LIMIT / 2
LONGEST = 1000  # characters of a reason, so that a datagram is never split

Address = tuple[str, int]


@dataclasses.dataclass(frozen=True)
class Word:
  """What a process tells the others."""

  run: str  # tells the runs apart that had the same port
  sender: int
  failed: str = ''  # why it ends
  leaving: bool = False  # it is done, and may be silent from now on
  stop: int = 0  # the signal that asks all of them to stop
  promise: int = -1  # the step before which it can stop no more


@dataclasses.dataclass
class Peer:
  """Another process: how to reach it, and what it said last."""

  address: Address
  out: socket.socket
  word: Word
  silence: float = 0.0
  refused: bool = False


def listen(host: str) -> socket.socket:
  """A socket for datagrams to this process, on a free port."""
  found = socket.getaddrinfo(host, 0, type=socket.SOCK_DGRAM)[0]
  own = socket.socket(found[0], socket.SOCK_DGRAM)
  own.bind(found[4])
  return own


class Peers:
  """The other processes, watched by a thread, which calls `lost` with one line when one of them is lost or fails."""

  def __init__(
    self, run: str, index: int, own: socket.socket, addresses: dict[int, Address], lost: Callable[[str], None]
  ) -> None:
    self._own, self._lost = own, lost
    self._word = Word(run, index)
    self._peers = {number: _peer(run, number, address) for number, address in addresses.items() if number != index}
    self._step = -1
    self._changed = threading.Condition()  # guards the words
    self._closed = threading.Event()
    self._thread = threading.Thread(target=self._watch, name='peers', daemon=True)
    self._thread.start()

  def tell(self, failed: str) -> None:
    """Tells the others why this process ends. More than once, since datagrams may be lost."""
    for _ in range(3):
      self._say(failed=failed[:LONGEST])
      time.sleep(0.02)

  def leave(self) -> None:
    """This process is done. It goes on watching those that are not."""
    for _ in range(3):
      self._say(leaving=True)

  def close(self) -> None:
    """Says and hears nothing more. Once is enough, twice does no harm."""
    if self._closed.is_set():
      return
    self._closed.set()
    self._own.sendto(b'', self._own.getsockname())  # or the thread would hear this only after a while
    self._thread.join()
    for peer in self._peers.values():
      peer.out.close()
    self._own.close()

  def stop(self, step: int, received: int = 0) -> int:
    """The signal for which all processes stop after this step, the same one in each; 0: go on.

    To be asked after every step, whose number only rises. `received` is a signal that this process has had.
    A process that has heard of one promises to stop no earlier than the step it may already be in, in a word that its
    thread sends, whatever the loop waits for; all stop after the latest step promised. Until that is known the loop
    waits here, never in the middle of a step that others need it for.
    """
    with self._changed:
      self._step = step
      if received:
        self._promise(received)
      if not self._word.stop or step < self._word.promise:
        return 0
      self._changed.wait_for(lambda: all(peer.word.stop for peer in self._peers.values()))
      words = [self._word, *(peer.word for peer in self._peers.values())]
      return max(word.stop for word in words) if step >= max(word.promise for word in words) else 0

  def _promise(self, signal: int) -> None:
    if not self._word.stop:
      self._say(stop=signal, promise=self._step + 1)

  def _say(self, **changes: object) -> None:
    with self._changed:
      self._word = dataclasses.replace(self._word, **changes)
      data = json.dumps(dataclasses.asdict(self._word)).encode()
      for peer in self._peers.values():
        try:
          peer.out.send(data)
        except ConnectionRefusedError:  # the answer to an earlier one; this one was not sent
          peer.refused = True
          with contextlib.suppress(OSError):
            peer.out.send(data)
        except OSError:  # no route: it will be missed
          pass

  def _watch(self) -> None:
    before = time.monotonic()
    while not self._closed.is_set():
      self._say()
      while not self._closed.is_set() and (left := before + PERIOD - time.monotonic()) > 0:
        self._hear(left)
      now = time.monotonic()
      # What was waiting while this process was itself stopped or starved is heard before anyone is missed.
      while self._hear(0):
        pass
      # Bounded, since time that passed without this thread says nothing about the others.
      passed, before = min(now - before, 2 * PERIOD), now
      missed = [self._missed(number, peer, passed) for number, peer in self._peers.items()]
      if any(missed) and not self._closed.is_set():
        self._lost(next(filter(None, missed)))
        return

  def _missed(self, number: int, peer: Peer, passed: float) -> str:
    if peer.word.leaving:
      return ''
    peer.silence += REFUSED if peer.refused else passed
    refused, peer.refused = peer.refused, False
    if peer.silence < LIMIT:
      return ''
    me, where = self._word.sender, peer.address[0]
    if refused:
      return f'process {number} on {where} is gone: it was killed or has crashed (noticed by process {me})'
    return (
      f'process {number} on {where} gave no sign of life for {math.ceil(peer.silence)} s: it was stopped, or the link '
      f'to it is cut (noticed by process {me})'
    )

  def _hear(self, seconds: float) -> bool:
    """Takes in a datagram, if one comes in time."""
    self._own.settimeout(seconds)
    try:
      word = Word(**json.loads(self._own.recv(8192)))
    except OSError:
      return False
    except (ValueError, TypeError):  # not one of ours
      return True
    peer = self._peers.get(word.sender)
    if peer is None or word.run != self._word.run:
      return True
    with self._changed:
      peer.word, peer.silence, peer.refused = word, 0.0, False
      if word.stop:
        self._promise(word.stop)
      self._changed.notify_all()
    if word.failed:
      self._lost(word.failed)
    return True


def _peer(run: str, number: int, address: Address) -> Peer:
  family = socket.AF_INET6 if ':' in address[0] else socket.AF_INET
  out = socket.socket(family, socket.SOCK_DGRAM)
  out.setblocking(False)
  out.connect(address)
  return Peer(address, out, Word(run, number))
