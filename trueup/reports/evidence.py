"""The evidence of a drift in sentences. A key without a sentence of its own is told by its name and value."""

from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import Any

from trueup.drift.causes import CERTAINTY_SENTENCES, cause_sentence, cause_title
from trueup.reports.display import count_of, show, signed

# A page tells this many rows of a component and counts the others.
MAX_TOLD = 5
_TITLES = {"log_id": "log row", "decrement_id": "decrement", "id": "row", "reference": "payment", "payment": "payment"}
# Told in the component's own sentence, or by the table of the report.
_SAID = frozenset({"cause", "tokens", "certainty", "alternatives", "ignored", "count", "at", "rows", "entries", "note"})
_FIGURES = frozenset({"components", "alternatives", "in_flight", "original", "consumed"})


def figure_sentences(evidence: Mapping[str, Any]) -> list[str]:
    """Return what the whole drift's evidence says: the account's figures, and causes that may be meant instead."""
    told = []
    if isinstance(evidence.get("original"), int) and isinstance(evidence.get("consumed"), int):
        told.append(f"Plan and grants: {show(evidence['original'])}. Used: {show(evidence['consumed'])}.")
    if evidence.get("in_flight"):
        told.append(f"Decrements of {show(evidence['in_flight'])} recent tokens may still arrive.")
    said = [part.get("alternatives") for part in evidence.get("components") or []]
    if evidence.get("alternatives") and evidence["alternatives"] not in said:
        told.append(f"It may also be: {', '.join(cause_title(str(one)) for one in evidence['alternatives'])}.")
    return [show(one) for one in (*told, *_others(evidence, _FIGURES))]


def component_sentences(part: Mapping[str, Any]) -> list[str]:
    """Return a component's evidence: first its cause, then its rows and entries, then what else it may be."""
    certainty = CERTAINTY_SENTENCES.get(part["certainty"], part["certainty"])
    decided = " A person decided to ignore it." if part.get("ignored") else ""
    told = [f"{signed(part['tokens'])} tokens: {cause_sentence(part['cause'])}; {certainty}.{decided}"]
    rows, entries = _listed(part.get("rows")), _listed(part.get("entries"))
    told += [f"{_row(row)}." for row in rows[:MAX_TOLD]]
    told += [f"{_entry(entry)}." for entry in entries[:MAX_TOLD]]
    more = max(part.get("count") or 0, len(rows), len(entries)) - min(MAX_TOLD, max(len(rows), len(entries)))
    if more > 0 and (rows or entries):
        told.append(f"And {count_of(more, 'more')}.".replace("mores", "more"))
    if part.get("note"):
        told.append(f"Note: {show(part['note'])}.")
    if part.get("alternatives"):
        told.append(f"It may also be: {', '.join(cause_title(str(one)) for one in part['alternatives'])}.")
    return [show(one) for one in (*told, *_others(part, _SAID))]


def _listed(rows: Any) -> list[Any]:
    return rows if isinstance(rows, list) else []


def _row(row: Any) -> str:
    """Return a host's row: its kind, its number, and its other values."""
    if not isinstance(row, dict):
        return _sentence(_value(row))
    key = next((name for name in _TITLES if row.get(name) is not None), None)
    title = f"{_TITLES[key]} {show(str(row[key]))}" if key else "row"
    values = dict(row)
    if key:
        del values[key]
    tokens = values.pop("tokens", None)
    at = values.pop("at", None) or values.pop("created_at", None)
    success = values.pop("success", None)
    parts = [
        *([f"{_value(tokens)} tokens"] if tokens is not None else []),
        *([f"at {_value(at)}"] if at else []),
        *(["of a failed call"] if success is False else []),
        *(f"{_name(name)} {_value(value)}" for name, value in values.items() if value not in (None, "", [], {})),
    ]
    return _sentence(f"{title}: {', '.join(parts)}" if parts else title)


def _entry(entry: Any) -> str:
    """Return one change of the counter, from the journal."""
    if not isinstance(entry, dict) or "old" not in entry or "new" not in entry:
        return _row(entry)
    by = f" by {_value(entry['application_name'])!r}" if entry.get("application_name") else ""
    at = f" at {_value(entry['at'])}" if entry.get("at") else ""
    return f"The counter changed from {_value(entry['old'])} to {_value(entry['new'])}{at}{by}"


def _others(evidence: Mapping[str, Any], said: frozenset[str]) -> Iterator[str]:
    for name, value in evidence.items():
        if name in said or value in (None, "", [], {}):
            continue
        if isinstance(value, list) and value and all(isinstance(one, dict) for one in value):
            yield from (f"{_sentence(_name(name))}: {_row(one)}." for one in value[:MAX_TOLD])
        else:
            yield f"{_sentence(_name(name))}: {_value(value)}."


def _value(value: Any) -> str:
    """Return a value of evidence in words. A time in ISO 8601 is shown to the second, in UTC."""
    if isinstance(value, dict):
        return ", ".join(f"{_name(name)} {_value(one)}" for name, one in value.items() if one is not None)
    if isinstance(value, list):
        more = f" and {len(value) - MAX_TOLD:,} more" if len(value) > MAX_TOLD else ""
        return ", ".join(map(_value, value[:MAX_TOLD])) + more
    if isinstance(value, str) and len(value) >= len("2026-01-01T00:00") and value[4:5] == "-" and value[10:11] == "T":
        try:
            return f"{show(datetime.fromisoformat(value).astimezone(UTC))} UTC"
        except (ValueError, OverflowError):
            return show(value)
    return show(value)


def _name(name: str) -> str:
    return show(str(name)).replace("_", " ")


def _sentence(words: str) -> str:
    return words[:1].upper() + words[1:]
