"""What a node's machines were given, and what they answered, as a person would say it.

Every kind of event, effect and message has a sentence in one of the tables below; ``{field}`` in it stands for the
value's field of that name, in words too. What is optional in a sentence stands in square brackets, and is left out
where the field is empty, false or missing. A fact is named, with its fields behind it.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from string import Formatter
from typing import Any, Final, get_args

from msgspec import Struct

from prime_async import messages as m
from prime_async.machines import vocabulary as v
from prime_async.machines.ballot import Ballot
from prime_async.machines.facts import Fact, MemberSeen
from prime_async.messages import ChunkInfo, ChunkKey, Commit, Member, Record, Turn, View, positions

SHORT_BYTES: Final = 4
FEW: Final = 8
"""Of a longer list only the length is said."""
NODE_FIELDS: Final = frozenset({"peer", "leader", "contributors", "members", "contacts", "peers", "left_out", "silent"})
BITMAPS: Final = frozenset({"contributors", "lost", "gone"})

EVENTS: Final[Mapping[type[Struct], str]] = {
    v.Tick: "its clock rings",
    v.Heard: "{peer} says: {message}",
    v.DoorClosed: "{peer} at {address} does not allow our key",
    v.LetIn: "key {key} of {name} is let in[ not: {refusal}]",
    v.Offended: "{peer} broke the protocol on the {plane} plane (time {times}): {reason}[; {shut_out}it is shut out]",
    v.StateAt: "our outer state is that after {round} rounds, {digest}",
    v.RunAt: "the run's outer state is that after {round} rounds, {digest}",
    v.ViewChanged: "decided is {view}",
    v.Reached: "{peer} [{reachable}can]<cannot> be dialled",
    v.BallotStored: "ballot {seq} is on disk",
    v.CommitReady: "a quorum of view {view} holds the same means: {commit}",
    v.Weighed: "the chunks should be shared out as {weights}",
    v.FoundUnusable: "owners cannot use what {peer} contributed to round {round} (time {times})",
    v.Progress: "{inner_steps} inner steps are done",
    v.Measured: "this node shows of itself: {figures}",
    v.AskAgain: "the state that the leader named is gone, so ask again",
    v.FetchState: "our outer state is not the run's, so fetch it",
    v.Begin: "the outer state after {round} rounds is the run's, so train on",
    v.Halt: "stop training",
    v.Halted: "the tensors are at rest",
    v.ContributionFixed: "our contribution to round {round} is fixed, {weight} tokens",
    v.Rejected: "owners could not use our contribution (time {times}), so begin again from the outer weights",
    v.ContributionTaken: "some of our contribution to round {round} was taken",
    v.MeansCommitted: "the means of round {round} are committed, and here",
    v.Told: "its program says {body}",
    v.Leave: "leave [{at_once}at once]<after the round>",
    v.Fetched: "{key} came from {peer}",
    v.FetchFailed: "{key} did not come from {peer}: {fault}",
    v.Reduced: "{key} is made[, without {left_out}]",
    v.MeansStored: "the means of round {round}, ({epoch}, {attempt}), are [{safe}on disk]<in memory alone>",
    v.StepsDone: "{steps} inner steps are done, {tokens} tokens in {seconds}",
    v.Captured: "the local weights are noted for round {round}",
    v.Encoded: "the contribution to round {round} is encoded[, {finite}and finite]<, and not finite>",
    v.Applied: "the outer step is taken: after {round} rounds the state is {digest}",
    v.Merged: "the local weights have moved with the outer ones of round {round}",
    v.Evaluated: "the held-out loss is {loss}",
    v.EvaluationStopped: "the measuring of the held-out loss was stopped",
    v.Restored: "the local weights are restored",
    v.Saved: "the outer state is saved[ at {path}]< nowhere>",
    v.ChunkImported: "{key} is in its place",
    v.Imported: "the outer state is now that after {round} rounds, {digest}",
    v.LedgerAt: "on disk are the snapshots [{snapshots}]<none>, the means of rounds [{means}]<none>",
    v.RecordRead: "the record that came from {peer} is of {record}",
    v.ManifestRead: "the manifest that came from {peer} is of round {round}, {digest}; chunks that differ: "
    "[{differing}]<none>",
    v.RoundOpened: "of round {round} these means are missing on disk: [{missing}]<none>",
    v.SnapshotOpened: "of snapshot {round} these chunks are missing on disk: [{missing}]<none>",
    v.ChunkStored: "{key} is on disk",
    v.RoundStored: "the means of round {round} are on disk, with their record",
    v.SnapshotStored: "snapshot {round} is on disk",
    v.FetchFile: "get the file {digest}",
    v.LeaveFile: "the file {digest} is not wanted any more",
    v.LedgerFailed: "the disk failed in {of} of round {round}[, {damaged}where bytes are damaged]: {text}",
}

EFFECTS: Final[Mapping[type[Struct], str]] = {
    v.WakeAt: "sets its clock to {at}",
    v.Report: "reports {fact}",
    v.Tell: "tells {actor}: {event}",
    v.Send: "sends {peer}: {message}",
    v.Dial: "dials {peer} at {control}",
    v.ConnectMembers: "connects to the members of {view}[ and to {contacts}]",
    v.KeyToLetIn: "puts key {key} of {name} on the list, as {peer} asks",
    v.StoreBallot: "stores ballot {seq}: {ballot}",
    v.Fail: "gives up ({kind}): {text}",
    v.Perform: "has its program do {body}",
    v.Finish: "has left the run",
    v.Fetch: "fetches {key} from {peer}",
    v.CancelFetches: "abandons all its fetches",
    v.CancelFetch: "abandons {key} from {peer}",
    v.AdoptMean: "takes {found} for {key}",
    v.Settle: "settles the means of round {round}: {commit}",
    v.Reduce: "makes {key} of {contributors}",
    v.Forget: "drops means before round {means_before} and contributions before {contributions_before}",
    v.RunSteps: "does {steps} inner steps for round {round}",
    v.StopSteps: "ends the inner steps early",
    v.Encode: "encodes its contribution to round {round}[{beside} beside the next inner steps]",
    v.Apply: "takes the outer step of round {round}[{beside} beside the inner steps]",
    v.Merge: "moves the local weights as round {round} moved the outer ones",
    v.TakeBack: "takes back its eager contribution to round {round}",
    v.GiveUp: "gives up the progress in its contribution to round {round}",
    v.Evaluate: "measures the held-out loss after {round} rounds",
    v.StopEvaluation: "stops measuring the held-out loss",
    v.Restore: "gives up the local progress",
    v.Save: "saves the outer state",
    v.ImportChunk: "puts {key} of {peer} in its place",
    v.EndImport: "makes what was imported the outer state after {round} rounds",
    v.StoreMeans: "stores the means of round {round}, ({epoch}, {attempt})",
    v.ReadRecord: "reads {key} of {peer}",
    v.FindRecord: "looks for the record of round {round} on its own disk",
    v.ReadManifest: "reads {key} of {peer}",
    v.OpenRound: "looks for the means of {record} on disk",
    v.OpenSnapshot: "makes room for snapshot {round} on disk",
    v.StoreChunk: "stores {key} of {peer}",
    v.StoreRecord: "stores the record of {record}",
    v.AdoptRound: "takes the pending means on disk for those of {commit}",
    v.FinishSnapshot: "finishes snapshot {round}",
    v.LoadSnapshot: "loads snapshot {round}",
    v.Advance: "takes the outer step of round {round} from disk",
    v.WriteSnapshot: "writes snapshot {round}",
    v.Keep: "keeps the snapshots [{snapshots}]<none> and the means from round {means_from} on",
}

MESSAGES: Final[Mapping[type[Struct], str]] = {
    m.Hello: "hello, I am {member}[, of view {view}]",
    m.Welcome: "welcome to {view}; I have {round} rounds",
    m.Redirect: "ask {leader}, who leads, at {control}",
    m.Refuse: "refused ({reason}): {text}[; {differences}]",
    m.Heartbeat: "alive in epoch {epoch}, view {view}, after {round} rounds with {state_digest}[; {figures}]",
    m.HeartbeatAck: "alive, epoch {epoch}, view {view} is decided[; {watched}somebody watches]",
    m.AskRoster: "how do the members do, from position {first} on?",
    m.Roster: "of view {view}, from position {first} on, do: {entries}[; gone are {departed}]",
    m.Propose: "store view {number} of epoch {epoch}[: {change}]",
    m.Accepted: "view {number} of epoch {epoch} is on disk here",
    m.AskView: "send me view {number}",
    m.ViewUpdate: "this is {view}[, {decided}decided]<, proposed>",
    m.PreVote: "would you promise epoch {epoch}? I have view {view}",
    m.Support: "yes, I would promise epoch {epoch}",
    m.Prepare: "promise me epoch {epoch}; I have view {number} of epoch {accepted_epoch}",
    m.Promise: "I promise epoch {epoch}; I have view {number} of epoch {accepted_epoch}[, and here it is: {view}]",
    m.Outvoted: "I have promised epoch {epoch} already",
    m.Goodbye: "goodbye[: {text}]",
    m.AskRun: "asks what the run is[, for key {key}]",
    m.RunInfo: "says what the run is, and {members} to ask",
    m.Vouch: "vouches for key {key} of {name}",
    m.Ready: "I am ready for round {round}, with {weight} tokens",
    m.Plan: "round {round}, ({epoch}, {attempt}), over view {view}: contributors are {contributors}, with weights "
    "{weights}, {turns}",
    m.Open: "I am at round {round} in epoch {epoch}[, and know of a plan: {plan}]",
    m.Ask: "which means of chunks {chunks} of round {round} do you hold? ({epoch}, {attempt}) asks",
    m.Held: "for round {round}, ({epoch}, {attempt}), I hold [{means}]<no means>",
    m.Have: "I have all means of round {round}, ({epoch}, {attempt})[{safe}]<, in memory alone>: {digest} for state "
    "{state}",
    m.Unusable: "of a chunk of mine nobody's contribution to round {round}, ({epoch}, {attempt}), can be used: "
    "{contributors}",
    m.Behind: "you are behind, the run is at round {round}",
    m.Own: "to the actor {actor}: {body}",
    m.AskLedger: "what do you have on disk?",
    m.Holdings: "I have {round} rounds, means from {means_from} on, and the snapshots [{snapshots}]<none>",
}

PARTS: Final[Mapping[type[Struct], str]] = {
    Commit: "commit of round {round} ({epoch}, {attempt}), means {digest}, chain {chain}",
    Turn: "by ({epoch}, {attempt})[ without {lost}]",
    m.Change: "{leader} leads epoch {epoch}[, gone are {gone}][, new are {members}][, {commit}]",
    m.MemberAddress: "{id} at {control}",
    m.HeldMean: "{chunk} of ({epoch}, {attempt})",
    ChunkInfo: "{digest}",
    Record: "{commit}",
}

TABLE: Final[Mapping[type[Struct], str]] = {**EVENTS, **EFFECTS, **MESSAGES, **PARTS}
FACTS: Final = frozenset(get_args(Fact))
HEX = re.compile(r"\b([0-9a-f]{8})[0-9a-f]{56}\b")
"""A digest or a key: its first digits are enough."""
OPTION = re.compile(r"\[([^\[\]]*)\](?:<([^<>]*)>)?")


class Words:
    """Says things of one node's log. It learns the names of nodes from the views that it is shown."""

    def __init__(self, members: Sequence[Member] = ()) -> None:
        self._names = {member.id: member.name for member in members}

    def learn(self, event: v.Event) -> None:
        """Nodes that ``event`` tells of are called by their names from now on."""
        match event:
            case v.ViewChanged(view=view) | v.Heard(message=m.Welcome(view=view) | m.ViewUpdate(view=view)):
                self._names |= {member.id: member.name for member in view.members}
            case v.Heard(message=m.Hello(member=member)):
                self._names[member.id] = member.name
            case _:
                pass

    def name(self, node: str) -> str:
        """The name of a node, or the first digits of its key."""
        return self._names.get(node) or node[:8]

    def of(self, value: Struct) -> str:
        """An event, effect or message."""
        if type(value) in FACTS:
            return self._fact(value)
        return self._sentence(TABLE[type(value)], value)

    def of_all(self, effects: Sequence[v.Effect], now: float) -> str:
        """The effects of an event at ``now``, one after the other; when to wake is said from ``now`` on."""
        said = []
        for event, group in itertools.groupby(effects, key=lambda e: e.event if isinstance(e, v.Tell) else None):
            if event is not None:
                said.append(f"tells {', '.join(e.actor for e in group if isinstance(e, v.Tell))}: {self.of(event)}")
            else:
                said += [self._effect(effect, now) for effect in group]
        return "; ".join(said) or "nothing"

    def differences(self, one: Struct, other: Struct) -> list[tuple[str, str, str]]:
        """Fields in which two values of one type differ, with what each has there."""
        return [
            (field, self._text(field, a), self._text(field, b))
            for field in one.__struct_fields__
            if (a := getattr(one, field)) != (b := getattr(other, field))
        ]

    def _effect(self, effect: v.Effect, now: float) -> str:
        return (
            f"sets its clock to {effect.at - now:.3f} s from now" if isinstance(effect, v.WakeAt) else self.of(effect)
        )

    # --- inside a sentence --------------------------------------------------------------------------------------

    def _sentence(self, template: str, value: Struct) -> str:
        def option(match: re.Match[str]) -> str:
            there, missing = match.group(1), match.group(2) or ""
            fields = [field for _, field, _, _ in Formatter().parse(there) if field]
            return there if all(_has(getattr(value, field)) for field in fields) else missing

        chosen = OPTION.sub(option, template)
        texts = {
            field: self._text(field, getattr(value, field)) for _, field, _, _ in Formatter().parse(chosen) if field
        }
        return chosen.format_map(texts)

    def _text(self, field: str, value: Any) -> str:
        match value:
            case True:
                return ""  # it only says that the option applies
            case bytes() if field in BITMAPS:
                return self._list("members", [str(i) for i in positions(value)])
            case bytes():
                return value[:SHORT_BYTES].hex()
            case float():
                return f"{value:.3f} s" if field.endswith(("_s", "seconds", "at")) else f"{value:.4g}"
            case str():
                return self.name(value) if field in NODE_FIELDS else HEX.sub(r"\1", value)
            case dict():
                return ", ".join(f"{self.name(key)}: {self._text('', item)}" for key, item in value.items())
            case tuple():
                return self._list("of them", [self._text(field, item) for item in value])
            case Struct():
                return self.of_part(value)
            case _:
                return str(value)

    @staticmethod
    def _list(of_what: str, items: Sequence[str]) -> str:
        return ", ".join(items) if len(items) <= FEW else f"{len(items)} {of_what}, from {items[0]} to {items[-1]}"

    def of_part(self, value: Struct) -> str:
        """What an event or a message has inside: a view, a commit, a key."""
        match value:
            case ChunkKey():
                return str(value)
            case View():
                return self._view(value)
            case Member():
                return value.name or self.name(value.id)
            case m.Figures():
                return f"{value.phase}, {value.tokens} tokens"
            case m.RosterEntry():
                return f"{value.position} [{self.of_part(value.figures) if value.figures else 'not known'}]"
            case m.Departed() | MemberSeen():
                return value.name or self.name(value.id)
            case Ballot():
                held = f", holds {self._view(value.view)}" if value.view else ""
                return f"promised epoch {value.promised}{held}"
            case _:
                return self.of(value)

    def _view(self, view: View) -> str:
        """Its members; the leader with a star, one that is not active with a minus, one without a vote with a tilde."""
        marked = [
            ("*" if member.id == view.leader else "") + self.of_part(member)
            + ("" if member.active else "-") + ("" if member.voter else "~")
            for member in view.members
        ]  # fmt: skip
        commit = f", commit {view.commit.round}" if view.commit else ""
        return f"view {view.number} of epoch {view.epoch} ({self._list('members', marked)}{commit})"

    def _fact(self, fact: Struct) -> str:
        name = re.sub(r"(?<!^)(?=[A-Z])", " ", type(fact).__name__).lower()
        fields = ", ".join(
            f"{field} {'yes' if shown is True else 'no' if shown is False else self._text(field, shown)}"
            for field in fact.__struct_fields__
            if _has(shown := getattr(fact, field)) or shown == 0
        )
        return f"{name} ({fields})" if fields else name


def _has(value: Any) -> bool:
    return value not in (None, "", b"", (), False) and value != {}
