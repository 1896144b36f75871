"""trueup's own tables, all in the schema `trueup`. Keys begin with the user. Tokens are bigint counts.

The first migration creates them. The comment of each constraint says which fault it prevents.
"""

from collections.abc import Mapping
from functools import cache
from typing import Any

from sqlalchemy import Column, MetaData, Table

from trueup.database.schema.access import add_access_table
from trueup.database.schema.balances import add_balance_tables
from trueup.database.schema.bounds import add_bound_tables
from trueup.database.schema.columns import user_id_column_type
from trueup.database.schema.grants import add_grant_tables
from trueup.database.schema.holds import add_hold_tables
from trueup.database.schema.journal import add_journal_tables
from trueup.database.schema.reconciling import add_reconcile_tables
from trueup.database.schema.requests import add_request_table
from trueup.database.schema.rollout import add_rollout_tables
from trueup.host.mapping import UserIdType

SCHEMA = "trueup"


def build_metadata(user_id_type: UserIdType) -> MetaData:
    """Return the tables for a host whose user ids have that type."""
    metadata = MetaData(schema=SCHEMA)

    def user_id(name: str = "user_id", *, nullable: bool = False) -> Column[Any]:
        return Column(name, user_id_column_type(user_id_type), nullable=nullable, autoincrement=False)

    add_balance_tables(metadata, user_id)
    add_grant_tables(metadata, user_id)
    add_hold_tables(metadata, user_id)
    add_journal_tables(metadata, user_id)
    add_reconcile_tables(metadata, user_id)
    add_request_table(metadata, user_id)
    add_rollout_tables(metadata, user_id)
    add_bound_tables(metadata)
    add_access_table(metadata)
    return metadata


@cache
def _tables(user_id_type: UserIdType) -> Mapping[str, Table]:
    return build_metadata(user_id_type).tables


def own_table(name: str, user_id_type: UserIdType) -> Table:
    """Return one of trueup's own tables, for use in Core statements."""
    return _tables(user_id_type)[f"{SCHEMA}.{name}"]
