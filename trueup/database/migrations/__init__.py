"""Alembic migrations of schema `trueup`; run through `trueup.install.install`."""
