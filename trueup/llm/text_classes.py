"""Classes of text: within one class, and for one model, a byte of text costs nearly the same number of tokens."""

import re
from collections import Counter
from collections.abc import Iterator

# Long enough for a stable ratio, short enough that a table or a key within prose is a class of its own.
CHUNK_CHARACTERS = 1_000

_LONG_WORD = re.compile(r"\S{25,}")
_SIGN = re.compile(r"[^\w\s]|[\d_]")
_BLANK = re.compile(r"\s")
_DENSE_SHARE, _BLANK_SHARE = 0.35, 0.4
_SCRIPTS = (
    ("arabic", re.compile(r"[\u0600-\u06ff\u0750-\u077f\ufb50-\ufdff\ufe70-\ufeff]")),
    ("cjk", re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\uff00-\uffef]")),
    ("cyrillic", re.compile(r"[\u0400-\u052f]")),
    ("latin", re.compile(r"[A-Za-z\u00c0-\u024f]")),
)
_LEAST_SCRIPT_SHARE = 0.5  # of the characters that are neither blank nor signs


def classes_of(text: str) -> Iterator[tuple[str, str]]:
    """Yield the text in chunks, each with its class."""
    for start in range(0, len(text), CHUNK_CHARACTERS):
        chunk = text[start : start + CHUNK_CHARACTERS]
        yield _class_of(chunk), chunk


def _class_of(chunk: str) -> str:
    if len(_BLANK.findall(chunk)) > _BLANK_SHARE * len(chunk):
        return "blank"
    signs = len(_SIGN.findall(chunk))
    is_dense = signs > _DENSE_SHARE * len(chunk) or _LONG_WORD.search(chunk) is not None
    return f"{_script_of(chunk)}{' dense' if is_dense else ''}"


def _script_of(chunk: str) -> str:
    if chunk.isascii():
        return "latin"
    counts = Counter({name: len(pattern.findall(chunk)) for name, pattern in _SCRIPTS})
    name, most = counts.most_common(1)[0]
    letters = sum(character.isalpha() for character in chunk)
    return name if most and most > _LEAST_SCRIPT_SHARE * letters else "other"
