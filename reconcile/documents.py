"""The JSON documents of the commands about what is on disk, and the same for people, from plain values.

Also what a command without work prints, so it imports nothing that such a command does not need.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from typing import Any

IN_SYNC = "in sync: nothing to do"


def variants_of_tree(variants: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """The model and variant of a tree; of a tree of several variants, a list of them."""
    rows = [{"model": model, "variant": variant} for model, variant in variants]
    return rows[0] if len(rows) == 1 else {"variants": rows}


def status_row(
    *,
    model: str,
    variant: str,
    state: str,
    path: str,
    missing: Sequence[str] = (),
    corrupt: Sequence[str] = (),
    extra: Sequence[str] = (),
    bytes_needed: int = 0,
) -> dict[str, Any]:
    """One variant in the document of `status`."""
    return {
        "model": model,
        "variant": variant,
        "state": state,
        "path": path,
        "missing_files": missing,
        "corrupt_files": corrupt,
        "extra_files": extra,
        "bytes_needed": bytes_needed,
    }


def status_cells(row: dict[str, Any], needed: str) -> tuple[str, str, str, str]:
    """The same as cells of a table; *needed*: the bytes needed, as people read them, or empty."""
    words = (("missing_files", "missing"), ("corrupt_files", "corrupt"), ("extra_files", "extra"))
    notes = [f"{len(row[key])} {word}" for key, word in words if row[key]]
    notes += [f"{needed} to fetch"] if needed else []
    return f"{row['model']}#{row['variant']}", row["state"], row["path"], ", ".join(notes)


def tree_row(*, model: str, variant: str, path: str, state: str, changed: bool) -> dict[str, Any]:
    """One tree in the document of `reconcile` and `ensure`."""
    return {"model": model, "variant": variant, "path": path, "state": state, "changed": changed}


def tree_cells(row: dict[str, Any]) -> tuple[str, str, str, str]:
    """The same as cells of a table."""
    word = "changed" if row["changed"] else "unchanged"
    return f"{row['model']}#{row['variant']}", row["state"], word, row["path"]


def result(trees: Iterable[dict[str, Any]], removed: Iterable[dict[str, Any]], summary: dict[str, Any]) -> dict[str, Any]:
    """The document of `reconcile` and `ensure`."""
    return {"trees": list(trees), "removed": list(removed), "summary": summary}


def result_summary(*, links: dict[str, int] | None = None, seconds: float = 0.0, **figures: int) -> dict[str, Any]:
    """The figures of an apply; those not given are 0. Bytes are bytes, times seconds."""
    names = ("fetched_blobs", "fetched_bytes", "resumed_bytes", "repaired_bytes", "reused_blobs", "reused_bytes")
    counts = {name: figures.get(name, 0) for name in (*names, "linked_files")}
    none = {"hardlink": 0, "reflink": 0, "symlink": 0, "copy": 0}
    return {**counts, "links": links or none, "seconds": round(seconds, 3)}


def plan_summary(
    *,
    free_bytes: int,
    fetch_blobs: int = 0,
    fetch_bytes: int = 0,
    link_files: int = 0,
    remove_files: int = 0,
    disk_bytes: int = 0,
) -> dict[str, int]:
    """A plan in figures."""
    return {
        "fetch_blobs": fetch_blobs,
        "fetch_bytes": fetch_bytes,
        "link_files": link_files,
        "remove_files": remove_files,
        "disk_bytes": disk_bytes,
        "free_bytes": free_bytes,
    }


def plan(actions: Sequence[dict[str, Any]], summary: dict[str, int]) -> dict[str, Any]:
    """The document of `plan`."""
    return {"changes": bool(actions), "actions": actions, "summary": summary}
