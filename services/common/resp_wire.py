"""Move bytes between memory and a Redis socket without copying, in a thread that may block.

A wire's calls raise ``redis.exceptions.TimeoutError`` after a stall and
``redis.exceptions.ConnectionError`` or ``OSError`` when the connection is lost.
"""

from __future__ import annotations

import select
import socket
import struct
from typing import TYPE_CHECKING, Protocol

from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

if TYPE_CHECKING:
    import ssl
    from collections.abc import Sequence

    from chiasm.common.redis_address import RedisAddress

# The default of 208 KiB has sender and Redis wait for each other. The size of TCP's buffers is
# left to the system, which adapts it.
_UNIX_SEND_BUFFER_BYTES = 1 << 20


class Wire(Protocol):
    """A connected socket whose calls end after a stall."""

    def send(self, parts: Sequence[memoryview]) -> None:
        """Send all of ``parts``, in order, as if they were one."""
        ...

    def receive(self, parts: Sequence[memoryview]) -> int:
        """Receive at least one byte into ``parts``, which are filled in order; return how many."""
        ...

    def fill(self, target: memoryview) -> None:
        """Receive until ``target`` is full."""
        ...

    def is_quiet(self) -> bool:
        """Tell whether the peer has sent nothing that was not received, not even an end."""
        ...

    def abort(self) -> None:
        """Make a call in another thread fail at once, and all later ones; may be repeated."""
        ...

    def close(self) -> None:
        """Close the socket; no thread may be in a call."""
        ...


def open_wire(address: RedisAddress, stall_s: float) -> Wire:
    """Connect to ``address``, with encryption if it says so; nothing of Redis is spoken yet.

    Args:
        address: Where to connect to.
        stall_s: Seconds that connecting, and later any call, waits for the peer to do something.

    Raises:
        OSError: It cannot be reached, or fails to prove who it is.
    """
    if address.path:
        plain = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        plain.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _UNIX_SEND_BUFFER_BYTES)
        plain.settimeout(stall_s)
        try:
            plain.connect(address.path)
        except BaseException:
            plain.close()
            raise
        return PlainWire(plain, stall_s)
    plain = socket.create_connection((address.host, address.port), stall_s)
    plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    plain.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if address.tls is None:
        return PlainWire(plain, stall_s)
    try:
        return TlsWire(address.tls.context().wrap_socket(plain, server_hostname=address.host))
    except BaseException:
        plain.close()
        raise


class PlainWire:
    """A socket without encryption.

    The socket blocks in the kernel, which knows the stall as a socket option: one call then moves
    a whole chunk. Python's own timeouts make sockets non-blocking, and a chunk would take a call,
    and a turn at the interpreter lock, for every piece that the kernel's buffers hold.
    """

    def __init__(self, connected: socket.socket, stall_s: float) -> None:
        self._socket = connected
        connected.setblocking(True)
        seconds = int(stall_s)
        timeval = struct.pack("@ll", seconds, int((stall_s - seconds) * 1e6))
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeval)
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeval)

    def send(self, parts: Sequence[memoryview]) -> None:
        """Send all of ``parts`` in gathered writes."""
        rest = list(parts)
        while rest:
            try:
                num_sent = self._socket.sendmsg(rest)
            except BlockingIOError:
                raise _stalled() from None
            rest = _without(rest, num_sent)

    def receive(self, parts: Sequence[memoryview]) -> int:
        """Receive what is there, at least one byte, scattered over ``parts``."""
        try:
            num_bytes = self._socket.recvmsg_into(parts)[0]
        except BlockingIOError:
            raise _stalled() from None
        return _checked(num_bytes)

    def fill(self, target: memoryview) -> None:
        """Receive until ``target`` is full."""
        while target.nbytes:
            try:
                num_bytes = self._socket.recv_into(target, 0, socket.MSG_WAITALL)
            except BlockingIOError:
                raise _stalled() from None
            target = target[_checked(num_bytes) :]

    def is_quiet(self) -> bool:
        """Tell whether nothing can be received, not even the end."""
        return _is_quiet(self._socket)

    def abort(self) -> None:
        """Shut the connection down."""
        _shut_down(self._socket)

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()


class TlsWire:
    """An encrypted socket; the library copies every byte, so parts are sent one by one."""

    def __init__(self, connected: ssl.SSLSocket) -> None:
        self._socket = connected

    def send(self, parts: Sequence[memoryview]) -> None:
        """Send all of ``parts``."""
        for part in parts:
            try:
                self._socket.sendall(part)
            except TimeoutError:
                raise _stalled() from None

    def receive(self, parts: Sequence[memoryview]) -> int:
        """Receive at least one byte into the first of ``parts``."""
        try:
            return _checked(self._socket.recv_into(parts[0]))
        except TimeoutError:
            raise _stalled() from None

    def fill(self, target: memoryview) -> None:
        """Receive until ``target`` is full."""
        while target.nbytes:
            target = target[self.receive([target]) :]

    def is_quiet(self) -> bool:
        """Tell whether nothing can be received, neither decrypted already nor from the peer."""
        return not self._socket.pending() and _is_quiet(self._socket)

    def abort(self) -> None:
        """Shut the connection down."""
        _shut_down(self._socket)

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()


def _without(parts: list[memoryview], num_bytes: int) -> list[memoryview]:
    """Return what of ``parts`` is left after their first ``num_bytes``."""
    for index, part in enumerate(parts):
        if num_bytes < part.nbytes:
            return [part[num_bytes:], *parts[index + 1 :]]
        num_bytes -= part.nbytes
    return []


def _checked(num_bytes: int) -> int:
    if not num_bytes:
        raise RedisConnectionError("Redis has closed the connection.")
    return num_bytes


def _stalled() -> RedisTimeoutError:
    return RedisTimeoutError("Redis makes no progress.")


def _is_quiet(connected: socket.socket) -> bool:
    poll = select.poll()
    poll.register(connected, select.POLLIN)
    return not poll.poll(0)


def _shut_down(connected: socket.socket) -> None:
    try:
        # NOTE: not the method of SSLSocket, which forgets its session under a running call.
        socket.socket.shutdown(connected, socket.SHUT_RDWR)
    except OSError:
        return  # it is closed already
