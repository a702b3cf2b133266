"""Group C: what is no JSON, or JSON that two parsers could read differently."""

import contextlib
import json
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from jobs import errors
from tests import wire
from tests.faults.world import MAX, answers, case, cases, check, here
from web import intake


def of(value: str | bytes) -> bytes:
    """Return a payload with this text as its data."""
    return b'{"data": %s}' % (value.encode() if isinstance(value, str) else value)


def lists(depth: int) -> bytes:
    return b"[" * depth + b"1" + b"]" * depth


def objects(depth: int) -> bytes:
    return b'{"a":' * depth + b"1" + b"}" * depth


def brackets(size: int) -> bytes:
    """Return a payload of about as many bytes, all of them empty lists."""
    return of(b"[" + b"[]," * ((size - 20) // 3) + b"1]")


REFUSED = {
    "C01": [b"{", b'{"data": 1} x', b" \r\n\t ", b"{'data': 1}", b'{"data": 1,}', of("[1,]")],
    "C01 comment": [b'{"data": 1} // x', b'{"data": /* x */ 1}'],
    "C02": [b"null", b"1", b'"x"', b"[1]", b"true"],
    "C03": [of("NaN"), of("Infinity"), of("[-Infinity]"), of("1e999"), of("-1e999")],
    "C04 lists": [of(lists(65)), of(lists(500)), of(lists(100_000)), of(b"[" * 100_000)],
    "C04 objects": [of(objects(65)), of(objects(1000)), of(objects(100_000))],
    "C05": [of("9" * 41), of("-" + "9" * 40), of("9" * 4300), of("9" * 4301), of("9" * 1_000_000)],
    "C07": [b'{"data": 1, "d\\u0061ta": 2}', b'{"data":1,"data":2}', of('[{"a": 1, "a": 1}]')],
    "C08": [of(r'"\ud800"'), of(r'"\udc00"'), of(r'"\udc00\ud800"'), of(r'{"\ud800": 1}')],
    "C09": [b"\xff\xfe" + of("1"), of(b'"\xed\xa0\x80"'), of(b'"\xc0\x80"')],
    "C09 encoding": [of("1").decode().encode(name) for name in ("utf-16", "utf-16-le", "utf-32")],
    "C10": [b"\xef\xbb\xbf" + of("1")],
    "C12": [of(b'"a\nb"'), of(b'"a\0b"'), of(b"\0 1")],
    "C13": [b'{"data": 1, "%s": 1}' % name for name in (b"", b"__proto__", b"__class__")],
}


@pytest.mark.parametrize(
    ("sent", "codes", "rows"),
    [row for number, sent in REFUSED.items() for row in cases(number, 400, *map(wire.post, sent))],
)
def test_what_is_not_plainly_json_is_refused(service, sent, codes, rows):
    check(service, sent, codes, rows)


@pytest.mark.parametrize(
    ("sent", "codes", "rows"),
    [
        case("C14 MAX", wire.post(wire.padded(MAX)), 200, rows=1),
        case("C14 MAX+1", wire.post(wire.padded(MAX + 1)), 413),
        case("C15", wire.post(brackets(MAX)), 200, rows=1),
    ],
)
def test_a_large_body(service, sent, codes, rows):
    check(service, sent, codes, rows)


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(lists(64), id="C04 64 lists"),
        pytest.param(objects(64), id="C04 64 objects"),
        pytest.param("9" * 40, id="C05 40 digits"),
        pytest.param("1e308", id="C06 1e308"),
        pytest.param("5e-324", id="C06 5e-324"),
        pytest.param("[-0, -0.0]", id="C06 -0"),
        pytest.param("0.10000000000000001", id="C06 17 digits"),
        pytest.param(json.dumps("[{" * 500), id="C04 in a string"),
        pytest.param(r'"\uD83D\ude00 \\ud800"', id="C08 pair"),
        pytest.param(r'"a\u0000b"', id="C11"),
        pytest.param('{"%s": 1}' % ("k" * 100_000), id="C13 100 KB"),
        pytest.param('{"__proto__": {"": 1}, "__class__": 2}', id="C13"),
        pytest.param(json.dumps("x" * 1_000_000), id="C14 1 MB"),
        pytest.param('"\u202e\u200f abc \u05d0"', id="C16 right to left"),
        pytest.param('"a\u200b\u200d\ufeffb"', id="C16 zero width"),
        pytest.param('"👩‍👩‍👧‍👦 🏴‍☠️"', id="C16 emoji"),
        pytest.param('"e\u0301 \u00e9 \ufb01"', id="C16 NFD beside NFC"),
    ],
)
def test_a_value_arrives_as_it_was_sent(service, mailbox, text):
    url = b', "postback_url": "%s"}' % mailbox.url.encode()

    found = answers(service, wire.post(of(text)[:-1] + url), 1)

    (request,) = mailbox.wait_for(1)
    assert found[0][0] == 200
    assert json.loads(request.body)["data"]["result"] == json.loads(text)


@pytest.mark.parametrize("body", [of(objects(100_000)), of("9" * 1_000_000)], ids=["C04", "C05"])
def test_what_would_take_long_is_refused_at_once(body):
    assert min(processor_seconds(body) for _ in range(5)) < 0.02


def processor_seconds(body: bytes) -> float:
    began = time.thread_time()
    with contextlib.suppress(errors.Refusal):
        intake.parse(body, max_depth=intake.MAX_DEPTH + 1)
    return time.thread_time() - began


@pytest.mark.slow
def test_c15_many_large_bodies_at_once_hold_up_nobody(service):
    sent = here(wire.post(brackets(MAX).replace(b"data", b"dota")))

    with ThreadPoolExecutor(12) as pool:
        sending = [pool.submit(patient_code, service, sent) for _ in range(12)]
        answered = 0
        while not all(one.done() for one in sending):
            assert answers(service, wire.get(), 1)[0][0] == 200
            answered += 1

    assert {one.result() for one in sending} == {400}
    assert answered >= 3  # while the large ones were still read


def patient_code(service, sent: bytes) -> int:
    with wire.connected(service) as (conn, stream):
        conn.settimeout(25)
        conn.sendall(sent)
        return wire.answer(stream)[0]
