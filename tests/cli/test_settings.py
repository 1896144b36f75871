"""`trueup settings`, and the errors for wrong settings."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from tests.cli.conftest import trueup, trueup_json
from trueup.cli.output import without_password
from trueup.settings.settings import Settings

SECRET = "hunter2"


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: Callable[..., None]) -> None:
    """Read the settings again, in a folder without a trueup.toml."""
    monkeypatch.chdir(tmp_path)
    settings()


def test_every_setting_is_listed_with_its_value(settings: Callable[..., None]) -> None:
    settings(TRUEUP_WORKER_CONCURRENCY="7")
    shown = trueup_json("settings")
    parts = {name: field.annotation for name, field in Settings.model_fields.items() if name != "host"}
    assert {name for name in shown if "__" not in name} == {
        f"TRUEUP_{name.upper()}" for name, kind in parts.items() if not _is_part(kind)
    } | {"host", "schema_version"}
    assert {name for name in shown if "__" in name} == {
        f"TRUEUP_{name.upper()}__{field.upper()}"
        for name, kind in parts.items()
        if _is_part(kind)
        for field in kind.model_fields
    }
    assert shown["TRUEUP_RECONCILE__POLICIES"] == {}
    assert shown["TRUEUP_WORKER_CONCURRENCY"] == 7
    assert shown["host"]["usage_log"]["table"] == "ai_usage_log"
    table = trueup("settings").stdout
    for variable in set(shown) - {"host", "schema_version"}:
        assert variable in table


def _is_part(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("TRUEUP_OPENAI_API_KEY", SECRET),
        ("TRUEUP_INSTAGRAM_ACCESS_TOKEN", SECRET),
        ("TRUEUP_DATABASE_URL", f"postgresql://app:{SECRET}@db/app"),
        ("TRUEUP_DATABASE_URL", f"postgresql://app:{SECRET}%2F{SECRET}%40{SECRET}@db/app"),
        ("TRUEUP_DATABASE_URL", f"postgresql://db/app?user=app&password={SECRET}&sslmode=require"),
        ("TRUEUP_BROKER_URL", f"redis://:{SECRET}@redis:6379/0"),
        ("TRUEUP_RESULT_BACKEND_URL", f"sentinel://:{SECRET}@one:26379;sentinel://:{SECRET}@two:26379"),
        ("TRUEUP_OPENAI_BASE_URL", f"https://me:{SECRET}@models.example/v1"),
    ],
)
def test_no_secret_is_ever_shown(settings: Callable[..., None], variable: str, value: str) -> None:
    settings(**{variable: value})
    for output in (trueup("settings").output, trueup("settings", "--json").output):
        assert SECRET not in output
        assert "(set)" in output or "***" in output


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql://app:x@db:5432/app", "postgresql://app:***@db:5432/app"),
        ("redis://:x@redis:6379/0", "redis://:***@redis:6379/0"),
        ("sentinel://:x@one:1;sentinel://:y@two:2", "sentinel://:***@one:1;sentinel://:***@two:2"),
        ("postgresql://db/app?password=x&sslmode=require", "postgresql://db/app?password=***&sslmode=require"),
        ("redis://redis:6379/0", "redis://redis:6379/0"),
        ("postgresql://postgres@/trueup?host=/run&port=5432", "postgresql://postgres@/trueup?host=/run&port=5432"),
        ("https://models.example/v1/a@b", "https://models.example/v1/a@b"),
    ],
)
def test_of_a_url_only_the_password_is_hidden(url: str, shown: str) -> None:
    assert without_password(url) == shown


@pytest.mark.parametrize("command", [("settings",), ("tokens", "show", 1), ("run", "qa", "--user", 1, __file__)])
def test_a_misspelt_variable_is_refused_with_the_nearest_name(
    settings: Callable[..., None], command: tuple[object, ...]
) -> None:
    settings(TRUEUP_DATABSE_URL="postgresql://db/app")
    result = trueup(*command, code=1)
    assert "TRUEUP_DATABSE_URL is no setting of trueup. Did you mean TRUEUP_DATABASE_URL?" in result.stderr


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("[host", "trueup.toml cannot be read"),
        ("[host]\nuser_id_typ = 'uuid'", "Did you mean host.user_id_type?"),
        ("worker_concurrency = 'many'", "TRUEUP_WORKER_CONCURRENCY"),
        ("\udcff", "trueup.toml cannot be read"),
    ],
    ids=["no TOML", "an unknown name", "a wrong type", "no text"],
)
def test_a_malformed_file_is_named_with_its_error(tmp_path: Path, content: str, named: str) -> None:
    (tmp_path / "trueup.toml").write_text(content, errors="surrogateescape")
    assert named in trueup("settings", code=1).stderr


def test_a_file_that_was_asked_for_and_is_not_there_is_refused(settings: Callable[..., None]) -> None:
    settings(TRUEUP_CONFIG="elsewhere.toml")
    assert "there is no file elsewhere.toml" in trueup("settings", code=1).stderr


def test_a_url_of_another_database_is_refused_without_its_password(settings: Callable[..., None]) -> None:
    settings(TRUEUP_DATABASE_URL=f"mysql://app:{SECRET}@db/app")
    result = trueup("tokens", "show", 1, code=1)
    assert "give a PostgreSQL URL" in result.stderr
    assert SECRET not in result.output
