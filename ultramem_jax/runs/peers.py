"""Notices at once which of several processes is gone, and ends this one.

Every process has a connection to process 0, which closes when its process
ends, however it ends. Whoever ends well says so first. JAX itself notices in
the next exchange, without saying who is gone, or by its heartbeats.
"""

import atexit
import contextlib
import os
import socket
import threading
import time
from typing import TextIO

from ultramem_jax.runs import console

STATUS = 1
CONNECT_SECONDS = 10
# For what ends all processes, such as a setting that cannot work, which each of
# them reports by itself.
GRACE_SECONDS = 2
BYE = -1  # in place of the number of a process that is gone


class Watch:
  """The connections of a process to its peers.

  Args:
    index: the number of this process.
    count: of processes.
  """

  def __init__(self, index: int, count: int):
    self._index, self._count = index, count
    self._connections: list[socket.socket] = []
    self._lock, self._ending = threading.Lock(), threading.Lock()
    atexit.register(self.leave)

  def listen(self) -> int:
    """Lets the others connect to this process, number 0; returns the port."""
    server = socket.create_server(("", 0), backlog=self._count)
    _start(self._accept, server)
    return server.getsockname()[1]

  def connect(self, host: str, port: int) -> None:
    """Connects to process 0; without it, if there is no way."""
    with contextlib.suppress(OSError):
      connection = socket.create_connection((host, port), CONNECT_SECONDS)
      connection.settimeout(None)
      connection.sendall(_line(self._index))
      _start(self._follow, connection, connection.makefile(), 0)

  def leave(self) -> None:
    """Tells the others that this process ends well."""
    self._send(BYE)

  def _accept(self, server: socket.socket) -> None:
    while True:
      connection, _ = server.accept()
      _start(self._greet, connection)

  def _greet(self, connection: socket.socket) -> None:
    """Follows a peer; anybody else may connect, and is left alone."""
    words = connection.makefile(errors="replace")
    with contextlib.suppress(OSError):
      first = words.readline(9).strip()
      if first.isdecimal() and 0 < int(first) < self._count:
        self._follow(connection, words, int(first))

  def _follow(
    self, connection: socket.socket, words: TextIO, index: int
  ) -> None:
    """Waits for the end of a process, or its word that another is gone."""
    _keep_alive(connection)
    with self._lock:
      self._connections.append(connection)
    text = ""
    with contextlib.suppress(OSError):
      text = words.readline()
    gone = int(text or index)
    # The end of one takes the others with it; the first is the cause.
    if gone == BYE or not self._ending.acquire(blocking=False):
      return
    self._send(gone)
    if gone != 0:  # without process 0, JAX aborts this one and says not why
      time.sleep(GRACE_SECONDS)
    console.show_at_once(
      f"error: process {gone} of {self._count} is gone, so process "
      f"{self._index} ends; run the same commands again to continue from the "
      "newest checkpoint"
    )
    os._exit(STATUS)

  def _send(self, number: int) -> None:
    with self._lock:
      for connection in self._connections:
        with contextlib.suppress(OSError):
          connection.sendall(_line(number))


def _line(number: int) -> bytes:
  return f"{number}\n".encode()


def _start(function, *arguments) -> None:
  threading.Thread(target=function, args=arguments, daemon=True).start()


def _keep_alive(connection: socket.socket) -> None:
  """Lets the system notice within half a minute that a host is gone."""
  connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
  for name, value in (("IDLE", 10), ("INTVL", 5), ("CNT", 4)):
    option = getattr(socket, f"TCP_KEEP{name}", None)  # not on all systems
    if option is not None:
      connection.setsockopt(socket.IPPROTO_TCP, option, value)
