"""Find out whether an address can be listened on, before anything slow is started."""

from __future__ import annotations

import socket


class ListenError(Exception):
    """The address cannot be listened on; the text says why."""


def check_can_listen(address: str) -> None:
    """Bind ``host:port`` and let go of it at once.

    Raises:
        ListenError: It is taken, not allowed, or not of this machine.
    """
    host, _, port = address.rpartition(":")
    try:
        family, kind, protocol, _, target = socket.getaddrinfo(
            host.strip("[]"), int(port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, protocol) as listener:
            # As servers do: a port whose last connections are still closing counts as free.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(target)
    except OSError as error:
        reason = error.strerror or error
        raise ListenError(
            f"The gateway cannot listen on {address}: {reason}; choose another --host, --port or"
            " --grpc-port."
        ) from error
