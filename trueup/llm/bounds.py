"""Bounds of prompts for models whose tokenizer is not known here: as set, as learned, else one token for each byte.

What providers report of prompts teaches how many tokens a byte costs at most, for each model and class of text. The
database keeps it, so all workers know it.
"""

import logging
import threading
import time
from collections import Counter
from dataclasses import dataclass

from sqlalchemy import Connection, text

from trueup.database.retry import retrying
from trueup.errors import TrueupError
from trueup.llm.text_classes import classes_of
from trueup.llm.texts import without_lone_surrogates
from trueup.llm.tokens import BoundCounter, EncodingCounter, FileCounter, TokenCounter, counter_for, offline_counter
from trueup.settings.models import settings_of_model
from trueup.settings.settings import Settings

logger = logging.getLogger(__name__)

# So many prompts of a class must have been reported before their ratio is used.
LEAST_SAMPLES = 5
# A shorter prompt says more of a model's template than of its tokenizer.
LEAST_BYTES = 256
# The share of a prompt that must be of one class, so that its tokens say something about that class.
_SAME_CLASS = 0.9
# The highest ratio seen, times this: 1.5.
_MARGIN = (3, 2)
_UNIT = 1_000_000  # a ratio is kept as tokens per million bytes
_FRESH_SECONDS = 30.0


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """How many tokens a class of text costs. `highest`: tokens per million bytes, the most that was seen."""

    samples: int
    highest: int


class AssignedCounter(EncodingCounter):
    """Counts in an encoding that the settings assign to a model. The model's template is not known."""

    exact = False


class RatioCounter:
    """An upper bound by the ratio that the settings give. `ratio`: tokens per million bytes."""

    exact = False

    def __init__(self, ratio: int) -> None:
        self._ratio = ratio

    def count(self, text: str) -> int:
        return 1 + _share(len(without_lone_surrogates(text).encode()), self._ratio)


class LearnedCounter:
    """An upper bound by learned ratios. A class of text without one is bounded by its bytes."""

    exact = False

    def __init__(self, ratios: dict[str, Ratio]) -> None:
        self._ratios = ratios
        self._bytes = BoundCounter()

    def count(self, text: str) -> int:
        return sum(self._chunk(kind, chunk) for kind, chunk in classes_of(text))

    def _chunk(self, kind: str, chunk: str) -> int:
        most = self._bytes.count(chunk)
        ratio = self._ratios.get(kind)
        if ratio is None or ratio.samples < LEAST_SAMPLES:
            return most
        size = len(without_lone_surrogates(chunk).encode())
        return min(most, 1 + _share(size * _MARGIN[0], ratio.highest, _MARGIN[1]))


class ClassCounter:
    """Counts nothing, and notes the bytes of each class of the texts that it is given."""

    exact = False

    def __init__(self) -> None:
        self.sizes: Counter[str] = Counter()

    def count(self, text: str) -> int:
        for kind, chunk in classes_of(text):
            self.sizes[kind] += len(without_lone_surrogates(chunk).encode())
        return 0


def bounding_counter(model_name: str, settings: Settings) -> TokenCounter:
    """Return the counter for a prompt's bound: the model's own, else as set, else as learned."""
    assigned = assigned_counter(model_name, settings)
    if assigned is not None:
        return assigned
    own = counter_for(model_name)
    return own if own.exact else LearnedCounter(_ratios.of(model_name))


def assigned_counter(model_name: str, settings: Settings) -> TokenCounter | None:
    """Return the counter that the settings give to a model; None if they give none.

    Raises `SettingsError` for a tokenizer's file that can't be read, `MissingExtraError` without its library.
    """
    known = settings_of_model(settings.models, model_name)
    if known.tokenizer_file is not None:
        return FileCounter(known.tokenizer_file)
    if known.tokenizer is not None:
        return AssignedCounter(known.tokenizer)
    return None if known.ratio is None else RatioCounter(int(known.ratio * _UNIT) + 1)


def likely_counter(model_name: str, settings: Settings) -> TokenCounter:
    """Return the counter for an estimate: as assigned, the model's own, else the one nearest to most models'.

    A ratio in the settings is a bound, so an estimate does not use it. Raises as `assigned_counter`.
    """
    assigned = assigned_counter(model_name, settings)
    if assigned is not None and not isinstance(assigned, RatioCounter):
        return assigned
    own = counter_for(model_name)
    return own if own.exact else offline_counter()


def learns(model_name: str, settings: Settings) -> bool:
    """Return whether the bounds of a model's prompts are learned."""
    if not model_name or assigned_counter(model_name, settings) is not None:
        return False
    return not counter_for(model_name).exact


def learn(model_name: str, sizes: Counter[str], prompt_tokens: int) -> None:
    """Learn from what a provider reports of a prompt. `sizes`: its bytes by class of text.

    A failure is logged only: the next prompt teaches the same.
    """
    total = sizes.total()
    if total < LEAST_BYTES:
        return
    kind, most = sizes.most_common(1)[0]
    if most < _SAME_CLASS * total:
        return
    try:
        _ratios.note(model_name, kind, min(_UNIT, -(-prompt_tokens * _UNIT // total)))
    except TrueupError as error:
        logger.warning("ratio of a prompt not learned model=%s error=%s", model_name, error)


def _share(size: int, ratio: int, divisor: int = 1) -> int:
    """Return the tokens of `size` bytes by a ratio, rounded up."""
    return -(-size * ratio // (_UNIT * divisor))


_READ = text("SELECT text_class, samples, highest FROM trueup.prompt_ratio WHERE model_name = :model_name")
_NOTE = text(
    "INSERT INTO trueup.prompt_ratio AS r (model_name, text_class, samples, highest) "
    "VALUES (:model_name, :text_class, 1, :ratio) ON CONFLICT (model_name, text_class) DO UPDATE "
    "SET samples = r.samples + 1, highest = greatest(r.highest, excluded.highest) RETURNING samples, highest"
)


class _Ratios:
    """The learned ratios of this process, read again from the database now and then."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: dict[str, tuple[float, dict[str, Ratio]]] = {}

    def of(self, model_name: str) -> dict[str, Ratio]:
        """Return a model's ratios by class of text."""
        name = model_name.lower()
        with self._lock:
            read_at, ratios = self._known.get(name, (float("-inf"), {}))
        if time.monotonic() - read_at < _FRESH_SECONDS:
            return ratios
        ratios = retrying(lambda connection: _read(connection, name))
        with self._lock:
            self._known[name] = (time.monotonic(), ratios)
        return ratios

    def note(self, model_name: str, kind: str, ratio: int) -> None:
        """Record a ratio that was seen, if the database does not know as much already."""
        name = model_name.lower()
        known = self.of(name)
        ratio_of_kind = known.get(kind)
        if ratio_of_kind is not None and ratio_of_kind.samples >= LEAST_SAMPLES and ratio <= ratio_of_kind.highest:
            return
        values = {"model_name": name, "text_class": kind, "ratio": ratio}
        row = retrying(lambda connection: connection.execute(_NOTE, values).one())
        with self._lock:
            known[kind] = Ratio(samples=row.samples, highest=row.highest)

    def forget(self) -> None:
        """Read everything again when it is next needed."""
        with self._lock:
            self._known.clear()


def _read(connection: Connection, model_name: str) -> dict[str, Ratio]:
    rows = connection.execute(_READ, {"model_name": model_name})
    return {row.text_class: Ratio(samples=row.samples, highest=row.highest) for row in rows}


_ratios = _Ratios()
forget_ratios = _ratios.forget
