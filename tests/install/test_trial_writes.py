"""What refuses trueup's writes in the host's real tables is found at the setup, and nothing is left of the trial."""

import pytest

from tests.support.books import dump
from tests.support.host import Host
from tests.support.sessions import locked
from tests.support.work import balance, hold_tokens
from trueup.accounts.account import read_account
from trueup.database.engine import connect, transaction
from trueup.errors import NotInstalledError
from trueup.host.mapping import HostMapping
from trueup.install.install import check_host, install

AUDIT = """
    CREATE FUNCTION audit() RETURNS trigger LANGUAGE plpgsql AS
    'BEGIN PERFORM current_setting(''app.user''); RETURN NEW; END';
"""
DROP = "CREATE FUNCTION audit() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END'; "
REFUSED = {
    f"{AUDIT} CREATE TRIGGER audit BEFORE UPDATE ON billing_subscription FOR EACH ROW EXECUTE FUNCTION audit()": (
        r"billing_subscription refuses that trueup lowers tokens_remaining \(unrecognized configuration parameter"
    ),
    f"{AUDIT} CREATE TRIGGER audit AFTER INSERT ON ai_usage_log FOR EACH ROW EXECUTE FUNCTION audit()": (
        r"ai_usage_log refuses a row of trueup's \(unrecognized configuration parameter"
    ),
    f"{AUDIT} CREATE CONSTRAINT TRIGGER audit AFTER INSERT ON ai_usage_log DEFERRABLE INITIALLY DEFERRED "
    "FOR EACH ROW EXECUTE FUNCTION audit()": r"ai_usage_log refuses a row of trueup's",
    f"{DROP} CREATE TRIGGER audit BEFORE INSERT ON ai_usage_log FOR EACH ROW EXECUTE FUNCTION audit()": (
        r"ai_usage_log refuses a row of trueup's \(a trigger drops it\)"
    ),
}


@pytest.mark.parametrize("statements", REFUSED)
def test_a_trigger_that_refuses_trueups_writes_is_refused_at_the_setup(host: Host, statements: str) -> None:
    host.subscriber()
    with host.engine.begin() as connection:
        connection.exec_driver_sql(statements)
    with transaction() as connection, pytest.raises(NotInstalledError, match=REFUSED[statements]):
        install(connection, HostMapping(), with_host_tables=False)


def test_a_trial_leaves_nothing(host: Host) -> None:
    user = host.subscriber(1_000)
    with connect() as connection:
        hold_tokens(connection, user, 100)
    before = dump(host)
    with transaction() as connection:
        check_host(connection, HostMapping())
    assert dump(host) == before
    with connect() as connection:
        assert read_account(connection, user).consumed == 0
    assert balance(host, user) == (0, 100)


@pytest.mark.parametrize("lock", ["LOCK TABLE ai_usage_log IN SHARE MODE", "SELECT * FROM accounts_user FOR UPDATE"])
def test_a_trial_waits_for_none_of_the_hosts_locks(host: Host, lock: str) -> None:
    host.subscriber()
    with locked(host, lock), transaction() as connection:
        check_host(connection, HostMapping())
