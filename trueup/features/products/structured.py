"""Products in a page's structured data: schema.org as JSON-LD or microdata."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from trueup.features.products.items import Product, Source, absolute_url, make_product
from trueup.features.products.prices import parse_price

MAX_PRODUCTS = 200
_MAX_ITEM_PROPERTIES = 20_000
_MAX_ITEM_REFERENCES = 30
_MAX_ITEM_DEPTH = 30
_JSON_LD = "application/ld+json"


def structured_products(tree: Any, *, url: str, warnings: list[str]) -> tuple[Product, ...]:
    """Return the products in a parsed page's data, JSON-LD before microdata; empty if there are none.

    `tree`: an lxml tree. `url`: the page's address. `warnings` receives an entry for unreadable data; malformed data
    never raises.
    """
    base_url = _base_url(tree, url)
    found = _products(_json_ld(tree, warnings), "json-ld", base_url, warnings)
    return found or _products(_microdata(tree, base_url, warnings), "microdata", base_url, warnings)


def _base_url(tree: Any, url: str) -> str:
    stated = tree.xpath("string((//base/@href)[1])")
    return absolute_url(stated, url) or url


def _json_ld(tree: Any, warnings: list[str]) -> Iterator[Mapping[str, Any]]:
    from extruct.jsonld import JsonLdExtractor  # on use: it imports rdflib, which takes a second

    extractor = JsonLdExtractor()
    for script in tree.xpath("//script[contains(@type, 'ld+json')]"):
        script.set("type", _JSON_LD)  # drops "; charset=utf-8", which the extractor does not accept
        try:
            # Each script is read alone, so that a malformed one does not hide the others.
            items = extractor.extract_items(script)
        except (ValueError, RecursionError):
            warnings.append("A JSON-LD script of the page is malformed and was ignored.")
            continue
        yield from (item for item in items if isinstance(item, Mapping))


def _microdata(tree: Any, base_url: str, warnings: list[str]) -> Iterator[Mapping[str, Any]]:
    """Yield the page's items.

    The extractor recurses into nested and referenced items, with five frames each, and compares properties in pairs.
    The limits below bound all three; `trueup.features.products.pages.MAX_DEPTH` explains why.
    """
    from extruct.w3cmicrodata import MicrodataExtractor

    if tree.xpath("count(//*[@itemprop])") > _MAX_ITEM_PROPERTIES:
        warnings.append(f"The page has more than {_MAX_ITEM_PROPERTIES} microdata properties; they were not read.")
        return
    if tree.xpath(f"boolean(//*[@itemscope][count(ancestor::*[@itemscope]) > {_MAX_ITEM_DEPTH}])"):
        warnings.append(
            f"The microdata of the page is nested more than {_MAX_ITEM_DEPTH} levels deep and was not read."
        )
        return
    referring = tree.xpath("//*[@itemref]")
    if sum(len(element.get("itemref").split()) for element in referring) > _MAX_ITEM_REFERENCES:
        warnings.append(f"The page has more than {_MAX_ITEM_REFERENCES} microdata references; they were not followed.")
        for element in referring:
            del element.attrib["itemref"]
    try:
        items = MicrodataExtractor().extract_items(tree, base_url=base_url)
    except ValueError:  # such as an unclosed bracket in an address
        warnings.append("The microdata of the page is malformed and was ignored.")
        return
    for item in items:
        yield _as_json_ld(item)


def _as_json_ld(item: Any) -> Any:
    """Return a microdata item in the form of JSON-LD, so that one reader serves both."""
    if isinstance(item, list):
        return [_as_json_ld(part) for part in item]
    if not isinstance(item, Mapping):
        return item
    properties = item.get("properties", {})
    return {
        "@type": item.get("type"),
        "@id": item.get("id"),
        **{name: _as_json_ld(value) for name, value in properties.items()},
    }


def _products(
    items: Iterable[Mapping[str, Any]], source: Source, base_url: str, warnings: list[str]
) -> tuple[Product, ...]:
    found: dict[tuple[object, ...], Product] = {}
    for values in product_values(items):
        product = make_product(values, source=source, base_url=base_url, warnings=warnings)
        if product is None:
            warnings.append("A product without a name was left out.")
            continue
        key = (product.name, product.price, product.currency, product.sku, product.url)
        found.setdefault(key, product)
        if len(found) == MAX_PRODUCTS:
            warnings.append(f"The page has {MAX_PRODUCTS} or more products; the first {MAX_PRODUCTS} are returned.")
            break
    return tuple(found.values())


_PRODUCT_TYPES = frozenset(
    {"product", "productgroup", "productmodel", "individualproduct", "someproducts", "productcollection", "vehicle",
     "car", "motorcycle"}
)  # fmt: skip
# Properties that lead to the page's own products. They leave out related products and the subjects of reviews.
_WAYS = ("@graph", "itemListElement", "item", "mainEntity", "mainEntityOfPage", "itemOffered", "offers",
         "makesOffer", "hasOfferCatalog", "hasVariant", "hasPart")  # fmt: skip
_FROM_GROUP = ("name", "description", "brand", "image", "url", "offers")
_STRUCK_OUT = ("listprice", "strikethroughprice", "msrp", "srp")
_MAX_DEPTH = 12

Item = Mapping[str, Any]


def product_values(items: Iterable[Item]) -> Iterator[dict[str, Any]]:
    """Yield the values of each product in the items, with the names of the fields of `Product`."""
    stated = list(items)
    known = dict(_by_id(stated, _MAX_DEPTH))
    seen: set[int] = set()
    for product in _find(stated, known, seen, _MAX_DEPTH):
        yield _values({name: _dereferenced(value, known) for name, value in product.items()})


def _by_id(node: object, depth: int) -> Iterator[tuple[str, Item]]:
    """Yield the items with an @id, so that references {"@id": "..."} can be resolved."""
    if depth == 0:
        return
    for item in _listed(node):
        if isinstance(item, Mapping):
            if isinstance(item.get("@id"), str) and len(item) > 1:
                yield item["@id"], item
            for value in item.values():
                yield from _by_id(value, depth - 1)


def _find(node: object, known: Mapping[str, Item], seen: set[int], depth: int) -> Iterator[Item]:
    if depth == 0:
        return
    for item in _listed(node):
        if not isinstance(item, Mapping):
            continue
        item = _resolved(item, known)
        if id(item) in seen:
            continue
        seen.add(id(item))
        if _types(item) & _PRODUCT_TYPES:
            yield from _variants(item, known, seen) or [item]
        else:
            for way in _WAYS:
                yield from _find(item.get(way), known, seen, depth - 1)


def _variants(group: Item, known: Mapping[str, Item], seen: set[int]) -> list[Item]:
    """Return a group's variants, each with the group's values that it lacks; empty for a product without variants."""
    variants: list[Item] = []
    for entry in _listed(group.get("hasVariant")):
        if not isinstance(entry, Mapping):
            continue
        variant = _resolved(entry, known)
        seen.add(id(variant))
        inherited = {name: group[name] for name in _FROM_GROUP if name in group}
        variants.append({**inherited, **variant})
    return variants


def _resolved(item: Item, known: Mapping[str, Item]) -> Item:
    reference = item.get("@id")
    return known.get(reference, item) if isinstance(reference, str) and len(item) == 1 else item


def _dereferenced(value: object, known: Mapping[str, Item]) -> object:
    if isinstance(value, list):
        return [_dereferenced(part, known) for part in value]
    return _resolved(value, known) if isinstance(value, Mapping) else value


def _values(product: Item) -> dict[str, Any]:
    offer = _best_offer(product.get("offers"))
    return {
        "name": _first_text(product.get("name")),
        "description": _first_text(product.get("description")),
        "sku": _first_text(product.get("sku"), offer.get("sku"), product.get("mpn"), product.get("gtin13")),
        "brand": _first_text(product.get("brand"), product.get("manufacturer")),
        "url": _first_text(product.get("url"), offer.get("url"), addresses=True),
        "image": _first_text(product.get("image"), addresses=True),
        "availability": _first_text(offer.get("availability")),
        "price": offer.get("price"),
        "currency": offer.get("currency"),
    }


def _best_offer(offers: object) -> dict[str, Any]:
    """Return the cheapest offer in the currency of the first one, which is the "from" price that shops show."""
    readable = [found for offer in _listed(offers) if isinstance(offer, Mapping) for found in _offers(offer)]
    priced = []
    for offer in readable:
        price = parse_price(offer["price"], stated_currency=offer["currency"])
        if price.amount is not None:
            priced.append((price.amount, price.currency, offer))
    if not priced:
        return readable[0] if readable else {}
    currency = priced[0][1]
    return min((entry for entry in priced if entry[1] == currency), key=lambda entry: entry[0])[2]


def _offers(offer: Item) -> Iterator[dict[str, Any]]:
    """Yield the price, currency and terms of an offer, or of the offers inside it."""
    terms = {name: offer.get(name) for name in ("availability", "sku", "url")}
    currency = _first_text(offer.get("priceCurrency"))
    low = _scalar(offer.get("lowPrice"))
    if low is not None:  # an AggregateOffer
        yield {**terms, "price": low, "currency": currency}
        return
    price = _scalar(offer.get("price"))
    if price is not None:
        yield {**terms, "price": price, "currency": currency}
        return
    for part in (*_listed(offer.get("priceSpecification")), *_listed(offer.get("offers"))):
        if isinstance(part, Mapping) and not _struck_out(part):
            for found in _offers(part):
                known = {name: value for name, value in found.items() if value not in (None, "")}
                yield {**terms, "price": None, "currency": currency, **known}
    if "priceSpecification" not in offer and "offers" not in offer:
        yield {**terms, "price": None, "currency": currency}


def _struck_out(specification: Item) -> bool:
    kind = _first_text(specification.get("priceType")).rpartition("/")[2].casefold()
    return kind in _STRUCK_OUT


def _types(item: Item) -> frozenset[str]:
    return frozenset(
        kind.rstrip("/").rpartition("/")[2].rpartition(":")[2].casefold()
        for kind in _listed(item.get("@type"))
        if isinstance(kind, str)
    )


def _listed(value: object) -> list[Any]:
    if isinstance(value, list):
        return value
    return [] if value is None else [value]


def _scalar(value: object) -> str | int | float | None:
    """Return the first plain value that is not empty. Pages wrap values in lists and in {"@value": ...}."""
    for part in _listed(value):
        if isinstance(part, Mapping):
            part = part.get("@value")
        if isinstance(part, str | int | float) and not isinstance(part, bool) and part != "":
            return part
    return None


def _first_text(*values: object, addresses: bool = False) -> str:
    """Return the first text among the values, which may be lists or items. `addresses` True: an item's address."""
    for value in values:
        for part in _listed(value):
            if isinstance(part, Mapping):
                names = ("@value", "contentUrl", "url", "name") if addresses else ("@value", "name")
                part = next((part[name] for name in names if isinstance(part.get(name), str)), None)
            if isinstance(part, str | int | float) and not isinstance(part, bool) and str(part).strip():
                return str(part) if not isinstance(part, str) else part
    return ""
