from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trueup.features.products.prices import MAX_PRICE, iso_code, parse_price


@pytest.mark.parametrize(
    ("value", "stated", "amount", "currency"),
    [
        ("1.299,00 €", None, "1299.00", "EUR"),
        ("€1,299.00", None, "1299.00", "EUR"),
        ("1 299,50 €", None, "1299.50", "EUR"),
        ("£4.50", None, "4.50", "GBP"),
        ("CHF 1'299.00", None, "1299.00", "CHF"),
        ("1’299.00", "CHF", "1299.00", "CHF"),
        ("199 TL", None, "199", "TRY"),
        ("₺1.299,90", None, "1299.90", "TRY"),
        ("129,90 zł", None, "129.90", "PLN"),
        ("19.99", "usd", "19.99", "USD"),
        (19.9, "EUR", "19.9", "EUR"),
        (1299, "EUR", "1299", "EUR"),
        (Decimal("0.10"), "EUR", "0.10", "EUR"),
        ("129.990", "CLP", "129990", "CLP"),
        ("129.990", "KWD", "129.990", "KWD"),
        ("0.500", "EUR", "0.500", "EUR"),
        (1.299, "EUR", "1.299", "EUR"),
        ("USD 25", None, "25", "USD"),
        ("CA$25", None, "25", "CAD"),
        ("NZD $25", None, "25", "NZD"),
        ("$25", "AUD", "25", "AUD"),
        ("25 درهم", "AED", "25", "AED"),
        ("۱۲۹٬۰۰۰ ریال", None, "129000", "IRR"),
        ("٤٥٫٥٠", "SAR", "45.50", "SAR"),
        ("از \u200e۴۵۰,۰۰۰\u200f ریال", None, "450000", "IRR"),
        ("from 20 - 30 €", None, "20", "EUR"),
        ("Price - 5 €", None, "5", "EUR"),
        ("12.50", "XXX", "12.50", None),
        ("12.50", "euros, mostly", "12.50", "EUR"),
        ("12.50", None, "12.50", None),
        ("12.50", "ZZZ", "12.50", None),
    ],
)
def test_a_price_is_parsed_as_shops_write_it(value: object, stated: object, amount: str, currency: str | None) -> None:
    price = parse_price(value, stated_currency=stated)
    assert price.amount == Decimal(amount)
    assert price.currency == currency


@pytest.mark.parametrize("value", ["۱۲۹٬۰۰۰ تومان", "129,000 تومان", "129000 Toman", "129,000 تومن"])
def test_toman_are_converted_to_rials_with_a_warning(value: str) -> None:
    price = parse_price(value)
    assert (price.amount, price.currency) == (Decimal(1_290_000), "IRR")
    assert price.warning
    assert "toman" in price.warning


def test_the_unofficial_toman_code_is_understood() -> None:
    assert parse_price("129000", stated_currency="IRT").amount == Decimal(1_290_000)


@pytest.mark.parametrize(
    ("value", "url", "currency"),
    [
        ("$25", "https://shop.example.ca/x", "CAD"),
        ("$25", "https://shop.com.au/", "AUD"),
        ("¥2500", "https://shop.co.jp/", "JPY"),
        ("¥250", "https://shop.cn/", "CNY"),
        ("249 kr", "https://butik.se/", "SEK"),
        ("249 kr", "https://butikk.no/", "NOK"),
        ("25 ريال", "https://shop.sa/", "SAR"),
        ("25 درهم", "https://shop.ma/", "MAD"),
    ],
)
def test_the_country_of_the_page_decides_an_ambiguous_sign(value: str, url: str, currency: str) -> None:
    assert parse_price(value, url=url).currency == currency


def test_a_dollar_sign_alone_means_us_dollars_with_a_warning() -> None:
    price = parse_price("$25", url="https://shop.example/")
    assert price.currency == "USD"
    assert price.warning
    assert "US dollars" in price.warning


@pytest.mark.parametrize("value", ["¥2500", "249 kr", "25 ريال", "25 درهم"])
def test_other_ambiguous_signs_stay_unknown_with_a_warning(value: str) -> None:
    price = parse_price(value, url="https://shop.example/")
    assert price.currency is None
    assert price.amount is not None
    assert price.warning


@pytest.mark.parametrize("value", ["-5 €", "−5", "€-5", "-€5", "-5.00", -5, -0.01, "Price: -12 USD"])
def test_a_negative_price_is_left_out_with_a_warning(value: object) -> None:
    price = parse_price(value)
    assert price.amount is None
    assert price.warning
    assert "negative" in price.warning


@pytest.mark.parametrize(
    "value",
    ["NaN", "Infinity", "1e999", "9" * 60, float("nan"), float("inf"), 1e300, 10**5000, "price on request", "1e99 €"],
    ids=lambda value: str(value)[:12] if not isinstance(value, int) else "huge integer",
)
def test_an_unusable_price_is_left_out_with_a_warning(value: object) -> None:
    price = parse_price(value, stated_currency="EUR")
    assert price.amount is None
    assert price.warning
    assert price.currency == "EUR"


@pytest.mark.parametrize("value", [None, "", "  ", [], {}, True, object()])
def test_a_missing_price_gives_no_warning(value: object) -> None:
    price = parse_price(value)
    assert price.amount is None
    assert price.warning is None


@given(st.one_of(st.text(), st.floats(), st.integers(), st.decimals(), st.none()), st.one_of(st.text(), st.none()))
def test_no_value_makes_the_parser_fail(value: object, stated: str | None) -> None:
    price = parse_price(value, stated_currency=stated, url="https://[")
    assert price.amount is None or (price.amount.is_finite() and 0 <= price.amount < MAX_PRICE)
    assert price.currency is None or iso_code(price.currency) == price.currency
