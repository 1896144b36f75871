"""The code blocks of a document, by their headings, to be run as written."""

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
SPECIFICATION = Path(__file__).parent / "specification.md"
MANUAL = ROOT / "docs" / "decorators.md"


def python_under_headings(text: Path) -> list[tuple[str, str]]:
    """Return each block of Python, with the heading above it. A `#` inside a block is not a heading."""
    found, heading, language, block = [], "", None, list[str]()
    for line in text.read_text().splitlines(keepends=True):
        if line.startswith("```"):
            if language == "python":
                found.append((heading, "".join(block)))
            language, block = (line[3:].strip() or "text") if language is None else None, []
        elif language is not None:
            block.append(line)
        elif line.startswith("#"):
            heading = line.lstrip("#").strip()
    return found


def code_under(text: Path, heading: str) -> str:
    """Return the one block of Python under a heading. Raises ValueError if there is none, or more than one."""
    [code] = [code for title, code in python_under_headings(text) if title == heading]
    return code


def run(text: Path, heading: str, /, **names: Any) -> dict[str, Any]:
    """Run the block under a heading as a module that also has these names. Returns all its names."""
    namespace = {"__name__": f"{text.stem}_{re.sub(r'[^a-z]+', '_', heading.lower())}", **names}
    exec(compile(code_under(text, heading), str(text), "exec"), namespace)  # noqa: S102 - our own
    return namespace
