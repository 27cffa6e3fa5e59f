"""Whether a node may join, and what it is told if not."""

from __future__ import annotations

from prime_async.machines.leadership import MembershipSettings
from prime_async.messages import PROTOCOL_VERSION, Hello, Refuse

MAX_LINE = 512
"""Characters of a difference: 256 of them are still a message. What a peer said may be longer."""


def judge_hello(settings: MembershipSettings, lineage: bytes, peer: str, hello: Hello) -> Refuse | None:
    """Why the node that says ``hello`` is refused by one of ``lineage``; ``None`` if it is not."""
    if hello.protocol != PROTOCOL_VERSION:
        text = f"this run speaks protocol {PROTOCOL_VERSION}, the node that asks speaks {hello.protocol}: "
        return Refuse(reason="other_protocol", text=text + "install the same version of prime-async")
    if hello.run_id != settings.run_id:
        text = "the node that asks has another run spec: copy the [run] table of a member"
        differences = setting_differences(settings.settings, hello.settings)
        return Refuse(reason="other_run", text=text, differences=differences[:256])
    if hello.member.id != peer:
        return Refuse(reason="key_not_allowed", text="the hello names another key than the connection's")
    if hello.lineage and lineage and hello.lineage != lineage:
        text = (
            "the node that asks holds a ballot of another lineage of this run (one side was carried on with "
            "`prime-async recover --force`, or founded anew): `prime-async recover --adopt` at that node gives up what "
            "it took part in, and keeps its outer state until it fetches this one"
        )
        return Refuse(reason="other_lineage", text=text)
    return None


def setting_differences(ours: dict[str, str], theirs: dict[str, str]) -> tuple[str, ...]:
    """One line for each setting that differs, in order of the settings' names; what is too long for a line is cut."""
    lines = []
    for name in sorted(ours.keys() | theirs.keys()):
        here, there = ours.get(name, "not set"), theirs.get(name, "not set")
        if here != there:
            lines.append(f"{name}: {here} in the run, {there} at the node that asks"[:MAX_LINE])
    return tuple(lines)
