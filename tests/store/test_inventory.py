"""What modelstow put into a tree, and what of it is believed."""

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelstow.cas import EMPTY, Digest, Inline, LinkKind, StoreStateError, Symlink
from modelstow.cas.entries import MAX_TARGET
from modelstow.cas.errors import Cause
from modelstow.cas.inventory import INTENT, Inventory, InventoryEntry, TreeRecords, read_inventory, tree_id
from modelstow.cas.links import kind_of
from modelstow.cas.records import INVALID, decode, encode

blobs = st.builds(
    InventoryEntry,
    st.binary(max_size=3).map(Digest.of),
    st.sampled_from([kind for kind in LinkKind if kind not in (LinkKind.INLINE, LinkKind.LITERAL)]),
    st.integers(0, 2**63),
    st.booleans(),
)
others = st.binary(max_size=4).map(Inline) | st.sampled_from(["a", "../é/\udcff", "/" * MAX_TARGET]).map(Symlink)
placed = blobs | others.map(lambda other: InventoryEntry(EMPTY, kind_of(other), 5, other=other))
names = st.text(st.characters(exclude_characters="\0/", exclude_categories=("Cs",)), min_size=1, max_size=5)
names = names.filter(lambda name: name not in (".", ".."))
records = st.builds(
    Inventory,
    tree=names.map("models/m@1/{}".format) | names.map("/mnt/{}".format),
    labels=st.dictionaries(st.sampled_from(["model", "variant", "with"]), st.text(max_size=5)),
    files=st.dictionaries(names, placed, max_size=5),
    staging=st.just(""),
    staging_ino=st.integers(0, 2**63),
    parent=st.tuples(st.integers(0, 2**63), st.integers(0, 2**63)),
)
RECORD = Inventory(tree="models/m@1/v", files={"a/b": InventoryEntry(Digest.of(b"x"), LinkKind.HARDLINK, 7)})


@given(records)
def test_an_inventory_reads_back_as_it_was_written(record: Inventory):
    """Encode and decode are inverse, order of files included."""
    again = Inventory.decode(record.encode())

    assert again == record and list(again.files) == list(record.files)


@given(st.integers(0, len(RECORD.encode()) - 2), st.integers(0, 7))
def test_no_flipped_bit_is_believed(at: int, bit: int):
    """An altered inventory is an error, never another inventory."""
    raw = bytearray(RECORD.encode())
    raw[at] ^= 1 << bit

    with pytest.raises(ValueError):
        Inventory.decode(bytes(raw))


@given(st.integers(0, len(RECORD.encode()) - 2))
def test_no_torn_inventory_is_believed(length: int):
    """What a power cut leaves of a file is an error too."""
    with pytest.raises(ValueError):
        Inventory.decode(RECORD.encode()[:length])


def test_an_inventory_that_cannot_be_believed_is_a_state_error_that_names_it(tmp_path: Path):
    """Garbage collection must stop; the hint says what to do."""
    (tmp_path / "torn").write_bytes(RECORD.encode()[:40])

    with pytest.raises(StoreStateError, match="torn") as caught:
        read_inventory(tmp_path / "torn")
    assert caught.value.cause is Cause.INVENTORY_UNREADABLE


@pytest.mark.parametrize(
    "raw",
    [
        encode("inventory", 2, {}),
        encode("inventory", 1, {}),
        encode("inventory", 1, {"parent": [1]}),
        encode("pin", 1, {"tree": "models/m@1/v"}),
    ],
    ids=["a later version", "no fields", "half a field", "another kind"],
)
def test_an_inventory_of_a_later_format_is_a_state_error(tmp_path: Path, raw: bytes):
    """An older modelstow never sweeps what a newer one keeps (D23)."""
    (tmp_path / "later").write_bytes(raw)

    with pytest.raises(StoreStateError):
        read_inventory(tmp_path / "later")


FILES = {
    "a": InventoryEntry(Digest.of(b"x"), LinkKind.HARDLINK, 7),
    "refs/main": InventoryEntry(EMPTY, LinkKind.INLINE, 8, other=Inline(b"\xff\n")),
    "snapshots/1/a": InventoryEntry(EMPTY, LinkKind.LITERAL, 9, other=Symlink("../../a")),
}


def test_symlinks_and_inline_files_are_recorded_with_what_they_hold():
    """The columns keep their lengths; a reader that does not know these letters refuses the record."""
    record = Inventory(tree="models/m@1/v", files=FILES)

    fields = decode(record.encode(), "inventory", version=1)

    assert fields["kinds"] == "hil" and len(fields["digests"]) == 3 * 64
    assert (fields["symlinks"], fields["inline"]) == ({"snapshots/1/a": "../../a"}, {"refs/main": "\udcff\n"})
    assert Inventory.decode(record.encode()).files == FILES
    assert record.digests == {Digest.of(b"x"), EMPTY}


def test_a_record_of_blobs_alone_is_what_former_versions_wrote():
    """No field was added to it, and one without the new fields is read."""
    assert decode(RECORD.encode(), "inventory", version=1).keys().isdisjoint({"symlinks", "inline"})


@pytest.mark.parametrize(
    "change",
    [
        {"kinds": "hiz"},
        {"symlinks": {}},
        {"inline": {"a": "y", "refs/main": "x"}},
        {"symlinks": {"refs/main": "x"}, "inline": {"snapshots/1/a": "x"}},
        {"symlinks": {"snapshots/1/a": ""}},
        {"symlinks": {"snapshots/1/a": "a\0b"}},
        {"symlinks": {"snapshots/1/a": 5}},
        {"inline": ["refs/main"]},
    ],
)
def test_a_record_whose_symlinks_or_inline_files_do_not_fit_is_refused(change: dict[str, object]):
    """What is managed would be unknown."""
    fields = decode(Inventory(tree="models/m@1/v", files=FILES).encode(), "inventory", version=1)

    with pytest.raises(INVALID):
        Inventory.decode(encode("inventory", 1, {**fields, **change}))


def test_an_intent_is_kept_next_to_the_inventory_until_the_change_is_committed(tmp_path: Path):
    """A process that finds ``.next`` knows what to finish; old and new are both roots."""
    records = TreeRecords(tmp_path)
    records.commit(RECORD)
    change = Inventory(tree=RECORD.tree, staging=".v.1.modelstow", staging_ino=5)

    records.write_intent(change)
    both = [read_inventory(path) for path in records.files()]
    records.commit(Inventory(tree=RECORD.tree))

    assert both == [RECORD, change]
    assert [path.name for path in records.files()] == [RECORD.id] and records.read_intent(RECORD.tree) is None
    records.remove(RECORD.tree)
    assert records.files() == [] and records.read(RECORD.tree) is None


def test_a_trees_id_depends_on_its_place_alone():
    """It is stable between runs and versions, and safe as a file's name."""
    id_ = tree_id("models/m@1/v")

    assert id_ == Inventory(tree="models/m@1/v", labels={"model": "other"}).id
    assert id_ != tree_id("models/m@1/w") and id_.isalnum() and INTENT not in id_
    assert tree_id(os.fsdecode(b"/raw/\xff")).isalnum()


def test_temporary_files_are_no_inventories(tmp_path: Path):
    """A crash between write and rename leaves one."""
    (tmp_path / ".tmp-0123").write_text("half")

    assert TreeRecords(tmp_path).files() == [] and TreeRecords(tmp_path / "absent").files() == []


def test_a_long_inventory_is_compressed_and_read_back_or_refused():
    """From a megabyte on it is a zstd frame; one altered byte is noticed, and so is a lost tail."""
    files = {
        f"some/deep/folder/file-{n:06}.bin": InventoryEntry(Digest.of(b"%d" % n), LinkKind.HARDLINK, n)
        for n in range(12_000)
    }
    record = Inventory(tree="models/m@1/v", files=files)

    raw = record.encode()

    assert raw[:4] == b"\x28\xb5\x2f\xfd" and len(raw) < 800_000
    assert Inventory.decode(raw) == record
    for broken in (raw[:-100], raw[:5000] + bytes([raw[5000] ^ 1]) + raw[5001:], raw + b"tail"):
        with pytest.raises(ValueError):
            Inventory.decode(broken)
