"""Conditions and expressions of the mapping: the setup refuses unusable ones and accepts the others."""

from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import Engine, create_engine, text
from sqlalchemy.engine import make_url
from sqlalchemy.pool import NullPool

from tests.support.host import pooled_engine
from trueup.doctor.host import check_mapping
from trueup.errors import NotInstalledError, TrueupError
from trueup.host.expressions import expression_problem, wrong_expression
from trueup.host.mapping import HostMapping
from trueup.host.setting_values import quote_literal
from trueup.install.install import check_host
from trueup.preview.scan import scan
from trueup.settings.settings import Settings

TABLES = """
    CREATE SCHEMA app;
    CREATE TYPE app.state AS ENUM ('ok', 'failed', 'late');
    CREATE DOMAIN app.tokens AS integer CHECK (VALUE >= 0);
    CREATE FUNCTION app.double(integer) RETURNS integer IMMUTABLE LANGUAGE sql AS 'SELECT 2 * $1';
    CREATE TABLE app."Subs" (id bigint PRIMARY KEY, user_id bigint UNIQUE, start_date timestamptz, "Left %s" integer,
        base integer, "Bonus" smallint, gift bigint, price numeric, note text, size app.tokens, trial_end timestamptz);
    CREATE TABLE app.log (id uuid PRIMARY KEY, user_id bigint, total_tokens integer, created_at timestamptz, ok boolean,
        is_test boolean NOT NULL DEFAULT false, state app.state, kind varchar(20), code smallint, extra jsonb,
        number serial, cost numeric, half integer GENERATED ALWAYS AS (total_tokens / 2) STORED);
    CREATE INDEX ON app.log (user_id, created_at);
"""


def mapped(*, included: Any = None, counts: Any = None, **log: Any) -> HostMapping:
    return HostMapping.model_validate(
        {
            "user": False,
            "token_plan": False,
            "full_plan": False,
            "subscription": {
                "table": "app.Subs",
                "tokens_remaining": "Left %s",
                "end_date": {"value": "infinity"},
                "is_active": {"value": True},
                "tokens_included": {"expression": included} if included else {"value": 5},
            },
            "usage_log": {
                "table": "app.log",
                "section": {"value": "chat"},
                "prompt_tokens": {"value": 0},
                "completion_tokens": {"value": 0},
                "response_time_ms": {"value": 0},
                "model_name": {"value": ""},
                "metadata": {"value": {}},
                "success": "ok",
                "counts": {"expression": counts} if isinstance(counts, str) else counts,
                **log,
            },
        }
    )


@pytest.fixture
def engine(empty_database: str) -> Iterator[Engine]:
    engine = pooled_engine(empty_database)
    with engine.begin() as connection:
        connection.exec_driver_sql(TABLES.replace("%", "%%"))
    yield engine
    engine.dispose()


def problems(engine: Engine, mappings: dict[str, HostMapping]) -> dict[str, str | None]:
    """Return the problem of each mapping, None for a good one. Check that no trial leaves anything behind."""
    said = {}
    with engine.connect() as connection:
        for name, mapping in mappings.items():
            problem = expression_problem(connection, mapping)
            said[name] = None if problem is None else " ".join(problem)
        assert connection.scalar(text("SELECT to_regclass('pg_temp.trueup_row')")) is None
        assert connection.scalar(text("SELECT current_setting('search_path')")) == '"$user", public'
        assert connection.scalar(text("SELECT nextval('app.log_number_seq')")) == 1
    return said


GOOD_TOKENS = (
    '{row}.base + coalesce({row}."Bonus", 0)',
    "{row}.gift",
    '{row}."Bonus"',
    "app.double({row}.base)",
    "CASE WHEN {row}.note LIKE '%pro:%' THEN 100 ELSE 5 END",
    "CAST({row}.price * 100 AS bigint)",
    "CAST({row}.size AS integer)",
    "{row}.base / 2 + {row}.gift % 7",
)
BAD_TOKENS = {
    "{row}.nothing": "column {row}.nothing does not exist. Correct it",
    "base + {row}.base": 'column reference "base" is ambiguous. Name the row\'s columns as {row}.column',
    "{row}.base +": "syntax error",
    "{row}.price": "its type is numeric. Cast it: it must be smallint or integer or bigint",
    "{row}.note": "its type is text",
    "{row}.base > 5": "its type is boolean",
    "{row}.size": "its type is app.tokens",
    "{row}.base, {row}.gift": "its type is record",
    "(SELECT 5)": "it reads more than its row",
    "(SELECT count(*) FROM app.log)": "it reads more than its row",
    "CAST(sum({row}.base) AS bigint)": "it reads more than its row",
    "generate_series(1, {row}.base)": "it reads more than its row",
    "CASE WHEN {row}.trial_end > now() THEN 1 ELSE 2 END": "it does not always return the same value for the same row",
    "CAST(random() * 10 AS integer)": "it does not always return the same value for the same row",
    "{row}.base / {row}.gift": "it divides by a value that may be 0 for a row",
    "{row}.base / 2 / {row}.gift": "it divides by a value that may be 0 for a row",
    "{row}.base / 0": "it divides by a value that may be 0 for a row",
    "mod({row}.base, {row}.base)": "it divides by a value that may be 0 for a row",
    "CAST({row}.note AS integer)": "it casts text or jsonb, which may fail for a row",
    "double({row}.base)": "function double(integer) does not exist",
}


def test_tokens_may_be_any_whole_number_expression_over_the_row(engine: Engine) -> None:
    good = problems(engine, {one: mapped(included=one) for one in GOOD_TOKENS})
    assert good == dict.fromkeys(GOOD_TOKENS)


def test_unusable_expressions_for_tokens_are_refused_with_the_remedy(engine: Engine) -> None:
    said = problems(engine, {one: mapped(included=one) for one in BAD_TOKENS})
    for one, wanted in BAD_TOKENS.items():
        assert str(said[one]).startswith("host.subscription.tokens_included: "), (one, said[one])
        assert wanted in str(said[one]), (one, said[one])


def test_a_subscriptions_column_of_tokens_is_a_whole_number(engine: Engine) -> None:
    fits = mapped(included="{row}.base")
    said = problems(
        engine,
        {
            name: fits.model_copy(
                update={"subscription": fits.subscription.model_copy(update={"tokens_included": name})}
            )
            for name in ("base", "Bonus", "gift", "size", "price", "note")
        },
    )
    assert [said[name] for name in ("base", "Bonus", "gift", "size")] == [None] * 4
    assert said["price"] == (
        "host.subscription.tokens_included: its type is numeric. Cast it: it must be smallint or integer or bigint."
    )
    assert "its type is text" in str(said["note"])


GOOD_COUNTS = (
    "{row}.ok",
    "{row}.ok AND NOT {row}.is_test AND {row}.kind IS DISTINCT FROM 'refund'",
    "{row}.ok AND coalesce({row}.code, 200) BETWEEN 200 AND 299 AND {row}.total_tokens > 0",
    "{row}.ok AND coalesce({row}.state, 'ok') IN ('ok', 'late')",
    "{row}.ok AND coalesce(lower({row}.extra ->> 'kind'), '') NOT LIKE 'test%'",
    "{row}.ok AND CASE WHEN {row}.cost > 0 THEN true ELSE {row}.cost IS NULL END",
    "{row}.ok AND {row}.half = 1 AND {row}.user_id IS NOT NULL",
    "{row}.ok AND CAST(coalesce({row}.kind, 'ok') AS text) = 'ok'",
)
BAD_COUNTS = {
    "{row}.total_tokens": "its type is integer. Cast it: it must be boolean",
    "{row}.created_at > now() - interval '1 day'": "it does not always return the same value for the same row",
    "{row}.ok AND 100 / {row}.code > 1": "might fail for a row, and the host's own write of the row would fail too",
    "{row}.ok AND CAST({row}.kind AS integer) = 1": "might fail for a row",
    "{row}.ok AND CAST(CAST({row}.kind AS text) AS integer) = 1": "might fail for a row",
    "{row}.ok AND {row}.total_tokens + {row}.code > 5": "might fail for a row",
    "{row}.ok AND {row}.kind ~ {row}.kind": "might fail for a row",
    "{row}.ok AND app.double({row}.code) > 5": "might fail for a row",
    "CAST({row}.total_tokens AS app.tokens) = 5": "might fail for a row",
    "{row}.half IS NULL": "the rows that trueup writes would not count",
    "EXISTS (SELECT FROM app.log)": "it reads more than its row",
    "{row}.ok AND {row}.kind = 'chat'": "the rows that trueup writes would not count",
    "{row}.ok AND {row}.is_test": "the rows that trueup writes would not count",
    "NOT {row}.is_test": "a row that trueup writes of a failed call would count",
}


def test_a_condition_that_can_not_fail_is_accepted(engine: Engine) -> None:
    good = problems(engine, {one: mapped(counts=one) for one in GOOD_COUNTS})
    assert good == dict.fromkeys(GOOD_COUNTS)


def test_an_unusable_condition_for_rows_is_refused(engine: Engine) -> None:
    said = problems(engine, {one: mapped(counts=one) for one in BAD_COUNTS})
    for one, wanted in BAD_COUNTS.items():
        assert str(said[one]).startswith("host.usage_log.counts: "), (one, said[one])
        assert wanted in str(said[one]), (one, said[one])


def test_a_log_without_a_column_of_success_has_no_rows_of_failed_calls(engine: Engine) -> None:
    assert problems(engine, {"": mapped(counts="NOT {row}.is_test", success={"value": True})}) == {"": None}


def test_a_condition_is_tried_with_the_values_that_trueup_writes(engine: Engine) -> None:
    said = problems(
        engine,
        {
            "enum": mapped(counts={"column": "state", "equals": ["ok", "late"], "failed": "failed"}),
            "flag": mapped(counts={"column": "ok", "equals": True, "failed": False}),
            "number": mapped(counts={"column": "code", "equals": 200, "failed": 500}),
            "no such label": mapped(counts={"column": "state", "equals": "okay"}),
            "no such failure": mapped(counts={"column": "state", "equals": "ok", "failed": "broken"}),
            "no number": mapped(counts={"column": "code", "equals": "ok"}),
            "written otherwise": mapped(counts={"column": "code", "equals": "0200"}),
            "too long": mapped(counts={"column": "kind", "equals": "x" * 21}),
        },
    )
    assert (said["enum"], said["flag"], said["number"]) == (None, None, None)
    assert 'invalid input value for enum app.state: "okay"' in str(said["no such label"])
    assert 'invalid input value for enum app.state: "broken"' in str(said["no such failure"])
    assert "invalid input syntax for type smallint" in str(said["no number"])
    assert "the rows that trueup writes would not count" in str(said["written otherwise"])
    assert "value too long" in str(said["too long"])


def test_the_setup_the_preview_and_the_doctor_name_the_setting_and_the_remedy(engine: Engine) -> None:
    wrong = mapped(included="{row}.price")
    with engine.connect() as connection:
        with pytest.raises(
            NotInstalledError, match=r"tokens_included: its type is numeric\. Nothing was changed\. Cast"
        ):
            check_host(connection, wrong)
        told = list(check_mapping(connection, Settings(host=wrong)))
        assert ["tokens_included: its type is numeric" in finding.what for finding in told] == [True]
        assert [
            finding.level for finding in check_mapping(connection, Settings(host=mapped(included="{row}.gift")))
        ] == ["ok"]
        missing = mapped(included="{row}.gone + {row}.base")
        with pytest.raises(NotInstalledError, match=r"no column app\.Subs\.gone"):
            check_host(connection, missing)
        [gone] = check_mapping(connection, Settings(host=missing))
        assert "host.subscription.tokens_included" in str(gone.remedy)
    with pytest.raises(TrueupError, match=r"tokens_included: its type is numeric\. Nothing was read\. Cast"):
        scan(engine, wrong, lambda checked, findings: None)
    with pytest.raises(TrueupError, match=r"host\.subscription\.tokens_included: app\.Subs has no column gone"):
        scan(engine, missing, lambda checked, findings: None)
    with pytest.raises(TrueupError, match=r"host\.usage_log\.counts: app\.log has no column gone"):
        scan(engine, mapped(counts={"column": "gone", "equals": "ok"}), lambda checked, findings: None)


def test_a_column_that_the_database_computes_is_read_and_never_written(engine: Engine) -> None:
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.exec_driver_sql(
            "ALTER TABLE app.log ADD fine boolean GENERATED ALWAYS AS (ok AND NOT is_test) STORED"
        )
        wrong = mapped(success="fine")
        with pytest.raises(NotInstalledError, match=r"app\.log\.fine is computed by the database.*usage_log\.counts"):
            check_host(connection, wrong)
        [finding] = check_mapping(connection, Settings(host=wrong))
        assert (finding.level, finding.detail["column"]) == ("error", "app.log.fine")
    assert problems(engine, {"": mapped(counts="{row}.fine")}) == {"": None}


def test_a_label_of_an_enum_that_was_renamed_is_named(engine: Engine) -> None:
    mapping = mapped(counts={"column": "state", "equals": ["ok", "late"], "failed": "failed"})
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        assert wrong_expression(connection, mapping) is None
        connection.exec_driver_sql("ALTER TYPE app.state RENAME VALUE 'late' TO 'tardy'")
        [finding] = check_mapping(connection, Settings(host=mapping))
        assert 'host.usage_log.counts: invalid input value for enum app.state: "late"' in finding.what
        otherwise = wrong_expression(connection, mapped(counts={"column": "code", "equals": "0200"}))
        assert otherwise == (
            "host.usage_log.counts: code can't have the value '0200'.",
            "Write it as PostgreSQL shows it.",
        )


def test_a_role_without_the_right_to_temporary_tables_is_refused_with_the_remedy(engine: Engine) -> None:
    name = f"poor_{engine.url.database}"
    with engine.begin() as connection:
        connection.exec_driver_sql(
            f"REVOKE TEMPORARY ON DATABASE {engine.url.database} FROM PUBLIC; CREATE ROLE {name} LOGIN; "
            f'GRANT USAGE ON SCHEMA app TO {name}; GRANT SELECT ON app.log, app."Subs" TO {name}'
        )
    poor = create_engine(make_url(engine.url).set(username=name), poolclass=NullPool)
    with poor.connect() as connection:
        problem = expression_problem(connection, mapped(counts="{row}.ok"))
        assert problem is not None
        assert "GRANT TEMPORARY ON DATABASE" in problem[1]
        assert wrong_expression(connection, mapped(counts="{row}.ok")) is None
    with engine.begin() as connection:
        connection.exec_driver_sql(f"DROP OWNED BY {name}; DROP ROLE {name}")


def test_a_value_may_be_any_word(engine: Engine) -> None:
    """Also a word with a meaning in the statements of the trial."""
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE TYPE app.outcome AS ENUM ('SUCCEEDED', 'FAILED')")
        connection.exec_driver_sql("ALTER TABLE app.log ADD outcome app.outcome NOT NULL DEFAULT 'SUCCEEDED'")
    compared = mapped(counts={"column": "outcome", "equals": "SUCCEEDED", "failed": "FAILED"})
    expression = mapped(
        counts="{row}.outcome = 'SUCCEEDED' AND coalesce({row}.kind, 'EXPRESSION') <> 'HOST'", success={"value": True}
    )
    assert problems(engine, {"compared": compared, "expression": expression}) == {"compared": None, "expression": None}


@pytest.mark.parametrize("standard", ["on", "off"])
def test_no_value_ends_the_string_that_it_is_in(engine: Engine, standard: str) -> None:
    with engine.connect() as connection:
        connection.exec_driver_sql(f"SET standard_conforming_strings = {standard}")
        for value in (r"\'); DROP TABLE app.log; --", r"a\b", "it's", "\\"):
            statement = f"SELECT {quote_literal(value)}"
            assert connection.exec_driver_sql(statement).scalar_one() == value
