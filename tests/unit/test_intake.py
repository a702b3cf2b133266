"""What the intake promises: it takes strict JSON whole, and refuses the rest by its rule."""

import contextlib
import io
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs import errors
from web import intake

MAX_BYTES = 1024 * 1024
VALID = b'{"data": 1}'
TOO_DEEP = "The JSON is nested too deeply; send at most 65 levels."


def request(body=VALID, **headers):
    """Return the environ of a request that is right, but for what is given. None leaves it out."""
    environ = {
        "CONTENT_LENGTH": str(len(body)),
        "CONTENT_TYPE": "application/json",
        "wsgi.input": io.BytesIO(body),
    } | headers
    return {name: value for name, value in environ.items() if value is not None}


def read(environ, max_bytes=MAX_BYTES):
    return intake.read_payload(environ, max_bytes=max_bytes)


def data(text):
    """Return what the value `text` under "data" is read as."""
    return intake.parse(b'{"data": ' + text.encode() + b"}", max_depth=65)["data"]


def refusal(environ, status_code=400):
    """Return why a request, or a body, is refused."""
    with pytest.raises(errors.Refusal) as refused:
        read(request(environ) if isinstance(environ, bytes) else environ)
    assert refused.value.status_code == status_code
    return refused.value.detail


def test_a_payload_keeps_the_bytes_as_they_came():
    body = b' { "data" : [1.50] ,\n "postback_url" : "https://x/" , "metadata": {"a": [1]} } '

    payload = read(request(body))

    assert payload == (body, "https://x/", {"a": [1]}, None, {})


# The length


@pytest.mark.parametrize("length", [str(MAX_BYTES + 1), "9" * 30])
def test_a_length_over_the_limit_is_refused_before_the_type_and_unread(length):
    environ = request(CONTENT_LENGTH=length, CONTENT_TYPE="text/plain")

    assert f"at most {MAX_BYTES} bytes" in refusal(environ, 413)
    assert environ["wsgi.input"].tell() == 0


# The type


@pytest.mark.parametrize(
    "content_type",
    [
        "  APPLICATION/json  ",
        "application/json; charset=latin-1",
        'application/json; x="\\";charset=latin-1"',
    ],
)
def test_json_is_taken_however_its_type_is_written_and_a_charset_means_nothing(content_type):
    assert read(request(CONTENT_TYPE=content_type)).body == VALID


@pytest.mark.parametrize(
    "content_type",
    [
        None,
        "multipart/form-data; boundary=application/json",
        "application/jsonp",
        "\xff\x00;;;==",
    ],
)
def test_any_other_type_is_refused_unread(content_type):
    environ = request(CONTENT_TYPE=content_type)

    assert "send application/json" in refusal(environ, 415)
    assert environ["wsgi.input"].tell() == 0


# The JSON


@pytest.mark.parametrize(
    ("value", "detail"),
    [
        ("é'", "The body is not valid JSON in UTF-8: Expecting value: line 1 column 10"),
        ("NaN", "NaN is not JSON; send null or a string instead."),
        ("[-Infinity]", "-Infinity is not JSON; send null or a string instead."),
        ("1e999", "'1e999' is too large; send at most 1.79e308."),
        ("-1e999", "'-1e999' is too large; send at most 1.79e308."),
        ("1" * 41, "An integer has 41 characters; send at most 40."),
        ("-" + "1" * 40, "An integer has 41 characters; send at most 40."),
        ("1" * 1_000_000, "An integer has 1000000 characters; send at most 40."),
        ('{"a": 1, "\\u0061": 2}', "An object has the key 'a' 2 times; send it once."),
        ('[{"": 1, "": 3}]', "An object has the key '' 2 times; send it once."),
        (f'{{"{"k" * 99}": 1, "{"k" * 99}": 2}}', f"An object has the key {'k' * 64!r} 2 times; "),
        (r'"\ud83d \ude00"', "A \\u escape is half of a surrogate pair; send both halves."),
        (r'"\\\ud800"', "A \\u escape is half of a surrogate pair; send both halves."),
        (r'{"\udbff": 1}', "A \\u escape is half of a surrogate pair; send both halves."),
        ("[" * 100_000, TOO_DEEP),
        ("[" * 65 + "]" * 65, TOO_DEEP),
        ('{"a":' * 65 + "1" + "}" * 65, TOO_DEEP),
    ],
)
def test_what_two_parsers_could_read_differently_is_refused(value, detail):
    assert refusal(b'{"data": %s}' % value.encode()).startswith(detail)


@pytest.mark.parametrize(
    "text",
    [
        '"\\uD83D\\uDE00 \\\\ud800"',
        '[{"a":' * 32 + "1" + "}]" * 32,
        "[" + "[]," * 500 + "[]]",
        json.dumps("[{" * 500),
    ],
)
def test_what_only_looks_wrong_is_taken(text):
    assert data(text) == json.loads(text)


def test_depth_is_counted_far_past_what_recursion_can_reach():
    value = [1, {"a": [{}], "b": {}}]
    for _ in range(50_000):
        value = [value]

    assert intake.depth_of(value) == 50_004


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


@pytest.mark.parametrize(
    "header",
    ["", '""', "k" * 256, f'"{"k" * 256}"', "a\x00b", "caf\xe9", '"abc', r'"a\b"', '"a", "b"'],
)
def test_an_idempotency_key_that_breaks_the_rule_is_refused(header):
    detail = refusal(request(HTTP_IDEMPOTENCY_KEY=header))

    assert detail.endswith("send 1 to 255 printable ASCII characters.")


@pytest.mark.parametrize("value", ["", " a", "r" * 513, "caf\xe9", "a\r\nb"])
def test_a_header_of_tracing_travels_as_it_came_or_is_dropped(value):
    sent = {"HTTP_TRACEPARENT": "00-0af7", "HTTP_X_REQUEST_ID": "r" * 512, "HTTP_X_OTHER": "x"}

    payload = read(request(**sent, HTTP_TRACESTATE=value))

    assert payload.forwarded == {"traceparent": "00-0af7", "x-request-id": "r" * 512}


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ("respond-async", True),
        (" Respond-Async ; wait=10", True),
        ('foo="a, b", respond-async', True),
        ("", False),
        ("respond-asynchronously", False),
        ("wait=10; respond-async", False),
        ('foo="a, respond-async"', False),
        (r'foo="\", respond-async"', False),
        ("\xff", False),
    ],
)
def test_prefer_respond_async_is_found_among_others(header, expected):
    assert intake.prefers_async({"HTTP_PREFER": header}) is expected


@pytest.mark.parametrize(
    ("header", "token"),
    [
        ("Bearer t0k.en~+/=", "t0k.en~+/="),
        (" BEARER  t0k.en ", "t0k.en"),
        ("", None),
        ("Bearer ", None),
        ("Basic dTpw", None),
        ("Bearer a b", None),
        ("Bearer caf\xe9", None),
    ],
)
def test_a_bearer_token_is_found_however_its_scheme_is_written(header, token):
    assert intake.bearer_token({"HTTP_AUTHORIZATION": header}) == token


# Properties

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
@settings(deadline=None, max_examples=200)
def test_any_bytes_are_read_as_json_reads_them_or_refused(value, changes, as_ascii):
    body = json.dumps({"data": [value], "postback_url": "x"}, ensure_ascii=as_ascii).encode()
    assert intake.parse(body, max_depth=65)["data"] == [value]

    for at, cut, put in changes:
        body = body[:at] + put + body[at + cut :]
    with contextlib.suppress(errors.Refusal):
        read(request(body))
        assert intake.parse(body, max_depth=65)["data"] == json.loads(body)["data"]


HEADERS = [
    "CONTENT_TYPE",
    "HTTP_AUTHORIZATION",
    "HTTP_CONTENT_ENCODING",
    "HTTP_IDEMPOTENCY_KEY",
    "HTTP_PREFER",
    "HTTP_TRACEPARENT",
    "HTTP_X_REQUEST_ID",
]


@given(headers=st.dictionaries(st.sampled_from(HEADERS), st.text(st.characters(max_codepoint=255))))
@settings(deadline=None, max_examples=200)
def test_any_header_is_understood_or_refused(headers):
    environ = request(**headers)

    assert intake.prefers_async(environ) in {True, False}
    assert (intake.bearer_token(environ) or "").isascii()
    with contextlib.suppress(errors.Refusal):
        assert all(value.isascii() for value in read(environ).forwarded.values())
