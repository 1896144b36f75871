"""The Celery application: configuration, schedule, logs, health. `celery -A trueup.worker worker` and `beat`."""

if not __name__.startswith("trueup."):
    raise ImportError(
        "This folder is the package trueup.worker. Imported as worker, its code would run a second time. "
        "Nothing was imported. Import trueup.worker."
    )
