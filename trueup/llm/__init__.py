"""The metered model client, providers, and the counting of tokens."""
