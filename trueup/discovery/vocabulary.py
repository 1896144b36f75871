"""Names that hosts give to what trueup looks for, and how near a name comes to them. Pure."""

import difflib
import re

from trueup.host.fields import FIELDS

SOUGHT_FIELDS = {
    noun: {name: entry for name, entry in fields.items() if entry.is_sought} for noun, fields in FIELDS.items()
}
"""The columns that are looked for by name, of each table."""


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


PAID_WORDS = ("completed", "complete", "succeeded", "success", "successful", "paid", "captured", "settled", "confirmed")
"""What hosts call a payment whose money has come; compared without case."""

ACTIVE_WORDS = ("active", "enabled")
"""What hosts call a subscription that is in force; compared without case."""
STATUS_OF_SUBSCRIPTION = frozenset(_words("status state subscription_status subscription_state"))
DELETED_NAMES = frozenset(_words("deleted_at deleted_on discarded_at removed_at"))
"""When a row was deleted that is still there."""

STATUS_NAMES = frozenset(_words("status state outcome result success ended finish_status call_status request_status"))
OK_WORDS = ("ok", "success", "successful", "succeeded", "completed", "complete", "done", "finished")
FAILED_WORDS = ("failed", "failure", "fail", "error", "errored")
"""What hosts call a call that did, or did not, what was asked; compared without case."""

_HUMPS = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")
_FUZZY = 0.86


def plain(name: str) -> str:
    """Return a name in lower case, its words joined by "_": tokensLeft and "Tokens Left" are tokens_left."""
    return re.sub(r"\W+", "_", _HUMPS.sub("_", name)).strip("_").lower()


def nearness(name: str, default: str, others: tuple[str, ...]) -> tuple[float, str]:
    """Return how near a name comes to what is looked for, 0 to 1, and why. 1: it is Django's default name."""
    if name == default:
        return 1.0, "Django's default name"
    mine, known = plain(name), (plain(default), *others)
    if mine == known[0] or mine.replace("_", "") == known[0].replace("_", ""):
        return 0.95, f"{default} in another spelling"
    # Names that stand further back in the list say less.
    for place, other in enumerate(others):
        if mine == other or mine.replace("_", "") == other.replace("_", ""):
            return max(0.9 - 0.015 * place, 0.6), f"another name for {default}"
    # Django puts the application's label before a model's name, whose words it joins: assistant_aiusage.
    words = mine.split("_")
    tails = {"".join(words[place:]) for place in range(1, len(words))}
    ends = [other for other in known if len(other) > 3 and other.replace("_", "") in tails]
    if ends:
        return 0.75, f"its name ends with {max(ends, key=len)}"
    holds = [other for other in known if len(other) > 3 and f"_{other}_" in f"_{mine}_"]
    if holds:
        return 0.6, f"its name holds {max(holds, key=len)}"
    close = difflib.get_close_matches(mine, known, n=1, cutoff=_FUZZY)
    return (0.55, f"its name is close to {close[0]}") if close else (0.0, "")
