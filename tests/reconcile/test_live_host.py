"""A host process writes at full speed while reconcile runs; the tests compare the results with the host's own ledger.

A long test does this for a minute.
"""

import json
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, text

from tests.conftest import cloned_database
from tests.support.books import assert_true
from tests.support.host import Host, pooled_engine
from tests.support.legacy.live_host import THREADS
from tests.support.legacy.loading import SUBSCRIPTION_OFFSET, WITH_ROWS, load
from tests.support.legacy.population import Person, make_population
from tests.support.waiting import DEADLINE_SECONDS
from trueup.install.install import install
from trueup.reconcile.local_run import reconcile
from trueup.reconcile.runs import RunSummary
from trueup.settings.policies import Rules
from trueup.stack import StackUrls

pytestmark = pytest.mark.xdist_group("live host")  # the tests share a slow fixture

MIN_WRITES = 1_000  # by the host to counters, however long a loaded machine needs for them
SUBSCRIPTIONS = 1_500
MIN_RUNS = 3
MIN_AGE_SECONDS = 1
ROLES = ("spender", "spender", "spender", "buyer", "renewer", "leaver")
SLOWEST_STATEMENT_SECONDS = 5.0

# The host's own audit. The row lock orders the changes of one counter, from the host and from trueup.
_AUDIT = """
    CREATE TABLE host_audit (id bigserial PRIMARY KEY, user_id bigint, subscription_id bigint, before bigint,
                             after bigint, who text);
    CREATE FUNCTION host_audit() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
        INSERT INTO host_audit (user_id, subscription_id, before, after, who)
        VALUES (new.user_id, new.id, old.tokens_remaining, new.tokens_remaining,
                CASE current_setting('application_name') WHEN 'host' THEN 'host' ELSE 'trueup' END);
        RETURN NULL;
    END $$;
    CREATE TRIGGER host_audit AFTER UPDATE OF tokens_remaining ON billing_subscription
        FOR EACH ROW EXECUTE FUNCTION host_audit()
"""

_WRITES = "SELECT count(*) FROM host_audit WHERE who = 'host'"

# Computed from the log only, without trueup's tables.
_REMAINING = """
    SELECT s.user_id, s.tokens_remaining AS counter,
           coalesce(t.tokens_included, f.tokens_included)
           - coalesce((SELECT sum(l.total_tokens) FROM ai_usage_log l
                       WHERE l.user_id = s.user_id AND l.success AND l.created_at >= s.start_date), 0) AS remaining
    FROM billing_subscription s
    LEFT JOIN billing_tokenplan t ON t.id = s.token_plan_id
    LEFT JOIN billing_fullplan f ON f.id = s.full_plan_id
"""

_DOUBTED = """
    SELECT DISTINCT user_id FROM trueup.drift
    WHERE action = 'review' AND (cause LIKE '%manual_edit%' OR evidence -> 'alternatives' ? 'manual_edit')
"""


@dataclass(kw_only=True)
class Lived:
    """The host's writes, and the findings of the runs meanwhile.

    `roles`: the roles of the users that wrote. `doubted`: users whose drift a run left for review, because a gift of
    tokens would explain it as well.
    """

    people: list[Person]
    roles: dict[int, str]
    host: dict[str, Any]
    runs: list[RunSummary] = field(default_factory=list)
    audit: list[Any] = field(default_factory=list)
    corrections: list[Any] = field(default_factory=list)
    remaining: dict[int, tuple[int, int]] = field(default_factory=dict)
    again: RunSummary
    counters_again: dict[int, int | None] = field(default_factory=dict)
    drifts: dict[int, tuple[str, str]] = field(default_factory=dict)
    doubted: set[int] = field(default_factory=set)

    def users(self, *roles: str) -> set[int]:
        return {user for user, role in self.roles.items() if role in roles}


@contextmanager
def host_process(
    url: str, people: list[Person], roles: dict[int, str], folder: Path, seed: int
) -> Iterator[subprocess.Popen[str]]:
    subscriptions = [
        {
            "user": person.user_id,
            "subscription": SUBSCRIPTION_OFFSET + person.user_id,
            "tokens": person.life.plan.tokens,
            "role": roles[person.user_id],
            "token_plan": person.life.plan.id if person.life.plan.days is None else None,
            "full_plan": None if person.life.plan.days is None else person.life.plan.id,
        }
        for person in people
        if person.user_id in roles
    ]
    plan = {
        "url": url.replace("postgresql+psycopg:", "postgresql:"),
        "subscriptions": subscriptions,
        "seed": seed,
    }
    (folder / "plan.json").write_text(json.dumps(plan))
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.support.legacy.live_host", folder / "plan.json", folder / "ledger.json"],
        cwd=Path(__file__).parents[2],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate()


def live(engine: Engine, url: str, folder: Path, *, seconds: float, seed: int) -> Lived:
    rules = Rules(min_age_seconds=MIN_AGE_SECONDS)
    people = make_population(SUBSCRIPTIONS, seed=seed, now=time.time())
    with engine.begin() as connection:
        install(connection, WITH_ROWS, with_host_tables=True)
    load(engine, people)
    at_work = [
        person.user_id
        for person in people
        if person.group == "clean"
        and person.life.is_active
        and not person.life.grants
        # A payment that may still be credited makes a counter that is too high ambiguous, so a person decides.
        and person.label != "a payment that was never credited"
        and (person.life.counter or 0) > 100_000
    ]
    roles = {user: ROLES[place % len(ROLES)] for place, user in enumerate(at_work)}
    runs = []
    with Host(engine) as host:
        with engine.begin() as connection:
            connection.execute(text(_AUDIT))
        # The host's ids continue from their current values.
        host.execute("SELECT setval(pg_get_serial_sequence('billing_tokenusage', 'id'), 1)")
        # This run finds the counters of the people at work right: from here on the journal tells all of their story.
        reconcile(engine, WITH_ROWS, rules=rules)
        with host_process(url, people, roles, folder, seed) as process:
            end = time.monotonic() + seconds
            while time.monotonic() < end or len(runs) < MIN_RUNS or host.value(_WRITES) < MIN_WRITES:
                assert process.poll() is None, "the host ended by itself"
                runs.append(reconcile(engine, WITH_ROWS, rules=rules, batch_size=100))
            _, complaints = process.communicate(timeout=DEADLINE_SECONDS)
            assert process.returncode == 0, complaints
        wait_for_age(host)
        # Two passes: a drift that the rows explained in the first one may be explained by the journal in the second.
        runs += [reconcile(engine, WITH_ROWS, rules=rules, batch_size=100) for _ in range(2)]
        lived = Lived(
            people=people,
            roles=roles,
            host=json.loads((folder / "ledger.json").read_text()),
            runs=runs,
            audit=host.execute("SELECT * FROM host_audit ORDER BY id").all(),
            corrections=host.execute(
                "SELECT user_id, subscription_id, observed, written FROM trueup.drift WHERE action = 'corrected'"
            ).all(),
            remaining={row.user_id: (row.counter, row.remaining) for row in host.execute(_REMAINING)},
            again=reconcile(engine, WITH_ROWS, rules=rules, batch_size=100),
            counters_again={row.user_id: row.counter for row in host.execute(_REMAINING)},
            doubted=set(host.execute(_DOUBTED).scalars()),
            drifts={
                row.user_id: (row.cause, row.action)
                for row in host.execute("SELECT user_id, cause, action FROM trueup.drift ORDER BY id")
            },
        )
        assert_true(host, WITH_ROWS)
    return lived


def wait_for_age(host: Host) -> None:
    """Wait until the newest row is too old to be in flight."""
    while host.value(
        "SELECT count(*) FROM ai_usage_log WHERE created_at > clock_timestamp() - make_interval(secs => :age)",
        age=MIN_AGE_SECONDS + 0.2,
    ):
        time.sleep(0.1)


@pytest.fixture(
    scope="module", params=[(5, 1), pytest.param((60, 2), marks=pytest.mark.long)], ids=lambda param: f"{param[0]} s"
)
def lived(
    request: pytest.FixtureRequest, stack: StackUrls, admin_engine: Engine, tmp_path_factory: pytest.TempPathFactory
) -> Lived:
    """A host that wrote for a number of seconds, with random actions from a seed."""
    seconds, seed = request.param
    with cloned_database(stack, admin_engine, "template1") as url:
        engine = pooled_engine(url)
        lived = live(engine, url, tmp_path_factory.mktemp("live_host"), seconds=seconds, seed=seed)
        engine.dispose()
    return lived


def test_the_host_wrote_while_reconcile_ran(lived: Lived) -> None:
    kinds = Counter(entry["kind"] for entry in lived.host["ledger"])
    assert {"log", "write", "buy", "renew", "leave", "join"} <= set(kinds)
    assert kinds["write"] > MIN_WRITES / 4
    assert len(lived.runs) > MIN_RUNS
    assert len([entry for entry in lived.audit if entry.who == "trueup"]) > 10
    sys.stdout.write(
        f"host: {lived.host['statements'] / lived.host['seconds']:.0f} statements/s, {dict(kinds)}\n"
        f"slowest: {', '.join(f'{taken * 1000:.0f} ms {what}' for taken, what in lived.host['slowest'])}\n"
        f"reconcile: {len(lived.runs)} runs, {len(lived.corrections)} corrections, "
        f"{sum(entry.who == 'host' for entry in lived.audit)} changes of counters by the host\n"
    )


def test_the_host_saw_no_error_and_no_deadlock(lived: Lived) -> None:
    assert lived.host["errors"] == []
    assert len(lived.host["slowest"]) == THREADS
    assert lived.host["slowest"][0][0] < SLOWEST_STATEMENT_SECONDS, lived.host["slowest"]


def test_the_audit_saw_every_write_of_the_host_in_order(lived: Lived) -> None:
    """The ledger's committed writes equal the audit's, in the same order for each subscription."""
    sent, seen = defaultdict(list), defaultdict(list)
    for entry in lived.host["ledger"]:
        if "after" in entry:
            sent[entry["subscription"]].append(entry["after"])
    for entry in lived.audit:
        if entry.who == "host":
            seen[entry.subscription_id].append(entry.after)
    assert sent == seen


def test_a_correction_only_replaced_the_value_that_it_had_seen(lived: Lived) -> None:
    """No correction overwrites a write of the host: each replaced exactly the value in its drift row."""
    made = Counter(
        (entry.user_id, str(entry.subscription_id), entry.before, entry.after)
        for entry in lived.audit
        if entry.who == "trueup"
    )
    told = Counter((row.user_id, row.subscription_id, row.observed, row.written) for row in lived.corrections)
    assert made == told
    last: dict[int, int] = {}
    for entry in lived.audit:
        assert last.get(entry.subscription_id, entry.before) == entry.before
        last[entry.subscription_id] = entry.after


# Nearly all of this host's users lose updates, most of them several: far more than in any real host. A counter that was
# wrong when a run began and right when that run compared it has no last known point by itself: the journal tells the
# moment within the run, if one is there at which nothing was in flight. Else the rows explain it, and it may wait for a
# person.
MAX_AMBIGUOUS = 0.03


def test_counters_are_right_when_the_host_has_stopped(lived: Lived) -> None:
    """After two more passes no counter drifts, except counters of buyers, whose packs wait for a person.

    A counter with many lost updates may wait too, if a gift explains their sum as well; with many sums, this happens by
    chance. A single lost update is distinguishable from everything else that this host does.
    """
    users = lived.users("spender", "renewer", "leaver")
    lost = lost_updates(lived)
    wrong = {
        user: (counter, max(0, remaining), lived.drifts.get(user), lost[user])
        for user, (counter, remaining) in lived.remaining.items()
        if user in users and counter != max(0, remaining)
    }
    several = sum(count > 1 for user, count in lost.items() if user in users)
    sys.stdout.write(
        f"{len(lost.keys() & users)} of {len(users)} had lost updates, {several} of them several; wrong: {wrong}\n"
    )
    assert lost.keys() & users
    ambiguous = {user for user in wrong if user in lived.doubted and lost[user] > 1}
    assert wrong.keys() - ambiguous == set()
    assert len(ambiguous) <= max(1, len(users) * MAX_AMBIGUOUS)


def lost_updates(lived: Lived) -> Counter[int]:
    """Count, by user, the host's writes over a value that it had not seen: its own, or a correction by trueup."""
    replaced = defaultdict(list)
    for entry in lived.audit:
        if entry.who == "host":
            replaced[entry.subscription_id].append(entry.before)
    lost, place = Counter[int](), Counter[int]()
    for entry in lived.host["ledger"]:
        if "after" in entry:
            before = replaced[entry["subscription"]][place[entry["subscription"]]]
            place[entry["subscription"]] += 1
            lost[entry["user"]] += entry.get("seen", before) != before
    return +lost


def test_no_paid_tokens_were_taken_away(lived: Lived) -> None:
    """trueup never lowers a buyer's counter below the tokens left of the plan and of all packs at that moment."""
    buyers = {SUBSCRIPTION_OFFSET + user for user in lived.users("buyer")}
    began = {SUBSCRIPTION_OFFSET + person.user_id: person.life.counter or 0 for person in lived.people}
    # The correct remaining tokens after each of the host's writes, and the usage logged before its next write.
    rightly: dict[int, list[int]] = {subscription: [began[subscription]] for subscription in buyers}
    for entry in lived.host["ledger"]:
        if entry["subscription"] in buyers:
            left = rightly[entry["subscription"]]
            if entry["kind"] == "log":
                left[-1] -= entry["tokens"]
            elif "after" in entry:
                left.append(left[-1] + entry.get("tokens", 0))
    taken, writes = [], Counter[int]()
    for entry in lived.audit:
        if entry.who == "host":
            writes[entry.subscription_id] += 1
        elif entry.subscription_id in buyers:
            left_at_least = rightly[entry.subscription_id][writes[entry.subscription_id]]
            if entry.after < min(entry.before, left_at_least):
                taken.append((entry.user_id, entry.before, entry.after, left_at_least))
    assert sum(entry["kind"] == "buy" for entry in lived.host["ledger"]) > MIN_WRITES / 100
    assert taken == []


def test_a_third_pass_finds_nothing_new(lived: Lived) -> None:
    assert lived.again.found_new == 0
    assert lived.again.corrected == 0
    assert lived.counters_again == {user: counter for user, (counter, _) in lived.remaining.items()}
