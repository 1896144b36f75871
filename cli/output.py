"""Output of commands: JSON for programs, tables for people, and files."""

import json
import os
import re
import secrets
import shutil
import stat
import sys
import unicodedata
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, is_dataclass
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import click

from trueup.errors import TrueupError
from trueup.reports.display import count_of as count_of
from trueup.reports.display import show as show

SCHEMA_VERSION = 1
"""Of the commands' JSON. Names are added without a new version; a removed or changed name is a new version."""

# A piped table has no terminal width. This one fits every table, so that nothing is cut.
PIPED_WIDTH = 200
MIN_COLUMN_WIDTH = 8
MIN_COLUMNS = 2
_BORDERS_PER_COLUMN = 3  # a line and a space on each side; columns share the line

# The lines of a table: (left, middle, right, between) of top, rule and bottom; the vertical of head and body.
BOX = {"top": "┏┳┓━", "head": "┃", "rule": "┡╇┩━", "body": "│", "bottom": "└┴┘─"}
# For an output whose encoding has no line characters.
ASCII = {"top": "+++-", "head": "|", "rule": "+++-", "body": "|", "bottom": "+++-"}

# Numbers and times, which are not folded: half of a number would be read as a number.
_WHOLE = re.compile(r"[\d,.:+−-]+( [\d:]+)?")

# A password may contain "/" and "@", so it ends at the last "@". A sentinel URL names several servers, each with a
# password. libpq also takes a password as a parameter.
_PASSWORD = re.compile(r"(?<=://)([^/@:]*):(?:(?!://).)*@")
_PASSWORD_PARAMETER = re.compile(r"(?<=[?&])([a-z_]*password)=[^&]*", re.IGNORECASE)


def without_password(url: str) -> str:
    """Return a URL, or any text, with `***` in place of each password."""
    return _PASSWORD_PARAMETER.sub(r"\1=***", _PASSWORD.sub(r"\1:***@", url))


def print_json(content: Mapping[str, Any]) -> None:
    """Print content as a JSON object with `schema_version`: times as ISO 8601, UUIDs and decimals as texts."""
    document = {"schema_version": SCHEMA_VERSION, **content}
    click.echo(json.dumps(document, default=_plain, indent=2, ensure_ascii=False))


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, uuid.UUID | Decimal):
        return str(value)
    raise TypeError(f"{type(value).__name__} has no JSON form")


def echo(chunks: Iterable[str]) -> None:
    """Print chunks as they are. click handles a reader that has gone."""
    for chunk in chunks:
        click.echo(chunk, nl=False)


def print_facts(facts: dict[str, Any]) -> None:
    """Print names and values, one pair in a line."""
    width = max(len(name) for name in facts)
    for name, value in facts.items():
        zone = " UTC" if isinstance(value, datetime) and "UTC" not in name else ""
        click.echo(f"{name:<{width}}  {show(value)}{zone}")


def numeric_columns(rows: Sequence[Sequence[Any]]) -> list[bool]:
    """Return for each column whether it has only whole numbers and None."""
    return [all(value is None or isinstance(value, int) for value in column) for column in zip(*rows, strict=True)]


def print_table(headings: Sequence[str], rows: Sequence[Sequence[Any]], *, empty: str = "None.") -> None:
    """Print a table, with numbers aligned to the right; without rows, print `empty`."""
    if not rows:
        click.echo(empty)
        return
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else PIPED_WIDTH
    cells = [[show(value) for value in row] for row in rows]
    shown = fitting_columns([headings, *cells], width)
    head, body = table_lines(
        headings[:shown],
        [row[:shown] for row in cells],
        right=numeric_columns(rows)[:shown],
        width=width,
        lines=BOX if _can_print(BOX["top"] + BOX["body"]) else ASCII,
    )
    # In two calls: click flushes after each call, and a table may have very many rows.
    click.secho("\n".join(head), bold=True)
    click.echo("\n".join(body))
    if shown < len(headings):
        click.echo(f"Too narrow for: {', '.join(headings[shown:])}. Widen the terminal, or use --json.")


def _can_print(text: str) -> bool:
    """Return whether standard output's encoding has these characters."""
    try:
        text.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return False
    return True


def table_lines(
    headings: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    right: Sequence[bool],
    width: int,
    lines: dict[str, str] = BOX,
) -> tuple[list[str], list[str]]:
    """Return the lines of a table's head and of its body. Cells must not contain line breaks.

    `right`: the columns to align to the right. `width`: of the output, in characters. The table is wider only if each
    column has its least width already.
    """
    widths = _column_widths([headings, *rows], width)
    head = [_rule(widths, lines["top"]), *_row(headings, widths, right, lines["head"]), _rule(widths, lines["rule"])]
    body = [line for row in rows for line in _row(row, widths, right, lines["body"])]
    return head, [*body, _rule(widths, lines["bottom"])]


def display_width(text: str) -> int:
    """Return the number of terminal columns that the text takes."""
    return sum(map(_character_width, text))


def _character_width(character: str) -> int:
    if character.isascii():
        return 1
    if unicodedata.category(character) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in ("W", "F") else 1


def fitting_columns(rows: Sequence[Sequence[str]], width: int) -> int:
    """Return how many of the first columns fit into the width, each with its least width; at least `MIN_COLUMNS`."""
    least = _least_widths(rows)
    count = len(least)
    while count > MIN_COLUMNS and sum(least[:count]) > _room(width, count):
        count -= 1
    return count


def _room(width: int, columns: int) -> int:
    return width - _BORDERS_PER_COLUMN * columns - 1


def _least_widths(rows: Sequence[Sequence[str]]) -> list[int]:
    """Return the least width of each column: of its longest number or time, and of a few characters of its texts."""
    return [
        max(
            display_width(cell) if _WHOLE.fullmatch(cell) else min(display_width(cell), MIN_COLUMN_WIDTH)
            for cell in column
        )
        for column in zip(*rows, strict=True)
    ]


def _column_widths(rows: Sequence[Sequence[str]], width: int) -> list[int]:
    """Return each column's width. The widest columns that may be narrower shrink until the table fits."""
    widths = [max(map(display_width, column)) for column in zip(*rows, strict=True)]
    least = _least_widths(rows)
    room = _room(width, len(widths))
    while sum(widths) > room:
        larger = [place for place, own in enumerate(widths) if own > least[place]]
        if not larger:
            break
        widths[max(larger, key=widths.__getitem__)] -= 1
    return widths


def _rule(widths: Sequence[int], characters: str) -> str:
    left, middle, right, line = tuple(characters)
    return left + middle.join(line * (width + 2) for width in widths) + right


def _row(cells: Sequence[str], widths: Sequence[int], right: Sequence[bool], line: str) -> list[str]:
    folded = [_fold(cell, width) for cell, width in zip(cells, widths, strict=True)]
    padded = [
        [_aligned(text, width, to_the_right) for text in (*lines, *[""] * (max(map(len, folded)) - len(lines)))]
        for lines, width, to_the_right in zip(folded, widths, right, strict=True)
    ]
    return [f"{line} {f' {line} '.join(parts)} {line}" for parts in zip(*padded, strict=True)]


def _aligned(text: str, width: int, to_the_right: bool) -> str:
    space = " " * (width - display_width(text))
    return space + text if to_the_right else text + space


def _fold(text: str, width: int) -> list[str]:
    """Return the text in lines of at most `width`, broken between words, and within a word if necessary."""
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


def write_file(path: Path, chunks: Iterable[str]) -> None:
    """Write a file completely or not at all: an existing file stays until the new one is complete.

    A replaced file keeps its mode, and a link stays a link. Raises `TrueupError` if the file can't be written.
    """
    try:
        if path.exists() and not path.is_file():
            # A pipe or a device can't be replaced.
            with path.open("w", encoding="utf-8", newline="") as out:
                out.writelines(chunks)
        else:
            _replace(Path(os.path.realpath(path)), chunks)
    except OSError as error:
        raise TrueupError(
            f"--output: {path} can't be written: {error.strerror or error}. "
            "Give a file in an existing folder where you may write."
        ) from error


def _replace(target: Path, chunks: Iterable[str]) -> None:
    # The name is unpredictable, and O_EXCL refuses an existing file, so that a link which another user has put into
    # the folder is not followed. (tempfile would ignore the umask.)
    new = target.with_name(f".{secrets.token_hex(8)}.part")
    mode = stat.S_IMODE(target.stat().st_mode) if target.exists() else None
    descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        with open(descriptor, "w", encoding="utf-8", newline="") as out:
            if mode is not None:
                os.fchmod(descriptor, mode)
            out.writelines(chunks)
            out.flush()
            os.fsync(descriptor)
        new.replace(target)
    except BaseException:
        new.unlink(missing_ok=True)
        raise
