"""The domain: balances, the access decision, holds, charges, grants and reconciliation.

Nothing here knows of Celery, HTTP or click. `billing.utils` and `billing.decorators` are the public face.
"""
