"""Compares the records of a reconcile run with the truth."""

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from tests.support.host import Host
from tests.support.legacy.population import NO_DRIFT, PLANS, Group, Person

MOMENT_SECONDS = 2.0


def looks_like_a_lost_update(person: Person) -> bool:
    """Whether an edit raised the counter by just the tokens of a decrement that another request may have overwritten.

    That decrement was logged before this one and subtracted after it. The rows of both cases are equal.
    """
    edited = person.life.truth.tokens.get("manual_edit")
    return any(
        lost.tokens == edited
        and 0 <= kept.at - lost.at <= MOMENT_SECONDS
        and any(log.tokens == kept.tokens and log.at < lost.at for log in person.life.logs)
        for lost in person.life.decrements
        for kept in person.life.decrements
        if kept is not lost
    )


def looks_given(person: Person) -> bool:
    """Whether a person gave tokens and nothing else is wrong. No usage adds up to that amount."""
    life = person.life
    given = life.truth.tokens.get("manual_edit", 0)
    sizes = {plan.tokens for plan in PLANS}
    return (
        person.causes == {"manual_edit"}
        and given > 0
        and (given % 100 == 0 or given in sizes or given > life.consumed)
        and given not in {row.tokens for row in life.logs}
    )


@dataclass(frozen=True, kw_only=True)
class Named:
    """The content of a drift row of one subscription. Without a row, the causes are `NO_DRIFT`."""

    causes: frozenset[str]
    certainty: str
    action: str
    evidence: dict[str, Any]

    @property
    def tokens(self) -> dict[str, int]:
        """The components' signed tokens by cause."""
        sums: Counter[str] = Counter()
        for part in self.evidence.get("components", []):
            sums[part["cause"]] += part["tokens"]
        return dict(sums)


UNSEEN = Named(causes=NO_DRIFT, certainty="inferred", action="none", evidence={})


class Judgement:
    """Compares the drift rows of all subscriptions with the truth."""

    def __init__(self, people: list[Person], named: dict[int, Named]) -> None:
        self.people = people
        self.named = named

    @classmethod
    def read(cls, host: Host, people: list[Person]) -> "Judgement":
        """Read the records of the first run."""
        rows = host.execute("SELECT user_id, cause, certainty, action, evidence FROM trueup.drift")
        named = {
            row.user_id: Named(
                causes=frozenset(row.cause.split("+")),
                certainty=row.certainty,
                action=row.action,
                evidence=row.evidence,
            )
            for row in rows
        }
        return cls(people, named)

    def of(self, person: Person) -> Named:
        return self.named.get(person.user_id, UNSEEN)

    def is_right(self, person: Person) -> bool:
        return self.of(person).causes in person.accepted

    def group(self, group: Group) -> list[Person]:
        return [person for person in self.people if person.group == group]

    def share_right(self, people: Iterable[Person]) -> float:
        verdicts = [self.is_right(person) for person in people]
        return sum(verdicts) / len(verdicts)

    def wrong_and_certain(self) -> list[Person]:
        """Return the subscriptions with a wrong cause stated as certain. No stated cause is not a wrong one."""
        return [
            person
            for person in self.people
            if person.user_id in self.named
            and self.of(person).certainty == "inferred"
            and self.of(person).causes != {"unexplained"}
            and not self.is_right(person)
        ]

    def without_proof(self, people: Iterable[Person]) -> list[Person]:
        """Return the correct verdicts whose evidence lacks the rows of a cause that has rows."""
        lacking = []
        for person in people:
            shown = json.dumps(self.of(person).evidence)
            for rows in person.life.truth.rows.values():
                if rows and not any(row in shown for row in rows):
                    lacking.append(person)
                    break
        return lacking

    def table(self, group: Group) -> str:
        """Return the causes found for each label, with wrong causes below their label, and an example of each."""
        lines = []
        for label in sorted({person.label for person in self.group(group)}):
            people = [person for person in self.group(group) if person.label == label]
            lines.append(f"{label}: {sum(map(self.is_right, people))} of {len(people)} right")
            wrong = Counter((self._name(person)) for person in people if not self.is_right(person))
            for name, count in wrong.most_common():
                example = next(person for person in people if self._name(person) == name and not self.is_right(person))
                lines.append(f"    {count} x {name}, as user {example.user_id} {example.life.truth.tokens}")
        return "\n".join(lines)

    def _name(self, person: Person) -> str:
        named = self.of(person)
        return f"{'+'.join(sorted(named.causes))} ({named.certainty}, {named.action})"
