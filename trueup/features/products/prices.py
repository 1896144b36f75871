"""Prices and currencies as shops write them: "1.299,00 €", "۱۲۹٬۰۰۰ تومان", 19.9.

The currency is determined in this order: an ISO 4217 code beside the amount or stated by the page; a sign of exactly
one currency; a sign of several currencies ("$", "¥", "kr", "ريال") by the country of the page's address, such as .ca or
.com.au. A "$" without a dollar country in the address counts as US dollars, with a warning; other ambiguous signs give
None. The toman is not an ISO currency, so an amount in toman becomes ten times as many rials (IRR), with a warning.
"""

import math
import re
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from functools import lru_cache
from urllib.parse import urlsplit

from trueup.llm.texts import ascii_digits

RIALS_PER_TOMAN = 10
MAX_PRICE = Decimal(10) ** 15  # above every real price in every currency, so a larger one is the page's mistake

_SIGNS = {
    "€": "EUR", "euro": "EUR", "eur": "EUR", "£": "GBP", "US$": "USD", "CA$": "CAD", "C$": "CAD", "AU$": "AUD",
    "A$": "AUD", "NZ$": "NZD", "HK$": "HKD", "S$": "SGD", "NT$": "TWD", "MX$": "MXN", "R$": "BRL", "₺": "TRY",
    "TL": "TRY", "₽": "RUB", "руб": "RUB", "руб.": "RUB", "₹": "INR", "₩": "KRW", "₪": "ILS", "₴": "UAH", "zł": "PLN",
    "Zł": "PLN", "Kč": "CZK", "₫": "VND", "฿": "THB", "₦": "NGN", "₱": "PHP", "₸": "KZT", "₾": "GEL", "CN¥": "CNY",
    "ریال": "IRR", "﷼": "IRR", "د.إ": "AED", "ر.س": "SAR", "د.ك": "KWD", "ر.ق": "QAR", "ج.م": "EGP",
}  # fmt: skip
_SIGNS_BY_COUNTRY = {
    "$": {"ca": "CAD", "au": "AUD", "nz": "NZD", "sg": "SGD", "hk": "HKD", "mx": "MXN", "tw": "TWD", "ar": "ARS",
          "cl": "CLP", "co": "COP"},
    "¥": {"jp": "JPY", "cn": "CNY"}, "￥": {"jp": "JPY", "cn": "CNY"},
    "kr": {"se": "SEK", "no": "NOK", "dk": "DKK", "is": "ISK"},
    "ريال": {"sa": "SAR", "qa": "QAR", "om": "OMR", "ye": "YER", "ir": "IRR"},
    "درهم": {"ae": "AED", "ma": "MAD"}, "جنيه": {"eg": "EGP", "sd": "SDG"}, "₨": {"pk": "PKR", "in": "INR"},
}  # fmt: skip
_TOMAN = re.compile(r"تومان|تومن|\btoman\b|\bIRT\b", re.IGNORECASE)
_RIAL = re.compile("ریال")
_PLAIN = re.compile(r"[+-]?\d+(?:\.\d+)?")
_SCIENTIFIC = re.compile(r"[+-]?\d+(?:\.\d+)?[eE][+-]?\d+")
_EXPONENT = re.compile(r"\d[eE][+-]?\d")
_THREE_DECIMALS = re.compile(r"[1-9]\d{0,2}\.\d{3}")
_NEGATIVE = re.compile(r"^[^\d]*[-−](?:[^\w\s]|[A-Z]{1,3}\$?)?\d")
_BIDI = re.compile(r"[\u200e\u200f\u061c\u202a-\u202e\u2066-\u2069]")
_SEPARATORS = str.maketrans({"٬": ",", "٫": ".", "،": ",", "’": "'"})
_CODE = re.compile(r"\b[A-Z]{3}\b")
# Currencies with three decimals. In all others, three digits after a point are thousands.
_MILS = frozenset({"BHD", "IQD", "JOD", "KWD", "LYD", "OMR", "TND"})


@dataclass(frozen=True, kw_only=True)
class Price:
    """A parsed price. `amount` None: not readable or not usable. `currency` None: unknown. `warning` None: no doubt."""

    amount: Decimal | None
    currency: str | None
    warning: str | None = None


def parse_price(value: object, *, stated_currency: object = None, url: str = "") -> Price:
    """Parse a price from a number or a text. Never raises.

    `stated_currency`: the currency that the page states, as code, sign or name. `url`: the page's address, whose
    country decides ambiguous signs.
    """
    text = _text(value)
    stated = _text(stated_currency)
    currency, factor, warning = _currency(text, stated, url)
    amount = _amount(text, value, currency)
    if amount is None or not amount.is_finite():
        unreadable = f"price {text[:40]!r} is not readable; left out" if text else None
        return Price(amount=None, currency=currency, warning=unreadable)
    amount *= factor
    if amount < 0 or _NEGATIVE.match(text):
        return Price(amount=None, currency=currency, warning=f"price {text[:40]!r} is negative; left out")
    if amount >= MAX_PRICE:
        return Price(amount=None, currency=currency, warning=f"price {text[:40]!r} is too large; left out")
    return Price(amount=amount, currency=currency, warning=warning)


def iso_code(text: str) -> str | None:
    """Return the text as an ISO 4217 code, such as "EUR" for "eur"; None if it is not one."""
    code = text.strip().upper()
    return code if code in _iso_codes() else None


def _text(value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float | Decimal):
        return ""
    if isinstance(value, int) and abs(value) >= MAX_PRICE:
        return "1e99"  # too large anyway, and Python refuses to print integers of more than 4300 digits
    text = _BIDI.sub("", ascii_digits(str(value))).translate(_SEPARATORS)
    return " ".join(text.split())[:200]


def _amount(text: str, value: object, currency: str | None) -> Decimal | None:
    from price_parser.parser import extract_price_text, parse_number  # 0.7 s to import

    if isinstance(value, float) and not math.isfinite(value):
        return None
    if _PLAIN.fullmatch(text) or _SCIENTIFIC.fullmatch(text):
        # schema.org requires a decimal point. Yet "129.990" means 129 990 in a currency without three decimals.
        thousands = isinstance(value, str) and _THREE_DECIMALS.fullmatch(text) and currency not in _MILS
        return _decimal(text.replace(".", "") if thousands else text)
    if _EXPONENT.search(text) or not any(character.isdecimal() for character in text):
        return None  # also for "free", which pages say about delivery more often than about a product
    found = extract_price_text(text)
    return parse_number(found) if found else None


def _decimal(text: str) -> Decimal | None:
    try:
        return Decimal(text)
    except InvalidOperation:
        return None


def _currency(text: str, stated: str, url: str) -> tuple[str | None, int, str | None]:
    """Return the ISO code (None: unknown), the factor for the amount, and a warning (None: no doubt)."""
    # A currency beside the amount has precedence over a currency that the page states elsewhere.
    for source in (text, stated):
        if _TOMAN.search(source):
            return "IRR", RIALS_PER_TOMAN, "the price was in toman; it was converted to rials, ten per toman"
        if _RIAL.search(source):
            return "IRR", 1, None
    for source in (stated, *_CODE.findall(text)):
        if code := iso_code(source):
            return code, 1, None
    sign = _sign(text, stated)
    if sign is None:
        return None, 1, None
    if code := _SIGNS.get(sign) or _SIGNS_BY_COUNTRY.get(sign, {}).get(_country(url)) or iso_code(sign):
        return code, 1, None
    if sign == "$":
        return "USD", 1, '"$" was read as US dollars, because the page names no other dollar'
    return None, 1, f"several countries use the currency {sign!r}; left out"


def _sign(text: str, stated: str) -> str | None:
    from price_parser.parser import extract_currency_symbol

    sign: str | None = extract_currency_symbol(text or None, stated or None)
    return sign.strip() if sign else None


def _country(url: str) -> str:
    try:
        host = urlsplit(url).hostname or ""
    except ValueError:
        return ""
    last = host.rpartition(".")[2]
    return last if len(last) == 2 else ""


@lru_cache(maxsize=1)
def _iso_codes() -> frozenset[str]:
    import pycountry  # half a second to import

    return frozenset(currency.alpha_3 for currency in pycountry.currencies) - {"XXX", "XTS"}
