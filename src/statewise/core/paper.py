"""A publication, and how it is cited in one line."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Paper:
    """authors: family names, or "Feng et al."; number: "arXiv:2405.13956" or "doi:10.1162/neco.1997.9.8.1735".

    >>> Paper("Attention as an RNN", "Feng et al.", 2024, "arXiv:2405.13956").cite()
    'Feng et al. 2024, Attention as an RNN, arXiv:2405.13956'
    """

    title: str
    authors: str
    year: int
    number: str

    def cite(self) -> str:
        return f"{self.authors} {self.year}, {self.title}, {self.number}"

    @property
    def link(self) -> str:
        """Where it can be read."""
        kind, _, rest = self.number.partition(":")
        return f"https://{'arxiv.org/abs' if kind == 'arXiv' else 'doi.org'}/{rest}"
