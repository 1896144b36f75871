"""The Celery application: configuration, process lifecycle, schedule. `celery -A trueup.worker worker` and `beat`."""
