"""API keys as HTTP header values. Errors never show them."""

from pydantic import SecretStr

from trueup.errors import SettingsError


def header_value(name: str, secret: SecretStr | None) -> str:
    """Return the secret without surrounding spaces; empty if it is not set.

    `name`: the setting, for the error. Raises `SettingsError`, without the secret, if no header can carry it.
    """
    value = secret.get_secret_value().strip() if secret else ""
    if not value.isascii() or not value.isprintable():
        raise SettingsError(
            f"{name} has characters that a key can't have (accents, typographic quotes, line breaks). "
            "Nothing was sent. Copy the key again from its issuer."
        )
    return value
