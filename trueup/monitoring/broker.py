"""The state of the queues and the workers, as the live page shows it. The worker package reads it."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class QueueState:
    """A queue. `length`: messages that wait. `oldest_seconds`: how long the oldest has been due; None: unknown.

    `workers`: how many workers consume it.
    """

    name: str
    length: int
    oldest_seconds: float | None
    workers: int


@dataclass(frozen=True, kw_only=True)
class BrokerState:
    """The queues, the names of the workers that answer, and the number of messages that no worker could work on."""

    queues: tuple[QueueState, ...]
    workers: tuple[str, ...]
    dead_letters: int
