"""Processes that work on shards: all threads of one process share an interpreter, and so one core for what is Python.

The process that has the run keeps its leases, sends one shard at a time, and hears of each batch. When it dies, or
stops, the channel between them ends: then the other one puts its shard back after the batch that it is in, and ends.
"""

import gc
import json
import os
import pickle
import queue
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from multiprocessing.connection import Connection

from sqlalchemy import Engine

from trueup.database.engine import reason_of
from trueup.drift.evidence import Evidence
from trueup.errors import TrueupError
from trueup.reconcile.audit import Defect
from trueup.reconcile.runs import KEPT_FINDINGS, Finding, RunSummary
from trueup.reconcile.shard_worker import work_shard
from trueup.reconcile.shards import Shard, ShardLostError
from trueup.reconcile.work import Job, Work

# The same modules as here, whatever lies in the working folder: a host may well have a `trueup` of its own there.
_PROGRAM = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from trueup.reconcile.shard_processes import serve; serve(int(sys.argv[2]))"
)
POLL_SECONDS = 0.2
# How much longer than its longest statement a process may take to end.
ENDING_SECONDS = 30
_NO_EVIDENCE = Evidence()

MakeEngine = Callable[[], Engine]
"""How a process makes its engine: a function that pickles."""


class ProcessEndedError(TrueupError):
    """A process ended before it was done with its shard, on which nobody works now. What it had written stays.

    `exit_code`: -N means ended by signal N; 0 that it was asked to, and had not begun.
    """

    def __init__(self, exit_code: int) -> None:
        self.exit_code = exit_code
        super().__init__(exit_code)  # the argument, so that the error pickles

    def __str__(self) -> str:
        how = f"signal {-self.exit_code}" if self.exit_code < 0 else f"exit code {self.exit_code}"
        return f"A process of this run was ended by {how}. Run it again, with fewer jobs if memory is short."


@dataclass(frozen=True, kw_only=True)
class Order(Work):
    """What a process is to do with the shards that it is sent. `folder`: where relative paths of the settings begin."""

    make_engine: MakeEngine
    keep_findings: bool
    folder: str

    @classmethod
    def of(cls, job: Job, make_engine: MakeEngine, *, keep_findings: bool) -> "Order":
        return cls(**job.plain(), make_engine=make_engine, keep_findings=keep_findings, folder=os.getcwd())


@dataclass(frozen=True, kw_only=True)
class Ended:
    """What became of a shard. `lost`: another has taken it over. `error` None: it was worked on as far as asked for."""

    shard: Shard
    finished: bool = False
    lost: bool = False
    error: Exception | None = None


class ShardProcess:
    """Another process that works on shards for this one. `absorb` is called with the figures of each batch."""

    def __init__(self, order: Order, absorb: Callable[[RunSummary], None]) -> None:
        self.absorb = absorb
        self.patience_seconds = order.scan_timeout_seconds + ENDING_SECONDS
        document = pickle.dumps(order)
        ours, theirs = socket.socketpair()
        with ours, theirs:
            self.process = subprocess.Popen(  # noqa: S603 - our own argument list, no shell
                [sys.executable, "-c", _PROGRAM, json.dumps(sys.path), str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                # Ctrl-C in a terminal reaches us alone, and we say when to end.
                start_new_session=True,
            )
            self.channel = Connection(ours.detach())
        # Whoever is gone is noticed when its answer is read: here and below.
        with suppress(OSError):
            self.channel.send_bytes(document)

    def work(self, shard: Shard, stop: threading.Event) -> bool:
        """Have the shard worked on as by `work_shard`, with its result and its errors.

        Raises `ProcessEndedError` as well.
        """
        self._send(shard)
        asked = False
        while True:
            try:
                told = self.channel.poll(POLL_SECONDS)
                # Also while one batch after the other is told.
                if stop.is_set() and not asked:
                    asked = True
                    self._send(None)
                if not told:
                    continue
                message = self.channel.recv()
            except (EOFError, OSError):
                raise ProcessEndedError(self._exit_code()) from None
            if isinstance(message, Ended):
                return _result(shard, message)
            self.absorb(message)

    def close(self) -> None:
        """Let the process end, after the batch that it is in; killed if it does not."""
        self.channel.close()
        self._exit_code()

    def _exit_code(self) -> int:
        try:
            return self.process.wait(self.patience_seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()

    def _send(self, message: Shard | None) -> None:
        with suppress(OSError):
            self.channel.send(message)


def _result(shard: Shard, ended: Ended) -> bool:
    if ended.lost:
        raise ShardLostError
    if ended.error is not None:
        raise ended.error
    vars(shard).update(vars(ended.shard))
    return ended.finished


def serve(descriptor: int) -> None:
    """Work on the shards that come through the channel, until it ends or SIGTERM comes."""
    channel = Connection(descriptor)
    stop = threading.Event()
    shards: queue.SimpleQueue[Shard | None] = queue.SimpleQueue()

    def leave(*_signal: object) -> None:
        stop.set()
        shards.put(None)

    for kind in (signal.SIGINT, signal.SIGTERM):
        signal.signal(kind, leave)
    try:
        order: Order = channel.recv()
    except EOFError:
        return
    os.chdir(order.folder)
    engine = order.make_engine()
    # What was imported stays: to look through it again and again costs a quarter of the work.
    gc.freeze()

    def listen() -> None:
        with suppress(EOFError, OSError):
            while (shard := channel.recv()) is not None:
                shards.put(shard)
        leave()

    threading.Thread(target=listen, name="reconcile-channel", daemon=True).start()
    teller = _Teller(channel, keep_findings=order.keep_findings)
    job = Job(**order.plain(), engine=engine, report=teller.report, stop=stop)
    try:
        while not stop.is_set() and (shard := shards.get()) is not None:
            teller.tell(_worked_on(job, shard))
    finally:
        engine.dispose()


def _worked_on(job: Job, shard: Shard) -> Ended:
    try:
        return Ended(shard=shard, finished=work_shard(job, shard))
    except ShardLostError:
        return Ended(shard=shard, lost=True)
    except Exception as error:  # noqa: BLE001 - all of them are raised again where the run is
        return Ended(shard=shard, error=_portable(error))


def _portable(error: Exception) -> Exception:
    """Return the error, or one that says the same if it does not come through a pickle."""
    try:
        pickle.loads(pickle.dumps(error))  # noqa: S301 - our own
    except Exception:  # noqa: BLE001 - whatever its class does there
        return TrueupError(f"{type(error).__name__}: {reason_of(error)}")
    return error


class _Teller:
    """Tells the other side what was found: all figures, and of the findings only as many as a summary keeps."""

    def __init__(self, channel: Connection, *, keep_findings: bool) -> None:
        self.channel = channel
        self.left = KEPT_FINDINGS if keep_findings else 0

    def report(self, checked: int, findings: Sequence[Finding], defects: Sequence[Defect]) -> None:
        part = RunSummary(run_id=None, dry_run=True, started_at=datetime.now(UTC))
        part.add(checked, findings)
        part.add_defects(defects)
        kept = findings[: self.left]
        self.left -= len(kept)
        # What an explanation was made of is not asked for any more, and most of it all.
        part.keep([replace(found, drift=replace(found.drift, evidence=_NO_EVIDENCE)) for found in kept])
        self.tell(part)

    def tell(self, message: RunSummary | Ended) -> None:
        # A channel that has ended also says to stop.
        with suppress(OSError):
            self.channel.send(message)
