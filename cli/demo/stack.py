"""The demo's own stack: `trueup up` in a subprocess, a Graph API that answers locally, and clean tables."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from celery import Celery
from kombu.exceptions import OperationalError
from sqlalchemy import Engine, create_engine, text

from trueup.cli.demo.graph import GraphServer
from trueup.database.engine import transaction
from trueup.errors import OldLayoutError, SettingsError, TrueupError
from trueup.settings.settings import PREFIX, Settings, broker_url, database_url, get_settings
from trueup.stack.layout import prepare_layout

# The first start compiles every module: half a minute on a busy machine.
START_SECONDS = 120.0
STOP_SECONDS = 60.0
WORKERS = 2

# All that the demo writes: its stack's database is its own.
_CLEAR = text(
    """
    TRUNCATE accounts_user, billing_tokenplan, billing_fullplan, billing_subscription, ai_usage_log,
             trueup.balance, trueup.usage_delta, trueup.log_truncation, trueup.token_grant, trueup.hold,
             trueup.charge, trueup.call_intent, trueup.outbox, trueup.reconcile_run, trueup.reconcile_shard,
             trueup.drift, trueup.drift_decision, trueup.defect, trueup.grant_use, trueup.window_change,
             trueup.alert
    RESTART IDENTITY CASCADE
    """
)


@dataclass(frozen=True, kw_only=True)
class DemoStack:
    """What the story needs: the database as the host sees it, the Celery application, the Graph API, the log."""

    engine: Engine
    app: Celery
    graph: GraphServer
    log: Path


@contextmanager
def demo_stack(settings: Settings) -> Iterator[DemoStack]:
    """Run a whole stack in `TRUEUP_HOME/demo` for as long as the block takes.

    Raises `TrueupError` when it is not ready in time.
    """
    home = prepare_layout(settings.model_copy(update={"home": settings.home / "demo"})).home
    log = home / "up.log"
    with _termination_unwinds(), GraphServer() as graph:
        _use_only(home, graph)
        with _up(log) as process:
            engine, app = _ready(process, log)
            try:
                yield DemoStack(engine=engine, app=app, graph=graph, log=log)
            finally:
                engine.dispose()


@contextmanager
def _termination_unwinds() -> Iterator[None]:
    """Let SIGTERM and a closed terminal leave the block as Ctrl-C does: or the stack would run on."""

    def end(number: int, _frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    previous = {kind: signal.signal(kind, end) for kind in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for kind, handler in previous.items():
            signal.signal(kind, handler)


def _use_only(home: Path, graph: GraphServer) -> None:
    """Forget the user's own settings, in this process and those it starts."""
    for variable in [name for name in os.environ if name.startswith(PREFIX)]:
        del os.environ[variable]
    # An empty file, for a trueup.toml in the current folder would be read otherwise.
    config = home / "trueup.toml"
    config.write_text("")
    os.environ["TRUEUP_CONFIG"] = str(config)
    os.environ["TRUEUP_HOME"] = str(home)
    os.environ["TRUEUP_MODEL_PROVIDER"] = "offline"
    os.environ["TRUEUP_INSTAGRAM_GRAPH_URL"] = graph.url
    os.environ["TRUEUP_INSTAGRAM_ACCESS_TOKEN"] = "demo-only"
    get_settings.cache_clear()


@contextmanager
def _up(log: Path) -> Iterator[subprocess.Popen[bytes]]:
    program = shutil.which("trueup", path=str(Path(sys.executable).parent)) or "trueup"
    with log.open("wb") as output:
        process = subprocess.Popen(  # noqa: S603 - our own program
            [program, "up"], stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        process.wait(STOP_SECONDS)


def _ready(process: subprocess.Popen[bytes], log: Path) -> tuple[Engine, Celery]:
    """Wait until both workers answer, then clear the tables."""
    settings = get_settings()
    deadline = time.monotonic() + START_SECONDS
    while len(_workers()) < WORKERS:
        if process.poll() is not None or time.monotonic() > deadline:
            raise TrueupError(f"The demo's stack did not start; {log} says why. Its end:\n{_tail(log)}")
        time.sleep(0.2)
    from trueup.worker.celery import app

    clear_tables(settings.home)
    app.control.purge()
    return create_engine(database_url(settings)), app


def clear_tables(home: Path) -> None:
    """Remove what an earlier demo has written. Raises `TrueupError` if a version before the first release wrote it."""
    try:
        with transaction() as connection:
            connection.execute(_CLEAR)
    except OldLayoutError as error:
        raise TrueupError(
            f"An earlier version of trueup made the demo's database (revision {error.revision}). This version can't "
            f"use it, so nothing was shown. Delete {home}, which holds the demo's own data only, and run this again."
        ) from error


def _workers() -> list[object]:
    """Return the workers that answer; none while there is no broker yet."""
    settings = get_settings()
    try:
        broker_url(settings)
    except SettingsError:
        return []
    from trueup.worker.celery import app

    try:
        answers: list[object] = app.control.ping(timeout=1.0)
    except OperationalError:
        # A killed stack has left its file, and its successor has not come to Redis yet.
        return []
    return answers


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-15:])
