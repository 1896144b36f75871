"""Buttons of an Instagram message. Its text marks them as `[[CTA:Title|https://…]]`.

Limits are those of Meta's button template (developers.facebook.com, Instagram messaging, "Button Template"): one to
three buttons, titles of up to 20 characters, a text of up to 640 characters above them.
"""

import re
from collections.abc import Callable
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict

MAX_BUTTONS = 3
MAX_TITLE_CHARACTERS = 20
MAX_TEXT_CHARACTERS = 640
_MAX_URL_CHARACTERS = 2000

_MARKER = re.compile(r"\[\[CTA:([^\[\]|]*)\|([^\[\]|]*)\]\]")
_BEGUN = re.compile(r"\[\[\s*CTA\b", re.IGNORECASE)
_LINE_END = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_GAP = re.compile(r"[^\S\n]*\n(?:[^\S\n]*\n)+")


class Button(BaseModel):
    """A button that opens a web page."""

    model_config = ConfigDict(frozen=True)

    title: str
    url: str

    def as_payload(self) -> dict[str, str]:
        return {"type": "web_url", "url": self.url, "title": self.title}


def split_buttons(text: str, warnings: list[str]) -> tuple[str, tuple[Button, ...]]:
    """Return the text without its markers, and their buttons without duplicates.

    A marker that can't be a button stays in the text, and `warnings` receives its reason. If the text has nothing but
    markers, the titles become the text, because Instagram's template requires one.
    """
    buttons: list[Button] = []
    refused = 0

    def take(marker: re.Match[str]) -> str:
        nonlocal refused
        button = Button(title=marker[1].strip(), url=marker[2].strip())
        fault = _fault(button, buttons)
        if fault is None:
            if button not in buttons:
                buttons.append(button)
            return ""
        refused += 1
        warnings.append(f"{marker[0][:80]} stays text: {fault}.")
        return marker[0]

    rest = _MARKER.sub(take, text)
    if len(_BEGUN.findall(rest)) > refused:
        warnings.append("A button that is not written as [[CTA:Title|https://…]] stays text.")
    if not buttons:
        return text, ()
    rest = _GAP.sub("\n\n", "\n".join(line.rstrip() for line in rest.splitlines())).strip()
    return rest or " · ".join(button.title for button in buttons), tuple(buttons)


def without_markers(text: str, unwanted: Callable[[str], bool]) -> str:
    """Return the text without the markers, valid or not, for which `unwanted` returns True."""
    return _MARKER.sub(lambda marker: "" if unwanted(marker[0]) else marker[0], text)


def _fault(button: Button, others: list[Button]) -> str | None:
    """Return the reason that the button is not valid, alone or beside the others; None: it is valid."""
    if not button.title or _LINE_END.search(button.title):
        return "its title is empty or has more than one line"
    if len(button.title) > MAX_TITLE_CHARACTERS:
        return f"its title has {len(button.title)} characters; the limit is {MAX_TITLE_CHARACTERS}"
    if not _is_web_page(button.url):
        return "its address is not an https:// link"
    if len(others) == MAX_BUTTONS and button not in others:
        return f"a message has at most {MAX_BUTTONS} buttons"
    return None


def _is_web_page(url: str) -> bool:
    try:
        parts = urlsplit(url)
        named = bool(parts.hostname) and parts.username is None and parts.port != 0
    except ValueError:
        return False
    plain = url.isprintable() and not any(character.isspace() for character in url)
    return url.startswith("https://") and named and plain and len(url) <= _MAX_URL_CHARACTERS
