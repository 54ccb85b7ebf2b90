"""The documentation holds together: links lead somewhere, the ids that tests cite are explained, pages stay readable."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
README, DOCS, TESTS = REPOSITORY / "README.md", REPOSITORY / "docs", REPOSITORY / "tests"
MANUAL = [page for page in sorted(DOCS.rglob("*.md")) if page.parent.name != "adr"]
RECORDS = sorted((DOCS / "adr").glob("[0-9]*.md"))
PAGES = [README, *(REPOSITORY / f"{name}.md" for name in ("CONTRIBUTING", "SECURITY", "CHANGELOG")), *MANUAL, *RECORDS]


def links(page: Path) -> list[str]:
    """The targets of links within the repository."""
    return re.findall(r"\]\((?!https?://)([^)]+)\)", page.read_text("utf-8"))


def anchors(page: Path) -> set[str]:
    """What links to headings of a page end in."""
    text = re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(REPOSITORY).as_posix())
def test_links_lead_to_a_page_and_a_heading(page: Path) -> None:
    for link in links(page):
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_the_index_lists_every_page() -> None:
    """The README of docs lists the manual, that of docs/adr the records."""
    listed = {(DOCS / link.partition("#")[0]).resolve() for link in links(DOCS / "README.md")}
    assert set(MANUAL) - listed == {DOCS / "README.md"}
    assert [DOCS / "adr" / link for link in links(DOCS / "adr/README.md")] == RECORDS


@pytest.mark.parametrize("page", MANUAL, ids=lambda page: page.relative_to(DOCS).as_posix())
def test_a_page_begins_with_what_it_is_for_and_can_be_read_in_one_go(page: Path) -> None:
    title, blank, first = page.read_text("utf-8").split("\n")[:3]
    assert title.startswith("# ") and not blank
    assert re.match(r"This (page|guide) ", first), first
    words = len(re.sub(r"<!-- benchmarks -->.*", "", page.read_text("utf-8"), flags=re.DOTALL).split())
    assert words <= 4_000


def test_the_readme_is_short_and_begins_with_two_commands() -> None:
    lines = README.read_text("utf-8").splitlines()
    assert len(lines) <= 150
    screen = "\n".join(lines[:24])
    assert "make demo" in screen and "make test" in screen


def test_the_figures_of_the_readme_are_measured_ones() -> None:
    """Each time and ratio of its table is one of the generated tables'."""
    table = README.read_text("utf-8").partition("## Figures")[2].partition("##")[0]
    quoted = re.findall(r"\d+\.\d+ ×|\d+ ms|\d+\.\d+ s\b", table)
    measured = (DOCS / "performance.md").read_text("utf-8").partition("<!-- benchmarks -->")[2]
    assert len(quoted) > 8
    assert not [figure for figure in quoted if figure not in measured]


# ---- faults


def cited(file: Path) -> set[str]:
    """The ids that a test file cites, as in ``(L11)`` or ``(F6, F7)``."""
    found = re.findall(r"\(((?:[A-Z]\d{1,2})(?:, ?[A-Z]\d{1,2})*)\)", file.read_text("utf-8"))
    return {id_ for ids in found for id_ in re.split(", ?", ids)}


def rows() -> dict[str, list[set[str]]]:
    """The rows of docs/faults.md: by id, the test files that each row of this id names."""
    found: dict[str, list[set[str]]] = {}
    for id_, rest in re.findall(r"^\| ([A-Z]\d+) \|(.*)\|$", (DOCS / "faults.md").read_text("utf-8"), flags=re.MULTILINE):
        found.setdefault(id_, []).append(set(re.findall(r"`([\w/]+\.py)`", rest.rpartition("|")[2])))
    return found


def test_every_id_that_a_test_cites_is_explained() -> None:
    files = [file for file in TESTS.rglob("*.py") if file.name != "test_docs.py"]
    assert not {id_ for file in files for id_ in cited(file)} - rows().keys()


def test_a_row_names_tests_that_cite_it() -> None:
    for id_, each in rows().items():
        for named in each:
            for name in named:
                assert id_ in cited(TESTS / name), f"{id_}: {name}"
