"""What the host's rows say of a drifted counter, as `trueup.drift_evidence` gathers it. Token figures are counts.

Rows that only prove something stay as they come: dictionaries of id, tokens and time, JSON-safe.
"""

from datetime import datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Row = dict[str, Any]


def moment_of(at: str | None) -> datetime | None:
    """Return the time that PostgreSQL wrote; None for none, and for one that Python can't hold."""
    try:
        return datetime.fromisoformat(at) if at else None
    except ValueError:
        return None


class _Document(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class BasePoint(_Document):
    """When the counter was last known to be right.

    `written`, `seen_before`: by a correction then, and `kept`, what of it was for decrements in flight; else None.
    """

    at: str | None = None
    kind: Literal["window", "run", "correction", "decision"] = "window"
    written: int | None = None
    seen_before: int | None = None
    kept: int | None = None

    @property
    def moment(self) -> datetime | None:
        """Return when that was; None for a time that Python can't hold."""
        return moment_of(self.at)


class Part(_Document):
    """Rows without a partner in the other book, of one class, and what they made of the counter in tokens.

    `elsewhere`: other rows of such a size are in the log. `late`: some of this size were subtracted late.
    """

    kind: Literal["missed", "double", "failed", "unlogged", "mixed"] = Field(alias="class")
    count: int
    tokens: int
    first_at: str
    elsewhere: bool
    late: bool
    samples: list[Row]


class EdgeRow(_Document):
    """A row at the base point (`settled`: before it), or so young that its partner may come. L, F or D by `kind`."""

    kind: Literal["L", "F", "D"]
    id: str
    at: str
    settled: bool
    young: bool


class Edge(_Document):
    """Rows of one size, some of them settled or young."""

    tokens: int
    rows: list[EdgeRow]


class Concurrent(_Document):
    """Two decrements within seconds: the one may have been lost, the other kept.

    `overlapped`: the request of another decrement after the lost one had begun before it. `called_lost`: an earlier
    look that accounted for all of the drift said so.
    """

    lost: Row
    kept: Row
    overlapped: bool = False
    called_lost: bool = False


class Segment(_Document):
    """The counter between two purchases: its change, the lowest it came to, its last decrements, newest first."""

    number: int
    change: int
    lowest: int
    newest: list[Row]


class Purchase(_Document):
    id: str
    reference: str
    tokens: int
    at: str
    kind: str
    own_plan: bool
    granted: bool
    settled: bool
    opened_window: bool


class Carried(_Document):
    """The window before: what was bought (`tokens` None: not known), used and subtracted in it.

    `place`: how many payments back that is. `ran_out`: the plan had ended. `same_plan`: it is the one of now.
    """

    since: str
    tokens: int | None
    used: int
    lowered: int
    payment: str | None
    upgrade: Row
    place: int
    ran_out: bool
    same_plan: bool


class OwnMissed(_Document):
    """Charges of trueup's that could not lower the counter, because the host had it locked."""

    count: int
    tokens: int
    rows: list[Row]


class Grant(_Document):
    """A grant and what it had left when the window began, or when it ended."""

    id: int
    tokens: int
    reference: str | None
    granted_at: str
    given_since: bool
    ended_since: bool | None


class Match(_Document):
    """Rows of the log that are as large as `tokens` (of its sign here: what they would explain)."""

    tokens: int
    counted: int
    counted_rows: list[Row]
    failed: int
    failed_rows: list[Row]


class Pair(_Document):
    """Two rows of the log that add up to the drift: how many such pairs, and one."""

    kinds: Literal["LL", "FL", "FF"]
    count: int
    rows: list[Row]


class Young(_Document):
    count: int
    tokens: int


# A list as a default is copied deeply for each document, which takes longer than all the rest of reading it.
_NONE: Any = Field(default_factory=list)


class Evidence(_Document):
    """All that is known of one drifted counter. What needs a table that is not mapped is empty."""

    decrements_mapped: bool = False
    purchases_mapped: bool = False
    base: BasePoint = BasePoint()
    purchases: list[Purchase] = _NONE
    # Paid for in this window, before the counter was last right, and not granted: the credit may have come since.
    credit_may_be_late: list[int] = _NONE
    grants: list[Grant] = _NONE
    own_missed: OwnMissed | None = None
    carried: list[Carried] = _NONE
    # With the decrements' rows:
    logged_rows: int = 0
    lowered_rows: int = 0
    start: int = 0
    parts: list[Part] = _NONE
    edges: list[Edge] = _NONE
    concurrent: list[Concurrent] = _NONE
    # What was subtracted so soon after the last correction that its request may have read the counter before.
    overwriting: Row | None = None
    segments: list[Segment] = _NONE
    # Without them:
    matches: list[Match] = _NONE
    pairs: list[Pair] = _NONE
    young: Young | None = None
    used_before: bool = False
