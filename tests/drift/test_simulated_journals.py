"""The causes that the journal proves, compared with the true causes of simulated counters. A long test judges more."""

import sys
from collections import Counter
from dataclasses import dataclass, field

import pytest

from tests.support.counter_simulation import Life, live
from trueup.drift.findings import Found
from trueup.drift.matching import match

HOURS = 24
PER_HOUR = (5, 20, 60)


@dataclass(kw_only=True)
class Judged:
    """How many users were judged, and who is not right. `wrong`: named and true tokens by cause."""

    users: int = 0
    rows: int = 0
    wrong_sums: list[str] = field(default_factory=list)
    wrong: dict[str, tuple[dict[str, int], dict[str, int]]] = field(default_factory=dict)
    wrong_and_proven: list[str] = field(default_factory=list)
    causes: Counter[str] = field(default_factory=Counter)

    def judge(self, name: str, life: Life) -> None:
        found = match(life.story())
        self.users += 1
        self.rows += len(life.usage)
        named, true = by_cause(found), {cause: tokens for cause, tokens in life.truth.items() if tokens}
        self.causes.update(true.keys())
        if sum(named.values()) != life.drift:
            self.wrong_sums.append(name)
        if named != true:
            self.wrong[name] = named, true
            if all(one.certainty == "proven" for one in found):
                self.wrong_and_proven.append(name)


def by_cause(found: list[Found]) -> dict[str, int]:
    named: Counter[str] = Counter()
    for one in found:
        named[one.cause] += one.tokens
    return {cause: tokens for cause, tokens in named.items() if tokens}


@pytest.fixture(
    scope="module",
    params=[(300, "quick"), pytest.param((10_000, "long"), marks=pytest.mark.long)],
    ids=lambda param: f"{param[0]}",
)
def judged(request: pytest.FixtureRequest) -> Judged:
    """A third of the users each at 5, 20 and 60 requests an hour."""
    users, seed = request.param
    judged = Judged()
    for number in range(users):
        name = f"{seed}/{number}"
        judged.judge(name, live(name, per_hour=PER_HOUR[number % len(PER_HOUR)], hours=HOURS))
    right = 1 - len(judged.wrong) / judged.users
    sys.stdout.write(f"{judged.users:,} users, {judged.rows:,} log rows: all causes exact for {right:.4f}\n")
    return judged


def test_the_simulation_has_every_cause(judged: Judged) -> None:
    assert set(judged.causes) == {
        "missed_decrement", "stale_write", "double_decrement", "failed_usage_charged", "charged_not_logged",
        "clamped_at_zero", "host_decremented_our_charge", "credit_without_grant", "manual_edit",
    }  # fmt: skip


def test_the_components_are_the_drift_of_every_user(judged: Judged) -> None:
    assert judged.wrong_sums == []


def test_all_components_are_exact_for_nearly_every_user(judged: Judged) -> None:
    assert len(judged.wrong) <= max(2, 0.005 * judged.users), judged.wrong


def test_no_wrong_cause_is_called_proven(judged: Judged) -> None:
    assert judged.wrong_and_proven == [], {name: judged.wrong[name] for name in judged.wrong_and_proven}
