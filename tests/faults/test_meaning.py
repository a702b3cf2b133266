"""Group D: well-formed JSON that asks for what is not allowed, and analyses that misbehave."""

import json
import socket
import threading
from typing import Any

import pytest

from tests import receiver as script
from tests import wire
from tests.faults.world import ids, leaving, running
from tests.harness import events
from tests.receiver import Receiver

#: A public address: no connection to it is really made.
PUBLIC = "8.8.8.8"


def case(number: str, fields: object, code: int, named: str = ""):
    return pytest.param(fields, code, named, id=number)


@pytest.mark.parametrize(
    ("fields", "code", "named"),
    [
        case("D01 missing", {}, 400, "data"),
        case("D01 null", {"data": None}, 400, "data"),
        case("D01 empty string", {"data": ""}, 400, "data"),
        case("D01 empty list", {"data": []}, 400, "data"),
        case("D01 empty object", {"data": {}}, 400, "data"),
        case("D01 postback_url null", {"data": 1, "postback_url": None}, 400, "postback_url"),
        case("D01 postback_url list", {"data": 1, "postback_url": ["x"]}, 400, "postback_url"),
        case("D01 zero", {"data": 0}, 200),
        case("D01 false", {"data": False}, 200),
        case("D02", {"data": 1, "date": 2}, 400, "date"),
        case("D03", {"data": 1, "postback_url": "http://127.0.0.1/"}, 422, "POSTBACK_ALLOW"),
    ],
)
def test_fields(shared, fields, code, named):
    with leaving(shared, code == 200):
        status_code, _, body = wire.exchange(shared, wire.post(json.dumps(fields).encode()))

    assert status_code == code
    assert named in body.decode()


# Where to post


@pytest.fixture
def addresses(monkeypatch):
    """What names resolve to: a list for each look-up, the last one for good. Counts look-ups."""
    answers: dict[str, Any] = {"allowed.example": [["127.0.0.1"]]}
    looked_up = []

    def getaddrinfo(host, port, *arguments, **options):
        looked_up.append(host)
        found = answers[host]
        return [
            (socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0))
            for address in (found.pop(0) if len(found) > 1 else found[0])
        ]

    def create_connection(address, *arguments, **options):
        connected.append(address)
        if address[0] == PUBLIC:
            raise ConnectionRefusedError(111, "Connection refused")
        return really_connect(address, *arguments, **options)

    connected: list[tuple[str, int]] = []
    real = socket.getaddrinfo
    really_connect = socket.create_connection
    monkeypatch.setattr(
        socket,
        "getaddrinfo",
        lambda host, *rest, **more: (getaddrinfo if host in answers else real)(host, *rest, **more),
    )
    monkeypatch.setattr(socket, "create_connection", create_connection)
    answers["looked up"], answers["connected"] = looked_up, connected
    return answers


@pytest.fixture(scope="module")
def forbidden():
    """A listener that nothing may reach."""
    with Receiver() as one:
        yield one


@pytest.fixture(scope="module", params=["http://allowed.example", "http://allowed.example *"])
def guarded(request, forbidden, tmp_path_factory):
    """The service, with some receivers allowed."""
    with running(tmp_path_factory.mktemp("journal"), POSTBACK_ALLOW=request.param) as service:
        yield service


@pytest.mark.parametrize(
    "url",
    [
        pytest.param("http://other.example:{port}/", id="D04"),
        pytest.param("http://allowed.example@127.0.0.1:{port}/", id="D05 user"),
        pytest.param("http://127.0.0.1:{port}/#@allowed.example", id="D05 fragment"),
        pytest.param("http://127.0.0.1:{port}\\@allowed.example/", id="D05 backslash"),
        pytest.param("http://allowed.example\\@127.0.0.1:{port}/", id="D05 other backslash"),
        pytest.param("http://allowed.example.evil.example:{port}/", id="D05 suffix"),
        pytest.param("http://evil.example:{port}/allowed.example", id="D05 path"),
        pytest.param("http://allowed.example:{port}/", id="D06 port"),
        pytest.param("http://2130706433:{port}/", id="D07 decimal"),
        pytest.param("http://0x7f000001:{port}/", id="D07 hexadecimal"),
        pytest.param("http://0x7f.1:{port}/", id="D07 0x7f.1"),
        pytest.param("http://0177.0.0.1:{port}/", id="D07 octal"),
        pytest.param("http://127.1:{port}/", id="D07 127.1"),
        pytest.param("http://0:{port}/", id="D07 0"),
        pytest.param("http://127.0.0.1:{port}/", id="D07 plain"),
        pytest.param("http://localhost:{port}/", id="D07 localhost"),
        pytest.param("http://[::1]:{port}/", id="D07 ::1"),
        pytest.param("http://[::ffff:7f00:1]:{port}/", id="D07 mapped"),
        pytest.param("http://[64:ff9b::7f00:1]:{port}/", id="D07 NAT64"),
        pytest.param("http://169.254.169.254/", id="D07 metadata"),
        pytest.param("http://[fd00:ec2::254]/", id="D07 metadata, IPv6"),
        pytest.param("http://①②⑦.⓪.⓪.①:{port}/", id="D07 circled"),
        pytest.param("http://127。0。0。1:{port}/", id="D07 full stops"),
        pytest.param("file:///etc/passwd", id="D12 file"),
        pytest.param("ftp://127.0.0.1:{port}/", id="D12 ftp"),
        pytest.param("gopher://127.0.0.1:{port}/_x", id="D12 gopher"),
        pytest.param("data:text/plain,x", id="D12 data"),
        pytest.param("javascript:alert(1)", id="D12 javascript"),
        pytest.param("//127.0.0.1:{port}/", id="D12 no scheme"),
        pytest.param("", id="D12 empty"),
        pytest.param("http://allowed.example/" + "x" * 10_000, id="D13 10 KB"),
        pytest.param("http://allowed.example/\r\nHost: 127.0.0.1", id="D13 CRLF"),
        pytest.param("http://allowed.example/\0", id="D13 NUL"),
        pytest.param("http://ällowed.example/", id="D13 not ASCII"),
    ],
)
def test_a_url_that_is_not_allowed_reaches_nothing(guarded, forbidden, addresses, url):
    fields = {"data": 1, "postback_url": url.format(port=forbidden.port)}

    answer = guarded.post("/process", json=fields)

    assert answer.status_code == 422
    assert ids(guarded) == set()
    assert addresses["looked up"] == []
    assert forbidden.connections == 0


def test_d06_another_scheme_is_refused(start, addresses):
    service = start(ANALYSIS="tests.analyses:echo", POSTBACK_ALLOW="http://allowed.example")

    fields = {"data": 1, "postback_url": "https://allowed.example/"}

    assert service.post("/process", json=fields).status_code == 422
    assert ids(service) == set()


@pytest.mark.parametrize(
    ("host", "answers"),
    [
        pytest.param("inner.example", [["127.0.0.1"]], id="D08 loopback"),
        pytest.param("inner.example", [["10.0.0.1"]], id="D08 private"),
        pytest.param("inner.example", [["169.254.169.254"]], id="D08 metadata"),
        pytest.param("inner.example", [[PUBLIC, "127.0.0.1"]], id="D09"),
        pytest.param("inner.example", [["127.0.0.1", PUBLIC]], id="D09 other order"),
        pytest.param("inner.example", [[PUBLIC], ["127.0.0.1"]], id="D10"),
        pytest.param("inner.example", [["127.0.0.1"], [PUBLIC]], id="D10 other order"),
    ],
)
def test_a_name_that_leads_inside_is_blocked_at_each_attempt(
    start, forbidden, addresses, host, answers
):
    addresses[host] = answers
    service = start(
        ANALYSIS="tests.analyses:echo", POSTBACK_ALLOW="*", POSTBACK_SCHEDULE="20ms 20ms"
    )

    url = f"https://{host}:{forbidden.port}/"
    job = service.wait_for(service.process({"data": 1, "postback_url": url}))

    assert (job["state"], len(job["attempts"])) == ("undelivered", 3)
    assert f"refused: the address of {host} is not public" in [
        one["error"] for one in job["attempts"]
    ]
    assert {to for to, port in addresses["connected"] if port == forbidden.port} <= {PUBLIC}
    assert addresses["looked up"].count(host) == 3  # one look-up serves the check and the connect
    assert forbidden.connections == 0


def test_d08_a_listed_name_may_lead_inside(start, receiver, addresses):
    """The same name reaches the listener once it is listed: the test above can fail."""
    origin = f"http://allowed.example:{receiver.port}"
    service = start(ANALYSIS="tests.analyses:echo", POSTBACK_ALLOW=origin)

    job_id = service.process({"data": 1, "postback_url": origin + "/hook"})

    assert service.wait_for(job_id)["state"] == "delivered"
    assert ("127.0.0.1", receiver.port) in addresses["connected"]


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
def test_d11_a_redirect_to_the_inside_is_not_followed(start, receiver, forbidden, addresses, code):
    receiver.default = script.reply(code, headers={"Location": forbidden.url})
    service = start(
        ANALYSIS="tests.analyses:echo", POSTBACK_ALLOW=receiver.origin, POSTBACK_SCHEDULE="20ms"
    )

    job = service.wait_for(service.process({"data": 1, "postback_url": receiver.url}))

    assert (job["state"], len(receiver.requests)) == ("undelivered", 2)
    assert forbidden.connections == 0


# What the analysis does


def failing(number: str, analysis: str, kind: str, data: object = 7):
    return pytest.param(analysis, kind, data, id=number)


@pytest.mark.parametrize(
    ("analysis", "kind", "data"),
    [
        failing("D14", "fail", "ValueError"),
        failing("D15 NaN", "nan", "not_serialisable"),
        failing("D15 set", "unserialisable", "not_serialisable"),
        failing("D15 bytes", "binary", "not_serialisable"),
        failing("D15 circular", "circular", "not_serialisable"),
        failing("D15 depth 2,000", "deep", "not_serialisable"),
        failing("D15 key", "odd_key", "not_serialisable"),
        failing("D15 half a pair", "half_a_pair", "not_serialisable"),
        failing("D15 200 MB", "large", "result_too_large", 200_000_000),
        failing("D16 sys.exit", "leave", "SystemExit"),
        failing("D16 KeyboardInterrupt", "interrupt", "KeyboardInterrupt"),
        failing("D16 MemoryError", "exhaust", "MemoryError"),
    ],
)
def test_an_analysis_that_fails_is_posted_back_as_that(start, receiver, analysis, kind, data):
    service = start(ANALYSIS=f"tests.faults.misbehaving:{analysis}", POSTBACK_URL=receiver.url)

    job = service.wait_for(service.process({"data": data}))

    (event,) = events(receiver.requests)
    assert (job["state"], event["type"]) == ("delivered", "job.failed")
    assert event["data"]["error"]["type"] == kind
    assert "Traceback" not in str(event)
    assert service.get("/livez").status_code == 200


def test_d15_a_result_over_the_limit_of_a_postback_is_posted_as_a_link(start, receiver):
    service = start(ANALYSIS="tests.analyses:large", POSTBACK_URL=receiver.url)

    job = service.wait_for(service.process({"data": 2_000_000}))

    (event,) = events(receiver.requests)
    assert (job["state"], event["type"]) == ("delivered", "job.succeeded")
    assert event["data"]["result_bytes"] == 2_000_002
    assert "result" not in event["data"]


def test_d17_an_analysis_that_changes_its_input_does_not_change_the_journal(start, receiver):
    service = start(ANALYSIS="tests.analyses:change", POSTBACK_URL=receiver.url)

    job = service.wait_for(service.process({"data": [1, 2]}))

    assert (job["data"], job["result"]) == ([1, 2], "emptied")


@pytest.mark.parametrize(
    "data",
    [
        pytest.param("print", id="D18 prints"),
        pytest.param("chdir", id="D18 changes the directory"),
        pytest.param("signal", id="D18 sets a signal handler"),
        pytest.param("close", id="D18 closes the output"),
    ],
)
def test_an_analysis_that_meddles_with_the_process_hurts_no_other(start_process, receiver, data):
    service = start_process(ANALYSIS="tests.faults.misbehaving:meddle", POSTBACK_URL=receiver.url)
    reading = threading.Thread(target=service.process_.stdout.read, daemon=True)
    reading.start()

    first = service.wait_for(service.process({"data": data}), timeout=20)
    second = service.wait_for(service.process({"data": "nothing"}))

    assert (first["state"], second["state"]) == ("delivered", "delivered")
    assert second["outcome"] == "succeeded"
    assert service.end() == 0
    reading.join(5)
