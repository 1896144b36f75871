"""Lost updates where there is no journal.

A host that reads, computes and writes the counter without a lock keeps only the last decrement. Pure.

A decrement is lost only to a request that read the counter before the decrement was written. If the rows show that (the
other request was logged before this decrement and subtracted after it), sums of several losses are tried too, as long
as the sums are so few that a manual edit would hardly match one by chance. Two close decrements alone prove less.
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
    """Decrements that were lost together. `doubtful`: a manual edit of the same sum fits too."""

    lost: tuple[Candidate, ...]
    doubtful: bool
    cost: float


def losses_by_tokens(evidence: Evidence, plan_sizes: frozenset[int]) -> dict[int, Losses]:
    """Return the possible losses by the sum of tokens that they explain; for each sum, the best proven ones.

    `plan_sizes`: the tokens that plans include. A sum of that size is doubtful: people often grant a plan's tokens.
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
    """Return the lost updates that an earlier run named when it explained the whole drift."""
    return [_lost(pair) for pair in evidence.concurrent if pair.called_lost]


def _few_sums(lost: Sequence[Candidate]) -> Iterator[tuple[Candidate, ...]]:
    """Yield subsets of these losses: all, then smaller and larger ones, until a match by chance gets too probable."""
    if len(lost) >= weights.MAX_CONCURRENT:
        return
    chance = 0.0
    for few in range(len(lost) // 2 + 1):
        # All but a few were lost, or only a few: both have equally many subsets.
        for number in dict.fromkeys((len(lost) - few, few)):
            for chosen in combinations(lost, number) if number else ():
                tokens = max(weights.GIVEN_FROM, sum(one.tokens for one in chosen))
                chance += 1 / tokens / math.log(weights.GIVEN_TO / weights.GIVEN_FROM)
                if chance > weights.MAX_CHANCE:
                    return
                yield chosen


def _lost(pair: Concurrent) -> Candidate:
    proof = {"rows": [pair.lost, pair.kept], "note": "two decrements ran at the same moment, and one was lost"}
    return candidate("lost_update", int(pair.lost["tokens"]), "possible", at=pair.lost["at"], evidence=proof)
