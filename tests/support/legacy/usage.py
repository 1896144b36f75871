"""Scripts of a subscription's ordinary use: sessions of requests, as live hosts have them.

Token sizes are log-normal with a long tail (embeddings small, workflows large). Requests come in sessions with gaps of
seconds to minutes, and sometimes in bursts. About one in twenty fails and costs nothing. The decrement comes a moment
after the log row, usually a fraction of a second, sometimes a few seconds. One user's decrements wait for each other,
so ordinary use loses no update.
"""

import math
import random

from tests.support.legacy.timeline import Event, Plan

SECTIONS = {
    # section: frequency, median of its tokens, spread (sigma of the logarithm)
    "chat": (34, 900, 0.9),
    "prompt_generation": (12, 1_400, 0.8),
    "knowledge_qa": (12, 2_200, 0.7),
    "rag_pipeline": (8, 3_500, 0.7),
    "marketing_workflow": (6, 5_000, 0.8),
    "product_recommendation": (8, 1_100, 0.6),
    "web_knowledge": (5, 2_600, 0.9),
    "session_memory": (5, 450, 0.5),
    "intent_detection": (6, 160, 0.4),
    "embedding_generation": (3, 90, 0.8),
    "other": (1, 700, 1.0),
}
_NAMES = list(SECTIONS)
_WEIGHTS = [often for often, _, _ in SECTIONS.values()]

FAILURES = 0.05
BURSTS = 0.15


class Script:
    """Writes a script forward in time. `clock` is its current time, `left` the counter's value at that time."""

    def __init__(self, dice: random.Random, plan: Plan, start: float) -> None:
        self.dice = dice
        self.plan = plan
        self.clock = start
        self.left = plan.tokens
        self.events: list[Event] = []
        self.log_sizes: list[int] = []
        self._decremented_at = start
        self._keys = 0

    def wait(self, low: float, high: float) -> None:
        self.clock += self.dice.uniform(low, high)

    def wait_until(self, moment: float) -> None:
        """Continue no earlier than this, and only after the acts scripted so far."""
        self.clock = max(self.clock, self._decremented_at) + 0.5
        self.clock = max(self.clock, moment)

    def section_and_size(self) -> tuple[str, int]:
        """Draw a request that the counter can pay for more than twice."""
        section = self.dice.choices(_NAMES, _WEIGHTS)[0]
        _, median, spread = SECTIONS[section]
        size = int(median * math.exp(self.dice.gauss(0, spread)))
        return section, max(11, min(size, 60_000, self.left // 3 - self.dice.randrange(20)))

    def delay(self) -> float:
        """Return the seconds from a log row to its decrement."""
        return min(5.0, 0.15 * math.exp(self.dice.gauss(0, 1.0)))

    def log(self, section: str, tokens: int, *, success: bool = True, cause: str = "") -> None:
        self.log_sizes.append(tokens)
        self.events.append(
            Event(at=self.clock, kind="log", tokens=tokens, success=success, section=section, cause=cause)
        )

    def write(self, section: str, tokens: int, *, after: float, cause: str = "") -> None:
        """Lower the counter, after the decrements before it."""
        self._decremented_at = max(self._decremented_at + 0.002, self.clock + after)
        self.events.append(Event(at=self._decremented_at, kind="write", tokens=tokens, section=section, cause=cause))
        self.left = max(0, self.left - tokens)

    def write_both(self, requests: list[tuple[str, int]], *, after: float, apart: float) -> None:
        """Lower the counter for two requests at once. Both read it before either writes, so the first write is lost."""
        self._decremented_at = max(self._decremented_at + 0.002, self.clock + after)
        read_at = self._decremented_at
        for place, (section, tokens) in enumerate(requests):
            self._keys += 1
            self.events.append(Event(at=read_at + place * 0.001, kind="read", key=self._keys))
            self._decremented_at = read_at + 0.005 + place * apart
            self.events.append(
                Event(at=self._decremented_at, kind="write", tokens=tokens, section=section, key=self._keys)
            )
        self.left -= requests[-1][1]

    def request(self, tokens: int | None = None, *, after: float | None = None) -> None:
        """Script a successful request: a log row, and its decrement a moment later."""
        section, size = self.section_and_size()
        size = tokens or size
        self.log(section, size)
        self.write(section, size, after=self.delay() if after is None else after)

    def failed_request(self, tokens: int | None = None) -> None:
        """Script a failed request that costs nothing, as intended."""
        section, size = self.section_and_size()
        self.log(section, tokens or self.dice.choice((0, size // 3 or 1, size)), success=False)

    def session(self, *, most: int = 12) -> None:
        """Script a session of a user. A counter that is nearly empty prevents requests."""
        burst = self.dice.random() < BURSTS
        for _ in range(min(most, 1 + int(self.dice.expovariate(0.25)))):
            if self.left < 200:
                return
            if self.dice.random() < FAILURES:
                self.failed_request()
            else:
                self.request()
            self.wait(*((0.05, 1.2) if burst else (4.0, 110.0)))

    def add(self, event: Event) -> None:
        """Script an act of another kind now. Credits and edits change the rest."""
        self.events.append(event)
        if event.kind in ("credit", "edit"):
            self.left += event.tokens

    def buy(self, plan: Plan, *, cause: str = "", credited: bool = True, status: str = "completed") -> None:
        """Pay for a plan and raise the counter by its tokens."""
        self.wait_until(self.clock)
        self.add(Event(at=self.clock, kind="pay", plan=plan, cause=cause, status=status))
        if credited:
            self.wait(0.001, 2.0)
            self.add(Event(at=self.clock, kind="credit", tokens=plan.tokens, plan=plan, cause=cause))

    def open_window(self, plan: Plan, *, cause: str = "", paid: bool = True) -> None:
        """Start a window with a plan that was just bought. With a cause, the old tokens are kept."""
        self.wait_until(self.clock)
        if paid:
            self.add(Event(at=self.clock, kind="pay", plan=plan, cause=cause))
            self.wait(0.001, 2.0)
        self.add(Event(at=self.clock, kind="window", plan=plan, cause=cause))
        self.left = plan.tokens + (self.left if cause else 0)
        self.plan = plan
