"""Attaching to a host's database and leaving it: tables, functions, triggers, roles."""
