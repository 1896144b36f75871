"""Events that only look like a cause, or that look like another cause, to catch a finder that guesses.

Rows alone can't always prove the truth here. The tests require that no wrong cause is called certain, that no paid
tokens are taken away, and that a second pass finds nothing new.

equal_sizes_*: a user whose calls have one size, within minutes. One is missed, charged twice, lost, or failed and
    charged.
missed_of_a_plans_size: a missed decrement of exactly a pack's tokens.
edit_of_a_rows_size, edit_down_of_a_failed_rows_size: an edit by exactly the tokens of a log row.
edit_of_a_concurrent_rows_size: two decrements within 2 s, both in the counter, and an edit by the first one's tokens.
edit_of_a_plans_size: an edit by exactly a pack's tokens, without a payment.
edit_and_pending_payment: the same, beside a payment that was begun and never completed.
edit_and_lost_update: both at once. The rows are those of an edit by the sum.
unlogged_of_a_neighbours_size: a call that was charged and not logged, as large as a call logged minutes before.
paid_and_not_credited: a completed payment whose tokens never reached the counter, and a missed decrement.
slow_queue: decrements that come 20 to 40 minutes late, and a missed decrement.
sizes_that_add_up: a missed and a doubled decrement whose difference is another row's size.
burned_after_a_miss: a trial burned at expiry whose counter had been too high before.
"""

from collections.abc import Callable
from dataclasses import dataclass

from tests.support.legacy.injections import burn, lose, miss, other_pack
from tests.support.legacy.timeline import Event, Plan
from tests.support.legacy.usage import Script


@dataclass(frozen=True, kw_only=True)
class Coincidence:
    """`also`: other correct names. The causes that they leave out have no effect any more."""

    act: Callable[[Script, list[Plan]], None]
    on_trial: bool = False
    also: tuple[frozenset[str], ...] = ()


def _fixed_calls(script: Script, size: int) -> None:
    for _ in range(script.dice.randint(2, 5)):
        script.request(size)
        script.wait(5, 60)


def _equal_sizes(cause: str) -> Callable[[Script, list[Plan]], None]:
    def act(script: Script, plans: list[Plan]) -> None:
        size = script.dice.choice((128, 256, 512))
        _fixed_calls(script, size)
        if cause == "missed":
            script.log("embedding_generation", size, cause="missed_decrement")
        elif cause == "failed":
            script.log("embedding_generation", size, success=False, cause="failed_usage_charged")
            script.write("embedding_generation", size, after=0.2, cause="failed_usage_charged")
        elif cause == "lost":
            script.log("embedding_generation", size)
            script.log("embedding_generation", size)
            script.write_both([("embedding_generation", size)] * 2, after=0.1, apart=0.2)
        else:
            script.log("embedding_generation", size)
            script.write("embedding_generation", size, after=0.2)
            script.write("embedding_generation", size, after=4, cause="double_decrement")
        script.wait(5, 60)
        _fixed_calls(script, size)

    return act


def _missed_of_a_plans_size(script: Script, plans: list[Plan]) -> None:
    script.log("rag_pipeline", min(plan.tokens for plan in plans if plan.days is None), cause="missed_decrement")


def _edit(script: Script, tokens: int) -> None:
    script.wait(1, 3_000)
    script.wait_until(script.clock)
    script.add(Event(at=script.clock, kind="edit", tokens=tokens))
    script.wait(1, 100)


def _edit_of_a_rows_size(script: Script, plans: list[Plan]) -> None:
    _, size = script.section_and_size()
    script.request(size)
    _edit(script, size)


def _edit_down_of_a_failed_rows_size(script: Script, plans: list[Plan]) -> None:
    _, size = script.section_and_size()
    script.failed_request(size)
    _edit(script, -size)


def _edit_of_a_concurrent_rows_size(script: Script, plans: list[Plan]) -> None:
    _, size = script.section_and_size()
    script.request(size, after=0.2)
    script.request(script.section_and_size()[1], after=0.3)
    _edit(script, size)


def _edit_of_a_plans_size(script: Script, plans: list[Plan]) -> None:
    _edit(script, other_pack(script, plans).tokens)


def _edit_and_pending_payment(script: Script, plans: list[Plan]) -> None:
    pack = other_pack(script, plans)
    script.buy(pack, credited=False, status=script.dice.choice(("pending", "failed")))
    _edit(script, pack.tokens)


def _edit_and_lost_update(script: Script, plans: list[Plan]) -> None:
    lose(script, plans)
    _edit(script, script.dice.randint(50, 5_000))


def _unlogged_of_a_neighbours_size(script: Script, plans: list[Plan]) -> None:
    section, size = script.section_and_size()
    script.request(size)
    script.wait(2, 240)
    script.write(section, size, after=0.2, cause="charged_not_logged")
    script.wait(2, 240)


def _paid_and_not_credited(script: Script, plans: list[Plan]) -> None:
    script.buy(script.dice.choice((script.plan, other_pack(script, plans))), credited=False)
    script.wait(2, 2_000)
    miss(script, plans)


def _slow_queue(script: Script, plans: list[Plan]) -> None:
    miss(script, plans)
    for _ in range(3):
        section, size = script.section_and_size()
        script.log(section, size)
        script.write(section, size, after=script.dice.uniform(1_200, 2_400))
        script.wait(1, 30)
    script.wait_until(script.clock)


def _sizes_that_add_up(script: Script, plans: list[Plan]) -> None:
    section, size = script.section_and_size()
    more = script.section_and_size()[1]
    script.request(more)
    script.wait(5, 500)
    script.log(section, size + more, cause="missed_decrement")
    script.wait(5, 500)
    script.log(section, size)
    script.write(section, size, after=0.2)
    script.write(section, size, after=20, cause="double_decrement")
    script.wait(30, 60)


def _burned_after_a_miss(script: Script, plans: list[Plan]) -> None:
    miss(script, plans)
    script.request()
    burn(script, plans)


COINCIDENCES = {
    "equal_sizes_missed": Coincidence(act=_equal_sizes("missed")),
    "equal_sizes_double": Coincidence(act=_equal_sizes("double")),
    "equal_sizes_failed": Coincidence(act=_equal_sizes("failed")),
    "equal_sizes_lost": Coincidence(act=_equal_sizes("lost")),
    "missed_of_a_plans_size": Coincidence(act=_missed_of_a_plans_size),
    "edit_of_a_rows_size": Coincidence(act=_edit_of_a_rows_size),
    "edit_down_of_a_failed_rows_size": Coincidence(act=_edit_down_of_a_failed_rows_size),
    "edit_of_a_concurrent_rows_size": Coincidence(act=_edit_of_a_concurrent_rows_size),
    "edit_of_a_plans_size": Coincidence(act=_edit_of_a_plans_size),
    "edit_and_pending_payment": Coincidence(act=_edit_and_pending_payment),
    "edit_and_lost_update": Coincidence(act=_edit_and_lost_update),
    "unlogged_of_a_neighbours_size": Coincidence(act=_unlogged_of_a_neighbours_size),
    "paid_and_not_credited": Coincidence(act=_paid_and_not_credited),
    "slow_queue": Coincidence(act=_slow_queue),
    "sizes_that_add_up": Coincidence(act=_sizes_that_add_up),
    "burned_after_a_miss": Coincidence(
        act=_burned_after_a_miss,
        on_trial=True,
        also=(frozenset({"burned_at_expiry", "missed_decrement"}),),
    ),
}
