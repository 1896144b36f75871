"""A played round without any content, for the harness's own tests."""

from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace

import pytest
from sqlalchemy import Connection

from tests.faults.books import read_books
from tests.faults.by_hand import BUDGET, SENDING
from tests.faults.checks import violations
from tests.faults.ledger import GraphLedger, Ledger
from tests.faults.plans import plan_round
from tests.faults.stages import Stage
from tests.support.host import Host
from tests.support.work import hold_tokens
from trueup.gate.holds import Hold


@pytest.fixture
def stage(host: Host) -> Stage:
    """A played round of one user, without any content yet."""
    user = host.subscriber(BUDGET, start=datetime.now(UTC) - timedelta(days=1))
    provider, graph = SimpleNamespace(ledger=Ledger()), SimpleNamespace(ledger=GraphLedger())
    return Stage(
        plan=replace(plan_round(1, 0), budgets=(BUDGET,), tasks=(SENDING,)),
        servers=None,  # type: ignore[arg-type] - not asked
        database="",
        engine=host.engine,
        provider=provider,  # type: ignore[arg-type] - only its ledger is asked
        graph=graph,  # type: ignore[arg-type] - likewise
        workers=[],
        sender=None,  # type: ignore[arg-type] - not asked
        users=[user],
        settled=True,
    )


@pytest.fixture
def found(stage: Stage) -> Callable[[], set[str]]:
    """Return the kinds of violations that the checks find now."""
    return lambda: {violation.kind for violation in violations(stage, read_books(stage))}


@pytest.fixture
def hold(connection: Connection, stage: Stage) -> Hold:
    return hold_tokens(connection, stage.users[0], 80, task="t1")
