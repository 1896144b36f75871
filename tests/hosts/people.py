"""The users of the hosts, one for each answer of the gate, and their prompts for views that stream."""

from dataclasses import dataclass

PASSWORD = "correct horse"
JWT_SECRET = "only-for-tests-and-long-enough-for-hs256"


@dataclass(frozen=True, kw_only=True)
class Person:
    """A user. `tokens` None: without a subscription; `used`: tokens in the log."""

    id: int
    name: str
    tokens: int | None = 1_000_000
    used: int = 0
    active: bool = True
    expired: bool = False


RICH = Person(id=101, name="rich")
POOR = Person(id=102, name="poor", tokens=1_000)
SPENT = Person(id=103, name="spent", tokens=2_000, used=2_000)
EXPIRED = Person(id=104, name="expired", expired=True)
STOPPED = Person(id=105, name="stopped", active=False)
# The user of the specification's own test of the gate.
TESTER = Person(id=107, name="test@example.com", tokens=5_000, used=4_500)
STRANGER = Person(id=106, name="stranger", tokens=None)
RACERS = tuple(Person(id=200 + number, name=f"racer{number}", tokens=4_000) for number in range(4))

PEOPLE = (RICH, POOR, SPENT, EXPIRED, STOPPED, STRANGER, TESTER, *RACERS)
REASONS = {
    POOR: "insufficient_tokens",
    SPENT: "no_tokens_remaining",
    EXPIRED: "subscription_expired",
    STOPPED: "subscription_deactivated",
    STRANGER: "no_subscription",
}

# What `tests.hosts.streaming` answers, in words of one token each.
SHORT, SHORT_WORDS, PROMPT_TOKENS = "short", 20, 8
LONG = "as long as the hold allows"
