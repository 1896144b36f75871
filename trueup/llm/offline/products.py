"""Products without a model: each line of the page with a price, and the name beside or above it."""

import json
import re
from collections.abc import Sequence

from trueup.llm.model import Message
from trueup.llm.prompts import Job, block
from trueup.llm.texts import ascii_digits, cut_at_word

_MAX_PRODUCTS = 20
_MAX_NAME_CHARACTERS = 120
_CURRENCY = (
    r"(?:US\$|CA\$|A\$|R\$|[$€£¥₺₽₹₩₪₴﷼]|تومان|تومن|ریال|ريال|درهم"
    r"|\b(?:USD|EUR|GBP|TRY|IRR|AED|SAR|CAD|AUD|CHF|SEK|NOK|DKK|PLN|JPY|INR|TL|zł|kr)\b)"
)
_NUMBER = r"\d[\d.,٬٫'’ \u00a0\u202f]*"
_PRICE = re.compile(rf"(?:{_CURRENCY}\s?{_NUMBER}|{_NUMBER}\s?{_CURRENCY})")
_LABEL = re.compile(r"(?:price|now|only|from|fiyat[ıi]?|قیمت|السعر|سعر)\s*[:：]?\s*$", re.IGNORECASE)
_EDGES = " \t-–—|:•*#·,،"
_OUT_OF_STOCK = re.compile(r"out of stock|sold out|ناموجود|stokta yok|tükendi|غير متوفر|نفدت", re.I)
_IN_STOCK = re.compile(r"in stock|موجود|stokta|متوفر", re.I)


def product_answer(messages: Sequence[Message], job: Job) -> str:
    """Return the JSON answer to a prompt of `trueup.llm.prompts.product_messages`."""
    return json.dumps({"products": _products(block(messages, "page"))}, ensure_ascii=False)


def _products(page: str) -> list[dict[str, str]]:
    lines = [line.strip() for line in page.splitlines() if line.strip()]
    found: dict[str, dict[str, str]] = {}
    for index, line in enumerate(lines):
        price = _PRICE.search(ascii_digits(line))
        if not price:
            continue
        name = _name(line[: price.start()]) or _name_above(lines, index)
        if name and name not in found:
            found[name] = {"name": name, "price": line[price.start() : price.end()].strip()}
            if stock := _availability(lines[index : index + 3]):
                found[name]["availability"] = stock
        if len(found) == _MAX_PRODUCTS:
            break
    return list(found.values())


def _name(text: str) -> str:
    name = _LABEL.sub("", text.strip(_EDGES)).strip(_EDGES)
    letters = sum(character.isalpha() for character in name)
    return cut_at_word(name, _MAX_NAME_CHARACTERS) if letters >= 3 else ""


def _name_above(lines: Sequence[str], index: int) -> str:
    """Return the nearest short line above that is neither a price nor a sentence, where shops write the name."""
    for line in reversed(lines[max(0, index - 4) : index]):
        if _PRICE.search(ascii_digits(line)):
            return ""
        if len(line) <= _MAX_NAME_CHARACTERS and not line.endswith((".", "!", "?", "؟")):
            return _name(line)
    return ""


def _availability(lines: Sequence[str]) -> str | None:
    for number, line in enumerate(lines):
        if number and _PRICE.search(ascii_digits(line)):
            return None
        if _OUT_OF_STOCK.search(line):
            return "OutOfStock"
        if _IN_STOCK.search(line):
            return "InStock"
    return None
