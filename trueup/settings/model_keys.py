"""The keys of the model providers. Each maker's SDK has a usual variable for its key; trueup reads it too."""

import os

from pydantic import SecretStr

from trueup.settings.settings import PREFIX, Settings

# The setting for the key, the setting for the server, and the variables of the maker's SDK.
_NAMES = {
    "openai": ("openai_api_key", "openai_base_url", ("OPENAI_API_KEY",)),
    "anthropic": ("model_api_key", "model_base_url", ("ANTHROPIC_API_KEY",)),
    "gemini": ("model_api_key", "model_base_url", ("GEMINI_API_KEY", "GOOGLE_API_KEY")),
}


def model_key(settings: Settings) -> tuple[str, SecretStr | None]:
    """Return the names of the variables for the configured provider's key, and the key; None if it is not set.

    The SDK's usual variable holds a key of the maker's own server. It is not read if the settings name another server,
    which must not get that key.
    """
    if settings.model_provider not in _NAMES:
        return "", None
    own, server, usual = _NAMES[settings.model_provider]
    if (key := getattr(settings, own)) is not None:
        return f"{PREFIX}{own.upper()}", key
    if getattr(settings, server):
        return f"{PREFIX}{own.upper()}", None
    found = next((name for name in usual if os.environ.get(name)), None)
    if found is not None:
        return found, SecretStr(os.environ[found])
    return f"{PREFIX}{own.upper()} or {' or '.join(usual)}", None
