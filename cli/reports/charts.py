"""Where the bars of the charts stand. A chart is stretched to the page's width, so that its text stands outside."""

from collections.abc import Sequence
from dataclasses import dataclass

from trueup.reports.history import RunFigures

HEIGHT = 200
SLOT = 100


@dataclass(frozen=True, kw_only=True)
class Column:
    """One run in the chart over time: overstated tokens stand up from the middle line, understated ones hang down."""

    run: RunFigures
    x: float
    up: float
    down: float
    is_this: bool


@dataclass(frozen=True, kw_only=True)
class Columns:
    """The chart over time. `middle`: where the zero line is; `highest` and `lowest`: the tokens at its ends."""

    columns: list[Column]
    width: int
    middle: float
    highest: int
    lowest: int

    @property
    def height(self) -> int:
        return HEIGHT

    @property
    def bar(self) -> float:
        """How wide a bar is: few runs would else make walls of them."""
        return _bar(len(self.columns))

    @property
    def slot(self) -> int:
        return SLOT


def columns_of(runs: Sequence[RunFigures], *, this_run: int | None) -> Columns:
    """Return the chart of these runs. Both directions have one scale. `this_run`: the one that the report is of."""
    highest = max((run.tokens_overstated for run in runs), default=0)
    lowest = max((run.tokens_understated for run in runs), default=0)
    scale = HEIGHT / max(1, highest + lowest)
    middle = highest * scale if highest + lowest else HEIGHT / 2
    return Columns(
        columns=[
            Column(
                run=run,
                x=round(place * SLOT + (SLOT - _bar(len(runs))) / 2, 2),
                up=_visible(run.tokens_overstated, scale),
                down=_visible(run.tokens_understated, scale),
                is_this=run.id == this_run,
            )
            for place, run in enumerate(runs)
        ],
        width=max(1, len(runs)) * SLOT,
        middle=round(middle, 2),
        highest=highest,
        lowest=lowest,
    )


def _bar(runs: int) -> float:
    return round(SLOT * min(0.7, 0.04 * runs + 0.02), 2)


def _visible(tokens: int, scale: float) -> float:
    """Whatever is more than nothing is seen to be."""
    return round(max(1.5, tokens * scale), 2) if tokens else 0.0


def share_bars(pairs: Sequence[tuple[int, int]]) -> list[tuple[float, float]]:
    """Return the two widths of each bar, in percent of the longest bar."""
    longest = max((over + under for over, under in pairs), default=0) or 1
    return [(round(over / longest * 100, 2), round(under / longest * 100, 2)) for over, under in pairs]
