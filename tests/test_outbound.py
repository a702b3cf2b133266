import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from urllib3.exceptions import LocationParseError
from urllib3.util import parse_url

from jobs import errors
from web import outbound

NOT_CLEAN = [
    "",
    "example.com",
    "//example.com/",
    "http:example.com",
    "http:/example.com",
    "http:///path",
    "http://",
    "http://:80/",
    "file:///etc/passwd",
    "ftp://example.com/",
    "gopher://example.com/",
    "data:text/plain,x",
    "javascript:alert(1)",
    "http://allowed@evil/",
    "http://user:secret@evil/",
    "http://@evil/",
    "http://evil/#@allowed",
    "http://evil/#",
    "http://allowed\\@evil",
    "http://evil/\\x",
    "http://evil:80\\@allowed/",
    " http://example.com/",
    "http://example.com/ ",
    "http://exa mple.com/",
    "http://example.com/a b",
    "http://example.com/\r\nX: y",
    "http://example.com\n",
    "http://example.com/\x00",
    "http://example.com/\x7f",
    "http://example.com/\t",
    "http://exämple.com/",
    "http://example.com/ä",
    "http://①②⑦.⓪.⓪.①/",
    "http://127。0。0。1/",
    "http://127.0.0.1%00.example.com/",
    "http://%31%32%37.0.0.1/",
    "http://*.example.com/",
    "http://.example.com/",
    "http://a..b/",
    "http://-a.com/",
    "http://" + "a" * 64 + ".com/",
    "http://" + "a." * 127 + "com/",
    "http://example.com:/",
    "http://example.com:0/",
    "http://example.com:65536/",
    "http://example.com:99999/",
    "http://example.com:8x/",
    "http://example.com:-1/",
    "http://example.com:٨٠/",
    "http://2130706433/",
    "http://0x7f.1/",
    "http://0x7f000001/",
    "http://0177.0.0.1/",
    "http://127.1/",
    "http://127.0.0.1./",
    "http://0/",
    "http://256.1.1.1/",
    "http://a.b.0x/",
    "http://[::1/",
    "http://::1/",
    "http://[1:2]/",
    "http://[127.0.0.1]/",
    "http://[fe80::1%25eth0]/",
    "http://[::ffff:127.0.0.256]/",
    "http://example.com/" + "a" * 2048,
    "http://example.com/" + "a" * 10_000,
]


@pytest.mark.parametrize("url", NOT_CLEAN)
def test_what_is_not_a_plain_http_url_is_refused(url):
    with pytest.raises(errors.ReceiverRefusedError, match="plain http or https URL"):
        outbound.parts(url)


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://example.com", "http://example.com:80"),
        ("https://example.com/a?b=c", "https://example.com:443"),
        ("HTTPS://EXAMPLE.com:443?q", "https://example.com:443"),
        ("http://a.example:08080/@x", "http://a.example:8080"),
        ("http://xn--exmple-cua.com/", "http://xn--exmple-cua.com:80"),
        ("http://localhost:9000/%00", "http://localhost:9000"),
        ("http://my_host-1.internal./", "http://my_host-1.internal.:80"),
        ("http://127.0.0.1:80/", "http://127.0.0.1:80"),
        ("http://[0:0::1]:8080/", "http://[::1]:8080"),
        ("http://[::FFFF:7f00:1]/", "http://[::ffff:127.0.0.1]:80"),
        ("http://example.com/" + "a" * 2029, "http://example.com:80"),
    ],
)
def test_an_origin_has_one_form(url, expected):
    # Newer releases of Python write a mapped address with dots, older ones in hexadecimal.
    assert outbound.parts(url).origin.replace("7f00:1", "127.0.0.1") == expected


@settings(deadline=None, max_examples=100)
@given(st.text("htps:/@#?\\[]%.:a1x0-_ \n\x00é", max_size=30).map("http://".__add__))
def test_an_origin_names_the_host_the_library_connects_to(url):
    try:
        host = outbound.parts(url).origin.split("://")[1].rpartition(":")[0]
    except errors.ReceiverRefusedError:
        return

    try:
        connected = parse_url(url).host
    except LocationParseError:
        connected = "none"

    assert connected.lower() == host or host.startswith("[")


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
def test_an_address_that_is_not_of_the_public_internet_is_known(address):
    assert not outbound.is_public(address)


@pytest.mark.parametrize(
    "address",
    [
        "8.8.8.8",
        "93.184.216.34",
        "2606:4700::1111",
        "::ffff:8.8.8.8",
        "64:ff9b::808:808",
        "2002:808:808::1",
    ],
)
def test_an_address_of_the_public_internet_is_known(address):
    assert outbound.is_public(address)


def test_a_listed_origin_may_be_private_and_others_are_refused():
    policy = outbound.Policy.of("http://10.0.0.1:8000 https://hooks.example")

    allowed = [
        policy.check(url) for url in ("http://10.0.0.1:8000/x", "https://HOOKS.example:443/")
    ]

    assert allowed == [False, False]


@pytest.mark.parametrize(
    "url",
    [
        *(
            "http://hooks.example/",
            "https://hooks.example:8443/",
            "https://hooks.example.evil.com/",
        ),
        *("https://evil.com/hooks.example", "https://hooks.example./", "https://a.hooks.example/"),
    ],
)
def test_another_host_port_or_scheme_is_refused(url):
    policy = outbound.Policy.of("https://hooks.example")

    with pytest.raises(errors.ReceiverRefusedError, match="is not listed in POSTBACK_ALLOW"):
        policy.check(url)


@pytest.mark.parametrize("url", NOT_CLEAN)
def test_no_policy_allows_what_is_not_a_plain_url(url):
    with pytest.raises(errors.ReceiverRefusedError):
        outbound.Policy.of("*").check(url)


def test_with_nothing_listed_every_url_is_refused():
    with pytest.raises(errors.ReceiverRefusedError):
        outbound.Policy.of("").check("https://example.com/")


def test_any_https_address_is_allowed_but_must_be_public():
    assert outbound.Policy.of("*").check("https://example.com:8443/hook")


def test_a_listed_origin_beside_any_other_may_still_be_private():
    policy = outbound.Policy.of("* http://localhost:9000")

    assert [policy.check("http://localhost:9000/"), policy.check("https://8.8.8.8/")] == [
        False,
        True,
    ]


@pytest.mark.parametrize(
    "url",
    [
        *(
            "http://example.com/",
            "https://127.0.0.1/",
            "https://169.254.169.254/",
            "https://[::1]/",
        ),
        *("https://[::ffff:7f00:1]/", "https://[64:ff9b::7f00:1]/", "https://[fd00:ec2::254]/"),
    ],
)
def test_any_public_https_address_is_neither_http_nor_private(url):
    with pytest.raises(errors.ReceiverRefusedError):
        outbound.Policy.of("*").check(url)


@pytest.mark.parametrize(
    "entry",
    [
        "https://a.example/",
        "https://a.example/x",
        "https://a.example?q",
        "a.example",
        "https://*",
        "ftp://a",
    ],
)
def test_a_listed_entry_that_is_no_origin_is_named(entry):
    with pytest.raises(ValueError, match="expected an origin") as refused:
        outbound.Policy.of(f"https://good.example {entry}")

    assert repr(entry) in str(refused.value)


def test_a_name_is_resolved_to_each_of_its_addresses_once():
    addresses = outbound.resolve("localhost")

    assert set(addresses) <= {"127.0.0.1", "::1"}
    assert len(addresses) == len(set(addresses)) >= 1
