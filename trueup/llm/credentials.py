"""Keys and tokens, fit to travel in a header and never shown."""

from pydantic import SecretStr

from trueup.errors import SettingsError


def header_value(name: str, secret: SecretStr | None) -> str:
    """Return the secret without surrounding spaces; empty when it is not set.

    Raises `SettingsError`, naming the setting and not the secret, when no header can carry it.
    """
    value = secret.get_secret_value().strip() if secret else ""
    if not value.isascii() or not value.isprintable():
        raise SettingsError(
            f"{name} holds characters that no key has (accents, quotes, line breaks). Copy it again from where it was "
            "issued."
        )
    return value
