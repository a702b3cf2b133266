"""Group C: what is no JSON, or JSON that two parsers could read differently."""

import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from jobs import errors
from tests import wire
from tests.faults.world import delivered, leaving
from tests.harness import ROOT
from web import intake

MAX = 1024 * 1024


def of(value: str | bytes) -> bytes:
    """Return a payload with this text as its data."""
    return b'{"data": %s}' % (value.encode() if isinstance(value, str) else value)


def lists(depth: int) -> bytes:
    return of(b"[" * depth + b"1" + b"]" * depth)


def objects(depth: int) -> bytes:
    return of(b'{"a":' * depth + b"1" + b"}" * depth)


def case(number: str, body: bytes, code: int):
    return pytest.param(body, code, id=number)


def brackets(size: int) -> bytes:
    """Return a payload of about as many bytes, all of them empty lists."""
    return of(b"[" + b"[]," * ((size - 20) // 3) + b"1]")


@pytest.mark.parametrize(
    ("body", "code"),
    [
        case("C01 brace", b"{", 400),
        case("C01 two values", b'{"data": 1} x', 400),
        case("C01 white space", b" \r\n\t ", 400),
        case("C01 single quotes", b"{'data': 1}", 400),
        case("C01 comma in an object", b'{"data": 1,}', 400),
        case("C01 comma in a list", of("[1,]"), 400),
        case("C01 comment", b'{"data": 1} // x', 400),
        case("C01 comment within", b'{"data": /* x */ 1}', 400),
        case("C02 null", b"null", 400),
        case("C02 number", b"1", 400),
        case("C02 string", b'"x"', 400),
        case("C02 list", b"[1]", 400),
        case("C02 true", b"true", 400),
        case("C03 NaN", of("NaN"), 400),
        case("C03 Infinity", of("Infinity"), 400),
        case("C03 -Infinity", of("[-Infinity]"), 400),
        case("C03 1e999", of("1e999"), 400),
        case("C03 -1e999", of("-1e999"), 400),
        case("C04 64 lists", lists(64), 200),
        case("C04 64 objects", objects(64), 200),
        case("C04 65 lists", lists(65), 400),
        case("C04 65 objects", objects(65), 400),
        case("C04 500", lists(500), 400),
        case("C04 1,000", objects(1000), 400),
        case("C04 100,000 lists", lists(100_000), 400),
        case("C04 100,000 objects", objects(100_000), 400),
        case("C04 100,000 not closed", of(b"[" * 100_000), 400),
        case("C05 40 digits", of("9" * 40), 200),
        case("C05 41 digits", of("9" * 41), 400),
        case("C05 minus and 40 digits", of("-" + "9" * 40), 400),
        case("C05 4,300 digits", of("9" * 4300), 400),
        case("C05 4,301 digits", of("9" * 4301), 400),
        case("C05 1 MB of digits", of("9" * 1_000_000), 400),
        case("C07 top level", b'{"data": 1, "data": 2}', 400),
        case("C07 escaped", b'{"data": 1, "d\\u0061ta": 2}', 400),
        case("C07 nested", of('[{"a": 1, "a": 1}]'), 400),
        case("C08 high alone", of(r'"\ud800"'), 400),
        case("C08 low alone", of(r'"\udc00"'), 400),
        case("C08 wrong order", of(r'"\udc00\ud800"'), 400),
        case("C08 in a key", of(r'{"\ud800": 1}'), 400),
        case("C08 pair", of(r'"\ud83d\ude00"'), 200),
        case("C09 ff fe", b"\xff\xfe" + of("1"), 400),
        case("C09 surrogate in UTF-8", of(b'"\xed\xa0\x80"'), 400),
        case("C09 overlong", of(b'"\xc0\x80"'), 400),
        case("C09 UTF-16", of("1").decode().encode("utf-16"), 400),
        case("C09 UTF-16 without a mark", of("1").decode().encode("utf-16-le"), 400),
        case("C09 UTF-32", of("1").decode().encode("utf-32"), 400),
        case("C10", b"\xef\xbb\xbf" + of("1"), 400),
        case("C11", of(r'"\u0000"'), 200),
        case("C11 in postback_url", b'{"data": 1, "postback_url": "http://a/\\u0000"}', 422),
        case("C12 newline", of(b'"a\nb"'), 400),
        case("C12 NUL", of(b'"a\0b"'), 400),
        case("C12 outside of a string", of(b"\0 1"), 400),
        case("C13 empty", of('{"": 1}'), 200),
        case("C13 100 KB", of('{"%s": 1}' % ("k" * 100_000)), 200),
        case("C13 __proto__", of('{"__proto__": {"a": 1}, "__class__": 1}'), 200),
        case("C13 empty at top level", b'{"data": 1, "": 1}', 400),
        case("C13 __proto__ at top level", b'{"data": 1, "__proto__": 1}', 400),
        case("C13 __class__ at top level", b'{"data": 1, "__class__": 1}', 400),
        case("C14 MAX", wire.padded(MAX), 200),
        case("C14 MAX+1", wire.padded(MAX + 1), 413),
        case("C15", brackets(MAX), 200),
    ],
)
def test_json(shared, body, code):
    with leaving(shared, code == 200):
        assert wire.status_code(shared, wire.post(body)) == code


@pytest.mark.parametrize(
    ("body", "limit_ms"),
    [
        pytest.param(lists(1000), 50, id="C04 1,000"),
        pytest.param(lists(100_000), 50, id="C04 100,000 lists"),
        pytest.param(objects(100_000), 50, id="C04 100,000 objects"),
        pytest.param(of("9" * 4301), 50, id="C05 4,301 digits"),
        pytest.param(of("9" * 1_000_000), 50, id="C05 1 MB of digits"),
    ],
)
def test_what_would_take_long_is_refused_at_once(body, limit_ms):
    assert min(milliseconds(body) for _ in range(5)) < limit_ms


def milliseconds(body: bytes) -> float:
    began = time.perf_counter()
    with pytest.raises(errors.MalformedError):
        intake.parse(body, max_depth=65)
    return (time.perf_counter() - began) * 1000


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("1e308", id="C06 1e308"),
        pytest.param("5e-324", id="C06 5e-324"),
        pytest.param("-0", id="C06 -0"),
        pytest.param("-0.0", id="C06 -0.0"),
        pytest.param("0.10000000000000001", id="C06 17 digits"),
        pytest.param("9" * 40, id="C06 40 digits"),
        pytest.param(r'"a\u0000b"', id="C11"),
        pytest.param(r'"\ud83d\ude00"', id="C08 pair"),
        pytest.param('{"__proto__": {"": 1}, "__class__": 2}', id="C13"),
        pytest.param('"\u202e\u200f abc \u05d0"', id="C16 right to left"),
        pytest.param('"a\u200b\u200d\ufeffb"', id="C16 zero width"),
        pytest.param('"👩‍👩‍👧‍👦 🏴‍☠️"', id="C16 emoji"),
        pytest.param('"e\u0301 \u00e9 \ufb01"', id="C16 NFD beside NFC"),
    ],
)
def test_a_value_arrives_as_it_was_sent(shared, listening, text):
    with leaving(shared, 1):
        job_id = json.loads(wire.exchange(shared, wire.post(of(text)))[2])["id"]

    (request,) = delivered(listening, job_id)
    assert json.loads(request.body)["data"]["result"] == json.loads(text)


def test_c13_a_long_unknown_name_is_shortened_in_the_answer(shared):
    with leaving(shared, 0):
        _, _, body = wire.exchange(shared, wire.post(b'{"data":1,"%s":1}' % (b"k" * 100_000)))

    assert b"Unknown field" in body
    assert len(body) < 500


@pytest.mark.soak
def test_c15_brackets_take_a_quarter_of_a_second_at_most():
    child = subprocess.run(  # by itself: the collector also visits all that a test run has loaded
        [sys.executable, "-c", MEASURE], check=True, cwd=ROOT, capture_output=True, text=True
    )

    assert float(child.stdout) < 0.25


#: Prints the processor seconds that it takes to parse a payload of 1 MiB of empty lists.
MEASURE = """
import time
from tests.faults.test_json import MAX, brackets
from web import intake

def once():
    began = time.thread_time()
    intake.parse(payload, max_depth=65)
    return time.thread_time() - began

payload = brackets(MAX)
print(min(once() for _ in range(3)))
"""


@pytest.mark.soak
def test_c15_many_of_them_at_once_leave_the_service_alive(shared):
    sent = wire.post(brackets(MAX))

    with leaving(shared, 0), ThreadPoolExecutor(32) as pool:
        sending = [pool.submit(refused_at_last, shared, sent) for _ in range(32)]
        took = max(wire.seconds(shared, wire.get()) for _ in range(10))

        codes = {one.result() for one in sending}

    assert codes == {400}
    assert took < 1


def refused_at_last(service, sent: bytes) -> int:
    """Send what is read whole before its one fault is seen; return the status."""
    with wire.connected(service) as (conn, stream):
        conn.settimeout(25)
        conn.sendall(sent.replace(b'{"data": ', b'{"dota": '))
        return wire.answer(stream)[0]
