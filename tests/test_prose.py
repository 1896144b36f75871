"""Plain English: no phrases that readers with English as a second language have to read twice."""

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
# The other rooms join when they are rewritten.
PLAIN = (
    "CONTRIBUTING.md",
    "Dockerfile",
    "Makefile",
    "README.md",
    "benchmarks",
    "docker-compose.yml",
    "docs",
    "pyproject.toml",
    "requirements/compile",
    "tasks",
    "tests/conftest.py",
    "tests/faults",
    "tests/hosts",
    "tests/packaging",
    "tests/stack",
    "tests/support",
    "tests/test_attach_docs.py",
    "tests/test_clocks.py",
    "tests/test_extras.py",
    "tests/test_moments.py",
    "tests/test_public_names.py",
    "tests/test_readme.py",
    "tests/test_repository.py",
    "trueup/api",
    "trueup/features",
    "trueup/llm",
    "trueup/monitoring",
    "trueup/reconcile",
    "trueup/reports",
    "trueup/review",
    "trueup/stack",
    "trueup/usage",
)


def _files(place: str) -> Iterator[Path]:
    path = ROOT / place
    if path.is_file():
        yield path
    yield from (
        file for file in path.rglob("*") if file.suffix in (".py", ".sql", ".md") and file.name != "specification.md"
    )


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
def test_the_pattern_matches_its_examples(sentence: str) -> None:
    assert PHRASES.search(sentence)
