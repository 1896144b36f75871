"""Faults: seeded rounds of real workers and servers that are killed, stopped and cut off while tasks spend tokens.

`python -m tests.faults --seed N --rounds N`. A round is drawn from its seed and number alone (`plans`), made ready
(`rounds`), played (`stages`, `injections`), and then judged from the database and from the own ledgers of the provider
and of Instagram (`checks`).
"""
