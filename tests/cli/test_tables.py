"""Tables and progress as a terminal shows them."""

import os
import pty
import re
import subprocess
import sys

import pytest

from trueup.cli.output import ASCII, MIN_COLUMN_WIDTH, display_width, fitting_columns, table_lines
from trueup.cli.progress import progress_text

HEADINGS = ("user", "why")
WIDE = [["7", "the counter was written by an application that read it before"], ["8", "x" * 90]]


def lines(width: int, rows: list[list[str]] | None = None) -> list[str]:
    head, body = table_lines(HEADINGS, WIDE if rows is None else rows, right=(True, False), width=width)
    return [*head, *body]


def cells(table: list[str], column: int) -> str:
    """Return a column's text, its lines joined by spaces."""
    return " ".join(line.split("│")[column + 1].strip() for line in table if line.startswith("│"))


def test_a_table_with_room_is_as_wide_as_its_cells() -> None:
    assert lines(80, [["7", "lost update"], ["812", "–"]]) == [
        "┏━━━━━━┳━━━━━━━━━━━━━┓",
        "┃ user ┃ why         ┃",
        "┡━━━━━━╇━━━━━━━━━━━━━┩",
        "│    7 │ lost update │",
        "│  812 │ –           │",
        "└──────┴─────────────┘",
    ]


@pytest.mark.parametrize("width", [120, 80, 40, 20])
def test_a_table_fits_its_width_and_loses_no_text(width: int) -> None:
    table = lines(width)
    assert {display_width(line) for line in table} == {display_width(table[0])}
    assert display_width(table[0]) <= width
    assert cells(table, 1).replace(" ", "") == "".join(row[1] for row in WIDE).replace(" ", "")
    assert cells(table, 0).split() == ["7", "8"]


def test_no_column_is_narrower_than_can_be_read() -> None:
    table = lines(5)
    assert display_width(table[0]) == len("user") + MIN_COLUMN_WIDTH + 2 * 3 + 1


NUMBERS = [["1,234,567", "2026-12-01 08:30:00", "a text of several words"], ["-12", "–", "another"]]


@pytest.mark.parametrize("width", range(20, 80))
def test_a_number_or_a_time_is_never_broken(width: int) -> None:
    headings = ("tokens", "at (UTC)", "why")
    count = fitting_columns([headings, *NUMBERS], width)
    rows = [row[:count] for row in NUMBERS]
    head, body = table_lines(headings[:count], rows, right=(True, False, False)[:count], width=width)
    whole = ["1,234,567", "2026-12-01 08:30:00"]
    assert all(any(part in line for line in body) for part in whole)
    assert count == 3 or display_width(head[0]) <= max(width, 35)


def test_columns_that_do_not_fit_are_left_out_from_the_right() -> None:
    rows = [("tokens", "at (UTC)", "why"), *NUMBERS]
    assert [fitting_columns(rows, width) for width in (20, 40, 50, 80)] == [2, 2, 3, 3]


def test_wide_and_combining_characters_keep_the_borders_in_line() -> None:
    table = lines(80, [["7", "価格が違う"], ["8", "e\u0301te\u0301"], ["9", "مشتری"]])
    assert {display_width(line) for line in table} == {display_width(table[0])}
    assert display_width("価格") == 4
    assert display_width("e\u0301") == 1


def test_a_table_is_drawn_in_ascii_where_the_output_has_no_other_characters() -> None:
    head, body = table_lines(HEADINGS, [["7", "x"]], right=(True, False), width=80, lines=ASCII)
    assert all(line.isascii() for line in (*head, *body))
    script = "from trueup.cli.output import print_table; print_table(('a', 'b'), [(1, 'x')])"
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[3] == "| 1 | x |"


def test_progress_says_how_far_how_fast_and_how_long() -> None:
    assert progress_text("reconciling", "rows", 500, 2_000, 5.0) == (
        f"reconciling {'━' * 8}{' ' * 22} 500/2,000 100 rows/s 0:00:05 left 0:00:15"
    )
    assert progress_text("reconciling", "rows", 0, 0, 0.0).endswith("0/0 0 rows/s 0:00:00 left -:--:--")


PROGRESS = """
from trueup.cli.progress import progress_bar
with progress_bar("deciding", "drifts") as show_progress:
    show_progress(1, 4)
print("done")
"""


def test_progress_is_shown_on_a_terminal_and_removed() -> None:
    ours, theirs = pty.openpty()
    done = subprocess.run([sys.executable, "-c", PROGRESS], stdout=subprocess.PIPE, stderr=theirs, check=True)
    os.close(theirs)
    shown = os.read(ours, 10_000).decode()
    os.close(ours)
    assert done.stdout == b"done\n"
    assert re.search(r"deciding ━+ +1/4 ", shown)
    assert shown.endswith("\r\x1b[K")


def test_progress_is_silent_where_no_terminal_is() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRESS], capture_output=True, check=True)
    assert (done.stdout, done.stderr) == (b"done\n", b"")
