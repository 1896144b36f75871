"""The Celery tasks of the AI features."""
