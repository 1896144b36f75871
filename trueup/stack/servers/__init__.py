"""The embedded servers: PostgreSQL and Redis."""
