"""The metered model client, its providers, and token counting."""
