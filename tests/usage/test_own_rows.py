"""Only trueup can mark a log row as its own. A row with any other mark counts as the host's."""

from datetime import timedelta

import pytest
from sqlalchemy import Connection, text
from sqlalchemy.exc import ProgrammingError

from tests.support.books import assert_true
from tests.support.host import START, Host
from tests.support.work import charge_tokens, hold_tokens
from trueup.accounts.account import read_account

ROW = "INSERT INTO ai_usage_log (id, user_id, section, total_tokens, success, created_at) "
VALUES = "VALUES (CAST(:id AS uuid), :user, 'chat', 400, true, :at)"
ID = "00000000-0000-4000-8000-000000000001"
TEXT = f"'{ID} ' || pg_current_xact_id()::text"


@pytest.mark.parametrize(
    "forged",
    [
        f"set_config('trueup.own_log_id', '{ID}', true)",
        f"set_config('trueup.own_row', '{ID}', true)",
        # The mark without the secret.
        f"set_config('trueup.own_row', encode(sha256(convert_to({TEXT}, 'UTF8')), 'hex'), true)",
        # A mark of this row, which the role has seen in an earlier transaction.
        "set_config('trueup.own_row', '{seen}', true)",
    ],
)
def test_a_host_role_that_forges_the_mark_of_trueups_rows_hides_no_usage(
    host: Host, connection: Connection, forged: str
) -> None:
    user = host.subscriber(10_000)
    charge_tokens(connection, hold_tokens(connection, user, 500), 100)
    seen = connection.scalar(text("SELECT trueup.own_row_mark(:id)"), {"id": ID})
    host.execute("DO $$ BEGIN CREATE ROLE trueup_forger; EXCEPTION WHEN duplicate_object THEN NULL; END $$")
    host.execute("GRANT INSERT ON ai_usage_log TO trueup_forger")
    with host.engine.begin() as session:
        session.execute(text("SET LOCAL ROLE trueup_forger"))
        session.execute(text(f"SELECT {forged.format(seen=seen)}"))
        session.execute(text(ROW + VALUES), {"id": ID, "user": user, "at": START + timedelta(hours=1)})
    assert read_account(connection, user).consumed == 500
    assert_true(host)


def test_a_role_without_rights_on_trueup_cant_compute_a_mark(host: Host) -> None:
    host.execute("DO $$ BEGIN CREATE ROLE trueup_forger; EXCEPTION WHEN duplicate_object THEN NULL; END $$")
    for statement in ("SELECT mark_secret FROM trueup.installation", f"SELECT trueup.own_row_mark('{ID}')"):
        with host.engine.connect() as session:
            session.execute(text("SET ROLE trueup_forger"))
            with pytest.raises(ProgrammingError, match="permission denied for schema trueup"):
                session.execute(text(statement))
