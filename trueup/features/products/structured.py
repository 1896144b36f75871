"""Products in a page's structured data: schema.org as JSON-LD or microdata."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from trueup.features.products.items import Product, Source, absolute_url, make_product
from trueup.features.products.schema_org import product_values

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
