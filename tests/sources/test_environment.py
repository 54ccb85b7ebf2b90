"""The environment: flags, and exceptions from the proxy."""

from __future__ import annotations

from pathlib import Path

import pytest

from modelstow.backends import Offline
from modelstow.backends.environment import env_flag, proxy
from modelstow.backends.hf.hub import HubSource
from modelstow.backends.s3.client import _make
from modelstow.reconcile import settings

YES = ("1", "true", "Yes", "on", " ON ", "y", "2", "please")
NO = ("", "0", "false", "No", "off", " Off ")


@pytest.mark.parametrize(("text", "on"), [*((text, True) for text in YES), *((text, False) for text in NO)])
def test_a_switch_means_the_same_to_all_who_read_it(text: str, on: bool, tmp_path: Path):
    """Anything but a no is a yes, for settings and for the hub alike."""
    environ = {"HF_HUB_OFFLINE": text, "HF_ENDPOINT": "http://127.0.0.1:9"}

    assert env_flag({"ANY": text}, "ANY") is on
    assert settings.from_environment(environ, root=tmp_path).offline is on
    try:
        HubSource(environ)._parse("hf://org/name/config.json")
    except Offline:
        assert on
    else:
        assert not on


@pytest.mark.parametrize(("text", "on"), [("please", True), (" Off ", False)])
def test_requests_to_s3_are_left_unsigned_by_the_same_words(text: str, on: bool, monkeypatch: pytest.MonkeyPatch):
    """Where there are keys, the switch alone decides."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_NO_SIGN_REQUEST", text)

    assert bool(_make()[1]) is on


def test_a_switch_that_is_not_set_is_off():
    """As one that is empty."""
    assert not env_flag({}, "ANY")


@pytest.mark.parametrize(
    ("no_proxy", "url", "bypassed"),
    [
        ("10.0.0.0/8", "http://10.1.2.3/x", True),
        ("10.0.0.0/8", "http://11.1.2.3/x", False),
        ("10.9.9.9/8", "http://10.1.2.3/x", True),  # host bits are ignored
        ("10.0.0.0/8", "http://10.example.org/x", False),
        ("10.1.2.3", "http://10.1.2.3:8080/x", True),
        ("10.1.2.3", "http://110.1.2.3/x", False),
        ("2001:db8::/32", "http://[2001:db8::7]/x", True),
        ("2001:db8::/32", "http://[2001:db9::7]:80/x", False),
        ("2001:DB8:0::7", "http://[2001:db8::7]/x", True),
        ("[2001:db8::7]", "http://[2001:db8::7]:8080/x", True),
        ("[2001:db8::7]:81", "http://[2001:db8::7]:81/x", True),
        ("[2001:db8::7]:81", "http://[2001:db8::7]/x", False),
        ("::1", "http://[::1]:8080/x", True),
        ("10.0.0.0/8", "http://[::1]/x", False),
        ("example.org", "http://example.org/x", True),
        ("example.org", "http://hub.example.org/x", True),
        ("example.org", "http://notexample.org/x", False),
        (".example.org", "http://hub.example.org/x", True),
        (".example.org", "http://example.org/x", True),
        ("*.example.org", "http://hub.example.org/x", True),
        ("Example.ORG.", "http://EXAMPLE.org./x", True),
        ("example.org:8080", "http://example.org:8080/x", True),
        ("example.org:8080", "http://example.org/x", False),
        ("example.org:80", "http://example.org/x", True),
        ("10.1.2.3:81", "http://10.1.2.3:82/x", False),
        ("*", "http://example.org/x", True),
        ("a.test *", "http://[2001:db8::7]/x", True),
        ("a.test b.test", "http://b.test/x", True),
        ("a.test,\tb.test  c.test,", "http://c.test/x", True),
        ("a.test b.test", "http://a.testb.test/x", False),
        (" , .,:80", "http://example.org/x", False),
        ("10.0.0.0/99, 300.1.1.1/8", "http://10.1.2.3/x", False),
        ("", "http://example.org/x", False),
    ],
)
def test_no_proxy_is_understood_as_by_curl_go_and_requests(no_proxy: str, url: str, bypassed: bool):
    """Domains, addresses and networks, with or without a port; separated by commas or blanks."""
    environ = {"HTTP_PROXY": "http://proxy.test:3128", "NO_PROXY": no_proxy}

    assert proxy(url, environ) == ("" if bypassed else "http://proxy.test:3128")


def test_no_proxy_knows_the_default_port_of_https():
    """As in Go: an entry with port 443 matches a URL without port."""
    environ = {"https_proxy": "http://proxy.test:3128", "no_proxy": "example.org:443"}

    assert proxy("https://example.org/x", environ) == ""
    assert proxy("https://example.org:8443/x", environ) == "http://proxy.test:3128"
