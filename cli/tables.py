"""Tables of text: columns as wide as their cells, folded where the terminal is too narrow."""

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

MIN_COLUMN_WIDTH = 4
_BORDERS_PER_COLUMN = 3  # a line and a space on each side, shared with the next column


@dataclass(frozen=True, kw_only=True)
class Lines:
    """The characters of a table's lines: left end, middle, right end and what is between."""

    top: str
    head: str
    below_head: str
    body: str
    bottom: str


BOX = Lines(top="┏┳┓━", head="┃", below_head="┡╇┩━", body="│", bottom="└┴┘─")
# For an output whose encoding has no line characters.
ASCII = Lines(top="+++-", head="|", below_head="+++-", body="|", bottom="+++-")


def table_lines(
    headings: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[bool], width: int, lines: Lines = BOX
) -> tuple[list[str], list[str]]:
    """Return the lines of a table's head and of its body. Cells hold no line breaks.

    `right`: which columns are right-aligned. `width`: of the output, in columns; the table may be wider only if
    it has so many columns that each is at `MIN_COLUMN_WIDTH`.
    """
    widths = _column_widths([headings, *rows], width)
    head = [_rule(widths, lines.top), *_row(headings, widths, right, lines.head), _rule(widths, lines.below_head)]
    body = [line for row in rows for line in _row(row, widths, right, lines.body)]
    return head, [*body, _rule(widths, lines.bottom)]


def display_width(text: str) -> int:
    """Return how many columns of a terminal the text takes."""
    return sum(map(_character_width, text))


def _character_width(character: str) -> int:
    if character.isascii():
        return 1
    if unicodedata.category(character) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in ("W", "F") else 1


def _column_widths(rows: Sequence[Sequence[str]], width: int) -> list[int]:
    """Return each column's width. The widest ones give way until all fit."""
    widths = [max(map(display_width, column)) for column in zip(*rows, strict=True)]
    room = width - _BORDERS_PER_COLUMN * len(widths) - 1
    while sum(widths) > room and max(widths) > MIN_COLUMN_WIDTH:
        widest = max(widths)
        second = max((other for other in widths if other < widest), default=MIN_COLUMN_WIDTH)
        count = widths.count(widest)
        # Down to the next narrower ones, but not below what is needed.
        cut = min(widest - max(second, MIN_COLUMN_WIDTH), -(-(sum(widths) - room) // count))
        widths = [other - cut if other == widest else other for other in widths]
    return widths


def _rule(widths: Sequence[int], characters: str) -> str:
    left, middle, right, line = tuple(characters)
    return left + middle.join(line * (width + 2) for width in widths) + right


def _row(cells: Sequence[str], widths: Sequence[int], right: Sequence[bool], line: str) -> list[str]:
    folded = [_fold(cell, width) for cell, width in zip(cells, widths, strict=True)]
    height = max(map(len, folded))
    out = []
    for number in range(height):
        parts = [
            _aligned(lines[number] if number < len(lines) else "", width, to_the_right)
            for lines, width, to_the_right in zip(folded, widths, right, strict=True)
        ]
        out.append(f"{line} {f' {line} '.join(parts)} {line}")
    return out


def _aligned(text: str, width: int, to_the_right: bool) -> str:
    space = " " * (width - display_width(text))
    return space + text if to_the_right else text + space


def _fold(text: str, width: int) -> list[str]:
    """Return the text in lines of at most that width, broken between words, and in a word where it must be."""
    if display_width(text) <= width:
        return [text]
    lines = [""]
    for word in text.split():
        joined = f"{lines[-1]} {word}" if lines[-1] else word
        if display_width(joined) <= width:
            lines[-1] = joined
            continue
        if lines[-1]:
            lines.append("")
        for character in word:
            if display_width(lines[-1] + character) > width:
                lines.append("")
            lines[-1] += character
    return lines
