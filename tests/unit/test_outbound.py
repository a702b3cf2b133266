import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from urllib3.exceptions import LocationParseError
from urllib3.util import parse_url

from jobs import errors
from web import outbound

LONG_LABEL = "http://" + "a" * 64 + ".com/"

#: URLs that are refused, by what the refusal says. More are in tests/faults/test_meaning.py.
REFUSED = [
    ("begin with http", "example.com", "http:/a.com", "ftp://example.com/", " http://example.com/"),
    ("no user name", "http://user:secret@evil/", "http://@evil/", "http://allowed\\@evil"),
    ("no fragment", "http://evil/#", "http://evil#@allowed"),
    ("printable ASCII", "http://example.com/ ", "http://exa mple.com/", "http://example.com\n"),
    ("printable ASCII", "http://a/\t", "http://example.com/ä", "http://evil/\\x"),
    ("The host", "http:///path", "http://", "http://:80/", "http://127.0.0.1%00.example.com/"),
    ("The host", "http://%31%32%37.0.0.1/", "http://*.a.com/", "http://.a.com/", "http://a..b/"),
    ("The host", "http://-a.com/", LONG_LABEL, "http://" + "a." * 127 + "com/"),
    ("The host", "http://2130706433/", "http://127.0.0.1./", "http://256.1.1.1/"),
    ("The host", "http://a.b.0x/", "http://[::1/", "http://[1:2]/", "http://[127.0.0.1]/"),
    ("The host", "http://[fe80::1%25eth0]/", "http://[::ffff:127.0.0.256]/", "http://::1/"),
    ("The port", "http://a.com:/", "http://a.com:0/", "http://a.com:65536/", "http://a.com:8x/"),
    ("The port", "http://a.com:-1/", "http://a.com:99999/"),
    ("at most 2048", "http://a.com/" + "a" * 2048),
]


@pytest.mark.parametrize(("part", "url"), [(part, url) for part, *urls in REFUSED for url in urls])
def test_a_refused_url_is_told_which_part_is_wrong_without_being_quoted(part, url):
    with pytest.raises(errors.Refusal, match=part) as refused:
        outbound.Policy.of("*").check(url)

    assert (refused.value.status_code, refused.value.title) == (422, "Receiver refused")
    assert "secret" not in refused.value.detail


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://example.com", "http://example.com:80"),
        ("https://example.com/a?b=c", "https://example.com:443/a?b=c"),
        ("HTTPS://EXAMPLE.com:443?q", "https://example.com:443/?q"),
        ("http://a.example:08080/@x", "http://a.example:8080/@x"),
        ("http://xn--exmple-cua.com/", "http://xn--exmple-cua.com:80/"),
        ('http://a.com/%00/{id}?"<x>"', "http://a.com:80/%00/%7Bid%7D?%22%3Cx%3E%22"),
        ("http://my_host-1.internal./", "http://my_host-1.internal.:80/"),
        ("http://127.0.0.1:80/", "http://127.0.0.1:80/"),
        ("http://[0:0::1]:8080/", "http://[::1]:8080/"),
        ("http://[::FFFF:7f00:1]/", "http://[::ffff:127.0.0.1]:80/"),
        ("http://a.com/" + "a" * 2035, "http://a.com:80/" + "a" * 2035),
    ],
)
def test_a_url_has_one_form(url, expected):
    # Newer releases of Python write a mapped address with dots, older ones in hexadecimal.
    assert outbound.parts(url).url.replace("7f00:1", "127.0.0.1") == expected


@settings(deadline=None, max_examples=100)
@given(st.text("htps:/@#?\\[]%.:a1x0-_ \n\x00é", max_size=30).map("http://".__add__))
def test_the_host_is_the_one_that_another_parser_finds(url):
    try:
        host = outbound.parts(url).host
    except errors.Refusal:
        return

    try:
        other = parse_url(url).host
    except LocationParseError:
        other = "none"

    assert other.lower() == host or host.startswith("[")


@pytest.mark.parametrize(
    "address",
    [
        *("0.0.0.0", "10.1.2.3", "100.64.0.1", "100.100.100.200", "127.0.0.1", "127.255.255.254"),
        *("169.254.169.254", "172.16.0.1", "172.31.255.255", "192.0.0.8", "192.0.0.192"),
        *("192.0.2.1", "192.88.99.1", "192.168.1.1", "198.18.0.1", "198.19.255.255"),
        *("198.51.100.1", "203.0.113.1", "224.0.0.1", "239.255.255.255", "240.0.0.1"),
        *("255.255.255.255", "168.63.129.16"),
        *("::", "::1", "::127.0.0.1", "::8.8.8.8", "::ffff:127.0.0.1", "::ffff:7f00:1"),
        *("::ffff:169.254.169.254", "::ffff:0:127.0.0.1", "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe"),
        *("64:ff9b:1::1", "100::1", "2001::1", "2001:0:7f00:1::", "2001:10::1", "2001:db8::1"),
        *("2002:7f00:1::", "2002:a9fe:a9fe::1", "3fff::1", "5f00::1", "4000::1", "fc00::1"),
        *("fd00:ec2::254", "fe80::1", "fe80::1%eth0", "fec0::1", "ff02::1", "ff0e::1"),
        *("", "localhost", "127.1", "2130706433", "8.8.8.8 ", "08.8.8.8"),
    ],
)
def test_an_address_that_is_not_public_is_known(address):
    assert not outbound.is_public(address)


@pytest.mark.parametrize(
    "address", ["8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"]
)
def test_an_address_that_is_public_is_known(address):
    assert outbound.is_public(address)


def test_a_listed_origin_may_be_private_beside_any_other_that_must_not():
    policy = outbound.Policy.of("http://10.0.0.1:8000 https://hooks.example *")
    urls = ["http://10.0.0.1:8000/x", "https://HOOKS.example:443/", "https://8.8.8.8:8443/"]

    assert [policy.check(url) for url in urls] == [False, False, True]


@pytest.mark.parametrize(
    ("url", "entry"),
    [
        ("http://hooks.example/", "http://hooks.example:80"),
        ("https://hooks.example./", "https://hooks.example.:443"),
        ("https://a.hooks.example/", "https://a.hooks.example:443"),
    ],
)
def test_an_origin_that_is_not_listed_is_refused_and_the_entry_is_named(url, entry):
    with pytest.raises(errors.Refusal) as refused:
        outbound.Policy.of("https://hooks.example").check(url)

    hint = f"To allow it, the operator adds {entry} to POSTBACK_ALLOW."
    assert refused.value.detail.endswith(f"{entry} is not listed in POSTBACK_ALLOW. {hint}")
    assert outbound.Policy.of(entry).check(url) is False


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("http://example.com/", "must begin with https://"),
        ("https://127.0.0.1/", "127.0.0.1 is not a public address"),
    ],
)
def test_the_star_allows_neither_http_nor_a_private_address(url, why):
    with pytest.raises(errors.Refusal, match=why):
        outbound.Policy.of("*").check(url)


@pytest.mark.parametrize(
    ("code", "text", "reason"),
    [
        (56, "OpenSSL SSL_read: certificate required, errno 0", "TLS failed: OpenSSL SSL_read: "),
        (56, "Too many headers", "the connection failed: error 56 of libcurl"),
        (61, "Unrecognized content encoding", "the answer is not proper HTTP"),
    ],
)
def test_a_failure_that_libcurl_names_only_by_its_text_is_told(code, text, reason):
    request = outbound._Request(lambda _: None, 1.0)

    assert str(request.answer(code, text)).startswith(reason)
