"""Who reduces which chunk: a pure function of a view, so that it need not be sent."""

from __future__ import annotations

from prime_async.messages import View


def chunk_owners(view: View, chunk_count: int) -> tuple[str, ...]:
    """The owner's id of every chunk, in chunk order: the active members, in proportion to their weights.

    Smooth weighted round-robin, as nginx does it: neighbouring chunks go to different owners, so that all owners can
    begin at once. Integers only, so that every node computes the same. With no weight at all, all weigh the same.
    """
    members = view.active
    weights = [m.weight for m in members]
    if not any(weights):
        weights = [1] * len(members)
    total = sum(weights)
    credit = [0] * len(members)
    owners = []
    for _ in range(chunk_count):
        credit = [c + w for c, w in zip(credit, weights, strict=True)]
        best = max(range(len(members)), key=lambda i: (credit[i], -i))
        credit[best] -= total
        owners.append(members[best].id)
    return tuple(owners)
