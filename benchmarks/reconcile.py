"""The cost of reconciling: against bare statements, by size, with drift and by several jobs.

python -m benchmarks.reconcile [--subscriptions 1000000] [--users 100000] [--rows 10000000] [--drifted 20000]

The figures are ratios of medians, measured in turns in one run. A small run takes seconds: python -m
benchmarks.reconcile --subscriptions 10000 --users 1000 --rows 100000 --drifted 2000
"""

import argparse
import gc
import os
import resource
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event, text
from sqlalchemy.engine import make_url

from benchmarks.common import own_stack, print_markdown
from trueup.host.setting_values import DEFAULT_SCHEMA
from trueup.install.example_tables import build_host_metadata
from trueup.install.install import install
from trueup.reconcile.local_run import reconcile
from trueup.reconcile.runs import RunSummary
from trueup.settings.policies import Rules
from trueup.settings.settings import get_settings

ROUNDS = 5
PLAN_TOKENS = 1_000_000
LARGEST_LOGGED = 100_000
ROW_TOKENS = 7
RULES = Rules(min_age_seconds=0)

BARE_QUICK = """
    SELECT s.user_id, s.tokens_remaining, greatest(coalesce(tp.tokens_included, fp.tokens_included, 0) - b.consumed, 0)
    FROM public.billing_subscription s
    LEFT JOIN public.billing_tokenplan tp ON tp.id = s.token_plan_id
    LEFT JOIN public.billing_fullplan fp ON fp.id = s.full_plan_id
    LEFT JOIN trueup.balance b ON b.user_id = s.user_id
    WHERE s.tokens_remaining IS DISTINCT FROM
          greatest(coalesce(tp.tokens_included, fp.tokens_included, 0) - b.consumed, 0)
"""
BARE_DEEP = """
    SELECT count(*), sum(sums.tokens) FROM (
        SELECT l.user_id, sum(l.total_tokens) AS tokens
        FROM public.ai_usage_log l
        JOIN public.billing_subscription s ON s.user_id = l.user_id AND l.created_at >= s.start_date
        WHERE l.success GROUP BY l.user_id) AS sums
"""


def main() -> None:
    parser = argparse.ArgumentParser(description="The cost of reconciling.")
    parser.add_argument("--subscriptions", type=int, default=1_000_000, help="of the quick pass")
    parser.add_argument("--users", type=int, default=100_000, help="of the deep pass")
    parser.add_argument("--rows", type=int, default=10_000_000, help="the deep pass's log")
    parser.add_argument("--drifted", type=int, default=20_000, help="drifts of the pass that corrects them")
    parser.add_argument("--only", choices=("quick", "jobs", "deep", "drift"), help="only this part")
    options = parser.parse_args()
    gc.freeze()  # as the command does
    print(f"load average before: {os.getloadavg()[0]:.2f}, {os.cpu_count()} cores")  # noqa: T201
    with own_stack() as urls:
        url = str(urls.database_url)
        sizes = [size for size in (10_000, 100_000, 1_000_000) if size < options.subscriptions]
        if options.only in (None, "quick"):
            compare_quick(url, [*sizes, options.subscriptions])
        if options.only in (None, "jobs"):
            compare_jobs(url, options.subscriptions)
        if options.only in (None, "deep"):
            compare_deep(url, options.users, options.rows)
        if options.only in (None, "drift"):
            correct_drift(url, options.drifted)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"\nresident memory of this process at most: {memory:,.0f} MB")  # noqa: T201
    print(f"load average after: {os.getloadavg()[0]:.2f}")  # noqa: T201


@contextmanager
def database(url: str, name: str, users: int, rows: int, *, journaled: bool = False) -> Iterator[Engine]:
    """Make a host with so many subscriptions and log rows, in random order of users, and right counters. Drop it.

    `journaled`: with an entry of the journal for each log row.
    """
    admin = create_engine(url, isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        connection.execute(text(f"CREATE DATABASE {name}"))
    engine = create_engine(make_url(url).set(database=name), pool_size=4)
    try:
        with engine.begin() as connection:
            fill(connection, users, rows)
            if journaled:
                fill_journal(connection)
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.execute(text("VACUUM ANALYZE"))
            connection.execute(text("CHECKPOINT"))
        yield engine
    finally:
        engine.dispose()
        with admin.connect() as connection:
            connection.execute(text(f"DROP DATABASE {name} WITH (FORCE)"))
        admin.dispose()


def fill(connection: Connection, users: int, rows: int) -> None:
    mapping = get_settings().host
    metadata = build_host_metadata(mapping)
    log = metadata.tables[f"{DEFAULT_SCHEMA}.{mapping.usage_log.table}"]
    # After the rows, because that is much faster.
    indexes = list(log.indexes)
    log.indexes.clear()
    metadata.create_all(connection)
    # Without row-by-row checks of foreign keys, because only the result matters here.
    connection.execute(text("SET LOCAL session_replication_role = replica"))
    values = {"users": users, "rows": rows, "plan": PLAN_TOKENS, "tokens": ROW_TOKENS}
    for statement in (
        (
            "INSERT INTO public.billing_tokenplan (id, name, tokens_included) "
            "SELECT i, i, :plan FROM generate_series(1, 9) i"
        ),
        "INSERT INTO public.accounts_user SELECT i, 'user' || i, '' FROM generate_series(1, :users) i",
        (
            "INSERT INTO public.billing_subscription (id, user_id, token_plan_id, start_date, tokens_remaining) "
            "SELECT i, i, 1 + i % 9, now() - interval '30 days', :plan FROM generate_series(1, :users) i"
        ),
        (
            "INSERT INTO public.ai_usage_log (user_id, section, total_tokens, created_at) "
            "SELECT 1 + (i::bigint * 7919) % :users, 'chat', :tokens, "
            "now() - make_interval(secs => (:rows - i) / 10.0) "
            "FROM generate_series(1, :rows) i"
        ),
        (
            "CREATE TEMP TABLE used ON COMMIT DROP AS "
            "SELECT l.user_id, sum(l.total_tokens) AS tokens FROM public.ai_usage_log l "
            "JOIN public.billing_subscription s ON s.user_id = l.user_id AND l.created_at >= s.start_date GROUP BY 1"
        ),
        (
            "UPDATE public.billing_subscription s SET tokens_remaining = :plan - u.tokens "
            "FROM used u WHERE u.user_id = s.user_id"
        ),
    ):
        connection.execute(text(statement), {name: value for name, value in values.items() if f":{name}" in statement})
    for index in indexes:
        index.create(connection)
    connection.execute(text("SET LOCAL session_replication_role = origin"))
    install(connection, mapping, with_host_tables=False)
    connection.execute(
        text(
            "INSERT INTO trueup.balance (user_id, window_start, log_epoch, consumed) "
            "SELECT s.user_id, s.start_date, 0, coalesce(u.tokens, 0) FROM public.billing_subscription s "
            "LEFT JOIN used u ON u.user_id = s.user_id"
        ),
        {"plan": PLAN_TOKENS},
    )


def fill_journal(connection: Connection) -> None:
    """Insert the entries that the host's decrements of the log rows would have left."""
    connection.execute(
        text(
            "INSERT INTO trueup.counter_entry (user_id, subscription_id, kind, old_counter, new_counter, window_start, "
            "token_plan_id, at, transaction_id, backend_pid, application_name, written_by) "
            "SELECT l.user_id, l.user_id::text, 'changed', :plan - (l.place - 1) * :tokens, :plan - l.place * :tokens, "
            "s.start_date, s.token_plan_id::text, l.created_at, pg_current_xact_id(), 0, 'host', 'host' "
            "FROM (SELECT l.*, row_number() OVER (PARTITION BY l.user_id ORDER BY l.created_at) AS place "
            "      FROM public.ai_usage_log l) l "
            "JOIN public.billing_subscription s ON s.user_id = l.user_id AND l.created_at >= s.start_date"
        ),
        {"plan": PLAN_TOKENS, "tokens": ROW_TOKENS},
    )


def in_turns(ways: dict[str, Callable[[], object]], rounds: int = ROUNDS) -> dict[str, float]:
    """Return the median seconds of each way. Each is called once unmeasured."""
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, way in ways.items():
            started = time.perf_counter()
            way()
            if number:
                taken[name].append(time.perf_counter() - started)
    return {name: statistics.median(seconds) for name, seconds in taken.items()}


def bare(engine: Engine, statement: str) -> int:
    with engine.connect() as connection:
        return len(connection.execute(text(statement)).all())


def ours(engine: Engine, **options: Any) -> RunSummary:
    """Run a pass as `trueup reconcile` does."""
    settings = get_settings().model_copy(update={"database_url": engine.url.render_as_string(hide_password=False)})
    return reconcile(engine, settings.host, rules=RULES, **options)


def clean(engine: Engine, **options: Any) -> None:
    summary = ours(engine, **options)
    if summary.drifted or summary.defects:
        raise RuntimeError(f"{summary.drifted} drifts and {summary.defects} defects where there should be none")


def compare_quick(url: str, sizes: list[int]) -> None:
    """A pass that finds nothing: against the bare comparison, by size, and with ten log rows and entries of the journal
    for each subscription.
    """
    lines = []
    for size in sizes:
        with database(url, "quick", size, 0) as engine:
            taken = in_turns({"bare": lambda: bare(engine, BARE_QUICK), "ours": lambda: clean(engine)})
        flat = "–"
        if size <= LARGEST_LOGGED:
            with database(url, "logged", size, 10 * size, journaled=True) as engine:
                logged = in_turns({"ours": lambda: clean(engine)})
            flat = f"{logged['ours'] / taken['ours']:.2f}"
        lines.append(
            (
                f"{size:,}",
                f"{taken['ours']:.3f} s",
                f"{taken['bare']:.3f} s",
                f"{taken['ours'] / taken['bare']:.2f}",
                f"{taken['ours'] / size * 1e6:.2f} µs",
                flat,
            )
        )
    headings = (
        "subscriptions",
        "quick pass",
        "bare comparison",
        "ratio",
        "a subscription",
        "× with 10 rows and entries each",
    )
    print_markdown("A quick pass that finds nothing", headings, lines)


def compare_jobs(url: str, size: int) -> None:
    """A pass that finds nothing, by one job and by two, beside the database's own limit: two bare halves at once."""
    with database(url, "jobs", size, 0) as engine, ThreadPoolExecutor(2) as pool:
        halves = [f"{BARE_QUICK} AND s.user_id {half} {size // 2}" for half in ("<=", ">")]
        taken = in_turns(
            {
                "bare": lambda: bare(engine, BARE_QUICK),
                "halves": lambda: list(pool.map(lambda half: bare(engine, half), halves)),
                "one": lambda: clean(engine),
                "two": lambda: clean(engine, jobs=2),
            }
        )
    print_markdown(
        "By two jobs, nothing found",
        ("subscriptions", "bare, one connection", "two halves at once", "× faster", "1 job", "2 jobs", "× faster"),
        [
            (
                f"{size:,}",
                *(f"{taken[name]:.3f} s" for name in ("bare", "halves")),
                f"{taken['bare'] / taken['halves']:.2f}",
                *(f"{taken[name]:.3f} s" for name in ("one", "two")),
                f"{taken['one'] / taken['two']:.2f}",
            )
        ],
    )


def compare_deep(url: str, users: int, rows: int) -> None:
    """A deep pass over a correct log, against the bare sums."""
    with database(url, "deep", users, rows) as engine:
        taken = in_turns(
            {"bare": lambda: bare(engine, BARE_DEEP), "ours": lambda: clean(engine, kind="deep")}, rounds=3
        )
    took = {name: f"{seconds:.2f} s" for name, seconds in taken.items()}
    line = (f"{users:,}", f"{rows:,}", took["ours"], took["bare"], f"{taken['ours'] / taken['bare']:.2f}")
    print_markdown("A deep pass", ("users", "log rows", "deep pass", "bare GROUP BY", "ratio"), [line])


def correct_drift(url: str, drifted: int) -> None:
    """Passes that correct every counter, by one job and by two, and how long their statements lock rows."""
    longest: dict[str, float] = {"correct_counters": 0.0, "refresh_balances": 0.0}
    with database(url, "drifted", drifted, 10 * drifted) as engine:
        _time_statements(engine, longest)

        def spoil() -> None:
            with engine.begin() as connection:
                connection.execute(
                    text("UPDATE public.billing_subscription SET tokens_remaining = tokens_remaining - 7")
                )
                connection.execute(text("TRUNCATE trueup.drift"))
            with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
                connection.execute(text("VACUUM ANALYZE public.billing_subscription"))

        taken: dict[int, list[float]] = {1: [], 2: []}
        for _ in range(3):
            for jobs, seconds in taken.items():
                spoil()
                started = time.perf_counter()
                corrected = ours(engine, jobs=jobs).corrected
                seconds.append(time.perf_counter() - started)
                if corrected != drifted:
                    raise RuntimeError(f"{corrected} of {drifted} counters were corrected")
    one, two = (statistics.median(seconds) for seconds in taken.values())
    print_markdown(
        "A pass that corrects every counter, 1,000 a batch",
        ("drifts", "1 job", "2 jobs", "× faster", "longest correction", "longest refresh of balances"),
        [
            (
                f"{drifted:,}",
                f"{drifted / one:,.0f}/s",
                f"{drifted / two:,.0f}/s",
                f"{one / two:.2f}",
                f"{longest['correct_counters'] * 1000:.0f} ms",
                f"{longest['refresh_balances'] * 1000:.0f} ms",
            )
        ],
    )


def _time_statements(engine: Engine, longest: dict[str, float]) -> None:
    """Record the longest time of each named statement. It locks no row for longer."""

    def before(conn: Any, cursor: Any, statement: str, parameters: Any, context: Any, many: bool) -> None:
        context.begun = time.perf_counter()

    def after(conn: Any, cursor: Any, statement: str, parameters: Any, context: Any, many: bool) -> None:
        for name in longest:
            if name in statement:
                longest[name] = max(longest[name], time.perf_counter() - context.begun)

    event.listen(engine, "before_cursor_execute", before)
    event.listen(engine, "after_cursor_execute", after)


if __name__ == "__main__":
    main()
