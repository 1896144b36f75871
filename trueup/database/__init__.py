"""The connection to PostgreSQL: engine, sessions, locks, retries; trueup's own tables and their migrations."""
