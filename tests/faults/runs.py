"""A run: rounds one after the other on the same servers. The next round's workers boot while this one settles."""

import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

from tests.faults.plans import RoundPlan
from tests.faults.report import Totals, describe_round
from tests.faults.rounds import staged
from tests.faults.servers import Servers, running_servers
from tests.faults.stages import Stage


def run_rounds(plans: Sequence[RoundPlan], say: Callable[[str], None], partitions: int | None = None) -> Totals:
    """Play the rounds, print a line for each, and return the totals. No process is left in any case.

    `partitions`: split trueup's large tables by user into so many; None: they are plain.
    The workers' logs of rounds that went wrong, or did not settle, are kept in a folder whose name is printed.
    """
    totals = Totals(seed=plans[0].seed)
    logs = Path(tempfile.mkdtemp(prefix="trueup-faults-"))
    with running_servers(partitions) as servers, ExitStack() as everything:
        upcoming: tuple[Stage, ExitStack] | None = _open(plans[0], servers, logs, everything)
        for place, plan in enumerate(plans):
            assert upcoming is not None
            began = time.monotonic()
            stage, ending = upcoming
            stage.play()
            upcoming = _open(plans[place + 1], servers, logs, everything) if place + 1 < len(plans) else None
            stage.settle()
            books, violations = stage.judge()
            ending.close()
            seconds = time.monotonic() - began
            totals.add(stage, books, violations, seconds)
            say(describe_round(stage, violations, seconds))
            _tidy(logs, plan, keep=bool(violations) or not stage.settled, say=say)
    if not any(logs.iterdir()):
        logs.rmdir()
    return totals


def _open(plan: RoundPlan, servers: Servers, logs: Path, everything: ExitStack) -> tuple[Stage, ExitStack]:
    ending = everything.enter_context(ExitStack())
    return ending.enter_context(staged(plan, servers, logs)), ending


def _tidy(logs: Path, plan: RoundPlan, *, keep: bool, say: Callable[[str], None]) -> None:
    for log in logs.glob(f"round-{plan.number}-*.log"):
        if keep:
            say(f"  log: {log}")
        else:
            log.unlink()
