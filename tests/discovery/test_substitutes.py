"""The substitutes that discovery proposes for missing tables and columns, and the decisions left to a person."""

import pytest
from sqlalchemy import Connection

from tests.discovery.test_proposal import (
    catalog_of,  # noqa: F401 - a fixture
    certainties,
    discovered,
    script,
)
from trueup.discovery import propose, read_catalog
from trueup.discovery.toml import host_section, read_host
from trueup.errors import NotInstalledError
from trueup.install.install import check_host

SMALL_HOST = """
    CREATE TABLE memberships (id bigserial PRIMARY KEY, user_id bigint NOT NULL UNIQUE, quota int NOT NULL,
        tokens_left int NOT NULL, started_at timestamptz NOT NULL, ends_at timestamptz, is_active boolean NOT NULL);
    CREATE TABLE llm_calls (id uuid PRIMARY KEY, user_id bigint NOT NULL, tokens int NOT NULL, model text,
        status text NOT NULL, created_at timestamptz NOT NULL);
    CREATE INDEX ON llm_calls (user_id, created_at);
    INSERT INTO llm_calls SELECT gen_random_uuid(), 1, 5, 'm', said, now() FROM unnest(ARRAY['OK', 'failed']) said;
"""


def test_substitutes_for_missing_columns_and_tables_are_proposed_if_certain(
    catalog_of: Connection,  # noqa: F811
) -> None:
    script(catalog_of, SMALL_HOST)
    proposal = discovered(catalog_of)
    assert proposal.settings == {
        "user": False,
        "token_plan": False,
        "full_plan": False,
        "subscription": {
            "table": "memberships",
            "start_date": "started_at",
            "end_date": "ends_at",
            "tokens_remaining": "tokens_left",
            "tokens_included": "quota",
        },
        "usage_log": {
            "table": "llm_calls",
            "section": {"value": "other"},
            "prompt_tokens": {"value": 0},
            "completion_tokens": {"value": 0},
            "total_tokens": "tokens",
            "response_time_ms": {"value": 0},
            "model_name": "model",
            "metadata": {"value": {}},
            "counts": {"column": "status", "equals": ("OK",), "failed": "failed"},
        },
    }
    assert read_host(host_section(proposal.settings)) == proposal.mapping
    sure = certainties(proposal)
    assert sure["host.usage_log.section"] == sure["host.user"] == sure["host.usage_log.counts"] == "likely"
    assert "status" not in "\n".join(proposal.notes)
    assert proposal.mapping is not None
    with catalog_of.engine.begin() as connection:
        check_host(connection, proposal.mapping)


@pytest.mark.parametrize(
    ("change", "setting", "remedy"),
    [
        # With two fitting words, none, or two fitting columns, a person decides.
        (
            "UPDATE llm_calls SET status = 'done' WHERE status = 'failed'",
            "usage_log.success",
            "success = {value = true}",
        ),
        ("UPDATE llm_calls SET status = 'x'", "usage_log.success", "success = {value = true}"),
        ("ALTER TABLE llm_calls ADD outcome text DEFAULT 'ok'", "usage_log.success", "success = {value = true}"),
        ("ALTER TABLE memberships DROP ends_at", "subscription.end_date", 'end_date = {value = "infinity"}'),
        ("ALTER TABLE memberships DROP is_active", "subscription.is_active", "is_active = {value = true}"),
        (
            """
            ALTER TABLE memberships DROP is_active;
            ALTER TABLE memberships ADD status text DEFAULT 'on';
            INSERT INTO memberships (user_id, quota, tokens_left, started_at) VALUES (1, 1, 1, now())
            """,
            "subscription.is_active",
            'is_active = {column = "COLUMN", equals = "VALUE"}',
        ),
        ("ALTER TABLE memberships DROP quota", "token_plan.table", "under [host.token_plan]"),
    ],
)
def test_the_condition_for_spending_is_left_to_a_person(
    catalog_of: Connection,  # noqa: F811
    change: str,
    setting: str,
    remedy: str,
) -> None:
    script(catalog_of, SMALL_HOST)
    script(catalog_of, change)
    proposal = discovered(catalog_of)
    assert proposal.mapping is None
    remedies = {gap.setting: gap.remedy for gap in proposal.gaps if gap.stops == "everything"}
    assert remedy in remedies[f"host.{setting}"]


@pytest.mark.parametrize(
    ("more", "proposed"),
    [
        ("status text", {"column": "status", "equals": ("active",)}),
        ('"Status" standing', {"column": "Status", "equals": ("ACTIVE",)}),
        (
            "status text, ADD deleted_at timestamp",
            {"expression": "{row}.status = 'active' AND {row}.deleted_at IS NULL"},
        ),
        (
            '"Status" standing, ADD "deletedAt" timestamp',
            {"expression": '{row}."Status" = \'ACTIVE\' AND {row}."deletedAt" IS NULL'},
        ),
    ],
)
def test_a_status_decides_which_subscriptions_are_active(
    catalog_of: Connection,  # noqa: F811
    more: str,
    proposed: dict[str, object],
) -> None:
    script(catalog_of, SMALL_HOST)
    script(catalog_of, "CREATE TYPE standing AS ENUM ('ACTIVE', 'CANCELED')")
    script(catalog_of, f"ALTER TABLE memberships DROP is_active, ADD {more}")
    if "text" in more:
        rows = "SELECT i, 1, 1, now(), CASE i WHEN 1 THEN 'active' ELSE 'canceled' END FROM generate_series(1, 2) i"
        script(catalog_of, f"INSERT INTO memberships (user_id, quota, tokens_left, started_at, status) {rows}")
    proposal = discovered(catalog_of)
    assert proposal.settings["subscription"]["is_active"] == proposed
    assert certainties(proposal)["host.subscription.is_active"] == "likely"
    assert proposal.mapping is not None
    assert read_host(host_section(proposal.settings)) == proposal.mapping
    with catalog_of.engine.begin() as connection:
        check_host(connection, proposal.mapping)


def test_a_persons_settings_are_used_only_for_missing_matches(
    catalog_of: Connection,  # noqa: F811
) -> None:
    script(catalog_of, SMALL_HOST)
    script(catalog_of, "ALTER TABLE memberships DROP is_active; ALTER TABLE llm_calls RENAME status TO how")
    given = {
        "subscription": {"is_active": {"value": True}, "tokens_remaining": "quota"},
        "usage_log": {"counts": {"column": "how", "equals": ["OK"], "failed": "failed"}},
    }
    proposal = propose(catalog_of, read_catalog(catalog_of), given)
    assert proposal.mapping is not None
    assert proposal.settings["subscription"]["is_active"] == {"value": True}
    assert proposal.settings["subscription"]["tokens_remaining"] == "tokens_left"
    assert proposal.settings["usage_log"]["counts"] == {"column": "how", "equals": ("OK",), "failed": "failed"}
    whys = {choice.setting: choice.why for choice in proposal.choices}
    assert whys["host.usage_log.counts"] == whys["host.subscription.is_active"] == "set by you under [host]"


def test_a_persons_settings_are_kept_for_fields_that_are_not_sought(
    catalog_of: Connection,  # noqa: F811
) -> None:
    script(catalog_of, SMALL_HOST)
    script(catalog_of, "ALTER TABLE llm_calls DROP status, ADD success boolean, ADD billable boolean")
    assert "counts" not in discovered(catalog_of).settings["usage_log"]
    counts = {"expression": "billable"}
    proposal = propose(catalog_of, read_catalog(catalog_of), {"usage_log": {"counts": counts}})
    assert proposal.settings["usage_log"]["counts"] == counts
    settings = [choice.setting for choice in proposal.choices]
    assert len(settings) == len(set(settings))


def test_a_persons_table_is_used_if_none_is_found(
    catalog_of: Connection,  # noqa: F811
) -> None:
    script(catalog_of, SMALL_HOST)
    script(
        catalog_of,
        "ALTER TABLE llm_calls DROP created_at; ALTER TABLE llm_calls ADD xyz timestamptz, ADD zyx timestamptz",
    )
    log = {"table": "llm_calls", "total_tokens": "tokens", "created_at": "zyx", "success": {"value": True}}
    assert discovered(catalog_of).mapping is None
    proposal = propose(catalog_of, read_catalog(catalog_of), {"usage_log_id_type": "text", "usage_log": log})
    assert proposal.mapping is not None
    assert proposal.mapping.usage_log.created_at == "zyx"
    assert proposal.mapping.usage_log_id_type == "text"


def test_remarks_explain_deleted_and_computed_columns(
    catalog_of: Connection,  # noqa: F811
) -> None:
    script(catalog_of, SMALL_HOST)
    assert not discovered(catalog_of).notes
    script(
        catalog_of,
        "ALTER TABLE memberships ADD deleted_at timestamptz; ALTER TABLE llm_calls ADD deleted_at timestamptz; "
        "ALTER TABLE llm_calls DROP tokens; "
        "ALTER TABLE llm_calls ADD a int, ADD b int, ADD tokens int GENERATED ALWAYS AS (a + b) STORED",
    )
    notes = discovered(catalog_of).notes
    assert sum("deleted_at" in note for note in notes) == 2
    assert sum(note.startswith("llm_calls.tokens: the database computes it") for note in notes) == 1


USED_HOST = SMALL_HOST.replace("quota int", "token_limit int").replace("tokens_left int", "tokens_used int")


def test_a_counter_of_used_tokens_is_told_by_its_name_and_confirmed_by_its_values(
    catalog_of: Connection,  # noqa: F811
) -> None:
    script(catalog_of, USED_HOST)
    script(
        catalog_of,
        "INSERT INTO memberships SELECT i, i, 10000, 3000, now() - interval '1 day', NULL, true "
        "FROM generate_series(1, 3) i; "
        "INSERT INTO llm_calls SELECT gen_random_uuid(), i, 3000, 'm', 'OK', now() FROM generate_series(1, 3) i",
    )
    proposal = discovered(catalog_of)
    assert proposal.settings["subscription"]["counter"] == {"column": "tokens_used", "counts": "up"}
    assert proposal.settings["subscription"]["tokens_included"] == "token_limit"
    assert read_host(host_section(proposal.settings)) == proposal.mapping
    script(catalog_of, "ALTER TABLE memberships RENAME tokens_used TO tokens_left")
    asked = discovered(catalog_of)
    assert asked.mapping is None
    assert [gap.setting for gap in asked.gaps if gap.stops == "everything"] == ["host.subscription.counter"]
    given = {"subscription": {"tokens_remaining": "tokens_left", "counts": "up"}}
    answered = propose(catalog_of, read_catalog(catalog_of), given)
    assert answered.settings["subscription"]["counter"] == {"column": "tokens_left", "counts": "up"}


def test_a_name_that_the_values_contradict_is_asked_about(
    catalog_of: Connection,  # noqa: F811
) -> None:
    script(catalog_of, USED_HOST)
    script(
        catalog_of,
        "INSERT INTO memberships SELECT i, i, 10000, 7000, now() - interval '1 day', NULL, true "
        "FROM generate_series(2, 4) i; "
        "INSERT INTO llm_calls SELECT gen_random_uuid(), i, 3000, 'm', 'OK', now() FROM generate_series(2, 4) i",
    )
    asked = discovered(catalog_of)
    assert asked.mapping is None
    [gap] = [gap for gap in asked.gaps if gap.stops == "everything"]
    assert "equals the used tokens of 0 users, and the tokens left of 3. trueup reads it as used tokens" in gap.why
    given = {"subscription": {"tokens_remaining": "tokens_used", "counts": "down"}}
    answered = propose(catalog_of, read_catalog(catalog_of), given)
    assert answered.settings["subscription"]["counter"] == {"column": "tokens_used", "counts": "down"}


def test_a_host_whose_counter_counts_the_other_way_is_not_set_up(
    catalog_of: Connection,  # noqa: F811
) -> None:
    script(catalog_of, USED_HOST)
    mapping = discovered(catalog_of).mapping
    assert mapping is not None
    script(
        catalog_of,
        "INSERT INTO memberships VALUES (2, 2, 10000, 3000, now() - interval '1 day', NULL, true); "
        "INSERT INTO llm_calls VALUES (gen_random_uuid(), 2, 3000, 'm', 'OK', now())",
    )
    names = mapping.subscription.model_copy(update={"counts": None})
    with catalog_of.engine.begin() as connection, pytest.raises(NotInstalledError, match="equals the used tokens"):
        check_host(connection, mapping.model_copy(update={"subscription": names}))
    with catalog_of.engine.begin() as connection:
        check_host(connection, mapping)
