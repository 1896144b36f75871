"""A population of subscriptions: most without a fault, others with one cause, two causes, or a coincidence.

Everything comes from a seed: the same seed, size and time make the same host. The host has one rule for each act. A
plan bought while another runs keeps the old tokens (the cause "carried-over tokens"). A plan bought after the end of
the old one starts with its own tokens, and so does a renewal at its end.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from typing import Literal

from tests.support.legacy import injections
from tests.support.legacy.coincidences import COINCIDENCES
from tests.support.legacy.injections import INJECTIONS, Injection, drain_and_clamp
from tests.support.legacy.timeline import DAY, Event, Life, Numbers, Plan, Player
from tests.support.legacy.usage import Script

Group = Literal["clean", "single", "pair", "coincidence"]
SHARES: dict[Group, float] = {"clean": 0.60, "single": 0.16, "pair": 0.16, "coincidence": 0.08}

PLANS = [
    *(Plan(id=number, tokens=tokens) for number, tokens in enumerate((5_000, 10_000, 20_000, 50_000, 100_000), 1)),
    *(Plan(id=number, tokens=tokens) for number, tokens in enumerate((250_000, 1_000_000), 6)),
    Plan(id=21, tokens=3_000, days=14, sold=False),
    Plan(id=22, tokens=30_000, days=30),
    Plan(id=23, tokens=60_000, days=30),
    Plan(id=24, tokens=200_000, days=30),
    Plan(id=25, tokens=480_000, days=90),
]
TRIAL = PLANS[7]

# Tokens that come after a clamp make it visible. So does a counter that was too low before the clamp.
_ENDS = ("burned_at_expiry", "counter_null", "counter_negative")
_LOW = ("double_decrement", "charged_not_logged", "failed_usage_charged")
_CREDITS = ("credit_without_grant", "renewal_without_new_window")
# A clamp sets the counter to 0 and hides earlier lost updates and edits, so those come after it.
_AFTER_A_CLAMP = ("lost_update", "manual_edit")

_LAST = (*_ENDS, "burned_after_a_miss")

# These are not combined as a pair. The rows can't distinguish an edit and a lost update from an edit by the sum (see
# the coincidences), and a cause that ends a counter (burned, null, negative) also ends its earlier faults.
PAIRS = [
    pair
    for pair in combinations([cause for cause in INJECTIONS if cause not in _ENDS], 2)
    if set(pair) != {"lost_update", "manual_edit"}
]

NO_DRIFT = frozenset({"no drift"})

SETTLED_SECONDS = 600
"""The time in seconds before the population's end without any event."""


@dataclass(frozen=True, kw_only=True)
class Person:
    """One subscription, with the truth about it.

    `label`: the faults in it. `accepted`: the sets of causes that name them correctly.
    """

    user_id: int
    group: Group
    label: str
    life: Life
    accepted: tuple[frozenset[str], ...]

    @property
    def causes(self) -> frozenset[str]:
        return self.life.truth.causes


def make_population(size: int, *, seed: int, now: float) -> list[Person]:
    """Make so many subscriptions, whose lives ended `SETTLED_SECONDS` before `now` (seconds since 1970)."""
    dice = random.Random(seed)  # noqa: S311 - it makes a load, and guards nothing
    numbers = Numbers(dice)
    wanted: list[tuple[Group, tuple[str, ...]]] = []
    labels: dict[Group, list[tuple[str, ...]]] = {
        "single": [(cause,) for cause in INJECTIONS],
        "pair": [*PAIRS],
        "coincidence": [(name,) for name in COINCIDENCES],
    }
    for group, names in labels.items():
        count = round(size * SHARES[group])
        wanted += [(group, names[place % len(names)]) for place in range(count)]
    wanted += [("clean", (dice.choice(list(_CLEAN)),)) for _ in range(size - len(wanted))]
    dice.shuffle(wanted)
    return [_person(dice, numbers, user, group, names, now) for user, (group, names) in enumerate(wanted, 1)]


def _person(
    dice: random.Random, numbers: Numbers, user: int, group: Group, names: tuple[str, ...], now: float
) -> Person:
    for _ in range(50):
        life = _live(dice, numbers, group, names, now)
        causes = life.truth.causes
        drifted = life.counter != life.expected
        if group == "coincidence":
            fits = drifted and "clamped_at_zero" not in causes
        elif group == "clean":
            fits = not drifted and causes <= {"clamped_at_zero"}
        else:
            fits = drifted and causes == set(names) and not _edit_is_a_rows_size(life)
        if fits and _last_moment(life) < now - SETTLED_SECONDS and not _cancels_without_a_trace(life):
            also = COINCIDENCES[names[0]].also if group == "coincidence" else ()
            accepted = (NO_DRIFT,) if group == "clean" else (causes, *also)
            return Person(user_id=user, group=group, label="+".join(names), life=life, accepted=accepted)
    raise AssertionError(f"no life with {names} came about in 50 tries")


def _last_moment(life: Life) -> float:
    return max((row.at for rows in (life.logs, life.decrements, life.payments) for row in rows), default=life.start)


def _cancels_without_a_trace(life: Life) -> bool:
    """Whether an injected decrement of the same size follows a missed one within a day. Both are one slow request."""
    injected = {row for rows in life.truth.rows.values() for row in rows}
    missed = [row for row in life.logs if str(row.id) in life.truth.rows.get("missed_decrement", [])]
    return any(
        row.tokens == log.tokens and 0 <= row.at - log.at < DAY
        for log in missed
        for row in life.decrements
        if str(row.id) in injected
    )


def _edit_is_a_rows_size(life: Life) -> bool:
    """Whether a random edit equals the size in a row of any kind, which is a coincidence."""
    edited = abs(life.truth.tokens.get("manual_edit", 0))
    rows = {row.tokens for row in (*life.logs, *life.decrements)} | {
        pay.plan.tokens for pay in life.payments if pay.plan
    }
    return edited in rows


def _live(dice: random.Random, numbers: Numbers, group: Group, names: tuple[str, ...], now: float) -> Life:
    """Script a life and play it."""
    base = _base(dice, names)
    last = now - dice.uniform(3_600, 1.5 * DAY) - (0.4 * DAY if "clamped_at_zero" in names else 0)
    sold = [plan for plan in PLANS if plan.sold]
    small = [plan for plan in sold if plan.tokens <= 30_000]
    plan = TRIAL if base == "trial" else dice.choice(small if "clamped_at_zero" in names else sold)
    start = last - dice.uniform(1.5, 10 if base == "trial" else 25) * DAY
    if base == "changed":
        plan = dice.choice([plan for plan in sold if plan.days == 30])
        start = last - dice.uniform(45, 70) * DAY
    life = Life(plan=plan, start=start, end=plan.days and start + plan.days * DAY)
    script = Script(dice, plan, start)
    if base == "trial":
        life.status, life.trial_end = "trial", life.end
    else:
        # Usually the payment opens the window. Some hosts learn of the payment a little later.
        paid_at = start + (dice.uniform(0, 60) if dice.random() < 0.1 else -dice.uniform(0.001, 3))
        script.add(Event(at=paid_at, kind="pay", plan=plan))
    script.wait(20, 3_600)
    _open_windows(script, base, names, last)
    _spread(script, _acts(script, group, names), last)
    if _ends_burned(names):
        life.end = life.trial_end = _last_act(script) - dice.uniform(60, 7_200)
    elif base == "ended":
        life.end, life.is_active, life.status = last + 1, False, "ended"
    return Player(life, numbers).play(script.events)


def _ends_burned(names: tuple[str, ...]) -> bool:
    return names in (("burned_at_expiry",), ("burned_after_a_miss",))


def _last_act(script: Script) -> float:
    return max(event.at for event in script.events)


def _base(dice: random.Random, names: tuple[str, ...]) -> str:
    if _ends_burned(names):
        return "trial"
    if "carried_over_tokens" in names:
        return dice.choice(("plan", "plan", "plan", "renewed", "trial"))
    return dice.choice(("plan", "plan", "plan", "plan", "trial", "renewed", "renewed", "changed", "ended"))


def _open_windows(script: Script, base: str, names: tuple[str, ...], last: float) -> None:
    """Play the windows before the last one. Their usage does not count any more."""
    openers: list[Callable[[], None]] = []
    if base == "renewed":
        openers.append(lambda: script.open_window(script.plan))
    elif base == "changed":
        others = [plan for plan in PLANS if plan.days is None]
        openers.append(lambda: script.open_window(script.dice.choice(others)))
    if "carried_over_tokens" in names:
        openers.append(lambda: injections.carry_over(script, PLANS))
    for opener in openers:
        until = script.clock + (last - script.clock) * script.dice.uniform(0.2, 0.5)
        if base == "changed":
            until = script.clock + 29 * DAY
        _spread(script, [script.session] * script.dice.randint(1, 3), until)
        script.wait_until(until + 1.5 * DAY if base == "changed" else until)
        opener()
        script.wait(20, 3_600)


def _spread(script: Script, acts: list[Callable[[], None]], until: float) -> None:
    """Distribute acts over the time until then. Some follow closely on the act before."""
    moments = sorted(script.dice.uniform(script.clock + 60, max(script.clock + 61, until)) for _ in acts)
    for moment, act in zip(moments, acts, strict=True):
        if act == script.session or script.dice.random() < 0.6:
            script.wait_until(moment)
        act()


def _acts(script: Script, group: Group, names: tuple[str, ...]) -> list[Callable[[], None]]:
    """Return the events of the last window in order: sessions, with the faults between them."""
    special = [partial(act, script, PLANS) for act in _special_acts(script.dice, group, names)]
    acts: list[Callable[[], None]] = [script.session] * script.dice.randint(1, 8)
    if names[0] in _LAST:
        return acts + special
    for act in special:
        # Each at a place after the one before it.
        after = acts.index(special[special.index(act) - 1]) + 1 if act is not special[0] else 0
        acts.insert(script.dice.randint(after, len(acts)), act)
    return acts


def _special_acts(dice: random.Random, group: Group, names: tuple[str, ...]) -> list[Injection]:
    if group == "clean":
        return _CLEAN[names[0]]
    if group == "coincidence":
        return [COINCIDENCES[names[0]].act]
    causes = [name for name in names if name != "carried_over_tokens"]
    acts = {cause: INJECTIONS[cause] for cause in causes}
    dice.shuffle(causes)
    if "clamped_at_zero" in causes:
        (other,) = set(causes) - {"clamped_at_zero"} or ("",)
        way = dice.random()
        if other in _AFTER_A_CLAMP:
            causes = ["clamped_at_zero", other]
        elif other in _CREDITS and way < 0.7:
            causes, acts["clamped_at_zero"] = ["clamped_at_zero", other], _only_clamp
        elif other in _LOW and way < 0.5:
            causes, acts["clamped_at_zero"] = [other, "clamped_at_zero"], injections.clamp_and_stay
    return [acts[cause] for cause in causes]


def _only_clamp(script: Script, plans: list[Plan]) -> None:
    drain_and_clamp(script)


def _not_credited(status: str) -> Injection:
    def act(script: Script, plans: list[Plan]) -> None:
        script.buy(injections.other_pack(script, plans), credited=False, status=status)

    return act


_CLEAN: dict[str, list[Injection]] = {
    "ordinary": [],
    "ordinary, too": [],
    "ordinary, as most": [],
    "spent to the last token and beyond": [_only_clamp],
    "a pack that was granted": [injections.buy_granted_pack],
    "a payment that was never completed": [_not_credited("pending")],
    "a payment that was never credited": [_not_credited("completed")],
}
