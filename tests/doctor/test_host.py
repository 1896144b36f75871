"""The doctor's findings about the host's tables: names, types, indexes, partitions."""

import pytest
from sqlalchemy import Connection

from tests.doctor.test_doctor import found, mapped, only, set_up
from tests.support.host import Host
from trueup.doctor.host import check_log_index, check_mapping, check_subscription_index
from trueup.doctor.installation import check_triggers
from trueup.settings.settings import get_settings


def test_a_column_that_a_migration_renamed_is_named_with_the_nearest_name(host: Host, connection: Connection) -> None:
    host.execute("ALTER TABLE ai_usage_log RENAME total_tokens TO tokens_total")
    finding = only(check_mapping, connection)
    assert finding.what == "ai_usage_log has no column total_tokens; the nearest name is tokens_total."
    assert "host.usage_log.total_tokens" in str(finding.remedy)
    assert finding.detail["nearest"] == "tokens_total"


def test_a_table_that_a_migration_renamed_is_named_with_the_nearest_name(host: Host, connection: Connection) -> None:
    host.execute("CREATE SCHEMA app; ALTER TABLE billing_tokenplan SET SCHEMA app")
    host.execute("ALTER TABLE app.billing_tokenplan RENAME TO billing_token_plans")
    finding = only(check_mapping, connection)
    assert finding.what == "There is no table billing_tokenplan; the nearest name is app.billing_token_plans."
    assert "host.token_plan.table" in str(finding.remedy)


def test_a_column_that_only_the_views_show_is_a_warning(
    host: Host, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    host.execute("ALTER TABLE accounts_user RENAME email TO mail; ALTER TABLE billing_fullplan DROP name")
    warned = only(check_mapping, connection)
    assert warned.level == "warning"
    assert warned.what.startswith(
        "There is no column accounts_user.email, billing_fullplan.name: the API's account and plan"
    )
    assert 'username = {value = ""}' in str(warned.remedy)
    mapped(monkeypatch, USER__EMAIL="mail", FULL_PLAN__NAME='{"value": "a plan"}')
    assert only(check_mapping, connection).level == "ok"


@pytest.mark.parametrize(
    ("change", "column"),
    [
        ("billing_subscription ALTER start_date TYPE date", "billing_subscription.start_date"),
        ("ai_usage_log ALTER metadata DROP DEFAULT, ALTER metadata TYPE json", "ai_usage_log.metadata"),
        ("ai_usage_log ALTER total_tokens DROP DEFAULT, ALTER total_tokens TYPE numeric", "ai_usage_log.total_tokens"),
        ("ai_usage_log ADD cost numeric NOT NULL", "ai_usage_log.cost"),
    ],
)
def test_a_column_that_does_not_fit_is_named(host: Host, connection: Connection, change: str, column: str) -> None:
    host.execute(f"ALTER TABLE {change}")
    finding = only(check_mapping, connection)
    assert finding.level == "error"
    assert finding.what.startswith(column)


def test_smaller_integers_and_domains_fit(host: Host, connection: Connection) -> None:
    host.execute("CREATE DOMAIN tokens AS integer CHECK (value >= 0)")
    host.execute("ALTER TABLE ai_usage_log ALTER completion_tokens TYPE tokens")
    host.execute("ALTER TABLE billing_subscription ALTER tokens_remaining TYPE smallint")
    assert only(check_mapping, connection).level == "ok"


def test_a_new_constraint_that_refuses_trueups_rows_is_reported(host: Host, connection: Connection) -> None:
    host.execute("ALTER TABLE ai_usage_log ADD CONSTRAINT known CHECK (section ~ '^[0-9]+$')")
    finding = only(check_mapping, connection)
    assert (finding.level, "would refuse trueup's row of section 'chat'" in finding.what) == ("error", True)


def test_times_without_a_zone_are_read_as_utc_and_reported(host: Host, connection: Connection) -> None:
    host.execute("ALTER TABLE billing_subscription ALTER end_date TYPE timestamp")
    finding = only(check_mapping, connection)
    assert (finding.level, finding.detail["column"]) == ("warning", "end_date")
    assert "reads it as UTC" in finding.what


def test_user_ids_of_another_type_than_in_the_mapping_are_reported(
    host: Host, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    mapped(monkeypatch, USER_ID_TYPE="uuid")
    assert {finding.detail["column"] for finding in found(check_mapping, connection)} == {"id", "user_id"}


def test_a_log_without_a_usable_index_gets_the_statement_that_makes_it(host: Host, connection: Connection) -> None:
    host.execute("DROP INDEX ai_usage_log_user_created; CREATE INDEX partial ON ai_usage_log (user_id) WHERE success")
    finding = only(check_log_index, connection)
    assert finding.level == "warning"  # as long as the log is small
    assert "reads the whole log" in finding.what
    host.execute("CREATE INDEX other ON ai_usage_log (user_id, section)")
    assert "reads all rows of the user" in only(check_log_index, connection).what
    for statement in finding.detail["statements"]:
        host.execute(statement)
    assert only(check_log_index, connection).level == "ok"


def test_a_large_log_without_an_index_is_an_error(host: Host, connection: Connection) -> None:
    host.execute(
        "DROP INDEX ai_usage_log_user_created; UPDATE pg_class SET reltuples = 1e6 WHERE relname = 'ai_usage_log'"
    )
    assert only(check_log_index, connection).level == "error"


def test_an_invalid_index_is_not_used(host: Host, connection: Connection) -> None:
    host.execute(
        "UPDATE pg_index SET indisvalid = false WHERE indexrelid = CAST('ai_usage_log_user_created' AS regclass)"
    )
    finding = only(check_log_index, connection)
    assert "DROP INDEX CONCURRENTLY public.ai_usage_log_user_created" in str(finding.remedy)


def test_users_with_several_subscriptions_are_an_error_and_a_missing_unique_index_is_a_warning(
    host: Host, connection: Connection
) -> None:
    assert only(check_subscription_index, connection).level == "ok"
    host.execute("ALTER TABLE billing_subscription DROP CONSTRAINT billing_subscription_user_id_key")
    host.execute("CREATE INDEX slow ON billing_subscription (user_id)")  # not unique
    user = host.subscriber()
    finding = only(check_subscription_index, connection)
    assert finding.level == "warning"
    host.execute(
        "INSERT INTO billing_subscription (id, user_id, start_date) SELECT 999, :user, now()",
        user=user,
    )
    assert only(check_subscription_index, connection).detail["users"] == 1
    host.execute("DELETE FROM billing_subscription WHERE id = 999")
    for statement in finding.detail["statements"]:
        host.execute(statement)
    assert only(check_subscription_index, connection).level == "ok"


@pytest.fixture
def partitioned(host: Host) -> Host:
    """A host whose log is partitioned by month."""
    host.execute(
        "CREATE TABLE log (LIKE ai_usage_log INCLUDING DEFAULTS) PARTITION BY RANGE (created_at); "
        "CREATE TABLE log_old PARTITION OF log FOR VALUES FROM (MINVALUE) TO ('2024-12-01'); "
        "CREATE TABLE log_new PARTITION OF log FOR VALUES FROM ('2024-12-01') TO (MAXVALUE)"
    )
    return host


def test_a_partitioned_log_gets_an_index_that_never_blocks_the_host(
    partitioned: Host, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    mapped(monkeypatch, USAGE_LOG__TABLE="log")
    finding = only(check_log_index, connection)
    assert [statement.split(" (")[0] for statement in finding.detail["statements"]] == [
        "CREATE INDEX CONCURRENTLY ON public.log_new",
        "CREATE INDEX CONCURRENTLY ON public.log_old",
        'CREATE INDEX ON "public"."log"',
    ]
    for statement in finding.detail["statements"]:
        partitioned.execute(statement)
    assert only(check_log_index, connection).level == "ok"


def test_partitions_made_after_the_setup_are_named_until_it_is_run_again(
    partitioned: Host, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    mapped(monkeypatch, USAGE_LOG__TABLE="log")
    set_up(partitioned, get_settings().host)
    assert only(check_triggers, connection).level == "ok"
    partitioned.execute("ALTER TABLE log DETACH PARTITION log_old")
    partitioned.execute("CREATE TABLE log_none PARTITION OF log FOR VALUES FROM (MINVALUE) TO ('2024-12-01')")
    finding = only(check_triggers, connection)
    assert (finding.level, finding.detail["partitions"]) == ("warning", ["public.log_none"])
    set_up(partitioned, get_settings().host)
    assert only(check_triggers, connection).level == "ok"


def test_what_the_rows_leave_open_is_asked_until_the_mapping_answers(
    host: Host, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    host.subscriber(-1, counter=-1)
    user = host.subscriber(10_000)
    host.execute(f"UPDATE billing_subscription SET full_plan_id = {host.plan(500, kind='full')} WHERE user_id = {user}")
    asked = found(check_mapping, connection)
    assert [(one.level, one.detail["setting"]) for one in asked] == [
        ("warning", "host.subscription.tokens_included"),
        ("warning", "host.subscription.unlimited"),
    ]
    mapped(monkeypatch, SUBSCRIPTION__TOKENS_INCLUDED="first", SUBSCRIPTION__UNLIMITED="-1")
    assert only(check_mapping, connection).level == "ok"
