"""Finds a host's tables: reads the database's catalog and proposes the [host] mapping, with reasons."""

from trueup.discovery.catalog import Catalog, read_catalog
from trueup.discovery.proposal import Choice, Gap, Proposal, propose

__all__ = ["Catalog", "Choice", "Gap", "Proposal", "propose", "read_catalog"]
