"""Links in what a model writes: only those that the business gave go out, for a customer may talk it into others."""

import re

# Chats make a link of a bare host too. Without a path behind it it can't be told from a missing space: "tomorrow.We".
_BEGINNING = r"https?://|(?<![a-z0-9+.-])[a-z][a-z0-9+.-]*://|www\.|(?<![\w.@/-])(?:[a-z0-9-]+\.)+[a-z]{2,}/"
LINK = re.compile(rf"(?:{_BEGINNING})[^\s<>\"'\])}}|،؛]+", re.IGNORECASE)
_SCHEME = re.compile(r"https?://", re.IGNORECASE)


class KnownLinks:
    """The links that stand in the texts of a business."""

    def __init__(self, *texts: str) -> None:
        stated = {_plain(link) for text in texts for link in LINK.findall(text)}
        bare = {_SCHEME.sub("", link, count=1) for link in stated}
        self._links = stated | bare | {f"https://{link}" for link in stated & bare if "://" not in link}

    def has(self, link: str) -> bool:
        """Whether it is one of them, or a page above one: never another host that begins alike."""
        wanted = _plain(link).rstrip("/")
        beginnings = (f"{wanted}/", f"{wanted}?")
        return any(known.rstrip("/") == wanted or known.startswith(beginnings) for known in self._links)

    def has_all_of(self, text: str) -> bool:
        """Whether every link in the text is one of them."""
        return all(self.has(link) for link in LINK.findall(text))


def without_foreign_links(text: str, known: KnownLinks, warnings: list[str]) -> str:
    """Take out the links that are none of those known, and say so once."""
    own = LINK.sub(lambda link: link[0] if known.has(link[0]) else link[0][len(_trimmed(link[0])) :], text)
    if own != text:
        warnings.append("A link that the business did not give was taken out of the text.")
    return own


def _plain(link: str) -> str:
    return _trimmed(link).casefold()


def _trimmed(link: str) -> str:
    """Return a link without the sentence's own marks after it."""
    return link.rstrip(".,!?:;")
