"""Where completions come from: the offline provider by default, or any OpenAI-compatible endpoint."""

from trueup.extras import require_extra
from trueup.llm.model import Provider
from trueup.llm.tokens import TokenCounter, counter_for, offline_counter
from trueup.settings.settings import Settings


def provider_from_settings(settings: Settings) -> Provider:
    """Return the provider that the settings name.

    Raises `SettingsError` when it lacks its key, and `MissingExtraError` when its packages are not installed.
    """
    if settings.model_provider == "openai":
        require_extra("openai", "TRUEUP_MODEL_PROVIDER=openai", consequence="Nothing was spent.")
        # Imported on use: the SDK takes about a second and 43 MB, which offline processes don't owe.
        from trueup.llm.providers.openai import OpenAIProvider

        return OpenAIProvider(settings)
    require_extra("embedded", "TRUEUP_MODEL_PROVIDER=offline", "bpe_openai", consequence="Nothing was spent.")
    from trueup.llm.providers.offline import OfflineProvider

    return OfflineProvider()


def counter_from_settings(settings: Settings) -> TokenCounter:
    """Return the counter that the settings' provider bills by, for the services' `counter` argument."""
    if settings.model_provider == "offline":
        return offline_counter()
    return counter_for(settings.model_name)
