"""The guard of the tests holds: no other machine is reached, from pytest or from what it starts."""

from __future__ import annotations

import socket
import subprocess
import sys

import pytest

ELSEWHERE = "192.0.2.1"  # set aside for documentation (RFC 5737): nobody answers there


def test_pytest_reaches_no_other_machine() -> None:
    with (
        socket.socket() as one,
        pytest.raises(RuntimeError, match=r"no network, yet '192\.0\.2\.1'"),
    ):
        one.connect((ELSEWHERE, 80))
    with pytest.raises(RuntimeError, match=r"no network, yet .huggingface\.co."):
        socket.getaddrinfo("huggingface.co", 443)


def test_a_started_process_reaches_no_other_machine() -> None:
    code = f"import socket; socket.create_connection(('{ELSEWHERE}', 80), timeout=1)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=False
    )
    assert done.returncode == 1
    assert "NetworkUsedError" in done.stderr


def test_this_machine_is_reached() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        socket.create_connection(server.getsockname()).close()
