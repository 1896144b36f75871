import json
from decimal import Decimal
from pathlib import Path

import pytest

from tests.support.scripted import HeldModel, ScriptedModel, completion
from trueup.errors import AnswerFormatError, InvalidInputError
from trueup.features.products.extractor import ESTIMATED_TOKENS, ProductResult, estimated_tokens, extract_products
from trueup.features.products.items import Product
from trueup.features.products.pages import MAX_HTML_BYTES
from trueup.llm.tokens import BoundCounter, EncodingCounter, count_prompt_tokens

EXAMPLES = Path(__file__).parents[2] / "examples"
URL = "https://shop.example/lamps/"


def _stated(*scripts: object) -> ProductResult:
    html = "".join(_script(json.dumps(script)) for script in scripts)
    return extract_products(ScriptedModel(), url=URL, html=f"<html><body>{html}<p>Lamps</p></body></html>")


def _script(text: str, kind: str = "application/ld+json") -> str:
    return f'<script type="{kind}">{text}</script>'


def _product(**values: object) -> dict[str, object]:
    return {"@context": "https://schema.org", "@type": "Product", "name": "Lamp", **values}


def _offer(price: object = "38.00", **values: object) -> dict[str, object]:
    return {"@type": "Offer", "price": price, "priceCurrency": "GBP", **values}


def test_a_page_with_data_costs_no_tokens() -> None:
    model = ScriptedModel()
    result = extract_products(model, url=URL, html=(EXAMPLES / "shop.html").read_text())
    assert not model.prompts
    assert not result.model_called
    assert result.source == "json-ld"
    assert result.warnings == ()
    assert [(product.name, product.price, product.availability) for product in result.products] == [
        ("Ember 2 camping stove", Decimal("64.90"), "InStock"),
        ("Larch lantern, moss green", Decimal(38), "InStock"),
        ("Larch lantern, slate", Decimal(38), "OutOfStock"),
        ("Heron folding chair", Decimal("89.00"), "InStock"),
        ("Tarn water filter, 0.1 micron", Decimal("34.50"), "PreOrder"),
    ]
    assert {product.currency for product in result.products} == {"GBP"}
    assert [product.brand for product in result.products] == ["Kestrel"] * 3 + ["Wetherby Camp Works", "Kestrel"]
    assert all(product.image and product.image.startswith("https://shop.example/media/") for product in result.products)


def test_a_page_without_data_is_read_by_the_model_within_the_estimate() -> None:
    model = HeldModel(ESTIMATED_TOKENS)
    result = extract_products(model, url=URL, title="Mugs", html=(EXAMPLES / "shop_plain.html").read_text())
    assert result.model_called
    assert result.source == "model"
    assert [(product.name, product.price, product.currency) for product in result.products] == [
        ("Breakfast mug, oatmeal glaze", Decimal("24.50"), "EUR"),
        ("Noodle bowl with chopstick rest", Decimal("42.00"), "EUR"),
        ("Serving platter, river blue", Decimal("1120.00"), "EUR"),
        ("Set of four dinner plates", Decimal("136.00"), "EUR"),
    ]
    assert model.tokens_left >= 0


@pytest.mark.parametrize(
    "html",
    [
        """<div itemscope itemtype="https://schema.org/Product"><h1 itemprop="name">Lamp</h1>
        <img itemprop="image" src="lamp.jpg"><div itemprop="offers" itemscope itemtype="https://schema.org/Offer">
        <meta itemprop="priceCurrency" content="EUR"><span itemprop="price" content="38.5">38,50 €</span>
        <link itemprop="availability" href="https://schema.org/InStock"></div></div>""",
        """<div itemscope itemtype="http://schema.org/ItemList"><div itemprop="itemListElement" itemscope
        itemtype="http://schema.org/Product"><b itemprop="name">Lamp</b><img itemprop="image" src="lamp.jpg">
        <p itemprop="offers" itemscope itemtype="http://schema.org/Offer"><span itemprop="price">38,50 €</span>
        <meta itemprop="availability" content="InStock"></p></div></div>""",
    ],
)
def test_microdata_is_read(html: str) -> None:
    result = extract_products(ScriptedModel(), url=URL, html=html)
    assert result.source == "microdata"
    assert result.products == (
        Product(
            name="Lamp",
            price=Decimal("38.5"),
            currency="EUR",
            availability="InStock",
            image="https://shop.example/lamps/lamp.jpg",
            source="microdata",
        ),
    )


@pytest.mark.parametrize(
    "shape",
    [
        _product(offers=_offer()),
        [_product(offers=[_offer()])],
        {"@graph": [{"@type": "WebPage"}, _product(offers=_offer())]},
        {"@type": "WebPage", "mainEntity": _product(offers=_offer())},
        {"@type": "ItemList", "itemListElement": [{"@type": "ListItem", "item": _product(offers=_offer())}]},
        {"@type": "ItemList", "itemListElement": [_product(offers=_offer())]},
        {"@type": "OfferCatalog", "itemListElement": [{"@type": "Offer", "itemOffered": _product(offers=_offer())}]},
        _product(offers=_offer()) | {"@type": ["Product", "Thing"]},
        _product(offers=_offer()) | {"@type": "http://schema.org/Product"},
        _product(name=["Lamp"], offers=_offer()),
        _product(name={"@value": "Lamp", "@language": "en"}, offers=_offer()),
        _product(offers={"@type": "AggregateOffer", "lowPrice": 38, "highPrice": 50, "priceCurrency": "GBP"}),
        _product(offers={"@type": "AggregateOffer", "priceCurrency": "GBP", "offers": [_offer(50), _offer(38)]}),
        _product(offers=[_offer(50), _offer("38.00"), _offer(1, priceCurrency="USD")]),
        _product(offers={"@type": "Offer", "priceSpecification": {"price": 38, "priceCurrency": "GBP"}}),
        _product(
            offers={
                "@type": "Offer",
                "priceSpecification": [
                    {"price": 20, "priceCurrency": "GBP", "priceType": "https://schema.org/ListPrice"},
                    {"price": 38, "priceCurrency": "GBP"},
                ],
            }
        ),
        {"@graph": [_product(offers={"@id": "#offer"}), _offer() | {"@id": "#offer"}]},
        {"@type": "ProductGroup", "name": "Lamps", "offers": _offer(),
         "hasVariant": [{"@type": "Product", "name": "Lamp"}]},
        {"@graph": [{"@type": "ProductGroup", "name": "L", "hasVariant": [{"@id": "#v"}]},
                    _product(offers=_offer()) | {"@id": "#v"}]},
        {"@type": "ProductGroup", "name": "Lamp", "offers": _offer()},
    ],
    ids=lambda shape: json.dumps(shape)[:40],
)  # fmt: skip
def test_products_are_found_in_every_form_that_pages_use(shape: object) -> None:
    result = _stated(shape)
    assert [(product.name, product.price, product.currency) for product in result.products] == [
        ("Lamp", Decimal(38), "GBP")
    ]


def test_related_products_and_reviews_are_left_out() -> None:
    result = _stated(
        _product(
            isRelatedTo=_product(name="Other"), review={"@type": "Review", "itemReviewed": _product(name="Third")}
        ),
        {"@type": "Review", "itemReviewed": _product(name="Fourth")},
    )
    assert [product.name for product in result.products] == ["Lamp"]


def test_a_malformed_script_gives_a_warning_and_hides_no_other() -> None:
    html = (
        _script("{oops") + _script("[" * 50_000) + _script(json.dumps(_product()), "application/ld+json; charset=utf-8")
    )
    result = extract_products(ScriptedModel(), url=URL, html=html)
    assert [product.name for product in result.products] == ["Lamp"]
    assert sum("malformed" in warning for warning in result.warnings) == 2


@pytest.mark.parametrize("price", ["-5", -5, "NaN", float("nan"), "1e999", "ask us", 10**300])
def test_an_impossible_price_is_left_out_with_a_warning(price: object) -> None:
    result = _stated(_product(offers=_offer(price)))
    assert result.products[0].price is None
    assert any(warning.startswith("Lamp: price") for warning in result.warnings)


@pytest.mark.parametrize("junk", [None, 5, True, [], {}, [[]], [None], {"@id": 5}, {"a": [1]}, "\ud800", "x" * 10_000])
def test_no_value_in_a_pages_data_makes_it_fail(junk: object) -> None:
    fields = ("description", "sku", "brand", "image", "url", "offers", "@id", "hasVariant", "isVariantOf")
    result = _stated(junk, _product(**dict.fromkeys(fields, junk)), _product(name=junk), _product(offers=_offer(junk)))
    assert "Lamp" in {product.name for product in result.products}
    json.dumps(result.model_dump(mode="json")).encode()


@pytest.mark.parametrize(
    ("value", "url"),
    [
        ("/a.jpg", "https://shop.example/a.jpg"),
        ("//cdn.example/a.jpg", "https://cdn.example/a.jpg"),
        ("javascript:alert(1)", None),
        ("data:image/png;base64,AAAA", None),
        ("http://[", None),
        ("https://a.example/?x=1&amp;y=2", "https://a.example/?x=1&y=2"),
    ],
)
def test_addresses_become_absolute_http_addresses_or_none(value: str, url: str | None) -> None:
    product = _stated(_product(image=value, url=value)).products[0]
    assert (product.image, product.url) == (url, url)


def test_addresses_are_relative_to_the_base_element() -> None:
    html = '<head><base href="https://other.example/x/"></head>' + _script(json.dumps(_product(url="lamp")))
    result = extract_products(ScriptedModel(), url=URL, html=html)
    assert result.products[0].url == "https://other.example/x/lamp"


def test_escaped_html_in_data_becomes_plain_text() -> None:
    product = _stated(_product(name="Lamp &amp; shade", description="&lt;p&gt;Warm&lt;/p&gt; <b>light</b>")).products[0]
    assert product.name == "Lamp & shade"
    assert product.description == "Warm light"


def test_a_product_stated_twice_is_returned_once() -> None:
    assert len(_stated(_product(offers=_offer()), _product(offers=_offer())).products) == 1


@pytest.mark.parametrize(
    ("html", "warning"),
    [
        ('<div itemscope itemprop="x">' * 40, "nested"),
        ('<i itemscope><b itemprop="n">v</b></i>' * 20_001, "properties"),
        ('<div itemscope itemref="a b">x</div>' * 20, "references"),
    ],
    ids=["nested", "many", "references"],
)
def test_microdata_beyond_the_limits_is_not_read(html: str, warning: str) -> None:
    result = extract_products(ScriptedModel('{"products": []}'), url=URL, html=html + "text")
    assert any(warning in line for line in result.warnings)
    assert extract_products(ScriptedModel(), url=URL, html=(EXAMPLES / "shop.html").read_text()).products


def test_references_in_a_circle_end() -> None:
    circle = {"@graph": [{"@id": "a", "@type": "ProductGroup", "name": "g", "hasVariant": [{"@id": "a"}, {"@id": "b"}]},
                         {"@id": "b", "@type": "Product", "name": "v", "offers": {"@id": "b"}}]}  # fmt: skip
    assert {product.name for product in _stated(circle).products} == {"g", "v"}
    html = '<div id="a" itemscope itemtype="https://schema.org/Product" itemref="a"><b itemprop="name">Lamp</b></div>'
    assert extract_products(ScriptedModel(), url=URL, html=html).products


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"url": "ftp://shop.example/", "text": "x"}, "url"),
        ({"url": "javascript:alert(1)", "text": "x"}, "url"),
        ({"url": "shop.example", "text": "x"}, "url"),
        ({"url": "http://[", "text": "x"}, "url"),
        ({"url": "", "text": "x"}, "url"),
        ({"url": None, "text": "x"}, "url"),
        ({}, "html or text"),
        ({"html": "", "text": ""}, "html or text"),
        ({"html": "<p>x</p>", "text": "x"}, "html or text"),
        ({"html": "<html><body><script>build()</script></body></html>"}, "html has no text"),
        ({"html": "  \n "}, "html"),
        ({"html": "\x89PNG\r\n\x1a\n" + "\x00\x01" * 50}, "html holds binary"),
        ({"text": "%PDF-1.7 " + "\x00" * 100}, "text holds binary"),
        ({"html": "<p>" + "é" * (MAX_HTML_BYTES // 2)}, "html is larger than 5 MiB"),
        ({"html": "<div>" * 10_000 + "x"}, "html is nested"),
        ({"text": "x", "title": "t" * 501}, "title"),
    ],
)
def test_unusable_input_is_refused_before_the_model_is_called(values: dict[str, object], field: str) -> None:
    model = ScriptedModel()
    arguments: dict[str, object] = {"url": URL, **values}
    with pytest.raises(InvalidInputError, match=field):
        extract_products(model, **arguments)  # type: ignore[arg-type]
    assert not model.prompts


@pytest.mark.parametrize("counter", [EncodingCounter("o200k_base"), EncodingCounter("cl100k_base"), BoundCounter()])
@pytest.mark.parametrize("page", ["Lamp £38. " * 5000, "فانوس ۱۲۹٬۰۰۰ تومان\n" * 3000, "😀" * 9000, "x" * 50_000])
def test_a_long_page_is_cut_so_that_prompt_and_answer_fit_the_estimate(
    page: str, counter: EncodingCounter | BoundCounter
) -> None:
    model = ScriptedModel('{"products": []}')
    result = extract_products(model, url=URL + "x" * 1500, title="t" * 500, text=page, counter=counter)
    prompt_tokens = count_prompt_tokens(model.prompts[0], counter)
    assert model.caps[0] is not None
    assert prompt_tokens + model.caps[0] <= estimated_tokens(counter)
    assert model.caps[0] >= 400
    assert "The page is long" in result.warnings[0]


def test_the_estimate_is_the_specifications() -> None:
    assert estimated_tokens() == ESTIMATED_TOKENS == 1000


def test_values_that_the_model_invents_are_left_out() -> None:
    answer = json.dumps(
        {
            "products": [
                {"name": "Lamp", "price": "£38.00", "currency": "GBP", "availability": "in stock"},
                {"name": "Yacht", "price": "£1"},
                {"name": "Shade", "price": "£99"},
                {"price": "£38.00"},
            ]
        }
    )
    result = extract_products(ScriptedModel(answer), url=URL, text="Lamp £38.00\nShade £12.50")
    assert [(product.name, product.price, product.availability) for product in result.products] == [
        ("Lamp", Decimal("38.00"), "InStock"),
        ("Shade", None, None),
    ]
    assert any(warning.startswith("Yacht: the name is not on the page") for warning in result.warnings)
    assert any(warning.startswith("Shade: the price is not on the page") for warning in result.warnings)


@pytest.mark.parametrize(
    ("page", "price", "amount"),
    [
        ("Lamp 1.299,00 €", 1299, "1299"),
        ("Lamp 1 299 kr", "1299", "1299"),
        ("Lamp ۱۲۹٬۰۰۰ تومان", "129000 تومان", "1290000"),
        ("2 Lamps 19.90 20.00", "19.90", "19.90"),
        ("Lamp £20 - £30", "£20 - £30", "20"),
    ],
)
def test_a_price_in_another_notation_is_the_same_price(page: str, price: object, amount: str) -> None:
    answer = json.dumps({"products": [{"name": "Lamp", "price": price}]})
    text = page.replace("Lamps", "Lamp")
    assert extract_products(ScriptedModel(answer), url=URL, text=text).products[0].price == Decimal(amount)


def test_a_page_without_products_is_no_error() -> None:
    result = extract_products(ScriptedModel('{"products": []}'), url=URL, text="About us")
    assert result.products == ()
    assert result.source is None


def test_an_answer_in_the_wrong_format_is_an_error() -> None:
    with pytest.raises(AnswerFormatError, match="charged"):
        extract_products(ScriptedModel("There are no products."), url=URL, text="About us")


def test_an_answer_that_was_cut_off_keeps_its_complete_products() -> None:
    cut = completion('{"products": [{"name": "Lamp", "price": "£38"}, {"name": "Sha', truncated=True)
    result = extract_products(ScriptedModel(cut), url=URL, text="Lamp £38\nShade £12")
    assert [product.name for product in result.products] == ["Lamp"]
    assert any("cut off" in warning for warning in result.warnings)


def test_a_result_survives_json() -> None:
    result = _stated(_product(offers=_offer("38.10")))
    dumped = json.loads(json.dumps(result.model_dump(mode="json")))
    assert dumped["products"][0]["price"] == "38.10"
    assert ProductResult.model_validate(dumped) == result
