"""`trueup db attach`."""

from sqlalchemy import create_engine
from sqlalchemy.pool import NullPool

from tests.cli.conftest import trueup
from tests.support.host import Host
from trueup.host.mapping import HostMapping
from trueup.install.example_tables import build_host_metadata


def test_attach_shows_its_plan_asks_and_reports_each_step(empty_database: str) -> None:
    engine = create_engine(empty_database, poolclass=NullPool)
    with engine.begin() as connection:
        build_host_metadata(HostMapping()).create_all(connection)
    with Host(engine) as host:
        user = host.subscriber()
        host.log(user, 100)
        said = trueup("db", "attach", stdin="n\n", code=1).stdout
        assert (
            "triggers on ai_usage_log (about 0 rows): create, with SHARE ROW EXCLUSIVE on public.ai_usage_log for some "
            "milliseconds, independent of its rows; waits at most 50 ms" in said
        )
        assert "balances from the log, in about 1 s; takes only ACCESS SHARE" in said
        assert "    TRIGGER ON TABLE public.billing_subscription\n" in said
        assert '    SELECT ("id", "user_id", ' in said
        assert "lacks" not in said
        assert "this role lacks" not in said
        assert host.value("SELECT to_regnamespace('trueup') IS NULL")
        said = trueup("db", "attach", "--yes").stdout
        assert said.endswith("Balances are built: 1.\nBalances agree with the log: ready.\n")
        assert "triggers on ai_usage_log (about 0 rows): exist" in trueup("db", "attach", "--yes").stdout
        assert "9,900" in trueup("tokens", "show", user).stdout
    engine.dispose()


def test_a_host_that_does_not_fit_is_refused(empty_database: str) -> None:
    assert "no table" in trueup("db", "attach", "--yes", code=1).stderr


def test_attach_names_the_hosts_triggers_and_the_open_questions_in_its_plan(host: Host) -> None:
    user = host.subscriber(10_000)
    host.execute(f"UPDATE billing_subscription SET full_plan_id = {host.plan(500, kind='full')} WHERE user_id = {user}")
    host.execute(
        "CREATE FUNCTION touched() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END'; "
        "CREATE TRIGGER touches BEFORE UPDATE ON billing_subscription FOR EACH ROW EXECUTE FUNCTION touched(); "
        "CREATE TRIGGER cleans BEFORE INSERT ON ai_usage_log FOR EACH ROW EXECUTE FUNCTION touched()"
    )
    said = trueup("db", "attach", "--yes").stdout
    assert (
        "triggers of the host's that may change the counter or the log:\n"
        "    cleans on ai_usage_log: it may change rows of the log\n"
        "    touches on billing_subscription\n" in said
    )
    assert "question: Some subscriptions (1) have a token plan and a full plan. trueup counts the token plan" in said
