"""A database in another encoding than UTF8 is refused with one clear error, by every entry point."""

from pathlib import Path

import pytest
from sqlalchemy import Engine, text

from tests.conftest import settings_for, url_of_database
from trueup.database.engine import transaction
from trueup.errors import NotInstalledError
from trueup.host.mapping import HostMapping
from trueup.install.install import install
from trueup.stack import StackUrls


@pytest.mark.parametrize("encoding", ["SQL_ASCII", "LATIN1"])
def test_a_database_in_another_encoding_is_refused(
    stack: StackUrls,
    admin_engine: Engine,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    encoding: str,
) -> None:
    name = f"test_{encoding.lower()}"
    with admin_engine.connect() as connection:
        connection.execute(text(f"DROP DATABASE IF EXISTS {name}"))
        provider = "LOCALE_PROVIDER libc" if (connection.dialect.server_version_info or ()) >= (15,) else ""
        options = f"ENCODING '{encoding}' {provider} LC_COLLATE 'C' LC_CTYPE 'C' TEMPLATE template0"
        connection.execute(text(f"CREATE DATABASE {name} {options}"))
    try:
        assert stack.database_url is not None
        url = url_of_database(stack.database_url, name)
        with (
            settings_for(url, stack, monkeypatch, tmp_path),
            pytest.raises(NotInstalledError, match=f"{name} is encoded in {encoding}, and trueup needs UTF8"),
            transaction() as connection,
        ):
            install(connection, HostMapping(), with_host_tables=True)
    finally:
        with admin_engine.connect() as connection:
            connection.execute(text(f"DROP DATABASE {name} WITH (FORCE)"))
