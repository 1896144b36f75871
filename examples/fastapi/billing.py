"""The shop's tables. `python -m billing` makes them, with three customers: carol's counter has drifted."""

import os

from sqlalchemy import create_engine, text

engine = create_engine(os.environ["TRUEUP_DATABASE_URL"].replace("postgresql://", "postgresql+psycopg://", 1))

TABLES = """
CREATE TABLE plans (id bigint PRIMARY KEY, name text NOT NULL, tokens integer NOT NULL);
CREATE TABLE customers (id bigint PRIMARY KEY, name text NOT NULL UNIQUE);
CREATE TABLE subscriptions (
    id bigserial PRIMARY KEY, customer_id bigint NOT NULL UNIQUE REFERENCES customers, plan_id bigint REFERENCES plans,
    started_at timestamptz NOT NULL DEFAULT now(), is_active boolean NOT NULL DEFAULT true, tokens_left integer NOT NULL
);
CREATE TABLE model_calls (
    id bigserial PRIMARY KEY, customer_id bigint NOT NULL REFERENCES customers, tokens integer NOT NULL,
    called_at timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX ON model_calls (customer_id, called_at);
INSERT INTO plans VALUES (1, 'Starter', 5000);
INSERT INTO customers VALUES (1, 'ada'), (2, 'bob'), (3, 'carol');
INSERT INTO subscriptions (customer_id, plan_id, tokens_left) VALUES (1, 1, 3800), (2, 1, 0), (3, 1, 4400);
INSERT INTO model_calls (customer_id, tokens) VALUES (1, 600), (1, 600), (2, 2500), (2, 2500), (3, 1000), (3, 1000);
"""


def customer_named(name: str) -> int | None:
    with engine.connect() as connection:
        return connection.scalar(text("SELECT id FROM customers WHERE name = :name"), {"name": name})


if __name__ == "__main__":
    with engine.begin() as connection:
        connection.execute(text(TABLES))
