"""A host's bulk writes on its log, under a limit on temporary files."""

from datetime import timedelta

from sqlalchemy import Connection, text

from tests.support.books import assert_true
from tests.support.host import START, Host
from trueup.accounts.account import read_account

ROWS = 60_000
INSERT = """
    INSERT INTO ai_usage_log (id, user_id, section, total_tokens, success, created_at)
    SELECT gen_random_uuid(), :user, 'chat', 5, true, CAST(:at AS timestamptz) + n * interval '1 second'
    FROM generate_series(1, :rows) n
"""


def test_an_update_of_many_rows_passes_where_the_sums_need_more_temporary_files_than_allowed(
    host: Host, connection: Connection
) -> None:
    user = host.subscriber(1_000_000)
    host.execute(INSERT, user=user, at=START + timedelta(hours=1), rows=ROWS)
    assert read_account(connection, user).consumed == 5 * ROWS
    truncations = tokens = 0
    # How much the host's statement and the sums take differs between versions of PostgreSQL.
    for megabytes in range(20, 0, -2):
        truncations, tokens = host.value("SELECT count(*) FROM trueup.log_truncation"), 100 + megabytes
        with host.engine.begin() as session:
            session.execute(text(f"SET LOCAL temp_file_limit = '{megabytes}MB'"))
            session.execute(text("SET LOCAL work_mem = '64kB'"))
            session.execute(text("UPDATE ai_usage_log SET total_tokens = :tokens"), {"tokens": tokens})
        if host.value("SELECT count(*) FROM trueup.log_truncation") > truncations:
            break  # the statement passed, and the sums did not fit
    assert host.value("SELECT count(*) FROM trueup.log_truncation") == truncations + 1
    assert read_account(connection, user).consumed == tokens * ROWS
    assert_true(host)
