"""trueup reports on a working Django project, attaches, enforces, reconciles and detaches; its books are the judge."""

import json
import secrets
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from celery import Celery
from sqlalchemy import Engine, text

from tests.cli.conftest import trueup, trueup_json
from tests.conftest import cloned_database, settings_for
from tests.hosts.legacy import Shop
from tests.hosts.running import host_at
from tests.support.model_tasks import spend
from tests.support.worker import own_application, running_worker
from tests.worker.conftest import TASKS
from trueup.database.engine import dispose_engine
from trueup.errors import TokensDenied
from trueup.settings.settings import get_settings
from trueup.stack import StackUrls

ROLES = ("migrate", "worker", "readonly")
# The project's faults with its idle customers, and the cause that trueup must find for each.
CAUSES = {
    "miss": "missed_decrement",
    "lose": "lost_update",
    "retry": "double_decrement",
    "charge_unlogged": "charged_not_logged",
    "charge_in_vain": "failed_usage_charged",
    "buy_pack": "credit_without_grant",
    "renew_early": "renewal_without_new_window",
    "upgrade": "carried_over_tokens",
}
PAID = ("buy_pack", "renew_early", "upgrade")
FOR_A_PERSON = (*PAID, "charge_unlogged")

# From the project's tables alone.
_COUNTERS = """
    SELECT u.username, s.id, s.tokens_remaining AS counter, greatest(p.tokens_included - coalesce((
        SELECT sum(l.total_tokens) FROM ai_usage_log l
        WHERE l.user_id = s.user_id AND l.success AND l.created_at >= s.start_date), 0), 0) AS remaining
    FROM billing_subscription s
    JOIN accounts_user u ON u.id = s.user_id
    JOIN billing_tokenplan p ON p.id = s.token_plan_id
"""


@dataclass(kw_only=True)
class Lived:
    """The reports while the project worked, and the tables afterwards. `audit`: every change of a counter."""

    books: list[dict[str, Any]]
    before: list[str]
    after: list[str]
    mapping: str
    look: dict[str, Any]
    owner: str
    took: list[tuple[str, float]]
    reconciled: list[dict[str, Any]] = field(default_factory=list)
    tasks: dict[str, Any] = field(default_factory=dict)
    observed: dict[str, Any] = field(default_factory=dict)
    history: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    audit: list[Any] = field(default_factory=list)
    rows: dict[str, list[Any]] = field(default_factory=dict)
    counters: dict[str, Any] = field(default_factory=dict)

    def entries(self, kind: str) -> Counter[Any]:
        """Count the entries of one kind in the project's books."""
        return Counter(
            tuple(entry) if isinstance(entry, list) else entry for book in self.books for entry in book[kind]
        )


@contextmanager
def role_of(url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Make this process, and the workers that it starts, use that role."""
    with monkeypatch.context() as patch:
        patch.setenv("TRUEUP_DATABASE_URL", url)
        get_settings.cache_clear()
        dispose_engine()
        yield
    dispose_engine()
    get_settings.cache_clear()


def spend_now(user: int) -> int | TokensDenied:
    """Let a worker run a gated task for that user. Returns the tokens spent, or the reason of the denial."""
    sent = spend.delay(user_id=user)
    result: int | TokensDenied = sent.get(timeout=30, propagate=False)
    return result


def live(shop: Shop, app: Celery, roles: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Lived:
    opened = shop.open()
    users = {row.username: row.id for row in shop.host.execute("SELECT username, id FROM accounts_user")}
    before = shop.structure()
    named = [f"--{part}-role={role}" for part, role in roles.items()]
    reconciled, tasks = [], {}

    def reconcile() -> None:
        reconciled.append(json.loads(shop.trueup("reconcile", "--json", role=roles["worker"])))
        shop.goes_on()

    with shop.at_work() as served:
        shop.goes_on()
        shop.trueup("db", "discover", "--write")
        monkeypatch.setenv("TRUEUP_CONFIG", str(shop.folder / "trueup.toml"))
        look = json.loads(shop.trueup("drift", "report", "--read-only", "--json"))
        with role_of(shop.url, monkeypatch):
            shop.psql(trueup("db", "grants", *named).stdout)
        shop.trueup("db", "attach", "--yes", role=roles["migrate"])
        shop.goes_on()
        owner = shop.host.value("SELECT pg_get_userbyid(nspowner) FROM pg_namespace WHERE nspname = 'trueup'")
        with role_of(shop.url, monkeypatch):
            shop.psql(trueup("db", "grants", *named).stdout)
        with (
            role_of(shop.url_of(roles["worker"]), monkeypatch),
            running_worker(shop.folder / "worker.log", include=(TASKS,), concurrency=1),
        ):
            trueup("rollout", "set", "*", "observe", "--note", "look first")
            tasks["spent, observed"] = spend_now(users["spent"])
            reconcile()
            trueup("rollout", "set", "*", "enforce", "--note", "all is well")
            tasks["spent, enforced"] = spend_now(users["spent"])
            tasks["rich"] = spend_now(users["rich"])
            observed = trueup_json("rollout", "list")
            reconcile()
        kept = shop.folder / "history.jsonl"
        shop.trueup("db", "detach", "--keep-history", str(kept), "--yes", role=roles["migrate"])
        shop.goes_on()
    history: dict[str, list[dict[str, Any]]] = {}
    for line in kept.read_text().splitlines():
        entry = json.loads(line)
        history.setdefault(entry["table"], []).append(entry["row"])
    return Lived(
        books=opened + served,
        before=before,
        after=shop.structure(),
        mapping=(shop.folder / "trueup.toml").read_text(),
        look=look,
        owner=owner,
        took=shop.took,
        reconciled=reconciled,
        tasks=tasks,
        observed=observed,
        history=history,
        audit=shop.host.execute("SELECT * FROM sales_counterchange ORDER BY id").all(),
        rows={
            "logs": shop.host.execute("SELECT id, user_id, total_tokens, success FROM ai_usage_log").all(),
            "decrements": shop.host.execute("SELECT subscription_id, used_tokens FROM billing_tokenusage").all(),
            "payments": list(shop.host.execute("SELECT transaction_id FROM billing_payment").scalars()),
        },
        counters={row.username: row for row in shop.host.execute(_COUNTERS)},
    )


@pytest.fixture(scope="module")
def lived(stack: StackUrls, admin_engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lived]:
    folder, suffix = tmp_path_factory.mktemp("shop"), secrets.token_hex(4)
    roles = {role: f"{role}_{suffix}" for role in ROLES}
    with (
        pytest.MonkeyPatch.context() as patch,
        cloned_database(stack, admin_engine, "template1") as url,
        settings_for(url, stack, patch, folder),
        host_at(url) as host,
    ):
        patch.setenv("TRUEUP_RECONCILE__MIN_AGE_SECONDS", "1")
        app = own_application()
        app.control.purge()
        yield live(Shop(url=url, folder=folder, host=host), app, roles, patch)
    with admin_engine.connect() as connection:
        for role in roles.values():
            connection.execute(text(f"DROP ROLE IF EXISTS {role}"))


def test_the_project_worked_all_the_time_without_an_error(lived: Lived) -> None:
    slowest = sorted((tuple(book["slowest"]) for book in lived.books[1:]), reverse=True)
    said = ", ".join(f"{seconds * 1000:.0f} ms {what}" for seconds, what in slowest)
    steps = sum(book["steps"] for book in lived.books[1:])
    sys.stdout.write(f"the shop: {steps} transactions; the longest of each thread: {said}\n{lived.took}\n")
    assert [error for book in lived.books for error in book["errors"]] == []
    assert all(book["steps"] > 100 for book in lived.books)


def test_every_row_of_the_project_is_unchanged(lived: Lived) -> None:
    own = {row["log_id"] for row in lived.history["charge"]}
    logs = Counter((str(row.id), *row[1:]) for row in lived.rows["logs"] if str(row.id) not in own)
    assert logs == lived.entries("logs")
    assert Counter(map(tuple, lived.rows["decrements"])) == lived.entries("decrements")
    assert Counter(lived.rows["payments"]) == lived.entries("payments")


def test_each_counter_has_the_project_s_value_with_trueup_s_corrections(lived: Lived) -> None:
    written = Counter((row.subscription_id, row.after) for row in lived.audit if row.who == "shop")
    assert written == lived.entries("counters")
    last: dict[int, int] = {}
    for row in lived.audit:
        assert last.get(row.subscription_id, row.before) == row.before
        last[row.subscription_id] = row.after
    assert {row.id: row.counter for row in lived.counters.values() if row.id in last} == last


def test_trueup_changed_counters_only_by_corrections_and_charges(lived: Lived) -> None:
    made = Counter(
        (str(row.subscription_id), row.before, row.after)
        for row in lived.audit
        if row.who != "shop" and row.before != row.after
    )
    corrections = Counter(
        (row["subscription_id"], row["observed"], row["written"])
        for row in lived.history["drift"]
        if row["action"] == "corrected"
    )
    assert corrections
    assert not corrections - made
    [(subscription, before, after)] = (made - corrections).elements()
    assert (subscription, before - after) == (str(lived.counters["rich"].id), lived.tasks["rich"])


def test_the_first_report_found_the_faults(lived: Lived) -> None:
    assert 'table = "billing_tokenusage"' in lived.mapping
    assert 'table = "billing_payment"' in lived.mapping
    assert set(CAUSES.values()) <= {row["cause"] for row in lived.look["rows"]}


@pytest.mark.parametrize("act", CAUSES)
def test_customers_with_a_history_have_the_right_counter_and_cause(lived: Lived, act: str) -> None:
    """Drifts that may be paid tokens, or use without a log row, wait for a person. All others are corrected."""
    for number in range(3):
        customer = lived.counters[f"idle-{act}-{number}"]
        found = {
            row["cause"]: row["action"] for row in lived.history["drift"] if row["subscription_id"] == str(customer.id)
        }
        assert found == {CAUSES[act]: "review" if act in FOR_A_PERSON else "corrected"}
        assert (customer.counter == customer.remaining) is (act not in FOR_A_PERSON)


def test_the_gate_admitted_denied_and_charged_by_its_settings(lived: Lived) -> None:
    assert lived.tasks["spent, observed"] == lived.tasks["rich"] > 0
    denied = lived.tasks["spent, enforced"]
    assert isinstance(denied, TokensDenied)
    assert "no_tokens_remaining" in str(denied)
    [noted] = lived.observed["observed_denials"]
    assert (noted["feature_name"], noted["reason"], noted["times"]) == ("Spender", "no_tokens_remaining", 1)
    assert len(lived.history["charge"]) == 2


def test_each_part_ran_with_its_own_role(lived: Lived) -> None:
    assert lived.owner.startswith("migrate_")


def test_the_database_has_its_structure_of_before(lived: Lived) -> None:
    assert lived.after == lived.before
    assert len(lived.before) > 50
