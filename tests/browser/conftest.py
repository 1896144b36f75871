"""A real browser. The tests are skipped where Playwright (`make test-browser` installs it) or Chromium is missing."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

# Debian's and Ubuntu's package is `chromium`.
_NAMES = ("chromium", "chromium-browser", "google-chrome")
PICTURES = os.environ.get("PICTURES")
"""A folder for the pictures of the documentation. Without it none are made."""


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    """A running Chromium, as Playwright's `Browser`."""
    playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is missing: run `make test-browser`")
    pytest.importorskip("axe_playwright_python", reason="axe-core is missing: run `make test-browser`")
    program = next(filter(None, map(shutil.which, _NAMES)), None)
    if program is None:
        pytest.skip("Chromium is missing: install your system's package, such as Debian's chromium")
    with playwright.sync_playwright() as started:
        # Without its sandbox, which needs rights that a container lacks. It opens pages of this test only.
        browser = started.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def axe() -> str:
    """The source of axe-core."""
    package = pytest.importorskip("axe_playwright_python")
    return (Path(package.__file__).parent / "axe.min.js").read_text()


def violations(page: Any, axe: str) -> list[str]:
    """Return axe-core's findings about a page, one line each."""
    page.evaluate(axe)
    found = page.evaluate("axe.run(document, {resultTypes: ['violations']})")
    return [f"{one['id']}: {one['help']}: {node['html'][:200]}" for one in found["violations"] for node in one["nodes"]]


def wrapped_figures(page: Any) -> list[str]:
    """Return the texts of cells with figures or times that take more than one line."""
    found: list[str] = page.evaluate(
        """() => [...document.querySelectorAll("td.number, dd.figure")].filter((cell) => {
            const range = document.createRange();
            range.selectNodeContents(cell);
            return new Set([...range.getClientRects()].map((one) => Math.round(one.top / 8))).size > 1;
        }).map((cell) => cell.textContent)"""
    )
    return found


def overflow(page: Any) -> int:
    """Return by how many pixels the page is wider than its window."""
    pixels: int = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
    return pixels


def take_picture(page: Any, name: str) -> None:
    if PICTURES:
        page.screenshot(path=str(Path(PICTURES) / name), full_page=False)
