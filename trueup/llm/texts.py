"""Plain text: check and clean it, split it into sentences, shorten it."""

import re
import unicodedata
from collections.abc import Iterator

from trueup.errors import InvalidInputError

_SURROGATE = re.compile(r"[\ud800-\udfff]")
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f]")
_UNREADABLE_SHARE = 0.05

_PARAGRAPH = re.compile(r"\n[^\S\n]*(?:\n[^\S\n]*)+")
_SENTENCE_END = re.compile(r"[.!?؟۔…]+[\"'”’»)\]]*(?=\s|$)|[。！？]+[」』”]?|\n+")
_ABBREVIATION = re.compile(r"(?:\b(?:e\.g|i\.e|etc|vs|no|mr|mrs|ms|dr|prof|st|approx|örn|vb)|\b\w)\.$", re.I)
_WORD = re.compile(r"[^\W\d_](?:[^\W_]|['’\u200c])*")
_MARKS = re.compile(r"[\u064b-\u065f\u0670\u0640\u200b-\u200f\u061c\u202a-\u202e\u2066-\u2069\ufeff]")
_LETTERS = str.maketrans({"ي": "ی", "ى": "ی", "ك": "ک", "ة": "ه", "أ": "ا", "إ": "ا", "آ": "ا"})


def without_lone_surrogates(text: str) -> str:
    """Return the text with each lone surrogate replaced. It has no UTF-8 form, so it can't be sent to a provider."""
    return _SURROGATE.sub("\ufffd", text)


def cleaned_text(text: str) -> str:
    """Return the text stripped, with spaces in place of control characters."""
    return without_lone_surrogates(_CONTROL.sub(" ", text)).strip()


def readable(field: str, text: object, *, minimum: int, maximum: int) -> str:
    """Return the text stripped, with spaces in place of control characters.

    `minimum`, `maximum`: its length in characters. Raises `InvalidInputError`, which names `field`, for a value that is
    not a text, too short, too long or binary.
    """
    if not isinstance(text, str):
        raise InvalidInputError(f"{field} is {type(text).__name__}, not text. Send a string.")
    if len(text) > maximum:
        raise InvalidInputError(f"{field} has {len(text)} characters; the limit is {maximum}. Send it in parts.")
    if _looks_binary(text):
        raise InvalidInputError(f"{field} holds binary data, not text. Send the text itself, decoded as UTF-8.")
    cleaned = cleaned_text(text)
    if len(cleaned) < minimum:
        raise InvalidInputError(
            f"{field} has {len(cleaned)} readable characters; it needs at least {minimum}. Send more text."
        )
    return cleaned


def _looks_binary(text: str) -> bool:
    if text.lstrip().startswith(("%PDF-", "PK\x03\x04", "\x89PNG", "GIF8")):
        return True
    unreadable = sum(
        1
        for character in text
        if character == "\ufffd" or (character not in "\t\n\r\f\x0b" and unicodedata.category(character) in _BINARY)
    )
    return unreadable > len(text) * _UNREADABLE_SHARE


# Unicode categories of binary data. Not Cf: Persian needs the zero-width non-joiner. Not Cn: an emoji may be newer than
# this Python's tables. Not Co: icon fonts use it.
_BINARY = frozenset({"Cc", "Cs"})


def paragraph_spans(text: str) -> Iterator[tuple[int, int]]:
    """Yield the start and end of each paragraph, without the blank lines between them."""
    start = 0
    for gap in _PARAGRAPH.finditer(text):
        yield from _trimmed(text, start, gap.start())
        start = gap.end()
    yield from _trimmed(text, start, len(text))


def sentence_spans(text: str, start: int = 0, end: int | None = None) -> Iterator[tuple[int, int]]:
    """Yield the start and end of each sentence in text[start:end]. A line break ends a sentence too."""
    end = len(text) if end is None else end
    begin = start
    for stop in _SENTENCE_END.finditer(text, start, end):
        if stop.group() == "." and _ABBREVIATION.search(text, max(begin, stop.end() - 10), stop.end()):
            continue
        yield from _trimmed(text, begin, stop.end())
        begin = stop.end()
    yield from _trimmed(text, begin, end)


def sentences(text: str) -> list[str]:
    """Return the sentences of the text, verbatim."""
    return [text[start:end] for start, end in sentence_spans(text)]


def _trimmed(text: str, start: int, end: int) -> Iterator[tuple[int, int]]:
    while start < end and text[start].isspace():
        start += 1
    while end > start and text[end - 1].isspace():
        end -= 1
    if start < end:
        yield start, end


def cut_at_word(text: str, limit: int) -> str:
    """Return at most `limit` characters, cut at a word's end if one lies in the last third."""
    if len(text) <= limit:
        return text
    head = text[:limit]
    if not text[limit].isspace():
        space = max(head.rfind(" "), head.rfind("\n"))
        head = head[:space] if space >= limit * 2 // 3 else head
    return head.rstrip()


def cut_to_bytes(text: str, limit: int) -> str:
    """Return at most `limit` UTF-8 bytes of the text, cut at a word's end if one lies in the last third."""
    data = text.encode()
    if len(data) <= limit:
        return text
    return cut_at_word(text, len(data[:limit].decode(errors="ignore")))


def cut_to_characters(text: str, limit: int) -> str:
    """Return at most `limit` UTF-16 code units of the text (an emoji has two), cut as in `cut_to_bytes`."""
    data = text.encode("utf-16-le")
    if len(data) <= 2 * limit:
        return text
    return cut_at_word(text, len(data[: 2 * limit].decode("utf-16-le", errors="ignore")))


def words(text: str) -> list[str]:
    """Return the words of the text, each folded as by `fold`."""
    return [fold(word) for word in _WORD.findall(text)]


def fold(text: str) -> str:
    """Return the text for comparisons: NFKC, casefolded, without marks, with equal Arabic and Persian letters."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return _MARKS.sub("", folded).translate(_LETTERS)


def ascii_digits(text: str) -> str:
    """Return the text with every decimal digit (Persian, Arabic, Devanagari, …) as 0-9."""
    if text.isascii():
        return text
    return "".join(str(unicodedata.decimal(character)) if character.isdecimal() else character for character in text)
