"""The core works without any extra's packages, and each missing extra is one error that names it."""

import os
import pickle
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.support.worker import running_worker
from trueup.errors import MissingExtraError
from trueup.extras import EXTRAS, missing_modules, require_extra
from trueup.tasks import FEATURE_TASK_MODULES

ROOT = Path(__file__).parents[1]
TRUEUP = Path(sys.executable).with_name("trueup")
ALL = sorted({module for modules in EXTRAS.values() for module in modules})
# Python loads this at its start if the folder is on its path. These modules can't be imported then.
BLOCK = "import sys\nsys.modules.update(dict.fromkeys({modules!r}))\n"
# These need an extra and raise its error when they are used, or Django, which a Django project has. No other module
# imports them.
NEEDS_EXTRA = re.compile(
    r"trueup\.(api\b|stack\.|llm\.(providers\.|offline\.server|transport\.on_)|cli\.demo\.|django\.(?!driver))"
    r"|trueup\.database\.migrations\."
)

IMPORT_CORE = f"""
import importlib, pkgutil, re
import trueup
for module in pkgutil.walk_packages(trueup.__path__, "trueup.", onerror=lambda name: None):
    if not re.match({NEEDS_EXTRA.pattern!r}, module.name):
        importlib.import_module(module.name)
        print(module.name)
"""


def environment(folder: Path, *modules: str) -> dict[str, str]:
    """Return an environment whose Python processes lack these modules. None given: those of all extras."""
    (folder / "sitecustomize.py").write_text(BLOCK.format(modules=modules or ALL))
    return os.environ | {"PYTHONPATH": str(folder)}


def trueup(folder: Path, *arguments: str, without: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [TRUEUP, *arguments], env=environment(folder, *without), cwd=folder, capture_output=True, text=True, check=False
    )


def test_every_core_module_is_imported_without_any_extra(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", IMPORT_CORE],
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    imported = set(done.stdout.split())
    assert {"trueup.cli.up", "trueup.worker.http", "trueup.tasks.metered", "trueup.features.qa"} <= imported
    assert {"trueup.stack", "trueup.gate.holds", "trueup.llm.metering", "trueup.django"} <= imported


def test_the_extras_are_those_of_the_package_and_name_its_modules() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = {
        extra: {canonicalize_name(Requirement(line).name) for line in lines}
        for extra, lines in project["optional-dependencies"].items()
    }
    [everything] = project["optional-dependencies"]["all"]
    assert Requirement(everything).extras == set(EXTRAS) == set(declared) - {"all"}
    # Several distributions bring modules of these packages.
    api = {name: ["opentelemetry-api"] for name in ("opentelemetry.metrics", "opentelemetry.trace")}
    brought = {**packages_distributions(), "google.genai": ["google-genai"], **api}
    for extra, modules in EXTRAS.items():
        assert {canonicalize_name(name) for module in modules for name in brought[module]} == declared[extra]


def test_a_missing_extra_s_error_gives_its_consequence_and_its_remedy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "redbeat", None)
    with pytest.raises(MissingExtraError) as raised:
        require_extra("redbeat", "Beat", otherwise="use one beat")
    assert str(raised.value) == (
        "Beat needs the extra [redbeat], which is not installed (no module redbeat). Nothing was started. "
        "Install it: pip install 'trueup[redbeat]'; or use one beat."
    )
    assert str(pickle.loads(pickle.dumps(raised.value))) == str(raised.value)  # noqa: S301 - our own


@pytest.mark.parametrize(
    ("arguments", "extra"),
    [
        (("api",), "api"),
        (("up",), "embedded"),
        (("demo",), "embedded"),
        (("status",), "embedded"),
        (("run", "qa", "--user", "1", "page.txt"), "features"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else value,
)
def test_a_command_without_its_extra_ends_with_one_error(
    tmp_path: Path, arguments: tuple[str, ...], extra: str
) -> None:
    (tmp_path / "page.txt").write_text("Returns are free. " * 20)
    done = trueup(tmp_path, *arguments)
    assert done.returncode == 1
    assert f"needs the extra [{extra}], which is not installed" in done.stderr
    assert f"pip install 'trueup[{extra}]'" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_core_commands_work_without_any_extra(database: str, tmp_path: Path) -> None:
    for arguments in (("--help",), ("api", "--help"), ("status",), ("reconcile", "--dry-run"), ("drift", "history")):
        done = trueup(tmp_path, *arguments)
        assert done.returncode == 0, (arguments, done.stderr)


def test_doctor_names_the_extras_that_settings_need(
    database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRUEUP_MODEL_PROVIDER", "openai")
    shown = trueup(tmp_path, "doctor", "--json", without=("openai", "lxml")).stdout
    assert "TRUEUP_MODEL_PROVIDER=openai needs the extra [openai], which is not installed (no module openai)." in shown
    monkeypatch.setenv("TRUEUP_MODEL_PROVIDER", "offline")
    shown = trueup(tmp_path, "doctor", "--json", without=("bpe_openai",)).stdout
    assert "TRUEUP_MODEL_PROVIDER=offline needs the extra [embedded], which is not installed (no module bpe_op" in shown
    shown = trueup(tmp_path, "doctor", "--json", without=("openai", "lxml")).stdout
    assert "Without [features] this process registers none of trueup's own AI tasks." in shown


def test_a_worker_without_features_runs_the_upkeep_and_registers_no_ai_task(
    database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    from trueup.worker.celery import app

    app.loader.import_default_modules()
    with running_worker(tmp_path / "worker.log", queues=("trueup-reconcile",), concurrency=1) as worker:
        assert app.tasks["trueup.expire_holds"].apply_async().get(timeout=30) == {"holds": 0, "tokens": 0}
        output = worker.output
    assert "Without the extra [features] no AI task of trueup's own is registered" in output
    assert "trueup.expire_holds" in output
    assert "trueup.generate_qa" not in output


def test_all_extras_are_installed_for_the_tests() -> None:
    assert [extra for extra in EXTRAS if missing_modules(extra)] == []
    assert len(FEATURE_TASK_MODULES) == 6


def test_a_metered_task_without_a_tokenizer_spends_nothing_and_says_why(tmp_path: Path) -> None:
    script = (
        "from trueup.llm.providers import provider_from_settings\n"
        "from trueup.settings.settings import Settings\n"
        "try:\n"
        "    provider_from_settings(Settings(model_provider='{provider}', openai_api_key='x'))\n"
        "except Exception as error:\n"
        "    print(error)\n"
    )
    for provider, extra in (("openai", "openai"), ("offline", "embedded")):
        done = subprocess.run(
            [sys.executable, "-c", script.format(provider=provider)],
            env=environment(tmp_path),
            capture_output=True,
            text=True,
            check=True,
        )
        assert f"TRUEUP_MODEL_PROVIDER={provider} needs the extra [{extra}]" in done.stdout
        assert "Nothing was spent." in done.stdout
