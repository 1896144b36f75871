"""Every way in which a counter goes wrong, as a part of a script, from the description of legacy hosts.

missed_decrement: a request is logged, but its decrement never comes (one to three times).
lost_update: two decrements read the counter before either writes. There are two decrement rows within 1.5 s, and only
    the second has lowered the counter.
double_decrement: a retry lowers the counter again for one log row, 0.5 s to 180 s after the first time.
charged_not_logged: a decrement with its row, without a log row.
failed_usage_charged: a failed request's tokens are subtracted from the counter.
clamped_at_zero: the last request costs more than the counter holds, so the counter correctly shows 0. It becomes wrong
    when tokens come afterwards: a pack that a person has turned into a grant, another injected credit or renewal, or a
    counter that had been too low before.
credit_without_grant: another plan's tokens are bought (one payment, sometimes two) and added to the counter.
renewal_without_new_window: the subscription's own plan is bought again and its tokens are added, but the window stays.
carried_over_tokens: another plan is bought and a new window starts. The counter keeps its tokens and gets the plan's.
    Sometimes the kept tokens are a trial's, which were never paid for.
manual_edit: a person sets the counter to another value, up or down, by or to a round number, or to any value.
burned_at_expiry: a trial ends. A moment later its counter is set to 0, and it is deactivated.
counter_null, counter_negative: the counter is null or negative.
"""

from collections.abc import Callable

from tests.support.legacy.timeline import DAY, Event, Plan
from tests.support.legacy.usage import Script

Injection = Callable[[Script, list[Plan]], None]


def miss(script: Script, plans: list[Plan]) -> None:
    for _ in range(script.dice.choice((1, 1, 1, 2, 3))):
        section, size = script.section_and_size()
        script.log(section, size, cause="missed_decrement")
        script.wait(5, 400)


def lose(script: Script, plans: list[Plan]) -> None:
    requests = [script.section_and_size(), script.section_and_size()]
    script.log(*requests[0])
    apart = script.dice.uniform(0.005, 1.4)
    script.wait(0, apart)
    script.log(*requests[1])
    script.write_both(requests, after=script.delay(), apart=apart)
    script.wait(5, 60)


def double(script: Script, plans: list[Plan]) -> None:
    section, size = script.section_and_size()
    script.log(section, size)
    script.write(section, size, after=script.delay())
    again = script.dice.choice((script.dice.uniform(0.5, 5), script.dice.uniform(5, 60), 180 + script.delay()))
    script.write(section, size, after=again, cause="double_decrement")
    script.wait(1, 100)


def charge_without_log(script: Script, plans: list[Plan]) -> None:
    for _ in range(script.dice.choice((1, 1, 2))):
        script.write(*script.section_and_size(), after=script.delay(), cause="charged_not_logged")
        script.wait(5, 100)


def charge_failed(script: Script, plans: list[Plan]) -> None:
    for _ in range(script.dice.choice((1, 1, 2))):
        section, size = script.section_and_size()
        script.log(section, size, success=False, cause="failed_usage_charged")
        script.write(section, size, after=script.delay(), cause="failed_usage_charged")
        script.wait(5, 100)


def other_pack(script: Script, plans: list[Plan]) -> Plan:
    return script.dice.choice([plan for plan in plans if plan.days is None and plan != script.plan])


def credit(script: Script, plans: list[Plan]) -> None:
    script.wait(600, 20_000)
    for _ in range(script.dice.choice((1, 1, 1, 1, 1, 2))):
        script.buy(other_pack(script, plans), cause="credit_without_grant")
        script.wait(5, 3_000)


def renew_early(script: Script, plans: list[Plan]) -> None:
    script.wait(3_600, 50_000)
    script.buy(script.plan, cause="renewal_without_new_window")
    script.wait(5, 100)


def carry_over(script: Script, plans: list[Plan]) -> None:
    if script.left == script.plan.tokens:
        # No row shows tokens that were given for nothing and never used.
        script.request()
        script.wait(60, 600)
    larger = [plan for plan in plans if plan.sold and plan.tokens > script.plan.tokens]
    script.open_window(script.dice.choice(larger or [other_pack(script, plans)]), cause="carried_over_tokens")
    script.wait(5, 100)


def edit(script: Script, plans: list[Plan]) -> None:
    script.wait_until(script.clock)
    script.add(Event(at=script.clock, kind="edit", tokens=edited_tokens(script, plans)))
    script.wait(5, 100)


def edited_tokens(script: Script, plans: list[Plan]) -> int:
    """Choose an edit of the counter that equals no plan's and no known row's size, and does not empty the counter."""
    dice = script.dice
    known = {plan.tokens for plan in plans} | set(script.log_sizes)
    while True:
        way = dice.random()
        if way < 0.35:
            tokens = dice.choice((100, 200, 250, 300, 400, 700, 800, 1_500, 4_000)) * dice.choice((1, 1, 10, -1))
        elif way < 0.65:
            tokens = max(500, 1_000 * round(script.left * dice.uniform(0.0005, 0.0016))) - script.left
        else:
            tokens = dice.randint(-8_000, 12_000)
        if tokens and abs(tokens) not in known and script.left + tokens > max(300, script.left // 3):
            return tokens


def drain_and_clamp(script: Script, *, visible_below: int | None = None) -> None:
    """Spend until a request costs more than the rest. `visible_below`: clamp away fewer tokens than that."""
    while script.left > 3_000:
        script.request(int(script.left * script.dice.uniform(0.2, 0.33)))
        script.wait(20, 900)
    most = max(60, script.left) if visible_below is None else max(2, min(visible_below, script.left))
    script.wait_until(script.clock)
    script.request(script.left + script.dice.randrange(1, most))
    script.wait(30, 3_000)


def clamp(script: Script, plans: list[Plan]) -> None:
    """Clamp, then add a pack that a person has granted. The counter shows all of it, but some was spent before."""
    drain_and_clamp(script)
    buy_granted_pack(script, plans)
    script.session(most=4)


def clamp_and_stay(script: Script, plans: list[Plan]) -> None:
    """Clamp while the counter is too low. It shows 0, but some tokens are left."""
    low = sum(event.tokens for event in script.events if event.kind == "write" and event.cause)
    drain_and_clamp(script, visible_below=low)


def buy_granted_pack(script: Script, plans: list[Plan]) -> None:
    pack = other_pack(script, plans)
    script.wait(600, 5_000)
    script.buy(pack)
    script.add(Event(at=script.clock + 30, kind="grant", plan=pack))
    script.wait(60, 600)


def burn(script: Script, plans: list[Plan]) -> None:
    script.wait_until(script.clock + 0.3 * DAY)
    script.add(Event(at=script.clock, kind="burn"))


def null(script: Script, plans: list[Plan]) -> None:
    script.wait_until(script.clock)
    script.add(Event(at=script.clock, kind="null"))


def negative(script: Script, plans: list[Plan]) -> None:
    script.wait_until(script.clock)
    script.add(Event(at=script.clock, kind="negative", tokens=script.dice.choice((1, 1, 7, 480, 3_271))))


INJECTIONS: dict[str, Injection] = {
    "missed_decrement": miss,
    "lost_update": lose,
    "double_decrement": double,
    "charged_not_logged": charge_without_log,
    "failed_usage_charged": charge_failed,
    "clamped_at_zero": clamp,
    "credit_without_grant": credit,
    "renewal_without_new_window": renew_early,
    "carried_over_tokens": carry_over,
    "manual_edit": edit,
    "burned_at_expiry": burn,
    "counter_null": null,
    "counter_negative": negative,
}

# Tokens that somebody paid for or that a person gave. A machine must never take them away.
PAID = frozenset({"credit_without_grant", "renewal_without_new_window", "carried_over_tokens"})
