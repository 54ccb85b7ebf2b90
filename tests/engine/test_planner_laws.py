"""Laws of the planner, on small colliding worlds. ``ideal_apply`` is what a perfect executor would leave behind."""

from dataclasses import replace
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from modelstow.cas import BlobState, BlobStatus, Digest, Inline, Symlink
from modelstow.reconcile.desired.lockfile import LockedBlob
from modelstow.reconcile.desired.selectors import VariantId
from modelstow.reconcile.planning.planner import Fetch, Link, LinkTree, Plan, Remove, Replace, plan, statuses
from modelstow.reconcile.planning.state import Actual, ActualTree, Desired, DesiredTree, Foreign, ModelState, TreeKey

SIZE = 7
DIGESTS = [Digest.of(bytes([n])) for n in range(5)]
PATHS = "abcd"

digests = st.sampled_from(DIGESTS)
others = st.sampled_from([Symlink("a"), Symlink("b"), Inline(b"a"), Inline(b"")])
entries = st.dictionaries(st.sampled_from(PATHS), digests | others, min_size=1, max_size=4)
foreign = st.builds(Foreign, st.sampled_from([None, SIZE, SIZE + 1]), modified=st.booleans())


@st.composite
def desireds(draw: st.DrawFn) -> Desired:
    trees = []
    for variant in draw(st.lists(st.sampled_from(["v1", "v2"]), unique=True, min_size=1)):
        key = TreeKey((VariantId("m@1", variant),), f"models/m@1/{variant}")
        drawn = draw(entries)
        files = {path: entry for path, entry in drawn.items() if isinstance(entry, Digest)}
        rest = {path: entry for path, entry in drawn.items() if not isinstance(entry, Digest)}
        trees.append(DesiredTree(key=key, path=Path("/store") / key.tree, files=files, others=rest))
    blobs = {digest: LockedBlob(size=SIZE, urls=("mem://o/x",)) for digest in DIGESTS}
    return Desired(trees=tuple(trees), blobs=blobs, prune=draw(st.booleans()))


@st.composite
def trees_seen(draw: st.DrawFn) -> ActualTree:
    placed = draw(st.dictionaries(st.sampled_from(PATHS + "x"), digests | others))
    strange = draw(st.dictionaries(st.sampled_from(PATHS + "x"), foreign))
    extra = tuple(draw(st.frozensets(st.sampled_from("yz"))))
    return ActualTree(
        exists=True,
        recorded=True,
        placed=placed,
        foreign={p: f for p, f in strange.items() if p not in placed},
        extra=extra,
    )


looks = st.sampled_from(
    [BlobStatus(BlobState.ABSENT), BlobStatus(BlobState.INTACT, ino=1), BlobStatus(BlobState.SUSPECT, ino=1)]
)


@st.composite
def worlds(draw: st.DrawFn) -> tuple[Desired, Actual]:
    desired = draw(desireds())
    seen = {tree.key: draw(st.one_of(st.just(ActualTree()), trees_seen())) for tree in desired.trees}
    blobs = {digest: draw(looks) for digest in DIGESTS}
    partials = draw(st.dictionaries(digests, st.integers(0, SIZE + 2)))
    return desired, Actual(blobs=blobs, partials=partials, trees=seen, free_bytes=1000)


def ideal_apply(desired: Desired, actual: Actual, work: Plan) -> Actual:
    """The world after a perfect executor: what is fetched or locally available becomes a blob before anything is linked."""
    blobs = dict(actual.blobs)
    fetched = {action.digest for action in work.actions if isinstance(action, Fetch)}
    seen = {key: (dict(tree.placed), dict(tree.foreign), set(tree.extra)) for key, tree in actual.trees.items()}
    for tree in desired.trees:  # a local file that could match the blob is adopted, not fetched
        placed, strange, _ = seen[tree.key]
        for path, digest in tree.files.items():
            at_hand = placed.get(path) == digest or (path in strange and strange[path].could_match(SIZE))
            if at_hand and blobs[digest].state is BlobState.ABSENT:
                blobs[digest] = BlobStatus(BlobState.INTACT, ino=2)
    for digest in fetched:
        blobs[digest] = BlobStatus(BlobState.INTACT, ino=2)
    for action in (link for a in work.actions for link in (a.links() if isinstance(a, LinkTree) else [a])):
        match action:
            case Link(tree=key, path=path, entry=entry) | Replace(tree=key, path=path, entry=entry):
                if isinstance(entry, Digest):
                    assert blobs[entry].state is BlobState.INTACT, "a link was planned before its blob"
                seen[key][0][path] = entry
                seen[key][1].pop(path, None)
            case Remove(tree=key, path=path):
                seen[key][0].pop(path, None)
                seen[key][1].pop(path, None)
                seen[key][2].discard(path)
            case Fetch():
                pass
    trees = {
        key: replace(actual.trees[key], exists=True, placed=placed, foreign=strange, extra=tuple(sorted(extra)))
        for key, (placed, strange, extra) in seen.items()
    }
    return replace(actual, blobs=blobs, trees=trees)


@given(worlds())
def test_applying_a_plan_reaches_the_desired_trees(world: tuple[Desired, Actual]):
    """Convergence: every desired path holds its entry, and nothing superfluous of ours is left."""
    desired, actual = world

    after = ideal_apply(desired, actual, plan(desired, actual))

    for tree in desired.trees:
        seen = after.trees[tree.key]
        assert dict(seen.placed) == dict(tree.entries)
        assert not seen.foreign
        assert desired.prune is False or not seen.extra


@given(worlds())
def test_planning_again_after_apply_gives_nothing_to_do(world: tuple[Desired, Actual]):
    """Idempotence."""
    desired, actual = world

    after = ideal_apply(desired, actual, plan(desired, actual))

    assert plan(desired, after).actions == ()


@given(worlds(), st.randoms())
def test_a_plan_does_not_depend_on_the_order_of_its_inputs(world: tuple[Desired, Actual], random):
    """Determinism: shuffled mappings give the same plan."""
    desired, actual = world

    def shuffled(mapping):
        items = list(mapping.items())
        random.shuffle(items)
        return dict(items)

    trees = tuple(replace(t, files=shuffled(t.files), others=shuffled(t.others)) for t in desired.trees)
    seen = shuffled(
        {k: replace(t, placed=shuffled(t.placed), foreign=shuffled(t.foreign)) for k, t in actual.trees.items()}
    )
    again = plan(replace(desired, trees=trees), replace(actual, blobs=shuffled(actual.blobs), trees=seen))

    assert again.actions == plan(desired, actual).actions


@given(worlds())
def test_what_is_there_is_never_fetched(world: tuple[Desired, Actual]):
    """Neither an intact blob nor a local file that could match it."""
    desired, actual = world

    for action in plan(desired, actual).actions:
        if isinstance(action, Fetch):
            assert actual.blob(action.digest) is not BlobState.INTACT
            assert 0 <= action.have <= action.size


@given(worlds())
def test_fetches_come_first_then_links_then_replacements_then_removals(world: tuple[Desired, Actual]):
    """Nothing is linked before everything is there; resumes come before new fetches."""
    desired, actual = world
    order = {Fetch: 0, Link: 1, LinkTree: 1, Replace: 2, Remove: 3}

    actions = plan(desired, actual).actions

    ranks = [order[type(action)] for action in actions]
    assert ranks == sorted(ranks)
    fetches = [action for action in actions if isinstance(action, Fetch)]
    assert [f.have == 0 for f in fetches] == sorted(f.have == 0 for f in fetches)


@given(worlds())
def test_files_of_the_user_are_removed_only_when_asked(world: tuple[Desired, Actual]):
    """Extra files appear in a plan only with prune."""
    desired, actual = world

    removed = {(a.tree, a.path) for a in plan(desired, actual).actions if isinstance(a, Remove)}

    for tree in desired.trees:
        for path in actual.trees[tree.key].extra:
            assert ((tree.key, path) in removed) is desired.prune


@given(worlds())
def test_a_variant_is_complete_exactly_when_its_plan_is_empty(world: tuple[Desired, Actual]):
    """The states and the plan cannot disagree; the three lists are disjoint."""
    desired, actual = world

    for tree in desired.trees:
        seen = next(s for s, t in zip(statuses(desired, actual), desired.trees, strict=True) if t is tree)
        alone = plan(Desired(trees=(tree,), blobs=desired.blobs), actual)
        assert (seen.state is ModelState.COMPLETE) == (actual.trees[tree.key].exists and not alone.actions)
        assert seen.bytes_needed == alone.summary.fetch_bytes
        lists = [set(seen.missing_files), set(seen.corrupt_files), set(seen.extra_files)]
        assert sum(map(len, lists)) == len(set.union(*lists))
