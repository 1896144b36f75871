"""Other versions of PostgreSQL."""
