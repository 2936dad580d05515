"""The processes of a run: how they start together, and how they end together.

What JAX has no public way for is used here and nowhere else.
"""

import contextlib
import ctypes
import functools
import json
import logging
import os
import secrets
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from dlrm_jax.cluster import Cluster, address
from dlrm_jax.peers import Peers, listen
from dlrm_jax.spec import SpecError
from dlrm_jax.watchdog import Watchdog

LOST = 3  # exit code: another process failed, or cannot be reached
STUCK = 4  # exit code: the watchdog's
START = 300  # seconds that a process waits for the others to start
END = 600  # seconds that a process that is done waits for the others, as long as they live
# Seconds without a word between a process and JAX's coordination service, in process 0. Longer than the limit of the
# peers, who can say what happened; this is for the case that they do not.
HEARTBEAT = 25
LEFT = 'left'  # what a process says that takes part in no more rounds
PATIENCE = 5  # seconds that a failed collective is given to be explained by the peers


class ClusterError(RuntimeError):
  """The processes did not come together; the message is one line for the user."""


class LeftError(RuntimeError):
  """Another process takes no more part in the rounds of `Rounds`."""


class Members:
  """This process among those of its run: ends it for a reason that all learn, and stops all after the same step.

  `is_program`: whether the process is the run's own, which may be ended from any thread.
  """

  def __init__(self, index: int = 0, is_program: bool = False) -> None:
    self.index, self.processes, self.is_program = index, 1, is_program
    self.client: Any = None  # of JAX's coordination service
    self.peers: Peers | None = None
    self._begun = 0  # how often rounds were begun
    self.terminate: Any = None  # what C++ calls, which has only its address
    self._ending = threading.Lock()  # whoever has it ends the process: the first reason is the only one told

  def stop(self, step: int, received: int = 0) -> int:
    """See Peers.stop; of one process alone, the signal that it received."""
    return self.peers.stop(step, received) if self.peers else received

  def rounds(self) -> 'Rounds':
    """What the processes agree on numbers by, round after round. All begin with it together."""
    self._begun += 1
    return Rounds(self.client, self.index, self.processes, self._begun)

  def watchdog(self, limit: float) -> Watchdog:
    """For the loop of this process; DLRM_HEARTBEAT names the file that it touches."""
    file = os.environ.get('DLRM_HEARTBEAT')
    return Watchdog(limit, lambda line: self.end(line, STUCK), Path(file) if file else None)

  def fail(self, error: object, code: int) -> int:
    """One line on stderr. The run's own process ends here, and the others with it; else the code is given back."""
    if self.is_program:  # nothing that is still open has its say at exit
      self.end(str(error), code)
    print(f'error: {error}', file=sys.stderr)
    return code

  def lost(self, line: str) -> NoReturn:
    """Ends this process because of another one."""
    self.end(line, LOST, line)

  def end(self, line: str, code: int, told: str = '') -> NoReturn:
    """Ends this process at once, from any thread: nothing waits at exit for others that may never come."""
    self._ending.acquire()
    try:
      print(f'error: {line}', file=sys.stderr, flush=True)
      if self.peers:
        self.peers.tell(told or f'process {self.index} failed: {line}')
      sys.stdout.flush()
    finally:
      os._exit(code)

  def give_up(self, error: BaseException) -> NoReturn:
    """Ends this process for an exception that nobody expected, or that other processes are behind."""
    text = ' '.join(str(error).split())
    if isinstance(error, (ClusterError, SpecError)):
      self.end(text, 2 if isinstance(error, SpecError) else 1)
    if isinstance(error, LeftError) or any(name in text for name in ('Gloo', 'oordination', 'MPI_', 'bad_cast')):
      self.cut_off(text)
    if isinstance(error, KeyboardInterrupt):
      self.end('interrupted', 130)
    traceback.print_exception(error)
    self.end(f'{type(error).__name__}: {text}', 1)

  def cut_off(self, text: str) -> NoReturn:
    """Ends this process because it cannot work with the others; if the peers know which one is lost, they say so."""
    time.sleep(PATIENCE)
    self.lost(f'process {self.index} lost its connection to another, which ended or was cut off ({text[:300]})')


class Rounds:
  """Numbers of all processes, round after round, by the key-value store of JAX's coordination service.

  No collective of arrays: those of another thread would meet the training step's in another order on each process.
  """

  def __init__(self, client: Any, index: int, count: int, use: int) -> None:
    self.index, self.count = index, count
    self._client, self._use, self._round = client, use, 0
    self._saying = threading.Lock()

  def agree(self, number: int) -> list[int]:
    """The numbers of all in this round, in their order; waits for them. LeftError if one has left."""
    if self.count == 1:
      return [number]
    this = self._say(str(number))
    if this >= 2:  # nobody is behind the last round, or this one could not have ended it
      self._client.key_value_delete(self._key(this - 2, self.index))
    words = [self._read(this, process) for process in range(self.count)]
    if LEFT in words:
      raise LeftError(f'process {words.index(LEFT)} has ended its work on the shared queue')
    return [int(word) for word in words]

  def leave(self) -> None:
    """Ends the rounds: whoever waits for this process, now or later, raises."""
    if self.count > 1:
      self._say(LEFT)

  def _say(self, word: str) -> int:
    with self._saying:
      this, self._round = self._round, self._round + 1
      self._client.key_value_set(self._key(this, self.index), word)
      return this

  def _key(self, number: int, process: int) -> str:
    return f'dlrm_jax/rounds/{self._use}/{number}/{process}'

  def _read(self, number: int, process: int) -> str:
    # A process that is late is waited for; one that is lost ends this process, by its peers.
    while True:
      try:
        return self._client.blocking_key_value_get(self._key(number, process), 10_000)
      except Exception as error:  # jaxlib's own type
        if 'DEADLINE_EXCEEDED' not in str(error):
          raise


@contextlib.contextmanager
def joined(cluster: Cluster | None, protocol: str) -> Iterator[Members]:
  """Starts JAX's distributed runtime, where there is a cluster, and leaves it when all are done.

  Whatever goes wrong in between ends this process and the others: one line on stderr, an exit code other than 0.
  """
  members = Members(cluster.index if cluster else 0, is_program=True)
  if cluster is None:
    yield members
    return
  try:
    _connect(cluster, protocol, members)
    yield members
    _leave(members)
  except BaseException as error:  # also KeyboardInterrupt: nobody may be left waiting
    members.give_up(error)


def _connect(cluster: Cluster, protocol: str, members: Members) -> None:
  if protocol == 'mpi' and not os.environ.get('MPITRAMPOLINE_LIB'):  # its absence would end the process in C
    raise SpecError("config.protocol='mpi': needs MPITRAMPOLINE_LIB, a wrapped MPI library; set it, or 'gloo'")
  _keep_stdout(cluster.index)
  client = _start_runtime(cluster, members)
  members.client, members.processes = client, cluster.processes
  host, members.peers = _meet(cluster, client, members.lost)
  _use_collectives(client, protocol, host)
  logging.info('%d processes, coordinated by %s; collectives by %s', cluster.processes, cluster.coordinator, protocol)


def _keep_stdout(index: int) -> None:
  """Only process 0 writes there, and of it only Python: Gloo, in C++, prints lines of its own."""
  sys.stdout = os.fdopen(os.dup(1), 'w', buffering=1) if index == 0 else sys.stderr
  nowhere = os.open(os.devnull, os.O_WRONLY)
  os.dup2(nowhere, 1)
  os.close(nowhere)


def quiet() -> None:
  """Keeps JAX's C++ logs off stderr, where they would surround the one clear line. Before JAX is imported."""
  os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')


def _start_runtime(cluster: Cluster, members: Members) -> Any:
  """JAX's coordination service (in process 0) and its client.

  Done by hand, since jax.distributed.initialize lets JAX abort a process that has lost the service, with a stack trace,
  a few milliseconds after process 0 died.
  """
  from jax._src.distributed import global_state
  from jax._src.lib import _jax

  listen_on = _bind_address(cluster.coordinator) if cluster.index == 0 else ''
  try:
    if listen_on:
      global_state.service = _jax.get_distributed_runtime_service(
        listen_on, cluster.processes,
        heartbeat_timeout=HEARTBEAT, cluster_register_timeout=START, shutdown_timeout=END,
      )  # fmt: skip
    _catch_verdicts(members)
    client = _jax.get_distributed_runtime_client(
      cluster.coordinator, cluster.index, init_timeout=START, shutdown_timeout=END,
      heartbeat_timeout=HEARTBEAT, use_compression=True, missed_heartbeat_callback=lambda *_: members.cut_off('JAX'),
    )  # fmt: skip
    client.connect()
  except RuntimeError:
    raise ClusterError(
      f'process {cluster.index} of {cluster.processes} did not meet all others at {cluster.coordinator} in {START} s: '
      'see whether each was started, with the same coordinator and number of processes'
    ) from None
  global_state.client, global_state.coordinator_address = client, cluster.coordinator
  global_state.process_id, global_state.num_processes = cluster.index, cluster.processes
  return client


def _bind_address(coordinator: str) -> str:
  """Where the service listens: on all addresses of the machine, unless only this machine can reach the coordinator."""
  host, port = address(coordinator, 'coordinator')
  local = host in ('localhost', '::1') or host.startswith('127.')
  # Both are tried first, since jaxlib 0.10.2 often crashes where the port is taken. It shares the port, as the launcher
  # does that holds it, so that another run's service there must be asked for.
  with contextlib.suppress(OSError), socket.create_connection((host, port), timeout=1):
    raise ClusterError(f'process 0 cannot listen on {coordinator}: another program does; choose a port that is free')
  try:
    with socket.socket(socket.AF_INET6 if host == '::1' else socket.AF_INET) as probe:
      probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
      probe.bind((host if local else '', port))
  except OSError as error:
    raise ClusterError(
      f'process 0 cannot listen on {coordinator}: {error.strerror}; choose a port that is free on its machine'
    ) from None
  return coordinator if local else f'[::]:{port}'


def _catch_verdicts(members: Members) -> None:
  """Has JAX's verdict that the service or a process is lost end this process with a line, not with an abort.

  Its callback takes an absl::Status, which jaxlib 0.10.2 cannot hand to Python: the attempt throws std::bad_cast in a
  thread of C++, and so calls std::terminate. Where libstdc++ is another one, that aborts: code 134, without a line.
  """
  try:
    library = ctypes.CDLL('libstdc++.so.6')
    set_terminate, exception_type = library._ZSt13set_terminatePFvvE, library.__cxa_current_exception_type
  except (OSError, AttributeError):
    return
  handler = ctypes.CFUNCTYPE(None)
  set_terminate.restype = exception_type.restype = ctypes.c_void_p

  @handler
  def terminate() -> None:
    kind = exception_type()
    # The second word of a type_info is its name.
    if kind and ctypes.c_char_p.from_address(kind + ctypes.sizeof(ctypes.c_void_p)).value == b'St8bad_cast':
      members.cut_off("JAX's coordination service, in process 0, is out of reach or misses a process")
    before()

  before = handler(set_terminate(terminate))
  members.terminate = terminate


def _meet(cluster: Cluster, client: Any, lost: Callable[[str], None]) -> tuple[str, Peers]:
  """This process's own address, as the others see it, and the watch over them."""
  key = 'dlrm_jax/{}'.format
  read = lambda number: json.loads(client.blocking_key_value_get(key(number), START * 1000))
  # Process 0 may know itself by a loopback address only (Debian's 127.0.1.1), so it asks where process 1 is.
  host = _own_address(*(address(cluster.coordinator, 'coordinator') if cluster.index else read(1)[:2]))
  own = listen(host)
  client.key_value_set(key(cluster.index), json.dumps([host, own.getsockname()[1], secrets.token_hex(8)]))
  words = [read(number) for number in range(cluster.processes)]
  addresses = {number: (word[0], word[1]) for number, word in enumerate(words)}
  return host, Peers(words[0][2], cluster.index, own, addresses, lost)


def _own_address(host: str, port: int) -> str:
  """The address from which this machine reaches that one; nothing is sent."""
  family, _, _, _, target = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
  with socket.socket(family, socket.SOCK_DGRAM) as probe:
    probe.connect(target)
    return probe.getsockname()[0]


def _use_collectives(client: Any, protocol: str, host: str) -> None:
  """How processors exchange arrays; GPUs have NCCL, which JAX chooses itself."""
  import jax
  from jax._src import xla_bridge
  from jax._src.lib import _jax

  jax.config.update('jax_cpu_collectives_implementation', protocol)
  if protocol == 'gloo':
    # Left to itself it listens on whatever address the machine's own name has, often one that others cannot reach.
    collectives = with_patient_threads(lambda: _jax.make_gloo_tcp_collectives(client, hostname=host))
    make = functools.partial(xla_bridge.make_cpu_client, collectives=collectives)
    xla_bridge.register_backend_factory('cpu', make, priority=0, fail_quietly=False)


def with_patient_threads(make: Callable[[], Any]) -> Any:
  """What `make` gives; the threads that it starts interrupt no other thread when they wake up.

  Gloo's thread does when a message comes. If that stops a thread on the same core that holds gloo's lock, it asks for
  the lock again and again until its time is over: two processes of a core each trained at 19,500 samples/s, and at
  32,000 since it is patient (AMD EPYC, 2 cores, 2026-11-27).
  """
  if not hasattr(os, 'sched_setscheduler'):  # Linux alone has it
    return make()
  threads = lambda: set(os.listdir('/proc/self/task'))
  before, made = threads(), make()
  for thread in threads() - before:
    with contextlib.suppress(OSError):  # it has ended, or may not be changed: the run is slower, no more
      os.sched_setscheduler(int(thread), os.SCHED_BATCH, os.sched_param(0))
  return made


def _leave(members: Members) -> None:
  """Waits for the others to be done, then ends the runtime."""
  import jax

  members.peers.leave()
  jax.distributed.shutdown()
  members.peers.close()
