"""Plain English: phrases that readers with English as a second language have to read twice are not used."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PHRASES = re.compile(
    r"\b(nobody|whoever|(?:gone|goes?|going|went) on with|told of|tells? of|(?:built|made) anew|one that|those that"
    r"|what (?:is|was|it|they|tells|did)\b.{0,60}?\b(?:is|was|are)|superfluous|insist\w*)\b",
    re.IGNORECASE,
)
# The other rooms join as they are rewritten.
PLAIN = (
    "CONTRIBUTING.md",
    "README.md",
    "cli",
    "docs",
    "tasks",
    "tests/accounts",
    "tests/billing",
    "tests/cli",
    "tests/database",
    "tests/discovery",
    "tests/doctor",
    "tests/drift",
    "tests/gate",
    "tests/host",
    "tests/install",
    "tests/preview",
    "tests/settings",
    "tests/worker",
    "trueup/__init__.py",
    "trueup/__main__.py",
    "trueup/accounts",
    "trueup/api",
    "trueup/billing",
    "trueup/database",
    "trueup/discovery",
    "trueup/doctor",
    "trueup/drift",
    "trueup/errors.py",
    "trueup/extras.py",
    "trueup/features",
    "trueup/gate",
    "trueup/host",
    "trueup/install",
    "trueup/llm",
    "trueup/monitoring",
    "trueup/preview",
    "trueup/reconcile",
    "trueup/reports",
    "trueup/review",
    "trueup/settings",
    "trueup/usage",
    "worker",
)


def _files(place: str) -> Iterator[Path]:
    path = ROOT / place
    if path.is_file():
        yield path
    yield from (file for file in path.rglob("*") if file.suffix in (".py", ".sql", ".md"))


@pytest.mark.parametrize("place", PLAIN)
def test_prose_uses_plain_phrases(place: str) -> None:
    files = list(_files(place))
    assert files
    found = {
        str(file.relative_to(ROOT)): [hit[0] for hit in PHRASES.finditer(file.read_text())]
        for file in files
        if PHRASES.search(file.read_text())
    }
    assert found == {}


@pytest.mark.parametrize(
    "sentence",
    [
        "Its hold's time ran out and nobody went on.",
        "its shard is gone on with",
        "A balance that was built anew.",
        "What is done about it is a policy.",
    ],
)
def test_the_pattern_finds_what_it_is_for(sentence: str) -> None:
    assert PHRASES.search(sentence)
