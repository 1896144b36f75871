"""The chart of drift over time: one bar for each run, at its true place in time."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from statistics import median

from trueup.reports.history import RunFigures

# The chart's own units. A page stretches it, so that its labels stand outside.
WIDTH = 1000
HEIGHT = 200
# Bars are between a hair and a twenty-fifth of the width, and leave a gap to a neighbour at the usual distance.
MIN_BAR = 2.0
MAX_BAR = 40.0
BAR_SHARE = 0.7


@dataclass(frozen=True, kw_only=True)
class Bar:
    """A run's bar. `x`: its left edge; `up` and `down`: its lengths for overstated and understated tokens.

    `is_this`: the report is about this run.
    """

    run: RunFigures
    x: float
    up: float
    down: float
    is_this: bool


@dataclass(frozen=True, kw_only=True)
class Chart:
    """Bars up for overstated and down for understated tokens, on one scale, the oldest run first.

    `bar`: the width of a bar. `middle`: the zero line. `highest`, `lowest`: the tokens at top and bottom. `ticks`: the
    times at the left, in the middle and at the right; only one if all runs started at the same time.
    """

    bars: list[Bar]
    bar: float
    middle: float
    highest: int
    lowest: int
    ticks: list[datetime]
    width: int = WIDTH
    height: int = HEIGHT


def chart_of(runs: Sequence[RunFigures], this_run: int | None = None) -> Chart:
    """Return the chart of these runs. `this_run`: the run of the report; None: of no single run."""
    runs = sorted(runs, key=lambda run: run.started_at)
    highest = max((run.tokens_overstated for run in runs), default=0)
    lowest = max((run.tokens_understated for run in runs), default=0)
    scale = HEIGHT / max(1, highest + lowest)
    places = _places([run.started_at for run in runs])
    gaps = [later - earlier for earlier, later in pairwise(places) if later > earlier]
    bar = round(min(MAX_BAR, max(MIN_BAR, BAR_SHARE * median(gaps) * WIDTH)), 2) if gaps else MAX_BAR
    return Chart(
        bars=[
            Bar(
                run=run,
                x=round(place * (WIDTH - bar), 2),
                up=_visible(run.tokens_overstated, scale),
                down=_visible(run.tokens_understated, scale),
                is_this=run.id == this_run,
            )
            for run, place in zip(runs, places, strict=True)
        ],
        bar=bar,
        middle=round(highest * scale if highest + lowest else HEIGHT / 2, 2),
        highest=highest,
        lowest=lowest,
        ticks=_ticks([run.started_at for run in runs]),
    )


def _places(times: Sequence[datetime]) -> list[float]:
    """Return each time's place between the first (0) and the last (1); 0.5 if all are the same time."""
    if not times or times[0] == times[-1]:
        return [0.5] * len(times)
    return [(time - times[0]) / (times[-1] - times[0]) for time in times]


def _ticks(times: Sequence[datetime]) -> list[datetime]:
    if not times or times[0] == times[-1]:
        return list(times[:1])
    return [times[0], times[0] + (times[-1] - times[0]) / 2, times[-1]]


def _visible(tokens: int, scale: float) -> float:
    """Return the length of a bar. More than zero tokens are always visible."""
    return round(max(1.5, tokens * scale), 2) if tokens else 0.0
