"""Alembic migrations of schema `trueup`; run through `billing.install`."""
