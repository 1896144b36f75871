"""The files of reports, and the host's texts in Markdown."""

import os
import stat
from collections.abc import Iterator
from dataclasses import fields, replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from trueup.cli.output import write_file
from trueup.cli.reports.markdown import report_markdown
from trueup.errors import TrueupError
from trueup.reconcile.runs import RunSummary
from trueup.reports.rows import DriftFilter, ReportRow
from trueup.reports.run_report import report_dry_run


@pytest.fixture
def common_umask() -> Iterator[None]:
    """Set the umask of most machines."""
    before = os.umask(0o022)
    yield
    os.umask(before)


def mode(file: Path) -> int:
    return stat.S_IMODE(file.stat().st_mode)


def test_a_new_file_has_the_mode_of_the_umask_and_one_that_is_replaced_its_own(
    tmp_path: Path, common_umask: None
) -> None:
    new, private = tmp_path / "new.csv", tmp_path / "private.csv"
    private.write_text("old")
    private.chmod(0o600)
    for file in (new, private):
        write_file(file, ["a", "b"])
        assert file.read_text() == "ab"
    assert (mode(new), mode(private)) == (0o644, 0o600)


def test_nothing_that_others_have_put_into_the_folder_is_written_through(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = tmp_path / "theirs"
    theirs.write_text("theirs")
    for name in (".d.csv.part", ".00.part"):
        (tmp_path / name).symlink_to(theirs)
    write_file(tmp_path / "d.csv", ["new"])
    assert (theirs.read_text(), (tmp_path / "d.csv").read_text()) == ("theirs", "new")
    # Not even where its name was guessed.
    monkeypatch.setattr("trueup.cli.output.secrets.token_hex", lambda _: "00")
    with pytest.raises(TrueupError, match="can't be written: File exists"):
        write_file(tmp_path / "d.csv", ["newer"])
    assert (theirs.read_text(), (tmp_path / "d.csv").read_text()) == ("theirs", "new")
    assert (tmp_path / ".00.part").is_symlink()


def test_a_link_stays_a_link_and_a_pipe_a_pipe(tmp_path: Path) -> None:
    file, link, pipe = tmp_path / "file", tmp_path / "link", tmp_path / "pipe"
    file.write_text("old")
    link.symlink_to(file)
    write_file(link, ["new"])
    assert (link.is_symlink(), file.read_text()) == (True, "new")
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_file(pipe, ["through"])
    assert os.read(reader, 100) == b"through"
    os.close(reader)
    assert pipe.is_fifo()


def test_a_name_of_any_length_that_a_folder_takes_is_fine(tmp_path: Path) -> None:
    write_file(tmp_path / ("x" * 255), ["long"])
    assert (tmp_path / ("x" * 255)).read_text() == "long"


@pytest.mark.parametrize(
    ("name", "why"),
    [("x" * 256, "File name too long"), ("no/d.csv", "No such file"), ("file/d.csv", "Not a directory"), (".", "Is a")],
)
def test_a_place_that_takes_no_file_is_one_clear_error(tmp_path: Path, name: str, why: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TrueupError, match=f"--output: .* can't be written: {why}") as raised:
        write_file(tmp_path / name, ["x"])
    assert "Give a file in an existing folder" in str(raised.value)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def cells_of(user_id: str) -> tuple[str, str]:
    """Return the user's id in the summary and in the drift row of a report about this user."""
    report = report_dry_run(RunSummary(run_id=None, dry_run=True, started_at=datetime(2024, 11, 1, tzinfo=UTC)))
    values = dict.fromkeys((field.name for field in fields(ReportRow)), 0) | {
        "user_id": user_id,
        "cause": "manual_edit",
    }
    row = ReportRow(**values)  # type: ignore[arg-type]
    lines = "".join(report_markdown(replace(report, filter=DriftFilter(user_id=user_id), rows=[row]))).split("\n")
    (summary,) = (line for line in lines if line.startswith("| only |"))
    cells, told = lines[-2].split("|")[1:-1], summary.split("|")[1:-1]
    assert (len(cells), len(told)) == (7, 2)
    return told[1].strip(), cells[0].strip()


@pytest.mark.parametrize(
    ("user_id", "shown"),
    [
        ("https://evil.example/?a=b", "`user https://evil.example/?a=b`"),
        ("www.evil.example", "`user www.evil.example`"),
        ("ann@evil.example", "`user ann@evil.example`"),
        ("<https://evil.example>", "`user <https://evil.example>`"),
        ("![x](https://evil.example)", "`user ![x](https://evil.example)`"),
        ("@everyone #1", "`user @everyone #1`"),
        ("a|b\\|c|", "`user a`&#124;`b\\`&#124;`c`&#124;"),
        ("a\nb\r\nc\u2028d", "`user a\ufffdb\ufffd\ufffdc\ufffdd`"),
        ("a``b`c", "```user a``b`c```"),
    ],
)
def test_a_user_id_is_no_link_no_name_and_no_end_of_a_cell_in_markdown(user_id: str, shown: str) -> None:
    assert cells_of(user_id) == (shown, shown.replace("user ", ""))


def test_a_number_needs_no_marks() -> None:
    assert cells_of("7") == ("`user 7`", "7")


def test_backticks_are_separated_from_the_fence() -> None:
    assert [cells_of(user_id)[1] for user_id in ("`a`", " a ", "|", "| |")] == [
        "`` `a` ``",
        "`  a  `",
        "&#124;",
        "&#124;` `&#124;",
    ]
