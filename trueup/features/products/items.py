"""The product model, and its construction from loosely typed values."""

import html
import re
from collections.abc import Mapping
from decimal import Decimal
from typing import Any, Literal
from urllib.parse import urljoin, urlsplit

from pydantic import BaseModel, ConfigDict

from trueup.features.answers import text_of
from trueup.features.products.prices import parse_price
from trueup.llm.texts import cut_at_word, without_lone_surrogates

MAX_NAME_CHARACTERS = 300
MAX_DESCRIPTION_CHARACTERS = 2000
_MAX_URL_CHARACTERS = 2000
_TAG = re.compile(r"<[^<>]{1,200}>")

Source = Literal["json-ld", "microdata", "model"]

_AVAILABILITY = {
    name.casefold(): name
    for name in (
        "InStock", "OutOfStock", "PreOrder", "PreSale", "BackOrder", "Discontinued", "InStoreOnly", "OnlineOnly",
        "LimitedAvailability", "SoldOut", "MadeToOrder", "Reserved",
    )
} | {"available": "InStock", "unavailable": "OutOfStock", "موجود": "InStock", "ناموجود": "OutOfStock",
     "stokta": "InStock", "stoktayok": "OutOfStock", "tükendi": "SoldOut", "متوفر": "InStock"}  # fmt: skip


class Product(BaseModel):
    """One product. None: the page does not state the value."""

    model_config = ConfigDict(frozen=True)

    name: str
    description: str | None = None
    price: Decimal | None = None
    currency: str | None = None
    """An ISO 4217 code."""
    availability: str | None = None
    """A schema.org ItemAvailability name, such as "InStock"."""
    sku: str | None = None
    brand: str | None = None
    url: str | None = None
    """Absolute."""
    image: str | None = None
    """Absolute."""
    source: Source


def make_product(values: Mapping[str, Any], *, source: Source, base_url: str, warnings: list[str]) -> Product | None:
    """Return a product from values with the names of its fields; None if it has no name.

    `base_url`: makes relative addresses absolute. `warnings` receives an entry for a price that was changed or dropped.
    """
    name = _line(values.get("name"), MAX_NAME_CHARACTERS)
    if not name:
        return None
    price = parse_price(values.get("price"), stated_currency=values.get("currency"), url=base_url)
    if price.warning:
        warnings.append(f"{name[:80]}: {price.warning}.")
    return Product(
        name=name,
        description=_line(values.get("description"), MAX_DESCRIPTION_CHARACTERS) or None,
        price=price.amount,
        currency=price.currency,
        availability=_availability(values.get("availability")),
        sku=_line(values.get("sku"), 100) or None,
        brand=_line(values.get("brand"), 200) or None,
        url=absolute_url(values.get("url"), base_url),
        image=absolute_url(values.get("image"), base_url),
        source=source,
    )


def absolute_url(value: object, base_url: str) -> str | None:
    """Return the value as an absolute http(s) address; None if it is not one."""
    text = text_of(value)
    if not text or len(text) > _MAX_URL_CHARACTERS:
        return None
    try:
        url = urljoin(base_url, html.unescape(text))
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname)
    except ValueError:  # such as an unclosed bracket in the host
        return None
    return url if usable else None


def _line(value: object, limit: int) -> str:
    """Return the value as one line of plain text, without tags and entities: shops put escaped HTML into JSON."""
    text = _TAG.sub(" ", html.unescape(text_of(value)))
    return cut_at_word(" ".join(without_lone_surrogates(text).split()), limit)


def _availability(value: object) -> str | None:
    name = text_of(value).rstrip("/").rpartition("/")[2]
    return _AVAILABILITY.get(re.sub(r"[\s_-]+", "", name).casefold())
