"""`trueup db discover`."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import create_engine
from sqlalchemy.pool import NullPool

from tests.cli.conftest import trueup, trueup_json
from tests.discovery.test_proposal import UUID_HOST, UUID_MAPPING
from trueup.host.mapping import HostMapping
from trueup.install.example_tables import build_host_metadata
from trueup.settings.settings import get_settings, read_settings


@pytest.fixture
def folder(empty_database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder: without a trueup.toml."""
    monkeypatch.chdir(tmp_path)
    get_settings.cache_clear()
    yield tmp_path
    get_settings.cache_clear()


@pytest.fixture
def other_host(folder: Path, empty_database: str) -> Path:
    engine = create_engine(empty_database, poolclass=NullPool)
    with engine.begin() as connection:
        connection.exec_driver_sql(UUID_HOST)
    engine.dispose()
    return folder / "trueup.toml"


def test_the_proposal_is_shown_with_certainty_and_notes(other_host: Path) -> None:
    shown = trueup("db", "discover").stdout
    for words in (
        "host.subscription.tokens_remaining",
        "another name for tokens_remaining, bigint",
        "the primary key, uuid",
        "Not found:",
        "host.usage_log.error_message: app.llm_calls has no column like error_message.",
        '[host.subscription]\ntable = "app.memberships"',
    ):
        assert words in shown
    assert not other_host.exists()
    assert get_settings().host == HostMapping()


def test_djangos_names_need_no_file(folder: Path, empty_database: str) -> None:
    engine = create_engine(empty_database, poolclass=NullPool)
    build_host_metadata(HostMapping()).create_all(engine)
    engine.dispose()
    assert "trueup.toml needs no [host]" in trueup("db", "discover").stdout
    assert trueup_json("db", "discover")["host"] == {}


def test_json_has_the_choices_the_gaps_and_the_section(other_host: Path) -> None:
    found = trueup_json("db", "discover", "--schema", "app")
    assert found["host"] == UUID_MAPPING
    assert (found["schema_version"], found["complete"]) == (1, True)
    assert {choice["certainty"] for choice in found["choices"]} <= {"certain", "likely", "guess"}
    assert all(gap["remedy"] for gap in found["gaps"])


def test_the_next_command_reads_the_written_mapping(other_host: Path) -> None:
    other_host.write_text('# mine\nhome = "elsewhere"\n\n[reconcile]\ntolerance = 7\n')
    said = trueup("db", "discover", "--write").stderr
    assert "Written to trueup.toml" in said
    content = other_host.read_text()
    assert content.startswith(
        '# mine\nhome = "elsewhere"\n\n[reconcile]\ntolerance = 7\n\n[host]\n# host.usage_log.error_message'
    )
    settings = read_settings()
    assert settings.host == HostMapping.model_validate(UUID_MAPPING)
    assert settings.reconcile.tolerance == 7


def test_a_host_section_is_replaced_only_by_force(other_host: Path) -> None:
    before = '[host]\nuser_id_type = "text"\n\n[reconcile]\ntolerance = 7\n'
    other_host.write_text(before)
    get_settings.cache_clear()
    assert "--force" in trueup("db", "discover", "--write", code=2).stderr
    assert other_host.read_text() == before
    trueup("db", "discover", "--write", "--force")
    assert read_settings().host == HostMapping.model_validate(UUID_MAPPING)
    assert read_settings().reconcile.tolerance == 7
    trueup("db", "discover", "--write", "--force")
    assert other_host.read_text().count("[host]") == 1


def test_another_file_can_be_named(other_host: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trueup("db", "discover", "--write", "--output", "new.toml")
    assert not other_host.exists()
    (other_host.parent / "set.toml").write_text("")
    monkeypatch.setenv("TRUEUP_CONFIG", "set.toml")
    trueup("db", "discover", "--write")
    assert (other_host.parent / "set.toml").read_text() == (other_host.parent / "new.toml").read_text()
    assert os.environ["TRUEUP_CONFIG"] == "set.toml"
    assert not other_host.exists()


def test_a_variable_that_overrides_the_written_mapping_is_named(
    other_host: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRUEUP_HOST__USER__TABLE", "x")
    get_settings.cache_clear()
    assert "Unset the variable" in trueup("db", "discover", "--write", code=1).stderr


def test_without_a_required_name_nothing_is_written(folder: Path) -> None:
    result = trueup("db", "discover", "--write", code=1)
    assert "No table resembles" in result.stdout
    assert "host.usage_log.table: no table has the columns of the AI usage log. Needed for everything." in result.stdout
    assert trueup_json("db", "discover", code=1)["complete"] is False
    assert list(folder.glob("*.toml")) == []


@pytest.mark.parametrize(
    ("arguments", "said", "code"),
    [
        (("--schema", "nowhere"), "schema: the database has no schema 'nowhere'", 2),
        (("--force",), "belong to --write", 2),
        (("--output", "x.toml"), "belong to --write", 2),
        (("--write", "--output", "."), "Invalid value for '--output'", 2),
        (("--write", "--output", "no/such/folder.toml"), "--output: no/such/folder.toml can't be written", 1),
        (("--write", "--output", "binary.toml"), "--output: binary.toml can't be read", 1),
        (("--write", "--output", "broken.toml"), "output: the file is not TOML", 2),
    ],
)
def test_bad_input_is_refused_by_the_options_name(
    other_host: Path, arguments: tuple[str, ...], said: str, code: int
) -> None:
    (other_host.parent / "binary.toml").write_bytes(b"\xff")
    (other_host.parent / "broken.toml").write_text("a = ")
    assert said in trueup("db", "discover", *arguments, code=code).stderr
    assert (other_host.parent / "binary.toml").read_bytes() == b"\xff"
    assert (other_host.parent / "broken.toml").read_text() == "a = "
