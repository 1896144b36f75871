"""Fault injection: seeded rounds in which real workers and servers are killed, stopped and cut off while tasks spend.

`python -m tests.faults --seed N --rounds N`. A round is drawn from its seed and number alone (`plans`), prepared
(`rounds`), played (`stages`, `injections`), and then checked against the database and the ledgers of the fake provider
and the fake Instagram (`checks`).
"""
