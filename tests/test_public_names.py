"""`import trueup` offers the names that a host needs and loads nothing. The manuals use and list all of them."""

import ast
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import trueup

ROOT = Path(__file__).parents[1]
MANUALS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# Names for one web framework are imported from its own module.
BESIDE = ("trueup.billing.frameworks.fastapi", "trueup.django")


def run(script: str) -> str:
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_importing_trueup_loads_nothing_but_the_standard_library() -> None:
    script = """
import sys
before = set(sys.modules)
import trueup
print(sorted(name for name in set(sys.modules) - before if name.partition(".")[0] not in sys.stdlib_module_names))
"""
    assert run(script) == "['trueup', 'trueup.errors']"


def test_a_name_loads_its_own_module_and_no_web_framework() -> None:
    script = """
import sys
from trueup import TokensDenied
assert not {"celery", "sqlalchemy", "pydantic"} & set(sys.modules)
from trueup import ai_tokens, metered_task, require_ai_tokens
assert {"celery", "sqlalchemy"} <= set(sys.modules)
print(sorted({"fastapi", "flask", "rest_framework", "starlette"} & set(sys.modules)))
"""
    assert run(script) == "[]"


@pytest.mark.parametrize("name", trueup.__all__)
def test_a_public_name_is_its_module_s_object(name: str) -> None:
    found = getattr(trueup, name)
    assert found is getattr(import_module(trueup._MODULES[name]), name)
    assert found.__module__.startswith("trueup.")
    assert name in dir(trueup)


def test_type_checkers_see_the_names_that_python_finds() -> None:
    seen = {
        alias.asname or alias.name: node.module
        for block in ast.parse(Path(trueup.__file__).read_text()).body
        if isinstance(block, ast.If)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert seen == trueup._MODULES
    assert trueup.__all__ == sorted(seen)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'trueup' has no attribute 'metered_tsk'"):
        _ = trueup.metered_tsk  # type: ignore[attr-defined]
    with pytest.raises(ImportError, match="metered_tsk"):
        from trueup import metered_tsk  # type: ignore[attr-defined]  # noqa: F401


def test_the_manual_lists_every_name() -> None:
    rows = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \|", (ROOT / "docs" / "python.md").read_text(), re.MULTILINE)
    assert sorted(re.findall(r"\w+", " ".join(rows))) == trueup.__all__


@pytest.mark.parametrize("manual", MANUALS, ids=lambda path: path.name)
def test_examples_import_public_names_only(manual: Path) -> None:
    for block in re.findall(r"^```python\n(.*?)^```", manual.read_text(), re.MULTILINE | re.DOTALL):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("trueup"):
                assert node.module in ("trueup", *BESIDE), ast.unparse(node)
            if isinstance(node, ast.Import):
                assert not [alias.name for alias in node.names if alias.name.startswith("trueup.")]
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "trueup":
                assert node.attr in trueup.__all__, ast.unparse(node)
