"""The Celery application: configuration, process lifecycle, schedule. `celery -A worker worker` and `beat`."""
