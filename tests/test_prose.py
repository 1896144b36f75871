"""Plain English: phrases that readers with English as a second language have to read twice are not used."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# "nobody" in quotes is the name of an account.
PHRASES = re.compile(
    r"\b(nobody(?!\")|whoever|(?:gone|goes?|going|went) on with|told of|tells? of|(?:built|made) anew|one that"
    r"|those that|what (?:is|was|it|they|tells|did)\b.{0,60}?\b(?:is|was|are)|superfluous|insist\w*)\b",
    re.IGNORECASE,
)
ROOMS = ("benchmarks", "cli", "docs", "requirements", "tasks", "tests", "trueup", "worker")
PROSE = {".md", ".py", ".sql", ".toml", ".txt", ".yml", ""}


def _files(place: str) -> Iterator[Path]:
    """Yield the files of a room, or those directly in the project, that people write."""
    files = ROOT.glob("*") if place == "." else (ROOT / place).rglob("*")
    for file in files:
        written = file.suffix in PROSE and not any(part.startswith((".", "__pycache__")) for part in file.parts[-3:])
        # The specification is kept as it was received. This file holds the phrases.
        if file.is_file() and written and file.name not in ("specification.md", Path(__file__).name):
            yield file


@pytest.mark.parametrize("place", [".", *ROOMS])
def test_prose_uses_plain_phrases(place: str) -> None:
    files = list(_files(place))
    assert files
    found = {str(file.relative_to(ROOT)): PHRASES.findall(file.read_text()) for file in files}
    assert {file: phrases for file, phrases in found.items() if phrases} == {}


@pytest.mark.parametrize(
    "sentence",
    [
        "Its hold's time ran out and nobody went on.",
        "its shard is gone on with",
        "A balance that was built anew.",
        "What is done about it is a policy.",
    ],
)
def test_the_pattern_matches_its_examples(sentence: str) -> None:
    assert PHRASES.search(sentence)
