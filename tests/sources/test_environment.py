"""Environment variables that are switches: one reading of them, wherever they are read."""

from __future__ import annotations

from pathlib import Path

import pytest

from modelstow.backends import Offline
from modelstow.backends.environment import env_flag
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
