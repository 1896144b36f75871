"""The code in a text, by its heading, to be run as it is written."""

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
SPECIFICATION = Path(__file__).parent / "specification.md"
MANUAL = ROOT / "docs" / "decorators.md"


def code_under(text: Path, heading: str) -> str:
    """Return the one block of Python under a heading. Raises ValueError when there is none, or more."""
    [section] = re.findall(rf"^#+ {re.escape(heading)}$(.*?)(?=^#+ |\Z)", text.read_text(), re.M | re.S)
    [code] = re.findall(r"^```python\n(.*?)^```", section, re.M | re.S)
    return str(code)


def run(text: Path, heading: str, /, **names: Any) -> dict[str, Any]:
    """Run the block under a heading as a module that knows these names too. Returns all its names."""
    namespace = {"__name__": f"{text.stem}_{re.sub(r'[^a-z]+', '_', heading.lower())}", **names}
    exec(compile(code_under(text, heading), str(text), "exec"), namespace)  # noqa: S102 - our own
    return namespace
