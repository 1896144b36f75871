"""`trueup drift report --read-only`."""

import csv
import io
import json
from pathlib import Path

import pytest

from tests.cli.conftest import trueup, trueup_json
from tests.cli.test_drift import SCHEMA, table
from tests.preview.test_scan import READ, as_role, bare, drifting
from tests.support.host import Host
from tests.support.schemas import complaints

__all__ = ["bare", "drifting"]

LOOK = ("drift", "report", "--read-only")


def test_the_drift_of_a_bare_database_is_shown(bare: Host, drifting: list[int]) -> None:
    shown = trueup(*LOOK).stdout
    for line in (
        "run                 dry run, nothing was written",
        "counters checked    3",
        "drifted             2",
        "tokens overstated   300",
        "tokens understated  50",
    ):
        assert line in shown
    assert ["missed decrement", "1", "0", "0", "300", "0"] in table(shown)
    row = [str(drifting[1]), "1,000", "700", "300", "missed decrement", "possible"]
    assert row in [cells[:6] for cells in table(shown)]
    assert "drift report --read-only --rows all" in trueup(*LOOK, "--rows", 1).stdout


def test_every_format_has_the_same_content(bare: Host, drifting: list[int], tmp_path: Path) -> None:
    found = trueup_json(*LOOK)
    assert complaints(found, SCHEMA) == []
    assert (found["kind"], found["dry_run"], found["checked"], found["rows_left_out"]) == ("look", True, 3, 0)
    assert [row["user_id"] for row in found["rows"]] == drifting[1:]
    rows = list(csv.DictReader(io.StringIO(trueup(*LOOK, "--format", "csv").stdout)))
    assert [row["user_id"] for row in rows] == [str(user) for user in drifting[1:]]
    assert "| missed decrement | 1 | 300 | 0 |" in trueup(*LOOK, "--format", "markdown").stdout
    page = tmp_path / "look.html"
    assert f"Written to {page}" in trueup(*LOOK, "--output", page).stdout
    assert "missed decrement" in page.read_text()
    few = trueup_json(*LOOK, "--rows", 1)
    assert (len(few["rows"]), few["rows_left_out"], few["drifted"]) == (1, 1, 2)


def test_the_options_select_the_drifts(bare: Host, drifting: list[int]) -> None:
    assert trueup_json(*LOOK, "--user", drifting[2])["checked"] == 1
    assert trueup_json(*LOOK, "--min", 51)["drifted"] == 1
    assert trueup_json(*LOOK, "--cause", "failed_usage_charged")["tokens_understated"] == 50
    trueup(*LOOK, "--fail-on-drift", code=3)
    trueup(*LOOK, "--fail-on-drift", "--min", 301)
    for arguments in (("--run", 1), ("--since", "1d")):
        assert "leave out --run and --since" in trueup(*LOOK, *arguments, code=2).stderr


def test_a_missing_column_is_named_with_its_remedy(bare: Host, drifting: list[int]) -> None:
    bare.execute("ALTER TABLE ai_usage_log RENAME total_tokens TO cost")
    said = trueup(*LOOK, code=1).stderr
    assert "host.usage_log.total_tokens: ai_usage_log has no column total_tokens" in said
    assert "`trueup db discover` proposes a mapping" in said


def test_missing_rights_of_the_role_are_named(bare: Host, drifting: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    from trueup.database.engine import dispose_engine
    from trueup.settings.settings import get_settings

    with as_role(bare) as engine:
        monkeypatch.setenv("TRUEUP_DATABASE_URL", engine.url.render_as_string(hide_password=False))
        get_settings.cache_clear()
        dispose_engine()
        assert 'GRANT SELECT ON "public"."ai_usage_log" TO "reader_' in trueup(*LOOK, code=1).stderr
        bare.execute(f"GRANT {READ} TO {engine.url.username}")
        assert trueup_json(*LOOK)["drifted"] == 2
        dispose_engine()


def test_causes_that_were_not_checked_are_named_beside_the_report(bare: Host, drifting: list[int]) -> None:
    bare.execute("DROP INDEX ai_usage_log_user_created")
    bare.execute(
        "INSERT INTO ai_usage_log (user_id, section, total_tokens, success) "
        "SELECT :user, repeat('x', 50), 0, true FROM generate_series(1, 20000)",
        user=drifting[0],
    )
    told = trueup(*LOOK, "--json")
    assert "Causes were not looked for" in told.stderr
    assert {row["cause"] for row in json.loads(told.stdout)["rows"]} == {"unexplained"}
