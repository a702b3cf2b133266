"""What the intake promises: it takes strict JSON whole, and refuses the rest by its rule."""

import contextlib
import io
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs import errors
from web import intake


def request(body=b'{"data": 1}', **headers):
    """Return the environ of a request that is right, but for what is given."""
    return {
        "CONTENT_LENGTH": str(len(body)),
        "CONTENT_TYPE": "application/json",
        "wsgi.input": io.BytesIO(body),
    } | headers


def read(environ):
    return intake.read_payload(environ, max_bytes=1024 * 1024)


def refusal(environ):
    """Return why a request, or a body, is refused."""
    with pytest.raises(errors.Refusal) as refused:
        read(request(environ) if isinstance(environ, bytes) else environ)
    assert refused.value.status_code == 400
    return refused.value.detail


# The JSON


@pytest.mark.parametrize(
    ("value", "detail"),
    [
        ("é'", "The body is not valid JSON in UTF-8: Expecting value: line 1 column 10"),
        ("NaN", "NaN is not JSON; send null or a string instead."),
        ("-1e999", "'-1e999' is too large; send at most 1.79e308."),
        ("-" + "1" * 40, "An integer has 41 characters; send at most 40."),
        (f'{{"{"k" * 99}": 1, "{"k" * 99}": 2}}', f"An object has the key {'k' * 64!r} 2 times; "),
        (r'"\\\ud800"', "A \\u escape is half of a surrogate pair; send both halves."),
        ("[" * 65 + "]" * 65, "The JSON is nested too deeply; send at most 65 levels."),
    ],
)
def test_what_two_parsers_could_read_differently_is_refused_with_what_is_right(value, detail):
    assert refusal(b'{"data": %s}' % value.encode()).startswith(detail)


# The fields


@pytest.mark.parametrize("name", ["callback", "", "__proto__", "DATA", "a\nb", "k" * 100_000])
def test_an_unknown_field_is_refused_by_its_shortened_name(name):
    detail = refusal(json.dumps({"data": 1, name: 2}).encode())

    assert detail == (
        f'Unknown field {name[:64]!r}; send only "data", "postback_url" and "metadata".'
    )


def test_all_that_is_wrong_with_the_fields_is_said_at_once():
    detail = refusal(b'{"url": 1, "postback_url": null, "metadata": null}')

    assert [part.partition(" ")[0] for part in detail.split(". ")] == [
        "Missing",
        "Unknown",
        "postback_url",
        "metadata",
    ]


# The headers


@pytest.mark.parametrize(
    ("header", "key"),
    [
        ("abc", "abc"),
        ('  "abc"\t', "abc"),
        ('"a b "', "a b "),
        ('a"b', 'a"b'),
        (r'"a\"b"', 'a"b'),
        (r'"a\\b"', r"a\b"),
        (f'"{"k" * 255}"', "k" * 255),
        ('"' + r"\"" * 255 + '"', '"' * 255),
    ],
)
def test_an_idempotency_key_is_the_same_quoted_or_bare(header, key):
    assert read(request(HTTP_IDEMPOTENCY_KEY=header)).idempotency_key == key


@pytest.mark.parametrize("value", ["", " a", "r" * 513, "caf\xe9", "a\r\nb"])
def test_a_header_of_tracing_travels_as_it_came_or_is_dropped(value):
    sent = {"HTTP_TRACEPARENT": "00-0af7", "HTTP_X_REQUEST_ID": "r" * 512, "HTTP_X_OTHER": "x"}

    payload = read(request(**sent, HTTP_TRACESTATE=value))

    assert payload.forwarded == {"traceparent": "00-0af7", "x-request-id": "r" * 512}


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(min_value=-(10**39) + 1, max_value=10**40 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda values: st.lists(values) | st.dictionaries(st.text(), values),
    max_leaves=20,
)
edits = st.lists(
    st.tuples(st.integers(0, 200), st.integers(0, 9), st.binary(max_size=4)), max_size=4
)


@given(value=json_values, changes=edits, as_ascii=st.booleans())
@settings(deadline=None, max_examples=80)
def test_any_bytes_are_read_as_json_reads_them_or_refused(value, changes, as_ascii):
    body = json.dumps({"data": [value], "postback_url": "x"}, ensure_ascii=as_ascii).encode()
    assert intake.parse(body, max_depth=65)["data"] == [value]

    for at, cut, put in changes:
        body = body[:at] + put + body[at + cut :]
    with contextlib.suppress(errors.Refusal):
        read(request(body))
        assert intake.parse(body, max_depth=65)["data"] == json.loads(body)["data"]


HEADERS = [
    *("CONTENT_TYPE", "HTTP_AUTHORIZATION", "HTTP_CONTENT_ENCODING", "HTTP_IDEMPOTENCY_KEY"),
    *("HTTP_PREFER", "HTTP_TRACEPARENT", "HTTP_X_REQUEST_ID"),
]


@given(headers=st.dictionaries(st.sampled_from(HEADERS), st.text(st.characters(max_codepoint=255))))
@settings(deadline=None, max_examples=80)
def test_any_header_is_understood_or_refused(headers):
    environ = request(**headers)

    assert intake.prefers_async(environ) in {True, False}
    assert (intake.bearer_token(environ) or "").isascii()
    with contextlib.suppress(errors.Refusal):
        assert all(value.isascii() for value in read(environ).forwarded.values())
