"""What a node did alone, in numbers: inner steps on their way to a contribution, tokens on theirs into a mean.

With fragments (Streaming DiLoCo, arXiv 2501.18512) a round exchanges one fragment of the weights, and the others go on
to move. So steps are counted from one contribution to the next, and tokens of each fragment for itself: the weight of
a contribution is what its fragment has learned since it was last in a mean.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from prime_async.messages import MAX_TOKENS


@dataclass(slots=True)
class Work:
    """Inner steps towards a contribution. ``complete``: they are one."""

    steps: int = 0
    seconds: float = 0.0
    complete: bool = False


@dataclass(slots=True)
class Offer:
    """The contribution to ``round``: the work in it, and its weight. Not known yet whether it counts."""

    round: int
    fragment: int
    work: Work
    tokens: int


@dataclass(slots=True)
class Account:
    """Inner steps that are in no mean yet. ``work``: since the last offer, or the last that counted for nothing."""

    fragments: int
    work: Work = field(default_factory=Work)
    tokens: list[int] = field(default_factory=list)  # by fragment
    offer: Offer | None = None

    def __post_init__(self) -> None:
        self.tokens = self.tokens or [0] * self.fragments

    def add(self, steps: int, tokens: int, seconds: float) -> None:
        self.work.steps += steps
        self.work.seconds += seconds
        self.tokens = [t + tokens for t in self.tokens]

    def make_offer(self, round: int) -> None:
        """What was done so far is the contribution to ``round``; what follows is towards the next one."""
        fragment = round % self.fragments
        self.offer, self.work = Offer(round, fragment, self.work, self.tokens[fragment]), Work()

    @property
    def weight(self) -> int:
        """Of the offer; 0 without one."""
        return min(max(1, self.offer.tokens), MAX_TOKENS) if self.offer is not None else 0

    def use_up(self) -> int:
        """The offer is in a mean, or is given up. Returns its tokens."""
        offer, self.offer = self.offer, None
        if offer is None:
            return 0
        self.tokens[offer.fragment] -= offer.tokens
        return offer.tokens

    def take_back(self) -> None:
        """The offer is in no mean: it is a contribution still, with what was done since."""
        offer, self.offer = self.offer, None
        if offer is not None:
            self.work.steps += offer.work.steps
            self.work.seconds += offer.work.seconds
            self.work.complete = True

    def forget(self) -> None:
        """The local weights are the outer weights again."""
        self.work, self.offer, self.tokens = Work(), None, [0] * self.fragments
