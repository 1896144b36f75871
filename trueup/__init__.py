"""Makes AI token budgets true: gates, records and reconciles the tokens that Celery tasks spend."""
