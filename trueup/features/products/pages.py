"""Validate and parse a web page, and read its text."""

import re
from typing import Any

from trueup.errors import InvalidInputError
from trueup.llm.texts import readable

MAX_HTML_BYTES = 5 * 1024 * 1024
MAX_TITLE_CHARACTERS = 500
# The libraries that walk a page recurse. This limit must stop them before Python's recursion limit does: an error
# raised while lxml holds the lock of a compiled XPath leaves it locked, and the next page would wait for ever.
MAX_DEPTH = 250
_BLANK_LINES = re.compile(r"\n\s*\n+")


def checked_page(html: str | None, text: str | None) -> tuple[str | None, str | None]:
    """Return the page's HTML or its text; the other is None.

    Raises `InvalidInputError` unless exactly one of them is given, readable, and at most 5 MiB long.
    """
    if bool(html) == bool(text):
        found = "both are given" if html else "both are empty"
        raise InvalidInputError(f"Send either html or text: {found}. Nothing was spent.")
    field, page = ("html", html) if html else ("text", text)
    if len(page or "") > MAX_HTML_BYTES or len(str(page).encode(errors="replace")) > MAX_HTML_BYTES:
        raise InvalidInputError(
            f"{field} is larger than {MAX_HTML_BYTES // 1024**2} MiB. Send the page without its embedded data."
        )
    checked = readable(field, page, minimum=1, maximum=MAX_HTML_BYTES)
    return (checked, None) if html else (None, checked)


def parsed_page(html: str) -> Any:
    """Return the page as an lxml tree. Raises `InvalidInputError` if it is nested deeper than `MAX_DEPTH`."""
    import html_text  # on use: it imports lxml, which only page extraction needs
    from lxml import etree  # type: ignore[import-untyped]

    tree = html_text.parse_html(html)
    depth = 0
    for event, _ in etree.iterwalk(tree, events=("start", "end")):
        depth += 1 if event == "start" else -1
        if depth > MAX_DEPTH:
            raise InvalidInputError(
                f"html is nested more than {MAX_DEPTH} levels deep, so it can't be read. Nothing was spent. Send a "
                "simpler version of the page, or its text."
            )
    return tree


def page_text(tree: Any) -> str:
    """Return the text that a visitor sees, line by line. Raises `InvalidInputError` if there is none."""
    import html_text

    text = _BLANK_LINES.sub("\n", html_text.extract_text(tree))
    if not text.strip():
        raise InvalidInputError(
            "html has no text and no product data. Nothing was spent. If scripts build the page, send the HTML as the "
            "browser has rendered it."
        )
    return text
