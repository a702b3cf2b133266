"""What the intake promises: it takes strict JSON whole, and refuses the rest by its rule."""

import contextlib
import io
import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs import errors, model
from web import intake

MAX_BYTES = 1024 * 1024
VALID = b'{"data": 1}'


def request(body=VALID, **headers):
    """Return the environ of a request that is right, but for what is given."""
    return {
        "CONTENT_LENGTH": str(len(body)),
        "CONTENT_TYPE": "application/json",
        "wsgi.input": io.BytesIO(body),
    } | headers


def without(name, **headers):
    environ = request(**headers)
    del environ[name]
    return environ


def chunked(body, *, terminated=True):
    """Return the environ of a chunked request, on a server that leaves its header in place."""
    return without(
        "CONTENT_LENGTH",
        body=body,
        HTTP_TRANSFER_ENCODING="chunked",
        **{"wsgi.input_terminated": terminated},
    )


def read(environ, max_bytes=MAX_BYTES):
    return intake.read_payload(environ, max_bytes=max_bytes)


def data(text):
    """Return what the value `text` under "data" is read as."""
    body = text if isinstance(text, bytes) else text.encode()
    return read(request(b'{"data": ' + body + b"}")).data


def nested(levels, opening, closing):
    return opening * levels + "1" + closing * levels


def refusal(body):
    """Return why `body` is refused."""
    with pytest.raises(errors.MalformedError) as refused:
        read(request(body))
    return str(refused.value)


class DrippingInput(io.BytesIO):
    """An input that gives at most three bytes a time."""

    def read(self, size=-1, /):
        return super().read(min(size, 3))


class BrokenInput:
    """An input whose server finds a fault while it is read."""

    def __init__(self, fault):
        self.fault = fault

    def read(self, size):
        raise self.fault


# The payload


def test_a_payload_keeps_the_bytes_as_they_came_beside_what_they_mean():
    body = b' { "data" : [1.50] ,\n "postback_url" : "https://example.org/in" } '

    payload = read(request(body))

    assert payload.body == body
    assert payload.data == [1.5]
    assert payload.postback_url == "https://example.org/in"
    assert payload.idempotency_key is None
    assert payload.forwarded == {}


def test_a_payload_does_not_change():
    payload = read(request())

    with pytest.raises(AttributeError):
        payload.data = 2


def test_a_payload_without_a_postback_url_leaves_it_to_the_settings():
    payload = read(request())

    assert payload.postback_url is None


# The length


@pytest.mark.parametrize(
    "length", ["-5", "+3", "1_0", "abc", "0x3", "3 ", "3, 3", "\u0663", "\xb2"]
)
def test_a_length_that_is_not_digits_alone_is_malformed(length):
    environ = request(CONTENT_LENGTH=length)

    with pytest.raises(errors.MalformedError, match=r"Content-Length is .*; send digits only"):
        read(environ)


@pytest.mark.parametrize("length", [str(MAX_BYTES + 1), "9" * 18, "0" * 18 + "50", "9" * 5000])
@pytest.mark.parametrize("content_type", ["application/json", "text/plain"])
def test_a_length_over_the_limit_is_refused_before_the_type_and_unread(length, content_type):
    environ = request(CONTENT_LENGTH=length, CONTENT_TYPE=content_type)

    with pytest.raises(errors.TooLargeError, match=f"at most {MAX_BYTES} bytes"):
        read(environ)

    assert environ["wsgi.input"].tell() == 0


def test_a_body_of_exactly_the_limit_is_taken():
    body = b'{"data": "' + b"a" * (MAX_BYTES - 12) + b'"}'

    payload = read(request(body))

    assert len(payload.body) == MAX_BYTES


@pytest.mark.parametrize(
    "environ",
    [
        pytest.param(without("CONTENT_LENGTH"), id="no header"),
        pytest.param(request(CONTENT_LENGTH=""), id="an empty variable"),
        pytest.param(chunked(VALID, terminated=False), id="chunked, and nobody decodes it"),
        pytest.param(request(HTTP_TRANSFER_ENCODING="chunked"), id="chunked, and a length"),
        pytest.param(without("CONTENT_LENGTH", **{"wsgi.input_terminated": True}), id="no framing"),
    ],
)
def test_a_body_of_unknown_length_is_refused(environ):
    with pytest.raises(errors.LengthRequiredError, match="send a Content-Length"):
        read(environ)


@pytest.mark.parametrize(
    "environ",
    [
        pytest.param(request(b""), id="a length of 0"),
        pytest.param(without("CONTENT_TYPE", body=b""), id="a length of 0 and no type"),
        pytest.param(chunked(b""), id="no chunks"),
    ],
)
def test_an_empty_body_is_malformed(environ):
    with pytest.raises(errors.MalformedError, match="The body is empty"):
        read(environ)


# The reading


def test_a_body_in_small_pieces_is_read_whole():
    environ = request(**{"wsgi.input": DrippingInput(VALID)})

    payload = read(environ)

    assert payload.body == VALID


def test_no_more_than_the_length_is_read():
    environ = request(CONTENT_LENGTH=str(len(VALID)), **{"wsgi.input": io.BytesIO(VALID + b"POST")})

    payload = read(environ)

    assert payload.body == VALID
    assert environ["wsgi.input"].read() == b"POST"


def test_a_body_shorter_than_its_length_is_malformed():
    environ = request(CONTENT_LENGTH="100")

    with pytest.raises(errors.MalformedError, match="ended after 11 of 100 bytes"):
        read(environ)


@pytest.mark.parametrize(
    "fault", [OSError("reset"), ValueError("chunk"), RuntimeError(), KeyError()]
)
def test_whatever_the_server_raises_while_reading_is_malformed(fault):
    environ = request(**{"wsgi.input": BrokenInput(fault)})

    with pytest.raises(errors.MalformedError, match="could not be read") as refused:
        read(environ)

    assert refused.value.__cause__ is fault


def test_the_end_of_the_process_is_not_taken_for_a_bad_body():
    environ = request(**{"wsgi.input": BrokenInput(KeyboardInterrupt())})

    with pytest.raises(KeyboardInterrupt):
        read(environ)


def test_an_input_that_ends_by_itself_needs_no_length():
    payload = read(chunked(VALID), max_bytes=len(VALID))

    assert payload.body == VALID


def test_an_input_that_ends_by_itself_is_read_one_byte_past_the_limit_at_most():
    environ = chunked(VALID * 9)

    with pytest.raises(errors.TooLargeError, match="at most 11 bytes"):
        read(environ, max_bytes=len(VALID))

    assert environ["wsgi.input"].tell() == len(VALID) + 1


# The type


@pytest.mark.parametrize(
    "content_type",
    [
        "application/json",
        "APPLICATION/JSON",
        "  application/json  ",
        "application/json;",
        "application/json; charset=utf-8",
        "application/json;charset=UTF-8",
        'Application/Json ; Charset = "Utf-8"',
        "application/json; version=1; charset=utf-8",
        'application/json; profile="a;charset=latin-1"',
        'application/json; x="\\";charset=latin-1"',
        "application/json; charset",
    ],
)
def test_json_is_taken_however_its_type_is_written(content_type):
    payload = read(request(CONTENT_TYPE=content_type))

    assert payload.data == 1


@pytest.mark.parametrize(
    "content_type",
    [
        "",
        "text/plain",
        "text/json",
        "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=application/json",
        "application/problem+json",
        "application/vnd.api+json",
        "application/jsonp",
        "application/json, application/json",
        "application/json charset=utf-8",
        "\xff\x00;;;==",
    ],
)
def test_any_other_type_is_refused_unread(content_type):
    environ = request(CONTENT_TYPE=content_type)

    with pytest.raises(errors.MediaTypeError, match="send application/json"):
        read(environ)

    assert environ["wsgi.input"].tell() == 0


def test_a_missing_type_is_refused():
    with pytest.raises(errors.MediaTypeError, match="send application/json"):
        read(without("CONTENT_TYPE"))


@pytest.mark.parametrize(
    "parameters",
    [
        "charset=latin-1",
        "charset=utf-16",
        "charset=",
        'CHARSET="ISO-8859-1"',
        "a=b ; charset = ascii",
        "charset=utf-8; charset=utf-16",
    ],
)
def test_a_charset_means_nothing_and_the_body_is_utf_8(parameters):
    content_type = f"application/json; {parameters}"

    assert read(request(CONTENT_TYPE=content_type)).data == 1
    with pytest.raises(errors.MalformedError, match="not UTF-8"):
        read(request(b'{"data": "caf\xe9"}', CONTENT_TYPE=content_type))


@pytest.mark.parametrize("encoding", ["gzip", "GZIP", "deflate", "br", "identity, gzip", "\xff"])
def test_an_encoded_body_is_refused(encoding):
    environ = request(HTTP_CONTENT_ENCODING=encoding)

    with pytest.raises(errors.MediaTypeError, match="send it unencoded"):
        read(environ)


@pytest.mark.parametrize("encoding", ["identity", " Identity ", ""])
def test_a_body_that_is_said_not_to_be_encoded_is_taken(encoding):
    payload = read(request(HTTP_CONTENT_ENCODING=encoding))

    assert payload.data == 1


# The JSON


@pytest.mark.parametrize(
    "body",
    [
        "{",
        "{} x",
        " \r\n\t",
        "{'data': 1}",
        '{"data": 1,}',
        '{"data": [1,]}',
        '{"data": 1} // no',
        '{"data": /* no */ 1}',
        '{"data": 01}',
        '{"data": .5}',
        '{"data": 1.}',
        '{"data": +1}',
        '{"data": 0x1}',
        '{"data": \u0661}',
        '{"data": True}',
        '{"data": "a\nb"}',
        '{"data": "a\x00b"}',
        '{"data": "\\x41"}',
        '{"data": "\\u00e"}',
        '{"data": "a',
        "{data: 1}",
        '{"data" 1}',
        '{"data": 1}{"data": 1}',
        '{"data": 1}\x00',
    ],
)
def test_wrong_syntax_is_refused_with_its_position(body):
    message = refusal(body.encode())

    assert message.startswith("The body is not valid JSON: ")
    assert "line 1 column" in message or "line 2 column" in message


@pytest.mark.parametrize("name", ["NaN", "Infinity", "-Infinity"])
def test_a_constant_that_is_not_json_is_refused(name):
    message = refusal(b'{"data": [%s]}' % name.encode())

    assert message == f"{name} is not JSON; send null or a string instead."


@pytest.mark.parametrize("number", ["1e999", "-1e999", "1" * 310 + ".0"])
def test_a_number_that_would_become_infinite_is_refused(number):
    message = refusal(b'{"data": %s}' % number.encode())

    assert message == f"{number[:64]!r} is too large; send at most 1.79e308."


@pytest.mark.parametrize("number", ["1" * 41, "-" + "1" * 40, "1" * 4300, "1" * 4301])
def test_an_integer_of_more_than_40_characters_is_refused(number):
    message = refusal(b'{"data": %s}' % number.encode())

    assert message == f"An integer has {len(number)} characters; send at most 40."


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("9" * 40, 10**40 - 1),
        ("-" + "9" * 39, -(10**39) + 1),
        ("1e308", 1e308),
        ("5e-324", 5e-324),
        ("-0", 0),
        ("-0.0", 0.0),
        ("0.12345678901234567", 0.12345678901234567),
        ("0", 0),
        ("false", False),
        ("true", True),
        ('"0"', "0"),
        ("[null]", [None]),
        ('{"": {}}', {"": {}}),
        ('{"__proto__": 1, "__class__": 2}', {"__proto__": 1, "__class__": 2}),
        ('"\\u0000"', "\x00"),
        ('"\\ud83d\\ude00"', "😀"),
        ('"\\uD83D\\uDE00 \\\\ud800"', "😀 \\ud800"),
        ('"\\\\ud800"', "\\ud800"),
        ('"😀 \u202e \u200b e\u0301 \ufeff"', "😀 \u202e \u200b e\u0301 \ufeff"),
    ],
)
def test_every_value_that_json_can_hold_is_taken(text, value):
    taken = data(text)

    assert taken == value
    assert type(taken) is type(value)


def test_a_key_in_the_data_may_be_of_any_length():
    key = "k" * 100_000

    assert data(json.dumps({key: 1})) == {key: 1}


@pytest.mark.parametrize(
    ("body", "name"),
    [
        (b'{"data": 1, "data": 1}', "'data'"),
        (b'{"data": {"a": 1, "b": [{"": 1, "c": 2, "": 3}]}}', "''"),
        (b'{"data": {"a": 1, "\\u0061": 2}}', "'a'"),
        (b'{"data": {"\\ud800": 1, "\\ud800": 2}}', r"'\ud800'"),
        (b'{"data": {"%s": 1, "%s": 2}}' % (b"k" * 999, b"k" * 999), repr("k" * 64)),
    ],
)
def test_a_key_that_comes_twice_is_refused_by_name(body, name):
    message = refusal(body)

    assert message == f"An object has the key {name} 2 times; send 1."


@pytest.mark.parametrize(
    "text",
    [
        r'"\ud800"',
        r'"\udc00"',
        r'"\uDFFF"',
        r'"\udc00\ud800"',
        r'"\ud83d\ude00\ud83d"',
        r'"\ud83d \ude00"',
        r'"\\\ud800"',
        r'{"\udbff": 1}',
        r'[{"a": ["\udc00"]}]',
    ],
)
def test_half_a_surrogate_pair_is_refused(text):
    message = refusal(b'{"data": %s}' % text.encode())

    assert message == "A \\u escape is half of a pair; send both halves."


@pytest.mark.parametrize(
    ("body", "place"),
    [
        (b"\xff\xfe", "0 (0xff)"),
        (b'{"data": "\xed\xa0\x80"}', "10 (0xed)"),
        (b'{"data": "\xc0\x80"}', "10 (0xc0)"),
        (b'{"data": "caf\xe9"}', "13 (0xe9)"),
        (b'{"data": "\xf4\x90\x80\x80"}', "10 (0xf4)"),
        ('{"data": 1}'.encode("utf-16"), "0 (0xff)"),
        ('{"data": 1}'.encode("utf-32"), "0 (0xff)"),
    ],
)
def test_bytes_that_are_not_utf_8_are_refused_with_their_place(body, place):
    assert refusal(body) == f"The body is not UTF-8 at byte {place}; send UTF-8."


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
def test_other_encodings_without_a_mark_are_not_guessed(encoding):
    assert "not valid JSON" in refusal('{"data": 1}'.encode(encoding))


def test_a_byte_order_mark_is_refused():
    assert "byte order mark" in refusal(b"\xef\xbb\xbf" + VALID)


# The depth


@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ('{"a":', "}"), ('[{"a":', "}]")])
def test_data_of_64_levels_is_taken_and_one_level_more_is_not(opening, closing):
    width = opening.count("[") + opening.count("{")
    deepest = nested(64 // width, opening, closing)

    value = data(deepest)

    assert model.depth_of(value) == intake.MAX_DEPTH == 64
    assert "nested too deeply" in refusal(b'{"data": [%s]}' % deepest.encode())


@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ('{"a":', "}")])
@pytest.mark.parametrize("levels", [65, 500, 1_000, 100_000])
def test_deeper_json_is_refused_at_every_depth(levels, opening, closing):
    body = b'{"data": %s}' % nested(levels, opening, closing).encode()

    assert refusal(body) == "The JSON is nested too deeply; send at most 65 levels."


@pytest.mark.parametrize("text", ["[" + "[]," * 500 + "[]]", json.dumps("[{" * 500)])
def test_many_brackets_that_are_not_deep_are_taken(text):
    assert data(text) == json.loads(text)


def test_another_limit_of_depth_holds_as_it_is_given():
    assert intake.parse(b"[[]]", max_depth=2) == [[]]
    with pytest.raises(errors.MalformedError, match="at most 2 levels"):
        intake.parse(b"[[[]]]", max_depth=2)


@pytest.mark.parametrize(
    ("value", "levels"),
    [(None, 0), (1, 0), ("[[", 0), ([], 1), ({}, 1), ([1, [], 2], 2), ({"a": [{}], "b": {}}, 3)],
)
def test_depth_counts_lists_and_dicts(value, levels):
    assert model.depth_of(value) == levels


def test_depth_is_counted_far_past_what_recursion_can_reach():
    value: list[Any] = []
    for _ in range(50_000):
        value = [value]

    assert model.depth_of(value) == 50_001


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b"[" * 100_000, id="brackets that open"),
        pytest.param(b"[" * 100_000 + b"]" * 100_000, id="brackets that close"),
        pytest.param(b'{"a":' * 100_000, id="braces"),
        pytest.param(b'{"data": ' + b"1" * 1_000_000 + b"}", id="digits"),
        pytest.param(b'{"data": -' + b"1" * 1_000_000 + b"}", id="digits below zero"),
    ],
)
def test_what_is_made_to_cost_time_is_refused(body):
    with pytest.raises(errors.MalformedError):
        read(request(body))


# The fields


@pytest.mark.parametrize("body", [b"null", b"1", b'"x"', b"[1]", b"[]", b"true", b'["data"]'])
def test_a_body_that_is_not_an_object_is_refused(body):
    assert refusal(body) == 'The body is not a JSON object; send {"data": …}.'


@pytest.mark.parametrize(
    "body",
    [
        b"{}",
        b'{"data": null}',
        b'{"data": ""}',
        b'{"data": []}',
        b'{"data": {}}',
        b'{"postback_url": "https://example.org/"}',
        b'{"Data": 1}',
        b'{"text": "hello"}',
    ],
)
def test_a_payload_without_data_is_refused(body):
    assert refusal(body).startswith("Missing data")


@pytest.mark.parametrize("name", ["callback", "", "__proto__", "__class__", "DATA", "a\nb", "é"])
def test_an_unknown_field_is_refused_by_name(name):
    body = json.dumps({"data": 1, name: 2}).encode()

    assert refusal(body) == f'Unknown field {name!r}; send only "data" and "postback_url".'


def test_the_name_of_an_unknown_field_is_shortened():
    body = json.dumps({"data": 1, "k" * 100_000: 2}).encode()

    assert refusal(body).startswith(f"Unknown field {'k' * 64!r};")


@pytest.mark.parametrize("value", [b"null", b"1", b"true", b"[]", b"{}", b'["https://a.example"]'])
def test_a_postback_url_that_is_not_a_string_is_refused_by_name(value):
    message = refusal(b'{"data": 1, "postback_url": %s}' % value)

    assert message == "postback_url is not a string; send a URL, or leave it out."


def test_all_that_is_wrong_with_the_fields_is_said_at_once():
    message = refusal(b'{"url": 1, "postback_url": 2}')

    assert message == (
        'Missing data: send "data" with a value that is not null, "", [] or {}. '
        'Unknown field \'url\'; send only "data" and "postback_url". '
        "postback_url is not a string; send a URL, or leave it out."
    )


@pytest.mark.parametrize("url", ["", "file:///etc/passwd", "a\x00b", "//x"])
def test_which_postback_urls_are_allowed_is_not_decided_here(url):
    payload = read(request(json.dumps({"data": 1, "postback_url": url}).encode()))

    assert payload.postback_url == url


# The headers


@pytest.mark.parametrize(
    ("header", "key"),
    [
        ("abc", "abc"),
        ('"abc"', "abc"),
        ('  "abc"\t', "abc"),
        ("a b", "a b"),
        ('"a b "', "a b "),
        ('a"b', 'a"b'),
        (r'"a\"b"', 'a"b'),
        (r"a\b", r"a\b"),
        (r'"a\\b"', r"a\b"),
        ("k" * 255, "k" * 255),
        (f'"{"k" * 255}"', "k" * 255),
        ('"' + r"\"" * 255 + '"', '"' * 255),
        ("8e03978e-40d5-43dd-bc93-6894a57f9324", "8e03978e-40d5-43dd-bc93-6894a57f9324"),
    ],
)
def test_an_idempotency_key_is_the_same_quoted_or_bare(header, key):
    payload = read(request(HTTP_IDEMPOTENCY_KEY=header))

    assert payload.idempotency_key == key


@pytest.mark.parametrize(
    "header",
    [
        "",
        "  ",
        '""',
        "k" * 256,
        f'"{"k" * 256}"',
        "a\x00b",
        "a\tb",
        "a\x7fb",
        "caf\xe9",
        '"caf\xe9"',
        '"abc',
        '"',
        r'"abc\"',
        r'"a\b"',
        '"a"b"',
        '"a", "b"',
        '"a";q=1',
    ],
)
def test_an_idempotency_key_that_breaks_the_rule_is_refused(header):
    environ = request(HTTP_IDEMPOTENCY_KEY=header)

    with pytest.raises(errors.MalformedError, match=r"Idempotency-Key .* 1 to 255 printable ASCII"):
        read(environ)


def test_the_headers_of_tracing_travel_as_they_came():
    traceparent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"

    payload = read(
        request(
            HTTP_TRACEPARENT=traceparent,
            HTTP_TRACESTATE="Congo=t61, rojo=1",
            HTTP_X_REQUEST_ID="r" * 512,
            HTTP_X_OTHER="other",
        )
    )

    assert payload.forwarded == {
        "traceparent": traceparent,
        "tracestate": "Congo=t61, rojo=1",
        "x-request-id": "r" * 512,
    }


@pytest.mark.parametrize("value", ["", " ", " a", "r" * 513, "caf\xe9", "a\x00", "a\r\nb", "a\n"])
def test_a_header_that_cannot_be_sent_on_is_dropped_and_refuses_nothing(value):
    payload = read(request(HTTP_X_REQUEST_ID=value, HTTP_TRACESTATE="a=1"))

    assert payload.forwarded == {"tracestate": "a=1"}


@pytest.mark.parametrize(
    "header",
    [
        "respond-async",
        "Respond-Async",
        " respond-async ",
        "respond-async; wait=10",
        "respond-async ;a;b=c",
        "respond-async, wait=10",
        "return=minimal, respond-async",
        'foo="a, b", respond-async',
        'respond-async; a=","',
    ],
)
def test_prefer_respond_async_is_found_among_others(header):
    assert intake.prefers_async({"HTTP_PREFER": header})


@pytest.mark.parametrize(
    "header",
    [
        "",
        "wait=10",
        "respond-asynchronously",
        "respond-async wait=10",
        "return=respond-async",
        "wait=10; respond-async",
        'foo="a, respond-async"',
        'foo="a, respond-async',
        r'foo="\", respond-async"',
        "\xff",
    ],
)
def test_any_other_preference_is_not_respond_async(header):
    assert not intake.prefers_async({"HTTP_PREFER": header})


def test_no_preference_is_not_respond_async():
    assert not intake.prefers_async({})


@pytest.mark.parametrize(
    "header", ["Bearer t0k.en~+/=", "bearer t0k.en~+/=", " BEARER  t0k.en~+/= "]
)
def test_the_bearer_token_is_found_however_its_scheme_is_written(header):
    assert intake.bearer_token({"HTTP_AUTHORIZATION": header}) == "t0k.en~+/="


@pytest.mark.parametrize(
    "header",
    ["", "Bearer", "Bearer ", "Bearertoken", "Basic dTpw", "token", "Bearer a b", "Bearer caf\xe9"],
)
def test_any_other_authorization_holds_no_token(header):
    assert intake.bearer_token({"HTTP_AUTHORIZATION": header}) is None


def test_no_authorization_holds_no_token():
    assert intake.bearer_token({}) is None


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


def edited(body, changes):
    """Return `body` with some bytes cut out, and others put in their place."""
    for at, cut, put in changes:
        body = body[:at] + put + body[at + cut :]
    return body


@given(value=json_values, as_ascii=st.booleans())
@settings(deadline=None, max_examples=100)
def test_any_json_value_arrives_as_it_was_sent(value, as_ascii):
    body = json.dumps({"data": [value]}, ensure_ascii=as_ascii).encode()

    payload = read(request(body))

    assert payload.data == [value]


@given(value=json_values, changes=edits)
@settings(deadline=None, max_examples=200)
def test_damaged_bytes_are_read_as_json_reads_them_or_refused(value, changes):
    body = edited(json.dumps({"data": [value], "postback_url": "x"}).encode(), changes)

    with contextlib.suppress(errors.RequestError):
        payload = read(request(body))
        assert payload.data == json.loads(body)["data"]


@given(body=st.binary(), max_depth=st.integers(0, 4))
@settings(deadline=None, max_examples=100)
def test_any_bytes_are_read_as_json_reads_them_or_refused(body, max_depth):
    with contextlib.suppress(errors.MalformedError):
        value = intake.parse(body, max_depth=max_depth)
        assert value == json.loads(body)
        assert model.depth_of(value) <= max_depth


@given(
    headers=st.dictionaries(
        st.sampled_from(
            [
                "CONTENT_LENGTH",
                "CONTENT_TYPE",
                "HTTP_AUTHORIZATION",
                "HTTP_CONTENT_ENCODING",
                "HTTP_IDEMPOTENCY_KEY",
                "HTTP_PREFER",
                "HTTP_TRACEPARENT",
                "HTTP_TRANSFER_ENCODING",
                "HTTP_X_REQUEST_ID",
            ]
        ),
        st.text(st.characters(max_codepoint=255)),
    )
)
@settings(deadline=None, max_examples=200)
def test_any_header_is_understood_or_refused(headers):
    environ = request(**headers)

    assert intake.prefers_async(environ) in {True, False}
    assert (intake.bearer_token(environ) or "").isascii()
    with contextlib.suppress(errors.RequestError):
        payload = read(environ)
        assert all(value.isascii() for value in payload.forwarded.values())


def test_many_threads_may_parse_at_once():
    bodies = [json.dumps({"a": [number / 2, {str(number): number}]}) for number in range(400)]

    with ThreadPoolExecutor(8) as pool:
        values = pool.map(lambda body: intake.parse(body.encode(), max_depth=3), bodies)

    assert list(values) == [json.loads(body) for body in bodies]
