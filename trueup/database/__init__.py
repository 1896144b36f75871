"""PostgreSQL: engine, sessions, locks and retries; trueup's own tables and their migrations."""
