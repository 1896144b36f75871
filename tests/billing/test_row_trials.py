"""What a log would refuse of trueup's rows is refused at the setup: later their tokens are spent."""

import pytest
from sqlalchemy import Connection, text

from billing import db
from billing.errors import NotInstalledError
from billing.install import install
from billing.mapping import HostMapping
from billing.row_trials import row_problem
from billing.sections import SECTIONS
from billing.tracking import track_ai_usage
from billing.usage import list_usage
from tests.support.host import Host
from tests.support.work import charge_tokens, hold_tokens

LOG = "ALTER TABLE ai_usage_log"
MODELS = f"CREATE TABLE models (name text PRIMARY KEY); {LOG} ADD FOREIGN KEY (model_name) REFERENCES models"
KINDS = f"CREATE TABLE kinds (name varchar(50) PRIMARY KEY); {LOG} ADD FOREIGN KEY (section) REFERENCES kinds"
REFUSED = {
    f"CREATE TYPE kind AS ENUM ('qa'); {LOG} ALTER section TYPE kind USING NULL": (
        "would refuse trueup's row of section 'chat' .column \"section\" is of type",
        r"Map columns that take any text",
    ),
    f"{LOG} ALTER section TYPE varchar(12)": (
        r"section 'embedding_generation' \(value too long",
        "Make the column longer",
    ),
    f"{LOG} ADD CONSTRAINT known CHECK (section IN ('chat', 'other'))": (
        r"section 'embedding_generation' \(new row .* violates check constraint \"known\"",
        "Let the constraint allow it",
    ),
    f"CREATE DOMAIN little AS integer CHECK (VALUE < 2); {LOG} ALTER total_tokens TYPE little": (
        "violates check constraint",
        "Let the constraint",
    ),
    MODELS: (r"ai_usage_log\.model_name must stand in models, and may not", "Drop that foreign key"),
    KINDS: ("must stand in kinds, where there is no chat, embedding_generation", "Add them there"),
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


def test_checks_keys_and_triggers_that_take_our_rows_are_no_matter(host: Host, connection: Connection) -> None:
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


@pytest.mark.parametrize("column_type", ["varchar(8)", "char(8)", "short"])
def test_names_of_models_and_errors_are_cut_to_what_the_column_holds(host: Host, column_type: str) -> None:
    host.execute("CREATE DOMAIN short AS varchar(8)")
    host.execute(f"{LOG} ALTER model_name TYPE {column_type}, ALTER error_message TYPE {column_type}")
    with host.engine.begin() as setup:
        install(setup, HostMapping(), with_host_tables=False)
    user = host.subscriber(1_000)
    hold = db.retrying(lambda worker: hold_tokens(worker, user, 100))
    assert db.retrying(lambda worker: charge_tokens(worker, hold, 10)).recorded
    report = {"section": "chat", "prompt_tokens": 1, "completion_tokens": 1, "model_name": "claude-haiku", "key": "k"}
    assert track_ai_usage(user, **report).recorded
    again = track_ai_usage(user, **report)
    assert (again.recorded, again.differs) == (False, False)
    failed = {**report, "key": "f", "success": False, "error_message": "rate limited by the provider"}
    assert track_ai_usage(user, **failed).recorded
    with db.connect() as connection:
        assert {row.model_name for row in list_usage(connection, HostMapping(), user)} == {"test-mod", "claude-h"}
    assert host.value("SELECT error_message FROM ai_usage_log WHERE NOT success") == "rate lim"


def test_a_role_that_may_make_no_temporary_table_tries_nothing(host: Host) -> None:
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
