"""What happened, in words. The page may be public: no paths, addresses, or texts of errors, which may hold both."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, TypeAlias

from prime_async.machines.facts import (
    CatchingUp,
    CatchUpStarted,
    CaughtUp,
    ChunksReassigned,
    ContributionRejected,
    ContributorLeftOut,
    CutOff,
    Fact,
    Founded,
    HelloRefused,
    Joined,
    LedgerRestored,
    LedgerTrouble,
    MemberJoined,
    MemberLeft,
    MemberLost,
    NonFiniteProgress,
    PeerDropped,
    RemoteCopied,
    RemoteCopyFailed,
    SlowWake,
    SnapshotWritten,
    StateDiverged,
    StateMended,
    StateNowhere,
    StateSaved,
    WaitingForMembers,
)

Kind: TypeAlias = Literal["good", "bad", "note", "saved"]


NOTICED_S = 3.0
"""What a busy machine does all the time is not worth a line."""


class Context(NamedTuple):
    """What a sentence needs to know beside the fact. ``me``: the name of this node; ``round``: the one that is open."""

    me: str
    round: int
    name_of: Callable[[str], str]


class Line(NamedTuple):
    """``key``: a later line of the same key takes this one's place while it is recent."""

    kind: Kind
    text: str
    key: str = ""


def listed(names: Sequence[str]) -> str:
    """As one writes it: "a", "a and b", "a, b and c"; of many, the first three and how many more."""
    if len(names) > 4:
        return f"{', '.join(names[:3])} and {len(names) - 3} others"
    return " and ".join([*([", ".join(names[:-1])] if len(names) > 1 else []), *names[-1:]])


def counted(count: int, thing: str) -> str:
    return f"{count:,} {thing}{'' if count == 1 else 's'}"


def size(count: int) -> str:
    """Bytes as people read them."""
    amount, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if amount < 1024:
            break
        amount, unit = amount / 1024, larger
    return f"{count} B" if unit == "B" else f"{amount:.1f} {unit}"


def seconds(amount: float) -> str:
    if amount < 60:
        return f"{amount:.1f} s"
    minutes, rest = divmod(round(amount), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def lost(name: str, round: int, silent_s: float, redone: tuple[int, Sequence[str], float] | None = None) -> str:
    """``redone``: so many of its chunks, by whom, in how many seconds."""
    text = f"{name} lost in round {round}, after {seconds(silent_s)} of silence"
    if redone is None:
        return text
    count, owners, took_s = redone
    verb = "was" if count == 1 else "were"
    return f"{text}; its {counted(count, 'chunk')} {verb} done again by {listed(owners)} in {seconds(took_s)}"


def redone(round: int, count: int, names: Sequence[str], owners: Sequence[str], took_s: float) -> str:
    verb = "was" if count == 1 else "were"
    return (
        f"{counted(count, 'chunk')} of {listed(names)} in round {round} {verb} done again by {listed(owners)} "
        f"in {seconds(took_s)}"
    )


def sentence(fact: Fact, about: Context) -> Line | None:
    """The line for a fact that stands for itself; ``None``: it is shown otherwise, or people need not read of it."""
    return _of_members(fact, about) or _of_rounds(fact, about) or _of_state(fact, about)


def _of_members(fact: Fact, about: Context) -> Line | None:
    me, name_of = about.me, about.name_of
    match fact:
        case Founded():
            return Line("good", f"{me} began the run")
        case Joined(round=round):
            return Line("good", f"{me} joined the run at round {round}")
        case MemberJoined(name=name):
            return Line("good", f"{name} joined in round {about.round}")
        case MemberLost(name=name, silent_s=silent_s):
            return Line("bad", lost(name, about.round, silent_s))
        case MemberLeft(name=name):
            return Line("note", f"{name} left in round {about.round}")
        case HelloRefused(peer=peer, text=text):
            return Line("note", f"{name_of(peer)} was refused: {text}", f"refused {peer}")
        case CutOff(seconds=silent_s, heard=heard, voters=voters):
            text = (
                f"{me} is cut off for {seconds(silent_s)}: it hears {heard} of {voters} that vote, and keeps its work"
            )
            return Line("bad", text, "cut off")
        case SlowWake(seconds=late_s) if late_s >= NOTICED_S:
            return Line("note", f"{me} was not run for {seconds(late_s)}", "slow")
        case PeerDropped(peer=peer, times=times, shut_out=shut_out):
            often = f", {times} times by now" if times > 1 else ""
            text = f"{name_of(peer)} broke the protocol{often}{'; it is shut out' if shut_out else ''}"
            return Line("bad", text, f"dropped {peer}")
        case _:
            return None


def _of_rounds(fact: Fact, about: Context) -> Line | None:
    match fact:
        case WaitingForMembers(round=round, active=active, min_members=needed):
            text = f"Round {round} waits for members: {active} of at least {needed} train"
            return Line("note", text, "waiting")
        case ChunksReassigned(round=round, chunks=chunks, lost=gone, owners=owners):
            text = f"{counted(chunks, 'chunk')} of {listed(gone)} in round {round} go to {listed(owners)}"
            return Line("note", text, f"redo {round}")
        case ContributorLeftOut(round=round, peer=peer, reason=reason):
            text = f"{about.name_of(peer)} left out of some chunks of round {round}: {reason}"
            return Line("bad", text, f"left out {peer} {round} {reason}")
        case ContributionRejected(round=round, peer=peer):
            text = f"What {about.name_of(peer)} contributed to round {round} was rejected: it begins the round again"
            return Line("bad", text, f"rejected {peer} {round}")
        case NonFiniteProgress(round=round):
            return Line("bad", f"{about.me} ended its steps of round {round} in NaN, and began them again")
        case _:
            return None


def _of_state(fact: Fact, about: Context) -> Line | None:
    me = about.me
    match fact:
        case LedgerRestored(round=round, seconds=took_s):
            return Line("good", f"{me} came back from its disk at round {round} in {seconds(took_s)}")
        case CatchUpStarted(round=round, run_round=goal, providers=providers):
            text = f"{me} is at round {round}, the run at {goal}: it catches up from {counted(providers, 'member')}"
            return Line("note", text, "catching up")
        case CatchingUp(run_round=goal, fetched_bytes=fetched, missing_bytes=missing, seconds=passed_s):
            so_far = f"{size(fetched)} fetched in {seconds(passed_s)}, {size(missing)} to go"
            return Line("note", f"{me} catches up to round {goal}: {so_far}", "catching up")
        case CaughtUp(round=round, fetched_bytes=fetched, seconds=took_s):
            text = f"{me} caught up to round {round}: {size(fetched)} fetched in {seconds(took_s)}"
            return Line("good", text, "catching up")
        case StateDiverged(peer=peer, round=round):
            return Line("bad", f"{about.name_of(peer)} has another outer state after round {round}")
        case StateMended(chunks=chunks):
            return Line("good", f"{me} mended {counted(chunks, 'chunk')} of its outer state")
        case StateNowhere(round=round):
            return Line("bad", f"No member holds the outer state after round {round}", "nowhere")
        case SnapshotWritten(round=round):
            return Line("saved", f"{me} wrote a checkpoint after round {round}", "checkpoint")
        case StateSaved(round=round):
            return Line("saved", f"{me} saved the state after round {round}, and leaves")
        case LedgerTrouble(round=round, damaged=damaged):
            what = "found damage on its disk" if damaged else "could not write to its disk"
            return Line("bad", f"{me} {what}, round {round}: see its log", f"disk {damaged}")
        case RemoteCopied(round=round):
            return Line("saved", f"{me} copied its ledger up to round {round}", "remote")
        case RemoteCopyFailed():
            return Line("bad", f"{me} could not copy its ledger: see its log", "remote")
        case _:
            return None
