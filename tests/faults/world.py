"""What the fault tests share: bytes on a socket, and what a case leaves behind."""

import contextlib
import json
import socket
from collections.abc import Sequence
from typing import Any

import pytest
import requests

from tests import wire

EXECUTORS = pytest.mark.parametrize("executor", ["thread", "process"])

#: The default of MAX_BODY.
MAX = 1024 * 1024


def here(sent: bytes) -> bytes:
    """Return requests with a Host that a service without a token accepts."""
    return sent.replace(b"Host: x\r\n", b"Host: localhost\r\n")


def case(number: str, sent: bytes, *codes: int, rows: int = 0) -> Any:
    """Return a row of a table: what is sent, how it is answered, and how many jobs it leaves."""
    return pytest.param(sent, codes, rows, id=number)


def cases(number: str, code: int, *requests: bytes) -> list[Any]:
    """Return a row for each of these requests, which are all accepted, or all refused alike."""
    return [
        case(f"{number} {place}", sent, code, rows=code == 200)
        for place, sent in enumerate(requests)
    ]


def check(service: Any, sent: bytes, codes: Sequence[int], rows: int) -> None:
    """Send bytes and expect these statuses, so many jobs, and that another job is delivered."""
    before = set(service.ids())

    found = answers(service, sent, len(codes))

    assert [code for code, _, _ in found] == [*codes, 0]
    refused = [one for one in found if one[0] >= 400]
    assert {headers["Content-Type"] for _, headers, _ in refused} <= {"application/problem+json"}
    assert [json.loads(body)["status"] for _, _, body in refused] == [one[0] for one in refused]
    assert b"<" not in b"".join(body for _, _, body in refused)
    assert len(set(service.ids()) - before) == rows
    assert service.wait_for(service.send("another"))["state"] == "delivered"


def answers(service: Any, sent: bytes, count: int) -> list[tuple[int, Any, bytes]]:
    """Send bytes; return so many answers, and then what follows the end of the sending."""
    with wire.connected(service) as (conn, stream):
        with contextlib.suppress(OSError):  # it is refused before all is sent
            conn.sendall(here(sent))
        found = [wire.answer(stream) for _ in range(count)]
        with contextlib.suppress(OSError):
            conn.shutdown(socket.SHUT_WR)
        return [*found, wire.answer(stream)]


def serves(base_url: str) -> bool:
    """Return whether a service answers there."""
    with contextlib.suppress(requests.ConnectionError):
        return requests.get(f"{base_url}/livez", timeout=5).status_code == 200
    return False
