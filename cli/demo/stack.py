"""The demo's stack: `trueup up` in a subprocess, a local Graph API, and empty tables."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

from celery import Celery
from kombu.exceptions import OperationalError
from sqlalchemy import Engine, create_engine, text

from trueup.database.engine import transaction
from trueup.errors import OldLayoutError, SettingsError, TrueupError
from trueup.settings.settings import PREFIX, Settings, broker_url, database_url, get_settings
from trueup.stack.layout import prepare_layout

# The first start compiles all modules, which takes half a minute on a busy machine.
START_SECONDS = 120.0
STOP_SECONDS = 60.0
WORKERS = 2

# All tables that the demo writes. The database of its stack is its own.
_CLEAR = text(
    """
    TRUNCATE public.accounts_user, public.billing_tokenplan, public.billing_fullplan, public.billing_subscription,
             public.ai_usage_log, trueup.balance, trueup.usage_delta, trueup.log_truncation, trueup.token_grant,
             trueup.hold, trueup.charge, trueup.owed_charge, trueup.charge_event, trueup.call_intent, trueup.outbox,
             trueup.reconcile_run, trueup.reconcile_shard, trueup.drift, trueup.drift_decision, trueup.defect,
             trueup.grant_use, trueup.window_change, trueup.alert, trueup.counter_entry, trueup.denial
    RESTART IDENTITY CASCADE
    """
)


class GraphServer:
    """A local replacement for Instagram's Graph API, inside a `with` block. `requests`: path and body of each call."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, dict[str, Any]]] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        requests = self.requests

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                length = int(self.headers.get("Content-Length", 0))
                requests.append((self.path, json.loads(self.rfile.read(length) or b"{}")))
                answer = {"id": f"demo-{len(requests)}", "message_id": f"demo-{len(requests)}", "recipient_id": "0"}
                body = json.dumps(answer).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the standard library's name
                """Log nothing. The demo shows the requests."""

        return Handler


@dataclass(frozen=True, kw_only=True)
class DemoStack:
    """The host's database, the Celery application, the Graph API and the log file of the stack."""

    engine: Engine
    app: Celery
    graph: GraphServer
    log: Path


@contextmanager
def demo_stack(settings: Settings) -> Iterator[DemoStack]:
    """Run a stack in `TRUEUP_HOME/demo` during the block. Raises `TrueupError` when it is not ready in time."""
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
    """Let SIGTERM and SIGHUP leave the block as Ctrl-C does, so that the stack stops."""

    def end(number: int, _frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    previous = {kind: signal.signal(kind, end) for kind in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for kind, handler in previous.items():
            signal.signal(kind, handler)


def _use_only(home: Path, graph: GraphServer) -> None:
    """Replace the user's settings by the demo's, in this process and its child processes."""
    for variable in [name for name in os.environ if name.startswith(PREFIX)]:
        del os.environ[variable]
    # An empty file, because otherwise trueup would read a trueup.toml in the current folder.
    config = home / "trueup.toml"
    config.write_text("")
    os.environ |= {
        "TRUEUP_CONFIG": str(config),
        "TRUEUP_HOME": str(home),
        "TRUEUP_MODEL_PROVIDER": "offline",
        # The host's decrements come at once, so there is no need to wait for them.
        "TRUEUP_RECONCILE__MIN_AGE_SECONDS": "0",
        "TRUEUP_INSTAGRAM_GRAPH_URL": graph.url,
        "TRUEUP_INSTAGRAM_ACCESS_TOKEN": "demo-only",
    }
    get_settings.cache_clear()


@contextmanager
def _up(log: Path) -> Iterator[subprocess.Popen[bytes]]:
    program = shutil.which("trueup", path=str(Path(sys.executable).parent)) or "trueup"
    with log.open("wb") as output:
        process = subprocess.Popen(  # noqa: S603 - trueup's own program
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
            raise TrueupError(f"The demo's stack did not start. The last lines of {log}:\n{_tail(log)}")
        time.sleep(0.2)
    from trueup.worker.celery import app

    clear_tables(settings.home)
    app.control.purge()
    return create_engine(database_url(settings)), app


def clear_tables(home: Path) -> None:
    """Delete the rows of an earlier demo. Raises `TrueupError` if a version before the first release made them."""
    try:
        with transaction() as connection:
            connection.execute(_CLEAR)
    except OldLayoutError as error:
        raise TrueupError(
            f"An earlier version of trueup made the demo's database (revision {error.revision}). This version can't "
            f"use it, so nothing was shown. Delete {home}, which has only the demo's data, and run this again."
        ) from error


def _workers() -> list[object]:
    """Return the answers of the workers; empty without a broker."""
    settings = get_settings()
    try:
        broker_url(settings)
    except SettingsError:
        return []
    from trueup.worker.celery import app

    try:
        answers: list[object] = app.control.ping(timeout=1.0)
    except OperationalError:
        # The file of a killed stack is still there, and the new stack has not started Redis yet.
        return []
    return answers


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-15:])
