"""Hints: what a user can do about an error. The packages below know no command line and say only what happened.

A hint that an error brings is kept; one by its cause, reason or class is added where only this package knows what to do.
"""

from __future__ import annotations

from collections.abc import Mapping

from modelstow.backends import NotListable
from modelstow.cas.errors import Cause

_BY_CAUSE: Mapping[object, str] = {
    Cause.LATER_FORMAT: "use the newer modelstow that made this store",
    Cause.NOT_A_STORE: "choose another --root, or restore this file from a backup",
    Cause.LOCK_HELD: "wait for it to end, or raise --lock-timeout",
    Cause.LOCK_LOST: "run it again; files below state/locks must not be deleted, and this file system may not keep locks",
    Cause.LINK_UNAVAILABLE: "drop --strict-links, or keep the store and the tree on one file system",
    Cause.INVENTORY_UNREADABLE: "remove this file and run `modelstow reconcile`, which records the tree again",
    Cause.LEASE_UNREADABLE: "if nothing uses the store, remove this file",
    Cause.ROOT_UNREADABLE: "use the modelstow that wrote it, or `modelstow gc --forget` it by the file's name",
}
_RELATIVE = "a relative source is relative to models.toml"
_BY_REASON: Mapping[object, str] = {
    "NetworkDisabled": "drop --offline, or unset MODELSTOW_OFFLINE and HF_HUB_OFFLINE; or add a folder that has it",
    "NoSuchFolder": _RELATIVE,
    "NotAFolder": _RELATIVE,
}
_LIST = "list the variant's `files` with path, size and sha256 in models.toml"


def hint_of(error: BaseException) -> str:
    """The hint for an error of any package; empty where there is none."""
    own = str(getattr(error, "hint", ""))
    if isinstance(error, NotListable):
        return f"{own}, or {_LIST}" if own else _LIST
    return own or _BY_CAUSE.get(getattr(error, "cause", None), "") or _BY_REASON.get(getattr(error, "reason", None), "")
