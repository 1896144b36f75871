"""The model provider that the settings name. There is no default."""

from trueup.errors import SettingsError
from trueup.extras import PROVIDER_EXTRAS, require_extra
from trueup.llm.bounds import assigned_counter
from trueup.llm.model import Provider
from trueup.llm.tokens import TokenCounter, counter_for, offline_counter
from trueup.settings.settings import PREFIX, Settings


def provider_from_settings(settings: Settings) -> Provider:
    """Return the provider that the settings name.

    Raises `SettingsError` if they name none or lack its key, `MissingExtraError` if its packages are not installed.
    """
    if settings.model_provider is not None:
        extra, modules = PROVIDER_EXTRAS[settings.model_provider]
        feature = f"{PREFIX}MODEL_PROVIDER={settings.model_provider}"
        require_extra(extra, feature, *modules, consequence="Nothing was spent.")
    match settings.model_provider:
        case "openai":
            # Imported on use: the SDK costs about one second and 43 MB, which other processes do not need.
            from trueup.llm.providers.maker import sdk_provider
            from trueup.llm.providers.openai import OpenAI

            return sdk_provider(settings, OpenAI)
        case "anthropic":
            from trueup.llm.providers.anthropic import Anthropic
            from trueup.llm.providers.maker import sdk_provider

            return sdk_provider(settings, Anthropic)
        case "gemini":
            from trueup.llm.providers.gemini import Gemini
            from trueup.llm.providers.maker import sdk_provider

            return sdk_provider(settings, Gemini)
        case "offline":
            from trueup.llm.providers.offline import offline_provider

            return offline_provider()
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
