"""Fixtures of the tests of hosts whose mapping differs from Django's defaults in a few settings."""

from pathlib import Path

import pytest

from tests.support.host import Host
from tests.support.mapped import Remap
from trueup.host.mapping import HostMapping
from trueup.install.install import install
from trueup.settings.settings import CONFIG_VARIABLE, get_settings


@pytest.fixture
def remap(host: Host, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Remap:
    """Write settings to trueup.toml, and set the database up for them after some statements of the host's."""

    def remap(settings: str, *statements: str) -> HostMapping:
        for statement in statements:
            host.execute(statement)
        (tmp_path / "trueup.toml").write_text(f"[host]\n{settings}")
        monkeypatch.setenv(CONFIG_VARIABLE, str(tmp_path / "trueup.toml"))
        get_settings.cache_clear()
        with host.engine.begin() as connection:
            install(connection, get_settings().host, with_host_tables=False)
        return get_settings().host

    return remap
