"""Finding a host's tables: the database's catalog is read, and the [host] mapping proposed, with reasons."""

from trueup.discovery.catalog import Catalog, read_catalog
from trueup.discovery.gaps import Gap
from trueup.discovery.proposal import Choice, Proposal, propose

__all__ = ["Catalog", "Choice", "Gap", "Proposal", "propose", "read_catalog"]
