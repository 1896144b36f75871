"""Which decrements other ones overwrote: read, computed and written without a lock, the counter keeps the last. Pure.

A decrement can only be lost to one that read the counter before it was written. Where both books show that (the other
request was logged before this decrement, and subtracted after it), several losses may be summed up, as long as the
sums are so few that an edit by hand would hardly meet one by chance. Two decrements that merely lie close prove less.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

from trueup.drift import weights
from trueup.drift.evidence import Concurrent, Evidence
from trueup.drift.hypotheses import Candidate, candidate


@dataclass(frozen=True, kw_only=True)
class Losses:
    """Decrements that were lost together. `doubtful`: an edit by hand of their sum can't be told from it."""

    lost: tuple[Candidate, ...]
    doubtful: bool
    cost: float


def losses_by_tokens(evidence: Evidence, plan_sizes: frozenset[int]) -> dict[int, Losses]:
    """Return what may have been lost, for each sum of tokens that it would explain; of several, what is proved best.

    Somebody who gives tokens by hand likes to give a plan's: a sum as large as one (`plan_sizes`) is doubtful.
    """
    pairs = [pair for pair in evidence.concurrent if int(pair.lost["tokens"]) > 0 and not pair.called_lost]
    overlapped = [_lost(pair) for pair in pairs if pair.overlapped]
    found: dict[int, Losses] = {}
    for lost in _few_sums(overlapped):
        tokens = sum(one.tokens for one in lost)
        cost = min(weights.LOST_UPDATE + weights.FURTHER_LOST_UPDATE * (len(lost) - 1), weights.MAX_LOST_UPDATES)
        found.setdefault(tokens, Losses(lost=lost, doubtful=tokens in plan_sizes, cost=cost))
    for lost in [*((_lost(pair),) for pair in reversed(pairs)), *combinations(overlapped, 2)]:
        tokens = sum(one.tokens for one in lost)
        found.setdefault(tokens, Losses(lost=lost, doubtful=True, cost=weights.LOST_UPDATE * len(lost)))
    return found


def called_lost(evidence: Evidence) -> list[Candidate]:
    """Return what an earlier look that accounted for all of the drift called lost: no more than that is known of it."""
    return [_lost(pair) for pair in evidence.concurrent if pair.called_lost]


def _few_sums(lost: Sequence[Candidate]) -> Iterator[tuple[Candidate, ...]]:
    """Yield what may be lost of these: all, then ever more of the ways to choose, while they prove something."""
    if len(lost) >= weights.MAX_CONCURRENT:
        return
    chance = 0.0
    for few in range(len(lost) // 2 + 1):
        # Few were kept, or few were lost: as many ways, the one as the other.
        for number in dict.fromkeys((len(lost) - few, few)):
            for chosen in combinations(lost, number) if number else ():
                tokens = max(weights.GIVEN_FROM, sum(one.tokens for one in chosen))
                chance += 1 / tokens / math.log(weights.GIVEN_TO / weights.GIVEN_FROM)
                if chance > weights.MAX_CHANCE:
                    return
                yield chosen


def _lost(pair: Concurrent) -> Candidate:
    proof = {"rows": [pair.lost, pair.kept], "note": "of two decrements at the same moment one was lost"}
    return candidate("lost_update", int(pair.lost["tokens"]), "likely", at=pair.lost["at"], evidence=proof)
