"""Alembic migrations of schema `trueup`; run through `trueup.database.migrate`."""
