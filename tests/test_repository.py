"""What must stay true of the tree as a whole."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from itertools import takewhile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
OWN = {"benchmarks", "tests", "trueup"}
LONGEST_FUNCTION_LINES = 70
LONGEST_MODULE_LINES = 300
LONGEST_TEST_MODULE_LINES = 450  # it mirrors a module of ours, and says more about it than that says itself
REASON = "# Longer than"
SQL_REASON = "-- Longer than"
# A function, a script, or a macro that several of these share.
SQL_PIECE = re.compile(
    r"^(?:CREATE OR REPLACE FUNCTION trueup\.(\w+).*?\bAS \$\$.*?|DO \$\$.*?)\$\$;|^\{% macro (\w+).*?endmacro %\}",
    re.MULTILINE | re.DOTALL,
)

# Put together here, so that this file is not one of those it finds.
MACHINE_PATHS = re.compile("(?<![\\w.~-])/(" + "|".join(("root", "work")) + ")/")
REGISTRIES = re.compile("|".join(("python" + "hosted", "pypi" + "[.]org", "arti" + "factory", "index" + "-url [^-]")))

# These come with what is required, in the version that it asks for, and are its own parts.
PARTS = {
    "anyio": "fastapi",
    "billiard": "celery",
    "cryptography": "pyjwt",
    "kombu": "celery",
    "packaging": "pytest",
    "ruamel": "check-jsonschema",
    "starlette": "fastapi",
    "werkzeug": "pytest-httpserver",
}


def _tracked() -> list[Path]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    return [ROOT / line for line in listed.stdout.splitlines() if (ROOT / line).is_file()]


TRACKED = _tracked()
PYTHON = [path for path in TRACKED if path.suffix == ".py" and "migrations" not in path.parts]

if not TRACKED:
    pytest.skip("this is no checkout, but a copy without its history", allow_module_level=True)


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_every_module_is_short_or_says_why_not() -> None:
    too_long = []
    for path in (*PYTHON, *ROOT.glob("trueup/**/*.sql")):
        text = path.read_text()
        longest = LONGEST_TEST_MODULE_LINES if name(path).startswith("tests/") else LONGEST_MODULE_LINES
        if len(text.splitlines()) > longest and REASON not in text:
            too_long.append(name(path))
    assert too_long == []


def test_every_function_fits_a_screen_or_says_above_why_not() -> None:
    too_long = []
    for path in PYTHON:
        lines = path.read_text().splitlines()
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            above = takewhile(lambda line: line.strip().startswith(("#", "@")), reversed(lines[: node.lineno - 1]))
            reason = any(line.strip().startswith("#") for line in above)
            if (node.end_lineno or 0) - node.lineno >= LONGEST_FUNCTION_LINES and not reason:
                too_long.append(f"{name(path)}: {node.name}")
    assert too_long == []


def _long_sql_pieces(text: str) -> list[str]:
    """Return the functions and macros that are longer than a screen and don't say in a comment above why."""
    found = []
    for piece in SQL_PIECE.finditer(text):
        above = takewhile(lambda line: line.startswith("--"), reversed(text[: piece.start()].splitlines()))
        reason = any(line.startswith(SQL_REASON) for line in above)
        if piece[0].count("\n") >= LONGEST_FUNCTION_LINES and not reason:
            found.append(piece[1] or piece[2] or "DO")
    return found


def test_every_sql_function_fits_a_screen_or_says_above_why_not() -> None:
    scripts = [path for path in TRACKED if path.suffix == ".sql"]
    pieces = [piece for path in scripts for piece in SQL_PIECE.finditer(path.read_text())]
    assert len(pieces) > 100
    assert {name(path): found for path in scripts if (found := _long_sql_pieces(path.read_text()))} == {}


def test_a_long_sql_function_is_found() -> None:
    body = "    SELECT 1;\n" * LONGEST_FUNCTION_LINES
    function = f"CREATE OR REPLACE FUNCTION trueup.long() RETURNS void LANGUAGE sql AS $$\n{body}$$;\n"
    macro = f"{{% macro wide() %}}\n{body}{{% endmacro %}}\n"
    assert _long_sql_pieces(function + macro) == ["long", "wide"]
    assert _long_sql_pieces(f"-- Longer than 70 lines: it is one list.\n{function}") == []
    assert _long_sql_pieces(function.replace(body, body.partition("\n")[2])) == ["long"]
    assert _long_sql_pieces(function.replace(body, "    SELECT 1;\n")) == []


def test_no_file_names_a_machine_or_a_package_registry() -> None:
    found = []
    for path in TRACKED:
        text = path.read_text(encoding="utf-8", errors="replace")
        found += [
            f"{name(path)}: {hit[0]}" for pattern in (MACHINE_PATHS, REGISTRIES) for hit in pattern.finditer(text)
        ]
    assert found == []


def test_the_patterns_find_what_they_are_for() -> None:
    for place in ("/" + "root/x", "cd /" + "work/main"):
        assert MACHINE_PATHS.search(place)
    for registry in ("https://files.python" + "hosted.org", "--index" + "-url https://x"):
        assert REGISTRIES.search(registry)
    for harmless in ("a/" + "root/b", "tests/" + "work/x", "--no-emit-index" + "-url --quiet"):
        assert not MACHINE_PATHS.search(harmless)
        assert not REGISTRIES.search(harmless)


def _requirements() -> Iterator[tuple[str, Requirement]]:
    """Yield each lock file with each requirement of pyproject.toml that it must pin."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    for line in project["project"]["dependencies"]:
        yield "main.txt", Requirement(line)
    for line in [*project["project"]["dependencies"], *project["dependency-groups"]["dev"]]:
        yield "dev.txt", Requirement(line)


REQUIREMENTS = list(_requirements())


def _pins(file: str) -> dict[str, str]:
    """Return the versions that a lock file pins with hashes, by the packages' plain names."""
    lock = (ROOT / "requirements" / file).read_text()
    pins = re.findall(
        r"^([a-z0-9._-]+)(?:\[[a-z,]+\])?==(\S+).*?\\\n {4}--hash=sha256:[0-9a-f]{64}", lock, re.MULTILINE
    )
    return {_plain(package): version for package, version in pins}


def _plain(package: str) -> str:
    return re.sub(r"[-_.]+", "-", package).lower()


@pytest.mark.parametrize("file", ["main.txt", "dev.txt"])
def test_every_dependency_is_pinned_with_hashes(file: str) -> None:
    pins = _pins(file)
    unpinned = [
        str(requirement)
        for wanted, requirement in REQUIREMENTS
        if wanted == file and not requirement.specifier.contains(pins.get(_plain(requirement.name), "0"))
    ]
    assert unpinned == [], "run `make lock`"


@pytest.mark.parametrize("file", ["main.txt", "dev.txt"])
def test_a_lock_file_holds_only_pins_and_says_nothing_of_where_they_come_from(file: str) -> None:
    lines = (ROOT / "requirements" / file).read_text().splitlines()
    line_of_a_lock = re.compile(r"#.*|[a-z0-9._-]+(\[[a-z,]+\])?==[^:@]+ \\|    --hash=sha256:[0-9a-f]{64}( \\)?")
    assert [line for line in lines if not line_of_a_lock.fullmatch(line)] == []


def test_what_the_container_runs_is_a_part_of_what_is_tested() -> None:
    assert _pins("main.txt").items() <= _pins("dev.txt").items()


def test_what_is_imported_is_required_and_not_there_by_chance() -> None:
    distributions = packages_distributions()
    by_chance = []
    for path in PYTHON:
        shipped = name(path).partition("/")[0] not in ("tests", "benchmarks")
        required = {_plain(requirement.name) for file, requirement in REQUIREMENTS if file == "main.txt" or not shipped}
        for module in _modules(path) - OWN - sys.stdlib_module_names:
            packages = [PARTS.get(module, module), *distributions.get(module, [])]
            if not required & {_plain(package) for package in packages}:
                by_chance.append(f"{name(path)}: {module}")
    assert by_chance == []


def _modules(path: Path) -> set[str]:
    """Return the packages that a module imports, at its top or later."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.partition(".")[0])
    return found
