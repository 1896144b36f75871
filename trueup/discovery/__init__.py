"""Finding a host's tables: the database's catalog is read, and the [host] mapping proposed, with reasons."""

from billing.discovery.catalog import Catalog, read_catalog
from billing.discovery.gaps import Gap
from billing.discovery.proposals import Choice, Proposal, propose

__all__ = ["Catalog", "Choice", "Gap", "Proposal", "propose", "read_catalog"]
