"""A host whose usage log is partitioned on two levels."""

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import text

from tests.support.host import START, Host, pooled_engine
from trueup.accounts.account import read_account
from trueup.database.retry import retrying
from trueup.host.mapping import HostMapping
from trueup.install.example_tables import build_host_metadata
from trueup.install.install import install

NOVEMBER, DECEMBER = START, datetime(2024, 12, 5, tzinfo=UTC)
ROW = "(user_id, section, total_tokens, created_at) VALUES (:user, 'chat', :tokens, :at)"


def month(number: int) -> str:
    later = "2025-01-01" if number == 12 else f"2024-{number + 1}-01"
    return f"FOR VALUES FROM ('2024-{number}-01Z') TO ('{later}Z')"


# PostgreSQL requires the partition column in the key. November's partition is partitioned again.
PARTITIONED = [
    "ALTER TABLE ai_usage_log RENAME TO plain",
    "ALTER INDEX ai_usage_log_user_created RENAME TO plain_user_created",
    "CREATE TABLE ai_usage_log (LIKE plain INCLUDING DEFAULTS INCLUDING IDENTITY) PARTITION BY RANGE (created_at)",
    "ALTER TABLE ai_usage_log ADD CONSTRAINT log_key PRIMARY KEY (id, created_at)",
    "CREATE INDEX ai_usage_log_user_created ON ai_usage_log (user_id, created_at)",
    "ALTER TABLE ai_usage_log ADD FOREIGN KEY (user_id) REFERENCES accounts_user ON DELETE CASCADE",
    "CREATE TABLE log_default PARTITION OF ai_usage_log DEFAULT",
    f"CREATE TABLE log_10 PARTITION OF ai_usage_log {month(10)}",
    f"CREATE TABLE log_11 PARTITION OF ai_usage_log {month(11)} PARTITION BY RANGE (created_at)",
    "CREATE TABLE log_11a PARTITION OF log_11 FOR VALUES FROM ('2024-11-01Z') TO ('2024-11-15Z')",
    "CREATE TABLE log_11b PARTITION OF log_11 FOR VALUES FROM ('2024-11-15Z') TO ('2024-12-01Z')",
    f'CREATE TABLE "Log 12" PARTITION OF ai_usage_log {month(12)}',
    "DROP TABLE plain",
]
PARTS = ['"Log 12"', "log_10", "log_11", "log_11a", "log_11b", "log_default"]


class PartitionedHost(Host):
    """A host that writes log rows through the parent table, and directly into partitions. It closes its engine."""

    mapping: HostMapping

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.engine.dispose()

    def write(self, user: int, tokens: int, *, into: str = "ai_usage_log", at: datetime = NOVEMBER) -> None:
        self.execute(f"INSERT INTO {into} {ROW}", user=user, tokens=tokens, at=at)

    def triggered(self) -> list[str]:
        """Return the tables that have all of the log's triggers."""
        return list(
            self.execute(
                "SELECT tgrelid::regclass::text FROM pg_trigger WHERE tgname IN "
                "('trueup_inserted', 'trueup_updated', 'trueup_deleted', 'trueup_truncated') "
                "GROUP BY tgrelid HAVING count(*) = 4 ORDER BY 1"
            ).scalars()
        )

    def set_up(self) -> None:
        with self.engine.begin() as connection:
            install(connection, self.mapping, with_host_tables=False)


def new_host(url: str, mapping: HostMapping) -> PartitionedHost:
    engine = pooled_engine(url)
    with engine.begin() as connection:
        build_host_metadata(mapping).create_all(connection)
        for statement in PARTITIONED:
            connection.execute(text(statement))
    host = PartitionedHost(engine)
    host.mapping = mapping
    return host


def known(user: int) -> int:
    """Return the user's consumed tokens as the gate sees them."""
    return retrying(lambda connection: read_account(connection, user)).consumed
