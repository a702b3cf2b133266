import base64
import sys
from datetime import UTC, datetime, timedelta

import pytest

from jobs import errors
from web import signatures

SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
OTHER = "whsec_" + base64.b64encode(b"k" * 32).decode()
AT = datetime.fromtimestamp(1614265330, UTC)
BODY = b'{"test": 2432232314}'
VECTOR = "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="
HEADERS = {
    "webhook-id": "msg_p5jXN8AQM9LWM0D4loKWxJek",
    "webhook-timestamp": "1614265330",
    "webhook-signature": VECTOR,
}


def signed(secrets, body=BODY, timestamp=AT):
    signature = signatures.sign(
        secrets, webhook_id=HEADERS["webhook-id"], timestamp=timestamp, body=body
    )
    return {**HEADERS, "webhook-signature": signature}


def status_code(secrets, headers, body=BODY, now=AT):
    """Return 200 if `verify` accepts it, else the status of the refusal."""
    try:
        signatures.verify(secrets, headers, body, now=now)
    except errors.Refusal as exc:
        return exc.status_code
    return 200


def test_the_published_vector_is_reproduced_and_accepted():
    assert signed([SECRET])["webhook-signature"] == VECTOR
    assert status_code([SECRET], HEADERS) == 200


@pytest.mark.parametrize("known", [[SECRET], [OTHER], [OTHER, SECRET]])
def test_while_secrets_are_rotated_one_match_is_enough(known):
    assert status_code(known, signed([SECRET, OTHER])) == 200


def test_signatures_of_unknown_versions_are_skipped():
    headers = {**HEADERS, "webhook-signature": f"v1a,AAAA nonsense v2,x {VECTOR}"}

    assert status_code([SECRET], headers) == 200


@pytest.mark.parametrize(
    "signature",
    [
        *("v1", "v1,", "v1,abc", "v1,a,b", "v1,é", ",", " ", "\ud800", "v1,AAAA="),
        VECTOR.replace("v1", "v2"),
    ],
)
def test_a_wrong_signature_is_refused(signature):
    assert status_code([SECRET], {**HEADERS, "webhook-signature": signature}) == 401


@pytest.mark.parametrize(("off", "code"), [(-300, 200), (300, 200), (-301, 400), (301, 400)])
def test_a_timestamp_may_be_five_minutes_off(off, code):
    assert status_code([SECRET], HEADERS, now=AT + timedelta(seconds=off)) == code


@pytest.mark.parametrize("timestamp", ["", "-1", "1.5", "1e9", "nan", "١٢٣", "1" * 13, " 1", "1\n"])
def test_a_timestamp_that_is_not_a_number_of_seconds_is_refused(timestamp):
    assert status_code([SECRET], {**HEADERS, "webhook-timestamp": timestamp}) == 400


# The secret of one receiver


def run(monkeypatch, *arguments, **environment):
    monkeypatch.delenv("POSTBACK_SECRET", raising=False)
    monkeypatch.delenv("POSTBACK_SECRET_FILE", raising=False)
    for name, text in environment.items():
        monkeypatch.setenv(name, text)
    monkeypatch.setattr(sys, "argv", ["signatures", *arguments])
    signatures.main()


@pytest.mark.parametrize("origin", ["https://a.example", "HTTPS://A.example:443/hook?x"])
def test_the_command_prints_one_line_for_each_secret(monkeypatch, capsys, tmp_path, origin):
    (tmp_path / "secret").write_text(f"{SECRET} {OTHER}\n")

    run(monkeypatch, origin, POSTBACK_SECRET_FILE=str(tmp_path / "secret"))

    expected = [signatures.secret_for(one, "https://a.example:443") for one in (SECRET, OTHER)]
    assert capsys.readouterr().out.splitlines() == expected


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        ([], {}, "usage: ./run secret <origin>"),
        (["a.example"], {"POSTBACK_SECRET": SECRET}, "must begin with http"),
        (["http://a"], {}, "Set POSTBACK_SECRET"),
        (["http://a"], {"POSTBACK_SECRET": "secret"}, "expected whsec_"),
        (["http://a"], {"POSTBACK_SECRET_FILE": "/nowhere"}, "No such file .*/nowhere"),
    ],
)
def test_the_command_says_what_is_missing(monkeypatch, arguments, environment, message):
    with pytest.raises(SystemExit, match=message):
        run(monkeypatch, *arguments, **environment)
