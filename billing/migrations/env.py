"""Run migrations on the connection that `billing.install` hands over, inside its transaction."""

from alembic import context

from billing.schema import SCHEMA

connection = context.config.attributes["connection"]
context.configure(
    connection=connection,
    version_table_schema=SCHEMA,
    # One transaction, the caller's: a migration that fails leaves nothing behind.
    transactional_ddl=True,
)
context.run_migrations()
