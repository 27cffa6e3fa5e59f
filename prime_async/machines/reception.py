"""Letting in who comes with an invitation: what it is told, and whose key may connect from then on.

The rules:

* Whoever is let in to the control plane may ask what the run is (``AskRun``): with an invitation, or with a key that
  may connect. The answer is the run spec, and members to ask.
* A key that is named with the question is put on this node's list first, and only then is it said that it may
  connect. Whether the invitation still counts is a matter of the clock on the wall: the list decides it, not we.
* A key that came with an invitation is told to all members (``Vouch``), so that its node finds a way in when this one
  is gone. Only members vouch. A vouch that is lost is not repeated: then this node alone knows the key, until it is in
  a view.
"""

from __future__ import annotations

from prime_async.machines.facts import KeyLetIn
from prime_async.machines.leadership import MembershipSettings
from prime_async.machines.vocabulary import Effect, KeyToLetIn, LetIn, Report, Send
from prime_async.messages import AskRun, MemberAddress, Refuse, RunInfo, View, Vouch

MAX_ADDRESSES = 64


def answer_run(settings: MembershipSettings, view: View | None, peer: str, asked: AskRun, out: list[Effect]) -> None:
    """``peer`` asks what the run is."""
    if asked.key in ("", peer):
        out.append(Send(peer=peer, message=_run_info(settings, view, asked.key)))
    else:
        out.append(KeyToLetIn(peer=peer, key=asked.key, name=asked.name, invited=True))


def on_let_in(settings: MembershipSettings, view: View | None, event: LetIn, out: list[Effect]) -> None:
    """The list of keys has changed, or has not."""
    if event.refusal:
        if event.invited:
            out.append(Send(peer=event.peer, message=Refuse(reason="key_not_allowed", text=event.refusal)))
        return
    out.append(Report(fact=KeyLetIn(key=event.key, name=event.name, by=event.peer, invited=event.invited)))
    if event.invited:
        out.append(Send(peer=event.peer, message=_run_info(settings, view, event.key)))
        others = [m.id for m in view.members if m.id != settings.me.id] if view else []
        out += [Send(peer=id, message=Vouch(key=event.key, name=event.name)) for id in others]


def _run_info(settings: MembershipSettings, view: View | None, key: str) -> RunInfo:
    """This node first, then the members that can be dialled, the longest-standing first."""
    me = settings.me
    others = [m for m in view.members if m.reachable and m.id != me.id] if view else []
    addresses = [MemberAddress(id=m.id, control=m.control) for m in (me, *others)]
    return RunInfo(settings=settings.settings, members=tuple(addresses[:MAX_ADDRESSES]), key=key)
