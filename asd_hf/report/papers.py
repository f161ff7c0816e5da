"""Where the paper of a method is to be read."""

from __future__ import annotations

SITES = {"arXiv": "https://arxiv.org/abs/", "OpenReview": "https://openreview.net/forum?id="}


def paper_link(ident: str) -> str | None:
    """The address of an id such as "arXiv 2211.10156"; None for a site that is not known."""
    site, _, number = ident.partition(" ")
    return f"{SITES[site]}{number}" if site in SITES else None
