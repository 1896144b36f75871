"""Remove unknown links from a model's text. Only the business's own stay, as a customer could talk it into others."""

import re

# Chats also link a bare host name. Without a path it looks like a missing space ("tomorrow.We"), so it needs a path.
_BEGINNING = r"https?://|(?<![a-z0-9+.-])[a-z][a-z0-9+.-]*://|www\.|(?<![\w.@/-])(?:[a-z0-9-]+\.)+[a-z]{2,}/"
LINK = re.compile(rf"(?:{_BEGINNING})[^\s<>\"'\])}}|،؛]+", re.IGNORECASE)
_SCHEME = re.compile(r"https?://", re.IGNORECASE)


class KnownLinks:
    """The links in the texts of a business."""

    def __init__(self, *texts: str) -> None:
        stated = {_plain(link) for text in texts for link in LINK.findall(text)}
        bare = {_SCHEME.sub("", link, count=1) for link in stated}
        self._links = stated | bare | {f"https://{link}" for link in stated & bare if "://" not in link}

    def has(self, link: str) -> bool:
        """Whether the link is known, or is a parent page of a known one. A host with the same prefix is not known."""
        wanted = _plain(link).rstrip("/")
        beginnings = (f"{wanted}/", f"{wanted}?")
        return any(known.rstrip("/") == wanted or known.startswith(beginnings) for known in self._links)

    def has_all_of(self, text: str) -> bool:
        """Whether every link in the text is known."""
        return all(self.has(link) for link in LINK.findall(text))


def without_foreign_links(text: str, known: KnownLinks, warnings: list[str]) -> str:
    """Return the text without unknown links. `warnings` receives one entry if any was removed."""
    own = LINK.sub(lambda link: link[0] if known.has(link[0]) else link[0][len(_trimmed(link[0])) :], text)
    if own != text:
        warnings.append("A link that the business did not give was removed from the text.")
    return own


def _plain(link: str) -> str:
    return _trimmed(link).casefold()


def _trimmed(link: str) -> str:
    """Return a link without the punctuation of the sentence after it."""
    return link.rstrip(".,!?:;")
