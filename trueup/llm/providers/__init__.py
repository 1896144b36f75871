"""The model provider that the settings name. There is no default."""

from trueup.errors import SettingsError
from trueup.extras import require_extra
from trueup.llm.bounds import assigned_counter
from trueup.llm.model import Provider
from trueup.llm.tokens import TokenCounter, counter_for, offline_counter
from trueup.settings.settings import PREFIX, Settings


def provider_from_settings(settings: Settings) -> Provider:
    """Return the provider that the settings name.

    Raises `SettingsError` if they name none or lack its key, `MissingExtraError` if its packages are not installed.
    """
    match settings.model_provider:
        case "openai":
            require_extra("openai", "TRUEUP_MODEL_PROVIDER=openai", consequence="Nothing was spent.")
            # Imported on use: the SDK costs about one second and 43 MB, which other processes do not need.
            from trueup.llm.providers.maker import MakerProvider
            from trueup.llm.providers.openai import OpenAI

            return MakerProvider(settings, OpenAI)
        case "anthropic":
            require_extra("anthropic", "TRUEUP_MODEL_PROVIDER=anthropic", consequence="Nothing was spent.")
            from trueup.llm.providers.anthropic import Anthropic
            from trueup.llm.providers.maker import MakerProvider

            return MakerProvider(settings, Anthropic)
        case "gemini":
            require_extra("gemini", "TRUEUP_MODEL_PROVIDER=gemini", consequence="Nothing was spent.")
            from trueup.llm.providers.gemini import Gemini
            from trueup.llm.providers.maker import MakerProvider

            return MakerProvider(settings, Gemini)
        case "offline":
            require_extra("embedded", "TRUEUP_MODEL_PROVIDER=offline", "bpe_openai", consequence="Nothing was spent.")
            from trueup.llm.offline.offline import OfflineProvider

            return OfflineProvider()
        case None:
            raise SettingsError(
                f"{PREFIX}MODEL_PROVIDER is not set, and this task needs a model. No tokens were held or spent. Set it "
                "for the workers and restart them: `openai` calls any OpenAI-compatible endpoint, `anthropic` and "
                "`gemini` their makers, `offline` makes up its answers."
            )


def counter_from_settings(settings: Settings) -> TokenCounter:
    """Return the token counter of the configured provider, for the services' `counter` argument.

    Without a provider it returns the counter of the model's name, so that an estimate needs no provider.
    """
    if settings.model_provider == "offline":
        return offline_counter()
    return assigned_counter(settings.model_name, settings) or counter_for(settings.model_name)
