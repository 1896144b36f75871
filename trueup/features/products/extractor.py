"""Extract the products of one page: from its structured data, without tokens, or else from its text by the model."""

import re
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict

from trueup.errors import AnswerFormatError, InvalidInputError
from trueup.features.answers import objects_under, text_of
from trueup.features.products.items import Product, Source, make_product
from trueup.features.products.pages import MAX_TITLE_CHARACTERS, checked_page, page_text, parsed_page
from trueup.features.products.structured import structured_products
from trueup.llm.model import Message, Model
from trueup.llm.prompt_fit import longest_fitting
from trueup.llm.prompts import product_messages
from trueup.llm.texts import ascii_digits, fold, readable, words
from trueup.llm.tokens import TokenCounter, count_prompt_tokens, offline_counter, scaled_estimate

ESTIMATED_TOKENS = 1000
"""Estimate for one extraction, by an exact counter. `estimated_tokens` scales it for other counters."""
_ANSWER_TOKENS = 400
_MAX_URL_CHARACTERS = 2000
_MAX_PROMPT_URL_CHARACTERS = 200
_MAX_PROMPT_TITLE_CHARACTERS = 150
_NUMBER = re.compile(r"\d[\d.,٬٫'’]*")
_SPACED_NUMBER = re.compile(r"\d{1,3}(?:[ \u00a0\u202f]\d{3})+(?:[.,]\d+)?")


class ProductResult(BaseModel):
    """The products of a page. `source` None: the page has no products."""

    model_config = ConfigDict(frozen=True, protected_namespaces=())

    url: str
    products: tuple[Product, ...]
    source: Source | None
    model_called: bool
    warnings: tuple[str, ...] = ()


def estimated_tokens(counter: TokenCounter | None = None) -> int:
    """Return the estimate in tokens for one extraction. `counter` None: that of the o200k encoding."""
    return scaled_estimate(ESTIMATED_TOKENS, counter or offline_counter())


def extract_products(
    model: Model,
    *,
    url: str,
    title: str = "",
    html: str | None = None,
    text: str | None = None,
    counter: TokenCounter | None = None,
) -> ProductResult:
    """Return the products of a page. The model is called only if the page's data states none.

    `html` or `text`: the page, exactly one of them. `counter` None: that of the o200k encoding. Raises
    `InvalidInputError` for unusable input, `AnswerFormatError` for an unusable answer, and the model's errors.
    """
    address = _checked_url(url)
    title = readable("title", title, minimum=0, maximum=MAX_TITLE_CHARACTERS)
    html, text = checked_page(html, text)
    warnings: list[str] = []
    if html is not None:
        tree = parsed_page(html)
        if stated := structured_products(tree, url=address, warnings=warnings):
            return ProductResult(
                url=address, products=stated, source=stated[0].source, model_called=False, warnings=tuple(warnings)
            )
        text = page_text(tree)
    products = _ask(model, text or "", address, title, counter or offline_counter(), warnings)
    return ProductResult(
        url=address,
        products=products,
        source="model" if products else None,
        model_called=True,
        warnings=tuple(warnings),
    )


def _checked_url(url: str) -> str:
    try:
        parts = urlsplit(url.strip())
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and len(url) <= _MAX_URL_CHARACTERS
    except (ValueError, AttributeError):
        usable = False
    if not usable:
        raise InvalidInputError(
            f"url {str(url)[:80]!r} is not a web address. Nothing was spent. Send an address that begins with http:// "
            f"or https:// and has at most {_MAX_URL_CHARACTERS} characters."
        )
    return url.strip()


def _ask(
    model: Model, page: str, url: str, title: str, counter: TokenCounter, warnings: list[str]
) -> tuple[Product, ...]:
    messages, kept = _fitted(page, url, title, counter)
    if len(kept) < len(page):
        warnings.append(f"The page is long; only its first {len(kept)} of {len(page)} characters were read.")
    answer_tokens = estimated_tokens(counter) - count_prompt_tokens(messages, counter)
    completion = model.complete(messages, max_completion_tokens=max(1, answer_tokens))
    found = objects_under(completion.text, "products")
    if found is None:
        cut = " It was cut off before its first product." if completion.truncated else ""
        raise AnswerFormatError(
            f"The model's answer for {url} has no list of products.{cut} Its tokens are charged. "
            "Use a model that follows instructions to answer in JSON (TRUEUP_MODEL_NAME)."
        )
    if completion.truncated:
        warnings.append("The model's answer was cut off; the page may have more products.")
    return _grounded(found, kept, url, warnings)


def _fitted(page: str, url: str, title: str, counter: TokenCounter) -> tuple[Sequence[Message], str]:
    """Return the prompt with as much of the page as fits beside the answer, and that part of the page."""
    budget = estimated_tokens(counter) - scaled_estimate(_ANSWER_TOKENS, counter)
    url, title = url[:_MAX_PROMPT_URL_CHARACTERS], title[:_MAX_PROMPT_TITLE_CHARACTERS]

    def fits(length: int) -> bool:
        return count_prompt_tokens(product_messages(page=page[:length], url=url, title=title), counter) <= budget

    kept = page[: _line_end(page, longest_fitting(min(len(page), budget * 8), fits))]
    return product_messages(page=kept, url=url, title=title), kept


def _line_end(page: str, position: int) -> int:
    """Return the end of the last whole line before `position`, so that no price is cut in two."""
    if position >= len(page):
        return len(page)
    line_end = page.rfind("\n", 0, position)
    return line_end if line_end > position // 2 else position


def _grounded(found: list[dict[str, Any]], page: str, url: str, warnings: list[str]) -> tuple[Product, ...]:
    """Keep products whose name is on the page, and prices that are on the page, because models invent both."""
    page_words, page_numbers = set(words(page)), _numbers(page)
    products: list[Product] = []
    for values in found:
        name = text_of(values.get("name"))
        if not (page_words & set(words(name)) or fold(name) in fold(page)):
            warnings.append(f"{name[:80]}: the name is not on the page; product left out.")
            continue
        price_numbers = _numbers(text_of(values.get("price")))
        if price_numbers and not price_numbers & page_numbers:
            warnings.append(f"{name[:80]}: the price is not on the page; price left out.")
            values = {**values, "price": None}
        product = make_product(values, source="model", base_url=url, warnings=warnings)
        if product is not None and product not in products:
            products.append(product)
    return tuple(products)


def _numbers(page: str) -> frozenset[str]:
    text = ascii_digits(page)
    return frozenset(_digits(number) for pattern in (_NUMBER, _SPACED_NUMBER) for number in pattern.findall(text))


def _digits(text: str) -> str:
    """Return a number's digits without outer zeros, so that 1.299,00 equals 1299."""
    return "".join(character for character in text if character.isdecimal()).strip("0")
