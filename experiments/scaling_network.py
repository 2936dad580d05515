"""Processes in network namespaces, with a network between them that carries so much and takes so long.

Each namespace has a TUN device whose other end is held here; a thread passes the packets on, at the rate and after the
delay of the network. (The kernel's own means to delay packets, netem, is missing from many kernels.) Packets are as
large as TCP makes them, up to 64 KB; what the thread takes of the cores shows in the row of a network without limits.
Needs root.
"""

import contextlib
import errno
import fcntl
import heapq
import os
import secrets
import select
import struct
import subprocess
import threading
import time
from collections.abc import Iterator

from experiments import common
from experiments.scaling_model import Network

PORT = 5000  # of the coordinator; nobody else is in a namespace
# From linux/if_tun.h.
TUNSETIFF, TUNSETOFFLOAD = 0x400454CA, 0x400454D0
TUN, NO_INFO, VIRTIO_HEADER = 0x0001, 0x1000, 0x4000
CHECKSUM, TCP_4 = 1, 2  # what the other end need not do to packets
HEADER = 10  # bytes of virtio's, before the packet
DESTINATION = HEADER + 19  # the last byte of the address
LARGEST = 70_000
WAIT = 0.1  # seconds between two looks at whether the thread is to end


class Unavailable(RuntimeError):
  """No namespaces here; the message is one line."""


@contextlib.contextmanager
def namespaces(count: int, network: Network) -> Iterator[list[str]]:
  """A command's first words, under the launcher, that put its process in the namespace of its number.

  Unavailable if they cannot be made. Namespaces, devices and the thread are gone when it ends, however it does.
  """
  own = f'dlrm{secrets.token_hex(3)}n'
  ends, stop = [], threading.Event()
  with contextlib.ExitStack() as stack:
    for index in range(count):
      _ip('netns', 'add', f'{own}{index}')
      stack.callback(subprocess.run, ['ip', 'netns', 'del', f'{own}{index}'], check=False)
      ends.append(_device(f'{own}{index}', stack))
      _ip('link', 'set', f'{own}{index}', 'netns', f'{own}{index}')
      up = 'link set lo up', f'link set {own}{index} up'
      for words in (f'address add 10.97.0.{index + 1}/24 dev {own}{index}', *up):
        _ip('-n', f'{own}{index}', *words.split())
    thread = threading.Thread(target=_carry, args=(ends, network, stop), daemon=True)
    thread.start()
    stack.callback(thread.join)
    stack.callback(stop.set)
    yield ['sh', '-c', f'DLRM_COORDINATOR=10.97.0.1:{PORT} exec ip netns exec {own}$DLRM_PROCESS_ID "$0" "$@"']


def _ip(*words: str) -> None:
  try:
    done = subprocess.run(['ip', *words], capture_output=True, text=True, check=False)
  except FileNotFoundError:
    raise Unavailable('there is no `ip` here') from None
  if done.returncode:
    raise Unavailable(f'ip {words[0]} {words[1]}: {common.last_words(done.stderr)}')


def _device(name: str, stack: contextlib.ExitStack) -> int:
  """This end of a new TUN device, closed with the stack; the device goes with it."""
  try:
    end = os.open('/dev/net/tun', os.O_RDWR | os.O_NONBLOCK)
    stack.callback(os.close, end)
    fcntl.ioctl(end, TUNSETIFF, struct.pack('16sH22x', name.encode(), TUN | NO_INFO | VIRTIO_HEADER))
    fcntl.ioctl(end, TUNSETOFFLOAD, CHECKSUM | TCP_4)
  except OSError as error:
    raise Unavailable(f'no TUN device: {error.strerror}') from None
  return end


def _carry(ends: list[int], network: Network, stop: threading.Event) -> None:
  """Passes packets on until asked to stop."""
  with contextlib.suppress(OSError):  # ahead of the processes, which leave no core idle
    os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
  free = [0.0] * len(ends)  # when the wire of each sender is
  flying: list[tuple[float, int, int, bytes]] = []  # (when it arrives, number, where, packet)
  number = 0
  while not stop.is_set():
    while flying and flying[0][0] <= time.monotonic():
      _, _, where, packet = heapq.heappop(flying)
      with contextlib.suppress(OSError):  # a process has ended, and its namespace drops what comes late
        os.write(ends[where], packet)
    wait = min(WAIT, max(0.0, flying[0][0] - time.monotonic())) if flying else WAIT
    for end in select.select(ends, [], [], wait)[0]:
      packet = _read(end)
      if len(packet) <= DESTINATION or packet[HEADER] >> 4 != 4 or not 0 < packet[DESTINATION] <= len(ends):
        continue  # of IPv6, which asks for neighbours
      sender = ends.index(end)
      free[sender] = max(free[sender], time.monotonic()) + (len(packet) - HEADER) / network.bandwidth
      number += 1
      heapq.heappush(flying, (free[sender] + network.delay, number, packet[DESTINATION] - 1, packet))


def _read(end: int) -> bytes:
  try:
    return os.read(end, LARGEST)
  except OSError as error:
    if error.errno in (errno.EAGAIN, errno.EIO):  # nothing there, or the device is down
      return b''
    raise
