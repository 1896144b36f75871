"""Task `trueup.extract_products`: extract typed products from a web page."""

from collections.abc import Mapping
from typing import Any

from trueup.accounts.user_ids import UserId
from trueup.features.products import extractor
from trueup.llm.model import Model
from trueup.llm.providers import counter_from_settings
from trueup.settings.settings import get_settings
from trueup.tasks.metered import metered_task


def estimate_tokens(_arguments: Mapping[str, Any]) -> int:
    """Return the specification's 1000, scaled up for models without an exact token counter."""
    return extractor.estimated_tokens(counter_from_settings(get_settings()))


@metered_task(
    name="trueup.extract_products",
    feature_name="Product Extractor",
    section="product_recommendation",
    estimated_tokens=estimate_tokens,
)
def extract_products(
    model: Model, user_id: UserId, url: str, title: str = "", html: str | None = None, text: str | None = None
) -> extractor.ProductResult:
    """Return the products of a page, given as `html` or as `text`.

    The page's structured data is used first and costs nothing. The model reads only a page that has none.
    """
    counter = counter_from_settings(get_settings())
    return extractor.extract_products(model, url=url, title=title, html=html, text=text, counter=counter)
