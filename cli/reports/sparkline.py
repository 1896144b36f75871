"""A row of figures as one line of text."""

from collections.abc import Sequence

BARS = "▁▂▃▄▅▆▇█"


def sparkline(values: Sequence[int]) -> str:
    """Return one bar for each value, from nothing to the largest of them; nothing has a bar of its own, the lowest."""
    top = max(values, default=0)
    if top <= 0:
        return BARS[0] * len(values)
    # Whatever is more than nothing is seen to be.
    return "".join(BARS[0] if value <= 0 else BARS[max(1, round(value / top * (len(BARS) - 1)))] for value in values)
