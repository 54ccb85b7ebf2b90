"""``python -m benchmarks.table``: puts the results into docs/performance.md, between its two marks."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .__main__ import figure
from .measure import Row

BEGIN, END = "<!-- benchmarks -->", "<!-- /benchmarks -->"


def main(argv: Sequence[str]) -> int:
    """Run the command line; 2 where there are no results or no place for them."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.table", description=__doc__)
    parser.add_argument("--results", default=".bench/results.json", metavar="FILE")
    parser.add_argument("--page", default="docs/performance.md", metavar="FILE")
    args = parser.parse_args(argv)
    page = Path(args.page)
    try:
        page.write_text(placed(page.read_text(), markdown(json.loads(Path(args.results).read_text()))))
    except (OSError, ValueError) as error:
        print(f"error: {error}\nhint: `python -m benchmarks` makes the results", file=sys.stderr)
        return 2
    return 0


def placed(text: str, table: str) -> str:
    """*text* with *table* between the marks; the end mark is made where it is missing. Raises ValueError."""
    before, mark, rest = text.partition(BEGIN)
    if not mark:
        raise ValueError(f"there is no {BEGIN} in it")
    _, end, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table}\n{END}{after if end else rest}"


def markdown(document: Mapping[str, Any]) -> str:
    """The results as markdown: what they were measured on, then one table a question."""
    about = document["machine"]
    rows = [Row(**row) for row in document["rows"]]
    facts = (f"{about['cores']} cores ({about['cpu']})", about["kernel"], f"Python {about['python']}", about["file_system"])
    parts = [f"Measured {about['date']} on {', '.join(facts)}. Ratios are medians of pairs from the same round."]
    for question in dict.fromkeys(row.question for row in rows):
        parts += ["", f"| {question} | | ratio | |", "|---|---:|---:|---|"]
        parts += [_line(row) for row in rows if row.question == question]
    return "\n".join(parts)


def _line(row: Row) -> str:
    ratio = "" if row.ratio is None else f"{row.ratio:.2f} × {row.ratio_to}"
    if row.ratio_to == row.row:
        ratio = "1"
    cells = (row.row, figure(row), ratio, row.note)
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
