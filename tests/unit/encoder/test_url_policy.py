"""Only unambiguous URLs and public addresses pass; no socket is opened here."""

from __future__ import annotations

import ipaddress

import pytest

from chiasm.common.errors import InvalidRequestError
from chiasm.encoder.url_policy import UrlPolicy

MALFORMED = [
    "http://allowed.com\\@127.0.0.1/",
    "http://127.0.0.1\\.allowed.com/",
    "http://user@allowed.com/",
    "http://user:password@allowed.com/",
    "http://allowed.com@127.0.0.1/",
    "http:///etc/passwd",
    "http://",
    "http:/allowed.com/",
    "http:allowed.com",
    "http://allowed.com:port/",
    "http://allowed.com:99999/",
    "http://allowed.com:/x",
    "http://①②⑦.⓪.⓪.①/",
    "http://\uff41llowed.com/",
    "http://allowed。com/",
    "http://%31%32%37.0.0.1/",
    "http://allowed.com%00.evil.com/",
    "http://allowed.com /x",
    " http://allowed.com/",
    "http://allowed.com/\r\nHost: evil",
    "http://allowed.com/\x00",
    "http://allowed.com\t/",
    "http://2130706433/",
    "http://0x7f000001/",
    "http://0177.0.0.1/",
    "http://127.1/",
    "http://127.0.0.1./",
    "http://[::1/",
    "http://[::1%25eth0]/",
    "http://[fe80::1%eth0]/",
    "http://[v1.x]/",
    "http://.allowed.com/",
    "http://allowed..com/",
    "http://-allowed.com/",
    "http://allowed.com-/",
    "http://allowed_com/",
    "http://" + "a" * 64 + ".com/",
    "http://" + "a." * 127 + "toolong/",
    "http://allowed.com/" + "x" * 8192,
]
FORBIDDEN_ADDRESSES = [
    *("0.0.0.0", "10.1.2.3", "100.64.0.1", "127.0.0.1", "127.255.255.254", "169.254.169.254"),
    *("172.16.0.1", "172.31.255.255", "192.0.0.8", "192.0.2.1", "192.88.99.1", "192.168.1.1"),
    *("198.18.0.1", "198.51.100.1", "203.0.113.1", "224.0.0.1", "240.0.0.1", "255.255.255.255"),
    *("::", "::1", "::127.0.0.1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "64:ff9b::7f00:1"),
    *("64:ff9b::a00:1", "64:ff9b:1::1", "2002:7f00:1::", "2001:0:1::1", "2001:db8::1"),
    *("fc00::1", "fd12::1", "fe80::1", "fec0::1", "ff02::1", "3fff::1", "100::1", "5f00::1"),
]
PUBLIC_ADDRESSES = [
    *("1.1.1.1", "8.8.8.8", "100.63.255.255", "100.128.0.1", "172.15.0.1", "172.32.0.1"),
    *("2606:4700::1111", "2a00:1450::1", "::ffff:8.8.8.8", "64:ff9b::808:808"),
]


@pytest.mark.parametrize("url", MALFORMED)
def test_ambiguous_urls_are_refused(url: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        UrlPolicy().parse(url)
    assert caught.value.reason == "INVALID_MEDIA_URL"


@pytest.mark.parametrize(
    ("url", "host", "port"),
    [
        ("http://example.com", "example.com", 80),
        ("https://Example.COM/a%20b?c=d#e", "example.com", 443),
        ("http://a-b.example.com:8080/x", "a-b.example.com", 8080),
        ("http://xn--bcher-kva.example/", "xn--bcher-kva.example", 80),
        ("http://8.8.8.8/x", "8.8.8.8", 80),
        ("http://[2606:4700::1111]:81/", "2606:4700::1111", 81),
    ],
)
def test_plain_urls_are_parsed(url: str, host: str, port: int) -> None:
    parsed = UrlPolicy().parse(url)

    assert (parsed.raw_host, parsed.port) == (host, port)


@pytest.mark.parametrize("address", FORBIDDEN_ADDRESSES)
def test_addresses_that_are_not_public_are_refused(address: str) -> None:
    with pytest.raises(InvalidRequestError, match="not public") as caught:
        UrlPolicy().check_address(ipaddress.ip_address(address))
    assert caught.value.reason == "MEDIA_URL_FORBIDDEN"
    assert address not in caught.value.message


@pytest.mark.parametrize("address", PUBLIC_ADDRESSES)
def test_public_addresses_pass(address: str) -> None:
    UrlPolicy().check_address(ipaddress.ip_address(address))


@pytest.mark.parametrize("url", ["http://127.0.0.1/", "http://[::1]/", "http://10.0.0.1:8000/x"])
def test_hosts_given_as_forbidden_addresses_are_refused(url: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        UrlPolicy().parse(url)
    assert caught.value.reason == "MEDIA_URL_FORBIDDEN"


def test_networks_that_the_operator_allows_pass_and_no_others() -> None:
    policy = UrlPolicy(allowed_networks=(ipaddress.ip_network("10.1.0.0/16"),))

    policy.check_address(ipaddress.ip_address("10.1.2.3"))
    policy.check_address(ipaddress.ip_address("::ffff:10.1.2.3"))
    for other in ("10.2.0.1", "127.0.0.1"):
        with pytest.raises(InvalidRequestError):
            policy.check_address(ipaddress.ip_address(other))


def test_only_the_allowed_domains_pass() -> None:
    policy = UrlPolicy(allowed_domains=frozenset({"good.example"}))

    assert policy.parse("https://GOOD.example/x").host == "good.example"
    for url in ("https://evil.example/", "https://sub.good.example/", "https://good.example.evil/"):
        with pytest.raises(InvalidRequestError, match="must be from one of the allowed domains"):
            policy.parse(url)


def test_a_url_of_the_longest_length_passes() -> None:
    url = "http://example.com/"

    assert UrlPolicy().parse(url + "x" * (8192 - len(url))).host == "example.com"
