"""`trueup status`."""

from sqlalchemy import Connection

from tests.cli.conftest import trueup, trueup_json
from tests.support.host import Host
from tests.support.work import charge_tokens, hold_tokens


def test_status_counts_holds_charges_and_overdrafts(host: Host, connection: Connection) -> None:
    user = host.subscriber(10_000)
    charge_tokens(connection, hold_tokens(connection, user, 1_000), 300)
    charge_tokens(connection, hold_tokens(connection, user, 100), 150)
    shown = trueup_json("status")
    figures = shown["status"]
    assert (figures["open_holds"], figures["tokens_held"]) == (2, 700)
    assert (figures["charges"], figures["tokens_charged"], figures["tokens_over_hold"]) == (2, 450, 50)
    assert (shown["unrecorded_calls"], shown["unknown_effects"]) == ([], [])
    lines = dict(line.rsplit(maxsplit=1) for line in trueup("status").stdout.splitlines() if len(line.split()) > 1)
    assert lines["open holds"] == "2"
    assert lines["  tokens charged"] == "450"


def test_status_covers_the_requested_hours(host: Host, connection: Connection) -> None:
    user = host.subscriber(10_000)
    charge_tokens(connection, hold_tokens(connection, user), 300)
    host.execute("UPDATE trueup.charge SET charged_at = charged_at - interval '3 hours'")
    assert trueup_json("status", "--since", "4h")["status"]["charges"] == 1
    assert trueup_json("status", "--since", "2h")["status"]["charges"] == 0
    assert "Invalid value for '--since'" in trueup("status", "--since", "soon", code=2).stderr


def test_status_of_a_new_database_is_all_dashes_and_zeros(database: str) -> None:
    output = trueup("status").stdout
    assert "oldest open hold" in output
    assert "–" in output
    assert trueup_json("status")["status"]["settlement_lag_median_seconds"] is None
