"""Refuses every connection but those to this machine, in the process that imports it.

`conftest.py` imports it for pytest and puts this folder on the PYTHONPATH of the commands which
tests start, where Python imports a module of this name by itself.
"""

from __future__ import annotations

import ipaddress
import socket
from typing import Any

LOOPBACK_NAMES = {"localhost", "", None}


class NetworkUsedError(RuntimeError):
    """A test, or a command that a test started, reached for another machine."""


def refuse(host: object) -> None:
    """Raises NetworkUsedError unless the host is this machine."""
    name = host.decode() if isinstance(host, bytes) else host
    if name in LOOPBACK_NAMES:
        return
    try:
        if ipaddress.ip_address(str(name).partition("%")[0]).is_loopback:
            return
    except ValueError:
        pass
    raise NetworkUsedError(f"tests have no network, yet {name!r} was asked for")


def guard() -> None:
    """Puts the check before connecting and before looking a name up."""
    connect, connect_ex, getaddrinfo = (
        socket.socket.connect,
        socket.socket.connect_ex,
        socket.getaddrinfo,
    )

    def checked_connect(self: socket.socket, address: Any) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6):
            refuse(address[0])
        connect(self, address)

    def checked_connect_ex(self: socket.socket, address: Any) -> int:
        if self.family in (socket.AF_INET, socket.AF_INET6):
            refuse(address[0])
        return connect_ex(self, address)

    def checked_getaddrinfo(host: Any, *args: Any, **options: Any) -> Any:
        # A machine may look up its own name: torch's rendezvous does.
        if host != socket.gethostname():
            refuse(host)
        return getaddrinfo(host, *args, **options)

    socket.socket.connect = checked_connect  # type: ignore[method-assign]
    socket.socket.connect_ex = checked_connect_ex  # type: ignore[method-assign]
    socket.getaddrinfo = checked_getaddrinfo


guard()
