"""The project's own module of this name: the queues that its workers take tasks from."""

QUEUES = ("celery", "trueup-reconcile", "trueup-ai")
