"""Switches in the environment, read in one way by all who read them."""

from __future__ import annotations

from collections.abc import Mapping


def env_flag(environ: Mapping[str, str], name: str) -> bool:
    """Whether a variable says yes: anything that is not a no, since a switch should not fail open."""
    return environ.get(name, "").strip().lower() not in ("", "0", "false", "no", "off")
