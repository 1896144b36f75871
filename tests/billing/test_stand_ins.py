"""What discovery proposes for tables and columns that a host does not have, and what it leaves to a person."""

import pytest
from sqlalchemy import Connection

from billing.discovery.toml_file import host_section, read_host
from billing.install import check_host
from tests.billing.test_discovery import (
    catalog_of,  # noqa: F401 - a fixture
    certainties,
    discovered,
    script,
)

SMALL_HOST = """
    CREATE TABLE memberships (id bigserial PRIMARY KEY, user_id bigint NOT NULL UNIQUE, quota int NOT NULL,
        tokens_left int NOT NULL, started_at timestamptz NOT NULL, ends_at timestamptz, is_active boolean NOT NULL);
    CREATE TABLE llm_calls (id uuid PRIMARY KEY, user_id bigint NOT NULL, tokens int NOT NULL, model text,
        status text NOT NULL, created_at timestamptz NOT NULL);
    CREATE INDEX ON llm_calls (user_id, created_at);
    INSERT INTO llm_calls SELECT gen_random_uuid(), 1, 5, 'm', said, now() FROM unnest(ARRAY['OK', 'failed']) said;
"""


def test_what_stands_for_missing_columns_and_tables_is_proposed_where_it_is_sure(
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
        # Two words that say so, none, and two columns that might: a person decides.
        (
            "UPDATE llm_calls SET status = 'done' WHERE status = 'failed'",
            "usage_log.success",
            "success = {value = true}",
        ),
        ("UPDATE llm_calls SET status = 'x'", "usage_log.success", "success = {value = true}"),
        ("ALTER TABLE llm_calls ADD outcome text DEFAULT 'ok'", "usage_log.success", "success = {value = true}"),
        ("ALTER TABLE memberships DROP ends_at", "subscription.end_date", 'end_date = {value = "infinity"}'),
        ("ALTER TABLE memberships DROP is_active", "subscription.is_active", "is_active = {value = true}"),
        ("ALTER TABLE memberships DROP quota", "token_plan.table", "under [host.token_plan]"),
    ],
)
def test_what_decides_who_may_spend_is_left_to_a_person(
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
