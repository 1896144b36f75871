"""Faults: seeded rounds of real workers and servers that are killed, stopped and cut off while tasks spend tokens.

`python -m tests.faults --seed N --rounds N`. A round is drawn from its seed and number alone (`plans`), played
(`rounds`, `injections`), and then judged from the database and the provider's own ledger (`checks`).
"""
