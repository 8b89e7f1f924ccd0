"""Draws the folders of this repository and the imports between them: docs/images/architecture.svg.

    python -m tools.draw_architecture

Boxes and arrows are read from the syntax trees, so the drawing is that of the code.
"""

from __future__ import annotations

import argparse
import ast
from pathlib import Path

from common.storage import write_atomically
from engine import cli

ROOT = Path(__file__).resolve().parents[1]
DRAWING = ROOT / "docs" / "images" / "architecture.svg"
ROWS = (  # from the top; a folder imports only from rows below its own, or from its left
    ("train*.py", "demo", "tools", "benchmarks"),
    ("evaluation", "sample"),
    ("engine",),
    ("models", "diffusion", "datasets"),
    ("common",),
)
CONTENTS = {
    "train*.py": "the command lines of training",
    "tools": "command lines: data, caches, conversion",
    "benchmarks": "what is timed, against the reference",
    "demo": "the drawn set, its page",
    "evaluation": "protocols, distances, detectors",
    "sample": "Generator, command lines, previews",
    "engine": "loop, state, conditions, objective, config",
    "models": "networks, codecs, converters",
    "diffusion": "processes, losses, samplers, guidance",
    "datasets": "video file to clip, caches",
    "common": "storage, checks, console",
}
WIDTH, HEIGHT, BOX, GAP, STEP = 920, 488, (205, 56), 20, 100


def files_of(folder: str) -> list[Path]:
    """Returns the Python files of a box."""
    return sorted(ROOT.glob(folder)) if "*" in folder else sorted((ROOT / folder).rglob("*.py"))


def find_imports(folder: str) -> set[str]:
    """Returns the other boxes that the files of `folder` import, type-checking imports included."""
    found: set[str] = set()
    for file in files_of(folder):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                found.add(node.module.partition(".")[0])
    return found & CONTENTS.keys() - {folder}


def draw_arrow(source: tuple[float, float], target: tuple[float, float]) -> str:
    """Returns an arrow from the bottom of one box to the top of a lower one, or between neighbours of a row."""
    (x, y), (to_x, to_y) = source, target
    if y == to_y:
        x, to_x = (x, to_x + BOX[0]) if x > to_x else (x + BOX[0], to_x)
        y = to_y = y + BOX[1] / 2
    else:
        x, y, to_x = x + BOX[0] / 2 + (to_x - x) / 12, y + BOX[1], to_x + BOX[0] / 2 + (x - to_x) / 12
    return f'<path d="M{x:.0f} {y:.0f}L{to_x:.0f} {to_y:.0f}" stroke="#8aa" fill="none" marker-end="url(#a)"/>'


def draw() -> str:
    """Returns the drawing as SVG. An arrow that follows from two others (to `common`, mostly) is left out."""
    imports = {name: find_imports(name) for name in CONTENTS}
    corners: dict[str, tuple[float, float]] = {}  # top left of each box
    for row, names in enumerate(ROWS):
        left = (WIDTH - len(names) * BOX[0] - (len(names) - 1) * GAP) / 2
        corners |= {name: (left + column * (BOX[0] + GAP), 16 + row * STEP) for column, name in enumerate(names)}
    shapes = []
    for name, used in imports.items():
        reached = set().union(*(imports[each] - {name} for each in used if corners[each][1] > corners[name][1]), set())
        shapes += [draw_arrow(corners[name], corners[each]) for each in sorted(used - reached)]
    for name, (x, y) in corners.items():
        lines = sum(len(file.read_text(encoding="utf-8").splitlines()) for file in files_of(name))
        middle = x + BOX[0] / 2
        shapes += [
            f'<rect x="{x:.0f}" y="{y:.0f}" width="{BOX[0]}" height="{BOX[1]}" rx="6" fill="#eef4f4" stroke="#577"/>',
            f'<text x="{middle:.0f}" y="{y + 22:.0f}" font-size="14" font-weight="bold">{name}</text>',
            f'<text x="{middle:.0f}" y="{y + 37:.0f}" font-size="9">{CONTENTS[name]}</text>',
            f'<text x="{middle:.0f}" y="{y + 50:.0f}" font-size="9" fill="#577">{round(lines, -2):,} lines</text>',
        ]
    marker = '<marker id="a" markerWidth="7" markerHeight="7" refX="6" refY="3" orient="auto">'
    marker += '<path d="M0 0L6 3L0 6z"/></marker>'
    style = 'font-family="Helvetica,Arial,sans-serif" text-anchor="middle" fill="#222"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" {style}>\n<defs>{marker}</defs>'
    return "\n".join([head, '<rect width="100%" height="100%" fill="#fff"/>', *shapes, "</svg>\n"])


def main(argv: list[str]) -> int:
    """Writes the drawing; returns the exit code."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args(argv)
    write_atomically(DRAWING, lambda temporary: temporary.write_text(draw(), encoding="utf-8"))
    print(f"{DRAWING.relative_to(ROOT)} is written")
    return 0


if __name__ == "__main__":
    cli.run(main)
