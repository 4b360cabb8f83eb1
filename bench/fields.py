"""Makes the table of harmless fields in docs/server.md out of the models of the requests.

python bench/fields.py            # writes the table
python bench/fields.py --check    # exits with 1 where it is out of date
"""

import sys
from pathlib import Path

from mlx_dgemma.server.schemas.fields import Harmless, harmless_fields
from mlx_dgemma.server.schemas.openapi import POSTS

PAGE = Path(__file__).parent.parent / "docs" / "server.md"
BEGIN, END = "<!-- harmless fields, by bench/fields.py -->\n", "<!-- end -->\n"


def table() -> str:
    """The table: the fields that change nothing for the same reason share a row."""
    rows: dict[tuple[str, str], list[str]] = {}
    for _, _, body in POSTS.values():
        for path, mark in harmless_fields(body):
            row = rows.setdefault((_condition(mark), mark.why), [])
            if f"`{path}`" not in row:
                row.append(f"`{path}`")
    lines = [f"| {', '.join(paths)} | {condition}{why} |\n" for (condition, why), paths in rows.items()]
    return "".join(["| field | why it changes nothing |\n|---|---|\n", *lines])


def _condition(mark: Harmless) -> str:
    return "on canvases: " if mark.canvases else ""


def page() -> str:
    """The text of docs/server.md with the table."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    return before + BEGIN + table() + END + rest.partition(END)[2]


if __name__ == "__main__":
    if "--check" in sys.argv[1:]:
        sys.exit(page() != PAGE.read_text(encoding="utf-8"))
    PAGE.write_text(page(), encoding="utf-8")
