"""Prints how long files and functions of a package are, the longest first: a guide, no gate."""

from __future__ import annotations

import ast
import statistics
import sys
from pathlib import Path

SHOWN = 8


def functions(path: Path) -> list[tuple[int, str]]:
    """Length in lines and `file:line name` of every function of a file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [
        ((node.end_lineno or node.lineno) - node.lineno + 1, f"{path}:{node.lineno} {node.name}")
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]


def show(title: str, rows: list[tuple[int, str]]) -> None:
    """One line of summary, then the longest."""
    lengths = sorted(length for length, _ in rows)
    p90 = lengths[int(0.9 * (len(lengths) - 1))]
    print(f"{title}: {len(rows)}, median {statistics.median(lengths):.0f}, p90 {p90} lines")
    for length, where in sorted(rows, reverse=True)[:SHOWN]:
        print(f"  {length:5d}  {where}")


def main(root: Path) -> None:
    """Files, then functions, of everything below `root`."""
    paths = sorted(root.rglob("*.py"))
    files = [(len(path.read_text(encoding="utf-8").splitlines()), str(path)) for path in paths]
    print(f"{sum(length for length, _ in files)} lines in {root}")
    show("files", files)
    show("functions", [row for path in paths for row in functions(path)])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
