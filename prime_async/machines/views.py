"""The decided views that an exchange machine may need again: plans and commits refer to them by number."""

from __future__ import annotations

from dataclasses import dataclass, field

from prime_async.messages import View

VIEWS_KEPT = 8


@dataclass(slots=True)
class Views:
    """The newest ones, and those that are ``pinned``."""

    known: dict[int, View] = field(default_factory=dict)
    pinned: set[int] = field(default_factory=set)

    def get(self, number: int) -> View | None:
        return self.known.get(number)

    def keep(self, view: View) -> None:
        self.known[view.number] = view
        self._trim()

    def pin(self, *numbers: int) -> None:
        """Exactly these are kept for as long as nothing else is pinned."""
        self.pinned = set(numbers)
        self._trim()

    def _trim(self) -> None:
        loose = sorted(n for n in self.known if n not in self.pinned)
        for number in loose[:-VIEWS_KEPT]:
            del self.known[number]
