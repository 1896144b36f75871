"""Run revisions on the connection that `trueup.database.migrate` hands over, in its transaction; or print their SQL."""

from alembic import context

from trueup.database.schema import SCHEMA

if context.is_offline_mode():
    context.configure(
        dialect_name="postgresql",
        dialect_opts={"paramstyle": "named"},
        version_table_schema=SCHEMA,
        output_buffer=context.config.attributes["output"],
    )
else:
    context.configure(
        connection=context.config.attributes["connection"],
        version_table_schema=SCHEMA,
        # One transaction, the caller's: a migration that fails leaves nothing behind.
        transactional_ddl=True,
    )
context.run_migrations()
