"""A log that would refuse trueup's rows is refused at the setup: at a charge the tokens are spent already."""

import pytest
from sqlalchemy import Connection, text
from sqlalchemy.exc import OperationalError

from tests.support.host import Host
from tests.support.work import charge_tokens, hold_tokens
from trueup.database.engine import connect, transaction
from trueup.database.retry import retrying
from trueup.errors import NotInstalledError
from trueup.host.expressions import expression_problem
from trueup.host.fields import SECTIONS
from trueup.host.mapping import HostMapping
from trueup.install.install import install
from trueup.install.write_probe import row_problem
from trueup.usage.log import list_usage
from trueup.usage.tracker import track_ai_usage

LOG = "ALTER TABLE ai_usage_log"
MODELS = f"CREATE TABLE models (name text PRIMARY KEY); {LOG} ADD FOREIGN KEY (model_name) REFERENCES models"
KINDS = f"CREATE TABLE kinds (name varchar(50) PRIMARY KEY); {LOG} ADD FOREIGN KEY (section) REFERENCES kinds"
REFUSED = {
    f"CREATE TYPE kind AS ENUM ('qa'); {LOG} ALTER section TYPE kind USING NULL": (
        "would refuse trueup's row of section 'qa' .column \"section\" is of type",
        "section_type = ",
    ),
    f"{LOG} ALTER section TYPE varchar(3)": (
        r"section 'chat' \(value too long",
        "Make the column longer",
    ),
    f"{LOG} ADD CONSTRAINT known CHECK (section ~ '^[0-9]+$')": (
        r"section 'chat' \(new row .* violates check constraint \"known\"",
        "Let the constraint allow it",
    ),
    f"CREATE DOMAIN little AS integer CHECK (VALUE < 2); {LOG} ALTER total_tokens TYPE little": (
        "violates check constraint",
        "Let the constraint",
    ),
    f"{LOG} ALTER total_tokens TYPE smallint": (
        r"trueup's row of 1,200,000 tokens and 600,000 ms \(smallint out of range",
        "Make the column integer",
    ),
    f"{LOG} ALTER response_time_ms TYPE numeric(4, 2)": (r"600,000 ms \(numeric field overflow", "Make the column"),
    f"{LOG} ADD CHECK (length(model_name) <= 20)": (
        "trueup's row of model 'claude-3-5-sonnet-20241022'",
        "Let the constraint",
    ),
    MODELS: (r"ai_usage_log\.model_name has a foreign key to models, which may lack", "Drop that foreign key"),
    KINDS: ("has a foreign key to kinds, which has no rows", "Add the sections of your tasks there"),
}


def change(host: Host, statements: str) -> None:
    for statement in statements.split("; "):
        host.execute(statement)


@pytest.mark.parametrize("statements", REFUSED)
def test_a_log_that_would_refuse_our_rows_is_refused(host: Host, statements: str) -> None:
    change(host, statements)
    what, remedy = REFUSED[statements]
    with pytest.raises(NotInstalledError, match=f"{what}.*Nothing was changed.*{remedy}"), host.engine.begin() as setup:
        install(setup, HostMapping(), with_host_tables=False)


def test_checks_keys_and_triggers_that_accept_trueups_rows_are_fine(host: Host, connection: Connection) -> None:
    change(
        host,
        f"{KINDS}; {LOG} ADD CHECK (section <> '' AND total_tokens >= 0); "
        f"{LOG} ADD CHECK (created_at > '2020-01-01') NOT VALID; "
        "CREATE TABLE notes (id uuid REFERENCES ai_usage_log)".replace(KINDS, KINDS.partition(";")[0]),
    )
    for section in SECTIONS:
        host.execute("INSERT INTO kinds VALUES (:section)", section=section)
    change(host, KINDS.partition("; ")[2])
    with host.engine.begin() as setup:
        assert row_problem(setup, HostMapping()) is None
        install(setup, HostMapping(), with_host_tables=False)
        assert setup.scalar(text("SELECT to_regclass('pg_temp.trueup_own')")) is None
    hold = hold_tokens(connection, host.subscriber(), 100)
    assert charge_tokens(connection, hold, 10).recorded


@pytest.mark.parametrize(
    "statements",
    [
        f"{LOG} ADD CHECK (user_id IS NOT NULL AND id IS NOT NULL) NOT VALID",
        f"CREATE DOMAIN known AS bigint NOT NULL; {LOG} ALTER user_id TYPE known",
        f"CREATE FUNCTION good(int8) RETURNS bool LANGUAGE sql AS 'SELECT $1 <> 1'; {LOG} ADD CHECK (good(user_id))",
        f"{LOG} ADD CHECK (model_name ~ '^[a-z0-9.-]+$')",
        f"{LOG} ALTER model_name TYPE varchar(5)",
        f"{LOG} ADD CHECK (total_tokens < 100000)",
        f"CREATE DOMAIN below AS bigint; CREATE DOMAIN above AS below; {LOG} ALTER total_tokens TYPE above",
        f"{LOG} ADD place serial, ADD CHECK (place IS NOT NULL)",
        f"{LOG} ADD place bigint GENERATED ALWAYS AS IDENTITY, ADD CHECK (place IS NOT NULL)",
        f"{LOG} ADD \"select\" text DEFAULT '5%', ADD CHECK (\"select\" LIKE '5%')",
    ],
)
def test_a_log_that_accepts_rows_of_a_real_user_is_not_refused(host: Host, statements: str) -> None:
    change(host, statements)
    with host.engine.begin() as setup:
        install(setup, HostMapping(), with_host_tables=False)
    user = host.subscriber(1_000)
    hold = retrying(lambda worker: hold_tokens(worker, user, 100))
    assert retrying(lambda worker: charge_tokens(worker, hold, 10)).recorded
    assert host.value("SELECT count(*) FROM ai_usage_log") == 1


def test_an_interrupted_probe_gives_no_verdict(host: Host) -> None:
    change(host, "CREATE FUNCTION slow(text) RETURNS boolean LANGUAGE sql AS 'SELECT pg_sleep(60) IS NOT NULL'")
    change(host, f"{LOG} ADD CHECK (slow(section))")
    with transaction() as setup:
        setup.execute(text("SET LOCAL statement_timeout = '200ms'"))
        with pytest.raises(OperationalError, match="statement timeout"):
            row_problem(setup, HostMapping())


def test_a_foreign_key_to_an_unreadable_table_is_not_judged(host: Host) -> None:
    change(host, f"CREATE SCHEMA hidden; {KINDS.replace('kinds', 'hidden.kinds')}; CREATE ROLE key_trier")
    with host.engine.begin() as setup:
        assert row_problem(setup, HostMapping()) is not None
        setup.execute(text("SET LOCAL ROLE key_trier"))
        assert row_problem(setup, HostMapping()) is None
        setup.execute(text("RESET ROLE; GRANT USAGE ON SCHEMA hidden TO key_trier; SET LOCAL ROLE key_trier"))
        assert row_problem(setup, HostMapping()) is None
        setup.execute(text("RESET ROLE; GRANT SELECT ON hidden.kinds TO key_trier; SET LOCAL ROLE key_trier"))
        assert row_problem(setup, HostMapping()) is not None
        setup.rollback()
    host.execute("DROP ROLE key_trier")


@pytest.mark.parametrize("column_type", ["varchar(8)", "char(8)", "short", "shorter"])
def test_names_of_models_and_errors_are_cut_to_what_the_column_holds(host: Host, column_type: str) -> None:
    change(host, "CREATE DOMAIN short AS varchar(8); CREATE DOMAIN shorter AS short")
    host.execute(f"{LOG} ALTER model_name TYPE {column_type}, ALTER error_message TYPE {column_type}")
    with host.engine.begin() as setup:
        install(setup, HostMapping(), with_host_tables=False)
    user = host.subscriber(1_000)
    hold = retrying(lambda worker: hold_tokens(worker, user, 100))
    assert retrying(lambda worker: charge_tokens(worker, hold, 10)).recorded
    report = {"section": "chat", "prompt_tokens": 1, "completion_tokens": 1, "model_name": "claude-haiku", "key": "k"}
    assert track_ai_usage(user, **report).recorded
    again = track_ai_usage(user, **report)
    assert (again.recorded, again.differs) == (False, False)
    failed = {**report, "key": "f", "success": False, "error_message": "rate limited by the provider"}
    assert track_ai_usage(user, **failed).recorded
    with connect() as connection:
        assert {row.model_name for row in list_usage(connection, HostMapping(), user)} == {"test-mod", "claude-h"}
    assert host.value("SELECT error_message FROM ai_usage_log WHERE NOT success") == "rate lim"


def test_a_role_without_temporary_tables_skips_the_probe(host: Host) -> None:
    change(host, f"{LOG} ALTER section TYPE varchar(3); CREATE ROLE row_trier")
    with host.engine.begin() as setup:
        name = setup.scalar(text("SELECT quote_ident(current_database())"))
        setup.execute(text(f"REVOKE TEMPORARY ON DATABASE {name} FROM PUBLIC"))
        setup.execute(text("GRANT SELECT ON ai_usage_log TO row_trier"))
        assert row_problem(setup, HostMapping()) is not None
        setup.execute(text("SET LOCAL ROLE row_trier"))
        assert row_problem(setup, HostMapping()) is None
        setup.rollback()
    host.execute("DROP ROLE row_trier")


def test_a_condition_is_tried_without_a_user_if_user_ids_have_a_format(host: Host) -> None:
    change(host, f"CREATE DOMAIN formed AS bigint CHECK (VALUE > 1); {LOG} ALTER user_id TYPE formed")
    counts = {"expression": "{row}.success AND {row}.section <> ''"}
    mapping = HostMapping.model_validate({"usage_log": {"success": "success", "counts": counts}})
    with host.engine.begin() as setup:
        assert expression_problem(setup, mapping) is None
