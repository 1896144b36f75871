"""`trueup db detach`."""

from pathlib import Path

from sqlalchemy import Connection

from tests.cli.conftest import trueup
from tests.support.host import Host
from tests.support.work import hold_tokens


def test_detach_shows_its_plan_and_asks(host: Host) -> None:
    said = trueup("db", "detach", stdin="n\n", code=1)
    assert "removes schema trueup" in said.stdout
    assert "5 triggers on public.ai_usage_log, public.billing_subscription" in said.stdout
    assert "--keep-history" in said.stdout
    assert host.value("SELECT count(*) FROM trueup.installation") == 1


def test_it_removes_and_keeps_the_history(host: Host, tmp_path: Path) -> None:
    file = tmp_path / "history.jsonl"
    said = trueup("db", "detach", "--yes", "--keep-history", file).stdout
    assert f"Saved to {file}: 1 of installation, 0 of reconcile_run" in said
    assert said.endswith("Removed the triggers and the schema trueup.\n")
    assert host.value("SELECT to_regnamespace('trueup') IS NULL")
    assert "nothing to remove" in trueup("db", "detach", "--yes", code=1).stderr
    assert "Run `trueup db attach`" in trueup("tokens", "show", 1, code=1).stderr


def test_open_holds_prevent_a_detach_without_force(host: Host, connection: Connection) -> None:
    hold_tokens(connection, host.subscriber())
    assert "1 holds are open" in trueup("db", "detach", "--yes", code=1).stderr
    trueup("db", "detach", "--yes", "--force")
    assert host.value("SELECT to_regnamespace('trueup') IS NULL")
