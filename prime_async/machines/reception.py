"""Letting in who comes with an invitation: what it is told, and whose key may connect from then on.

The rules:

* Whoever is let in to the control plane may ask what the run is (``AskRun``): with an invitation, or with a key that
  may connect. The answer is the run spec, and members to ask.
* A key that is named with the question is put on this node's list first, and only then is it said that it may
  connect. Whether the invitation still counts is a matter of the clock on the wall: the list decides it, not we.
* A key that came with an invitation is told to all members (``Vouch``), so that its node finds a way in when this one
  is gone. Only members vouch. No vouch is answered: it is repeated, each time after twice as long, until the key is
  in a view, or ``MAX_VOUCHES`` were sent. Who has heard one does nothing about the next, so that an operator may take
  the key back meanwhile.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from prime_async.machines.facts import KeyLetIn
from prime_async.machines.leadership import MembershipSettings
from prime_async.machines.vocabulary import Effect, KeyToLetIn, LetIn, Report, Send
from prime_async.messages import AskRun, MemberAddress, Refuse, RunInfo, View, Vouch

MAX_ADDRESSES = 64
MAX_VOUCHES = 8
"""Of one key to one member: with a fifth of all messages lost, all are once in 400,000 times. The last comes 127 of the
first pauses after the first."""


@dataclass(slots=True)
class _Vouch:
    name: str
    times: int = 0
    next_at: float = 0.0


@dataclass(slots=True)
class Reception:
    """See the module's rules. ``vouching``: keys not yet in a view; ``heard``: those that others vouched for."""

    settings: MembershipSettings
    vouching: dict[str, _Vouch] = field(default_factory=dict)
    heard: set[str] = field(default_factory=set)

    def answer_run(self, view: View | None, peer: str, asked: AskRun, out: list[Effect]) -> None:
        """``peer`` asks what the run is."""
        if asked.key in ("", peer):
            out.append(Send(peer=peer, message=self._run_info(view, asked.key)))
        else:
            out.append(KeyToLetIn(peer=peer, key=asked.key, name=asked.name, invited=True))

    def on_vouch(self, peer: str, vouch: Vouch, out: list[Effect]) -> None:
        """The member ``peer`` has let a key in."""
        if vouch.key not in self.heard:
            self.heard.add(vouch.key)
            out.append(KeyToLetIn(peer=peer, key=vouch.key, name=vouch.name, invited=False))

    def on_let_in(self, now: float, view: View | None, event: LetIn, out: list[Effect]) -> None:
        """The list of keys has changed, or has not."""
        if event.refusal:
            if event.invited:
                out.append(Send(peer=event.peer, message=Refuse(reason="key_not_allowed", text=event.refusal)))
            else:
                self.heard.discard(event.key)  # the list may have room when it comes again
            return
        if event.invited:
            out.append(Send(peer=event.peer, message=self._run_info(view, event.key)))
        if event.key in self.vouching:
            return  # the question came again
        out.append(Report(fact=KeyLetIn(key=event.key, name=event.name, by=event.peer, invited=event.invited)))
        if event.invited:
            self.vouching[event.key] = _Vouch(event.name)
            self.vouch(now, view, out)

    def vouch(self, now: float, view: View | None, out: list[Effect]) -> None:
        """Say what may not have been heard, if it is time."""
        for key, vouch in list(self.vouching.items()):
            if vouch.next_at > now:
                continue
            others = [m.id for m in view.members if m.id != self.settings.me.id] if view else []
            if vouch.times == MAX_VOUCHES or key in others:
                del self.vouching[key]
                continue
            out += [Send(peer=id, message=Vouch(key=key, name=vouch.name)) for id in others]
            vouch.next_at = now + self.settings.heartbeat_s * 2**vouch.times
            vouch.times += 1

    @property
    def next_at(self) -> float:
        """When to ``vouch`` again."""
        return min((v.next_at for v in self.vouching.values()), default=math.inf)

    def _run_info(self, view: View | None, key: str) -> RunInfo:
        """This node first, then the members that can be dialled, the longest-standing first."""
        me = self.settings.me
        others = [m for m in view.members if m.reachable and m.id != me.id] if view else []
        addresses = [MemberAddress(id=m.id, control=m.control) for m in (me, *others)]
        return RunInfo(settings=self.settings.settings, members=tuple(addresses[:MAX_ADDRESSES]), key=key)
