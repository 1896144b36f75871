"""The refusal of a database whose encoding can't hold every text."""

from typing import Any

import psycopg

from trueup.errors import NotInstalledError


def refuse_other_encodings(connection: psycopg.Connection[Any]) -> None:
    """Close a new connection and raise `NotInstalledError` unless its database is encoded in UTF8.

    A database in LATIN1 refuses most texts that models and users write, after their tokens were spent. One in SQL_ASCII
    keeps bytes of any encoding, which can't be read as text. The server tells its encoding when a session begins, so
    this costs no round trip.
    """
    encoding = connection.info.parameter_status("server_encoding")
    if encoding in (None, "UTF8"):  # None: a pooler in between that does not pass it on
        return
    name = connection.info.dbname
    connection.close()
    raise NotInstalledError(
        f"The database {name} is encoded in {encoding}, and trueup needs UTF8: texts of models and users would be "
        "refused or garbled. Nothing was changed. Make a database with CREATE DATABASE … ENCODING 'UTF8' TEMPLATE "
        "template0, and load a dump of this one into it."
    )
