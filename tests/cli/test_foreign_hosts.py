"""A host whose tables another tool made, by the commands alone: quoted names, a status, and times without a zone."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import create_engine
from sqlalchemy.pool import NullPool

from tests.cli.conftest import trueup, trueup_json
from tests.preview.test_scan import as_role, seen
from tests.support.host import Host
from trueup.discovery import propose, read_catalog
from trueup.errors import TrueupError
from trueup.settings.settings import get_settings

# As Prisma makes them: ids from the client, UTC in timestamps without a zone.
TABLES = """
    CREATE TYPE "SubscriptionStatus" AS ENUM ('ACTIVE', 'PAST_DUE', 'CANCELED');
    CREATE TYPE "AiStatus" AS ENUM ('SUCCESS', 'FAILED');
    CREATE TABLE "User" ("id" text PRIMARY KEY, "email" text NOT NULL, "updatedAt" timestamp(3) NOT NULL);
    CREATE TABLE "Plan" ("id" text PRIMARY KEY, "name" text NOT NULL, "tokensIncluded" integer NOT NULL,
        "durationDays" integer NOT NULL);
    CREATE TABLE "Subscription" ("id" text PRIMARY KEY, "userId" text NOT NULL UNIQUE REFERENCES "User",
        "planId" text NOT NULL REFERENCES "Plan", "status" "SubscriptionStatus" NOT NULL DEFAULT 'ACTIVE',
        "tokensRemaining" integer NOT NULL, "currentPeriodStart" timestamp(3) NOT NULL,
        "currentPeriodEnd" timestamp(3), "updatedAt" timestamp(3) NOT NULL);
    CREATE TABLE "AiUsage" ("id" text PRIMARY KEY, "userId" text NOT NULL REFERENCES "User", "feature" text NOT NULL,
        "model" text NOT NULL, "promptTokens" integer NOT NULL DEFAULT 0, "completionTokens" integer NOT NULL DEFAULT 0,
        "totalTokens" integer NOT NULL, "latencyMs" integer, "status" "AiStatus" NOT NULL DEFAULT 'SUCCESS',
        "createdAt" timestamp(3) NOT NULL DEFAULT CURRENT_TIMESTAMP);
    CREATE INDEX ON "AiUsage" ("userId", "createdAt");
    INSERT INTO "Plan" VALUES ('pro', 'Pro', 1000, 30);
    INSERT INTO "User" SELECT 'c' || i, i || '@example.com', now() FROM generate_series(1, 3) i;
    INSERT INTO "Subscription" SELECT 's' || i, 'c' || i, 'pro', CAST(status AS "SubscriptionStatus"), 1000,
        timezone('UTC', now()) - interval '1 day', timezone('UTC', now()) + interval '1 day', now()
        FROM unnest(ARRAY['ACTIVE', 'PAST_DUE', 'ACTIVE']) WITH ORDINALITY AS t (status, i);
    INSERT INTO "AiUsage" ("id", "userId", "feature", "model", "totalTokens", "status", "createdAt")
        SELECT 'u' || i, 'c1', 'chat', 'm', 100 * i, CAST(status AS "AiStatus"), timezone('UTC', now()) - before
        FROM unnest(ARRAY['SUCCESS', 'FAILED', 'SUCCESS'], ARRAY[interval '1 hour', '1 hour', '25 hours'])
            WITH ORDINALITY AS t (status, before, i);
"""


@pytest.fixture
def prisma(empty_database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    monkeypatch.chdir(tmp_path)
    get_settings.cache_clear()
    engine = create_engine(empty_database, poolclass=NullPool)
    with engine.begin() as connection:
        connection.exec_driver_sql(TABLES)
    with Host(engine) as host:
        yield host
    engine.dispose()
    get_settings.cache_clear()


def test_a_foreign_host_is_discovered_reported_attached_and_gated(prisma: Host) -> None:
    found = trueup("db", "discover", "--write").stdout
    assert '[host.subscription]\ntable = "Subscription"' in found
    assert 'is_active = {column = "status", equals = ["ACTIVE"]}' in found
    get_settings.cache_clear()
    [drifted] = trueup_json("drift", "report", "--read-only")["rows"]
    assert (drifted["user_id"], drifted["observed"], drifted["expected"]) == ("c1", 1_000, 900)
    script = trueup("db", "attach", "--dry-run").stdout
    assert 'TRIGGER trueup_inserted AFTER INSERT ON "public"."AiUsage"' in script
    assert prisma.value("SELECT to_regnamespace('trueup') IS NULL")
    assert "ready" in trueup("db", "attach", "--yes").stdout
    trueup("tokens", "check", "c1", "--tokens", "900")
    trueup("tokens", "check", "c1", "--tokens", "901", code=3)
    assert "deactivated" in trueup("tokens", "check", "c2", "--tokens", "1", code=3).stdout
    prisma.execute("UPDATE \"Subscription\" SET status = 'CANCELED' WHERE \"userId\" = 'c3'")
    trueup("tokens", "check", "c3", "--tokens", "1", code=3)
    assert [row["user_id"] for row in trueup_json("reconcile")["rows"]] == ["c1"]
    trueup("db", "detach", "--yes")


def test_manual_settings_are_kept_for_names_that_are_not_found(prisma: Host) -> None:
    prisma.execute('ALTER TABLE "Subscription" RENAME status TO phase')
    file = Path("trueup.toml")
    said = trueup("db", "discover", "--write", code=1).stdout
    assert "Set them under [host] in trueup.toml, and run `trueup db discover --write --force`" in said
    assert not file.exists()
    file.write_text('[host.subscription]\nis_active = {column = "phase", equals = "ACTIVE"}\n')
    get_settings.cache_clear()
    trueup("db", "discover", "--write", "--force")
    assert 'is_active = {column = "phase", equals = ["ACTIVE"]}' in file.read_text()
    get_settings.cache_clear()
    trueup("drift", "report", "--read-only")


def test_the_rights_that_a_reader_lacks_are_named_once_each(prisma: Host) -> None:
    prisma.execute('CREATE SCHEMA "Ai"')
    prisma.execute('ALTER TABLE "AiUsage" SET SCHEMA "Ai"')
    with as_role(prisma, 'SELECT ON "User", "Plan", "Ai"."AiUsage"') as engine:
        role = engine.url.username
        use = f'may not use schema Ai: GRANT USAGE ON SCHEMA "Ai" TO "{role}"'
        read = f'GRANT SELECT ON "public"."Subscription" TO "{role}"'
        with engine.connect() as connection:
            proposal = propose(connection, read_catalog(connection))
        assert [note for note in proposal.notes if "GRANT" in note] == [
            f"The role {role} may not read Subscription: {read};",
            f"The role {role} {use};",
        ]
        assert proposal.mapping is not None
        with pytest.raises(TrueupError) as refused:
            seen(engine, proposal.mapping)
    said = str(refused.value)
    assert f"role {role} {use}; role {role} may not read Subscription (" in said
    assert said.endswith(f"): {read}. Nothing was read. `trueup db discover` proposes a mapping.")
    assert said.count("GRANT") == 2
