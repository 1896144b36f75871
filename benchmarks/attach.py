"""Attaching to a live host: how long its writers wait, how long balances take, and the later cost of the triggers.

python -m benchmarks.attach [--subscriptions 100000] [--rows 2000000] [--seconds 10]
"""

import argparse
import random
import statistics
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import psycopg
from sqlalchemy import create_engine, text
from sqlalchemy.engine import make_url

from benchmarks.common import ROUNDS, own_stack, print_markdown
from trueup.database.retry import retrying
from trueup.install.attach import attach
from trueup.install.detach import detach
from trueup.install.example_tables import build_host_metadata
from trueup.install.plan import plan_attach
from trueup.settings.settings import get_settings

WRITERS = 8
BATCH_ROWS = 100
REPEATS = 300
INSERT = (
    "INSERT INTO public.ai_usage_log (id, user_id, section, total_tokens, created_at) "
    "VALUES (gen_random_uuid(), %s, 'chat', 10, clock_timestamp())"
)
MANY_COUNTERS = 1_000
LOWER = "UPDATE public.billing_subscription SET tokens_remaining = tokens_remaining - 1 WHERE user_id = %s"
LOWER_MANY = "UPDATE public.billing_subscription SET tokens_remaining = tokens_remaining - 1 WHERE user_id = ANY (%s)"
TOUCH = "UPDATE public.billing_subscription SET end_date = clock_timestamp() WHERE user_id = %s"
INSERT_MANY = (
    "INSERT INTO public.ai_usage_log (id, user_id, section, total_tokens, created_at) "
    "SELECT gen_random_uuid(), u, 'chat', 10, clock_timestamp() FROM unnest(%s::bigint[]) u"
)
# The plainest form of a balance: each user's usage in the window.
BARE_FILL = (
    "CREATE TABLE bare_sums (user_id bigint PRIMARY KEY, window_start timestamptz, consumed bigint)",
    (
        "INSERT INTO bare_sums SELECT s.user_id, s.start_date, coalesce(sum(l.total_tokens), 0) "
        "FROM public.billing_subscription s LEFT JOIN public.ai_usage_log l ON l.user_id = s.user_id AND l.success "
        "AND l.created_at >= s.start_date GROUP BY s.user_id, s.start_date"
    ),
    "DROP TABLE bare_sums",
)


@dataclass
class Waits:
    """The times of each statement of a host's writer, in seconds, and its errors."""

    seconds: list[float] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--subscriptions", type=int, default=100_000)
    parser.add_argument("--rows", type=int, default=2_000_000, help="of the usage log")
    parser.add_argument("--seconds", type=int, default=10, help="how long the eight writers write, each time")
    options = parser.parse_args()
    with own_stack() as urls:
        url = str(urls.database_url)
        target = make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)
        prepare(url, options.subscriptions, options.rows)
        compare_attaching(target, options.subscriptions, options.rows)
        compare_inserts(target, options.subscriptions)
        compare_updates(target, options.subscriptions)
        compare_writers(target, options.subscriptions, options.seconds)


def prepare(url: str, subscriptions: int, rows: int) -> None:
    """Make a host with its log, whose rows are ordered by time, not by user."""
    engine = create_engine(url)
    with engine.begin() as connection:
        build_host_metadata(get_settings().host).create_all(connection)
        connection.execute(
            text("SET LOCAL session_replication_role = replica")
        )  # looking up a key for each row takes long
        connection.execute(
            text("INSERT INTO public.billing_tokenplan (id, name, tokens_included) VALUES (1, 'p', 1000000)")
        )
        connection.execute(
            text("INSERT INTO public.accounts_user SELECT i, 'user' || i, 'e' FROM generate_series(1, :n) i"),
            {"n": subscriptions},
        )
        connection.execute(
            text(
                "INSERT INTO public.billing_subscription (id, user_id, token_plan_id, start_date, tokens_remaining) "
                "SELECT i, i, 1, now() - interval '20 days', 1000000 FROM generate_series(1, :n) i"
            ),
            {"n": subscriptions},
        )
        connection.execute(
            text(
                "INSERT INTO public.ai_usage_log (user_id, section, total_tokens, created_at) "
                "SELECT 1 + floor(random() * :n), 'chat', 10, now() - interval '30 days' "
                "* (1 - i / CAST(:rows AS float)) FROM generate_series(1, :rows) i"
            ),
            {"n": subscriptions, "rows": rows},
        )
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("VACUUM ANALYZE"))
        connection.execute(text("CHECKPOINT"))
    engine.dispose()


def compare_attaching(target: str, subscriptions: int, rows: int) -> None:
    """The whole attach beside a writer, its fill beside the bare statement, and each again without a writer."""
    bare = statistics.median(bare_fill(target) for _ in range(3))
    with writing(target, subscriptions) as undisturbed:
        time.sleep(5)
    expected = retrying(lambda connection: plan_attach(connection, get_settings().host)).fill_seconds
    steps: dict[str, float] = {}
    with writing(target, subscriptions) as waits:
        began = last = time.perf_counter()

        def report(line: str) -> None:
            nonlocal last
            now = time.perf_counter()
            steps[line.rstrip(".")] = now - last
            last = now

        attach(get_settings().host, report=report)
        whole = time.perf_counter() - began
    filling = next(seconds for line, seconds in steps.items() if line.startswith("Balances are built"))
    print_markdown(
        f"Attaching to {subscriptions:,} subscriptions and {rows:,} log rows, the host writing",
        ("step", "seconds"),
        [
            *((line, f"{seconds:.2f}") for line, seconds in steps.items()),
            ("all", f"{whole:.2f}"),
            ("what the plan expected of filling", "unknown" if expected is None else f"{expected:.0f}"),
        ],
    )
    print_markdown(
        "Balances, and the host's waits",
        ("bare INSERT … SELECT … GROUP BY", "fill", "ratio", "longest insert meanwhile", "without us", "host errors"),
        [
            (
                f"{bare:.2f} s",
                f"{filling:.2f} s",
                f"{filling / bare:.2f}",
                f"{max(waits.seconds) * 1000:.0f} ms of {len(waits.seconds):,}",
                f"{max(undisturbed.seconds) * 1000:.0f} ms of {len(undisturbed.seconds):,}",
                len(waits.errors) + len(undisturbed.errors),
            )
        ],
    )


def bare_fill(target: str) -> float:
    create, fill, drop = BARE_FILL
    with psycopg.connect(target, autocommit=True) as connection:
        connection.execute(create)
        began = time.perf_counter()
        connection.execute(fill)
        taken = time.perf_counter() - began
        connection.execute(drop)
    return taken


@contextmanager
def writing(target: str, users: int) -> Iterator[Waits]:
    """Write single rows and counters all the time, as the host does, some milliseconds apart."""
    waits, over = Waits(), threading.Event()

    def write() -> None:
        dice = random.Random(1)  # noqa: S311 - picks users
        with psycopg.connect(target, autocommit=True) as connection:
            while not over.wait(0.002):
                user = dice.randint(1, users)
                for statement in (
                    INSERT,
                    "UPDATE public.billing_subscription SET tokens_remaining = 5 WHERE user_id = %s",
                ):
                    began = time.perf_counter()
                    try:
                        connection.execute(statement, (user,))
                    except psycopg.Error as error:
                        waits.errors.append(str(error))
                    waits.seconds.append(time.perf_counter() - began)

    thread = threading.Thread(target=write)
    thread.start()
    try:
        yield waits
    finally:
        over.set()
        thread.join()


def compare_inserts(target: str, users: int) -> None:
    """The same insert into the log with and without our triggers, alternately."""
    statements = (("one row", INSERT, 1), (f"{BATCH_ROWS} rows", INSERT_MANY, BATCH_ROWS))
    compare_statements(target, users, "An insert into the log", "public.ai_usage_log", statements)


def compare_updates(target: str, users: int) -> None:
    """The same update of subscriptions with and without our trigger, which appends each changed counter."""
    statements = (
        ("one counter", LOWER, 1),
        ("another column", TOUCH, 1),
        (f"{MANY_COUNTERS:,} counters", LOWER_MANY, MANY_COUNTERS),
    )
    for durable in (False, True):
        compare_statements(
            target, users, "An update of subscriptions", "public.billing_subscription", statements, durable=durable
        )


def compare_statements(
    target: str,
    users: int,
    title: str,
    table: str,
    statements: tuple[tuple[str, str, int], ...],
    *,
    durable: bool = False,
) -> None:
    """Compare statements of the host with and without our triggers on `table`: each is a name, SQL and its users.

    `durable`: each commit waits for the disk, as in production. Otherwise the disk's time does not hide ours.
    """
    taken: dict[tuple[str, bool], list[float]] = {}
    with psycopg.connect(target, autocommit=True) as connection:
        connection.execute(f"SET synchronous_commit = {'on' if durable else 'off'}")
        dice = random.Random(2)  # noqa: S311 - picks users
        for _ in range(ROUNDS):
            for watched in (True, False):
                connection.execute(f"ALTER TABLE {table} {'ENABLE' if watched else 'DISABLE'} TRIGGER USER")
                for name, statement, rows in statements:
                    for number in range(REPEATS):
                        many = [dice.randint(1, users) for _ in range(rows)]
                        began = time.perf_counter()
                        connection.execute(statement, (many if rows > 1 else many[0],))
                        if number >= REPEATS // 10:  # before that, PostgreSQL makes its plans
                            taken.setdefault((name, watched), []).append(time.perf_counter() - began)
        connection.execute(f"ALTER TABLE {table} ENABLE TRIGGER USER")
    names = list(dict.fromkeys(name for name, _ in taken))
    middle = {key: statistics.median(values) for key, values in taken.items()}
    print_markdown(
        f"{title}, median, the disk {'' if durable else 'not '}waited for",
        ("statement", "with triggers", "without", "ratio"),
        [
            (
                name,
                f"{middle[name, True] * 1e6:,.0f} µs",
                f"{middle[name, False] * 1e6:,.0f} µs",
                f"{middle[name, True] / middle[name, False]:.2f}",
            )
            for name in names
        ],
    )


def compare_writers(target: str, users: int, seconds: int) -> None:
    """Eight writers of mixed batches of many users, with our triggers and after a detach."""
    rows = [("with triggers", *write_together(target, users, seconds))]
    detach(force=True)
    rows.append(("without trueup", *write_together(target, users, seconds)))
    print_markdown(
        f"{WRITERS} writers of mixed batches",
        ("", "statements/s", "longest", "deadlocks and errors", "samples with one waiting for a lock"),
        rows,
    )


def write_together(target: str, users: int, seconds: int) -> tuple[str, str, int, str]:
    """Insert, change and delete rows of many users in batches. Count the sessions that wait for locks all the time."""
    every, over = [Waits() for _ in range(WRITERS)], threading.Event()
    marker = f"bench-{uuid.uuid4().hex[:8]}"

    def write(number: int) -> None:
        dice = random.Random(number)  # noqa: S311 - picks users
        with psycopg.connect(target, autocommit=True, application_name=marker) as connection:
            own: list[list[int]] = []
            while not over.is_set():
                batch = [dice.randint(1, users) for _ in range(dice.randint(1, 200))]
                own.append(batch)
                began = time.perf_counter()
                try:
                    connection.execute(INSERT_MANY.replace("'chat'", f"'writer {number}'"), (batch,))
                    if len(own) % 5 == 0:
                        connection.execute(
                            "UPDATE public.ai_usage_log SET total_tokens = total_tokens + 1 WHERE user_id = ANY (%s) "
                            "AND section = %s",
                            (own[-2][:20], f"writer {number}"),
                        )
                    if len(own) % 7 == 0:
                        connection.execute(
                            "DELETE FROM public.ai_usage_log WHERE user_id = ANY (%s) AND section = %s",
                            (own[-3][:20], f"writer {number}"),
                        )
                except psycopg.Error as error:
                    every[number].errors.append(str(error))
                every[number].seconds.append(time.perf_counter() - began)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(WRITERS)]
    for thread in threads:
        thread.start()
    samples = waiting = 0
    end = time.monotonic() + seconds
    with psycopg.connect(target, autocommit=True) as watcher:
        while time.monotonic() < end:
            row = watcher.execute(
                "SELECT count(*) FROM pg_stat_activity WHERE application_name = %s AND wait_event_type = 'Lock' "
                "AND wait_event <> 'extend'",
                (marker,),
            ).fetchone()
            samples += 1
            waiting += bool(row and row[0])
            time.sleep(0.01)
    over.set()
    for thread in threads:
        thread.join()
    counted = [second for waits in every for second in waits.seconds]
    return (
        f"{len(counted) / seconds:,.0f}",
        f"{max(counted) * 1000:.0f} ms",
        sum(len(waits.errors) for waits in every),
        f"{waiting} of {samples}",
    )


if __name__ == "__main__":
    main()
