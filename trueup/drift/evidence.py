"""The evidence about a drifted counter, as `trueup.drift_evidence` gathers it from the host's rows.

Rows that only serve as proof stay dictionaries of id, tokens and time, JSON-safe.
"""

from datetime import datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Row = dict[str, Any]


def moment_of(at: str | None) -> datetime | None:
    """Return the time that PostgreSQL printed; None for no time, and for one outside Python's range."""
    try:
        return datetime.fromisoformat(at) if at else None
    except ValueError:
        return None


class _Document(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class BasePoint(_Document):
    """When the counter was last known to be right.

    For a correction: `written` is the new value, `seen_before` the old one, `kept` the tokens that it left for
    decrements in flight. None for other kinds.
    """

    at: str | None = None
    kind: Literal["window", "run", "correction", "decision"] = "window"
    written: int | None = None
    seen_before: int | None = None
    kept: int | None = None

    @property
    def moment(self) -> datetime | None:
        """Return the time; None if it is outside Python's range."""
        return moment_of(self.at)


class Part(_Document):
    """Log rows or decrements of one class without a match, and the drift in tokens that they caused.

    `elsewhere`: the log has other rows of this size. `late`: some decrements of this size came late.
    """

    kind: Literal["missed", "double", "failed", "unlogged", "mixed"] = Field(alias="class")
    count: int
    tokens: int
    first_at: str
    elsewhere: bool
    late: bool
    samples: list[Row]


class EdgeRow(_Document):
    """A row near the base point, or so recent that its match may still arrive.

    `kind`: L (log row that counts), F (failed log row), D (decrement). `settled`: before the base point.
    """

    kind: Literal["L", "F", "D"]
    id: str
    at: str
    settled: bool
    young: bool


class Edge(_Document):
    """Rows of one size, of which some are settled or young."""

    tokens: int
    rows: list[EdgeRow]


class Concurrent(_Document):
    """Two decrements within seconds: the counter may have lost one and kept the other.

    `overlapped`: a later decrement belongs to a request that began before the lost decrement. `called_lost`: an
    earlier run that explained the whole drift named this lost update.
    """

    lost: Row
    kept: Row
    overlapped: bool = False
    called_lost: bool = False


class Segment(_Document):
    """The counter between two purchases: its change, its lowest value, and its last decrements, newest first."""

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
    """The period before: tokens bought (None: not known), used and subtracted (`lowered`) in it.

    `place`: how many payments ago. `ran_out`: the plan had ended. `same_plan`: it is the present plan.
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
    """Charges of trueup's that did not lower the counter, because the host had its row locked."""

    count: int
    tokens: int
    rows: list[Row]


class Grant(_Document):
    """A grant, and the tokens that it had left when the period began, or when the grant ended."""

    id: int
    tokens: int
    reference: str | None
    granted_at: str
    given_since: bool
    ended_since: bool | None


class Reset(_Document):
    """What the reset of a counter at the beginning of a repeating period may have done.

    `used_before`: the usage of the period before. `used_until`: the usage of this period up to each of its first rows.
    """

    used_before: int
    used_until: list[int]


class Match(_Document):
    """Log rows whose size is that of `tokens`, the signed drift that one of them would explain."""

    tokens: int
    counted: int
    counted_rows: list[Row]
    failed: int
    failed_rows: list[Row]


class Pair(_Document):
    """Pairs of log rows that add up to the drift: how many, and one of them."""

    kinds: Literal["LL", "FL", "FF"]
    count: int
    rows: list[Row]


class Young(_Document):
    count: int
    tokens: int


# pydantic copies a default list deeply for each document, which costs more than all other parsing.
_NONE: Any = Field(default_factory=list)


class Evidence(_Document):
    """All evidence about one drifted counter. Fields that need an unmapped table are empty."""

    decrements_mapped: bool = False
    purchases_mapped: bool = False
    base: BasePoint = BasePoint()
    purchases: list[Purchase] = _NONE
    # Purchases in this period before the base point, without a grant: the host may have credited them after it.
    credit_may_be_late: list[int] = _NONE
    grants: list[Grant] = _NONE
    own_missed: OwnMissed | None = None
    carried: list[Carried] = _NONE
    # If periods repeat: None in the first one.
    reset: Reset | None = None
    # If the host's decrements are mapped:
    logged_rows: int = 0
    lowered_rows: int = 0
    start: int = 0
    parts: list[Part] = _NONE
    edges: list[Edge] = _NONE
    concurrent: list[Concurrent] = _NONE
    # A decrement so soon after the last correction that its request may have read the counter before it.
    overwriting: Row | None = None
    segments: list[Segment] = _NONE
    # If they are not mapped:
    matches: list[Match] = _NONE
    pairs: list[Pair] = _NONE
    young: Young | None = None
    used_before: bool = False
