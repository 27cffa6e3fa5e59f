"""``prime-async status``: how a run does, from the dashboard of one of its nodes."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.live import Live
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from prime_async.cli.options import Flag
from prime_async.errors import ConfigError, EnvironmentFault, ProtocolError
from prime_async.watch.words import seconds, size

DEFAULT_ADDRESS = "127.0.0.1:8080"
ANSWER_S = 10.0
MAX_ANSWER_BYTES = 16 << 20
EVERY_S = 1.0
EVENTS_SHOWN = 5
WIDE = ("round", "tokens", "tokens/s", "loss", "training", "sent", "received")
NARROW = WIDE[:-1]
UNBOUNDED = 10_000
PHASE_COLOURS = {"training": "green", "exchanging": "green", "serving": "green", "lost": "red", "left": "dim"}


def status(
    address: str = DEFAULT_ADDRESS,
    /,
    *,
    json: Flag = False,
    watch: Flag = False,
) -> int:
    """Show how a run does, as a node with `node.dashboard` tells it.

    Parameters
    ----------
    address
        HOST:PORT of that node's dashboard.
    json
        Print what the node says, as JSON.
    watch
        Go on, once a second, until Ctrl-C; with --json, a line each time.
    """
    if watch:
        return _watch(address, as_json=json)
    found = ask(address)
    if json:
        print(_json(found, indent=1))
    else:
        Console().print(report(found))
    return 0


def _json(found: dict[str, Any], indent: int | None = None) -> str:
    """(In ``status``, ``json`` is the option.)"""
    return json.dumps(found, indent=indent)


def _watch(address: str, *, as_json: bool) -> int:
    """A node that does not answer once is asked again; the first time it must."""
    found = ask(address)
    if as_json:
        while True:
            print(_json(found), flush=True)
            time.sleep(EVERY_S)
            found = ask(address)
    with Live(report(found), refresh_per_second=4) as live:
        while True:
            time.sleep(EVERY_S)
            try:
                found = ask(address)
            except EnvironmentFault:
                late = Text(
                    f"{address} does not answer; this is of {time.time() - found['now']:.0f} s ago", style="red"
                )
                live.update(Group(report(found), late))
                continue
            live.update(report(found))


def ask(address: str) -> dict[str, Any]:
    """What the node whose dashboard is at ``address`` says.

    Raises :class:`ConfigError` if that is no address, :class:`EnvironmentFault` if nobody answers,
    :class:`ProtocolError` if what answers is no dashboard.
    """
    host, colon, port = address.removeprefix("http://").rstrip("/").rpartition(":")
    if not (host and colon and port.isascii() and port.isdigit()):
        raise ConfigError([f'"{address}" is no address: expected HOST:PORT, such as {DEFAULT_ADDRESS}'])
    where = f"{host}:{port}"
    try:
        with urllib.request.urlopen(f"http://{where}/api/status", timeout=ANSWER_S) as answer:
            data = answer.read(MAX_ANSWER_BYTES)
    except urllib.error.HTTPError as error:
        raise ProtocolError(f"{where} is no dashboard of prime-async: it answers with status {error.code}") from error
    except OSError as error:
        reason = getattr(error, "reason", error)
        raise EnvironmentFault(
            f"nobody answers at {where} ({reason}): is the node running, with "
            f'`dashboard = "{where}"` under [node] in its TOML file?'
        ) from error
    try:
        found = json.loads(data)
        report(found)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ProtocolError(f"{where} is no dashboard of prime-async, or one of another version") from error
    return dict(found)


def report(found: dict[str, Any]) -> Group:
    """What a node said, for people."""
    members = _Members(wide=_table(found, WIDE), narrow=_table(found, NARROW))
    return Group(_headline(found), members, *_events(found))


def _headline(found: dict[str, Any]) -> Text:
    about, totals = found["about"], found["totals"]
    rounds = f" of {about['rounds']}" if about["rounds"] else ""
    parts = [f"round {totals['round']}{rounds}", f"{totals['active']} of {totals['members']} members active"]
    if totals["heldout_loss"] is not None:
        parts.append(f"held-out loss {totals['heldout_loss']:.3f} after round {totals['heldout_round']}")
    parts += [f"{totals['tokens']:,} tokens", f"{totals['tokens_per_s']:,} tokens/s"]
    if totals["training_share"] is not None:
        parts.append(f"training {totals['training_share']:.1%} of the time")
    text = Text.assemble((about["run"], "bold"), f", {about['model']}, seen from {about['node']}\n", "  ".join(parts))
    if not totals["connected"]:
        text.append("\nthis node hears no leader", style="red")
    return text


@dataclass(frozen=True, kw_only=True)
class _Members:
    """The table of the members, with as many columns as the terminal has room for: no figure is cut off."""

    wide: Table
    narrow: Table

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        fits = Measurement.get(console, options.update(max_width=UNBOUNDED), self.wide).maximum <= options.max_width
        yield self.wide if fits else self.narrow


def _table(found: dict[str, Any], columns: Sequence[str]) -> Table:
    table = Table(box=None, header_style="dim", pad_edge=False, padding=(0, 3 if columns == WIDE else 2, 0, 0))
    table.add_column("member")
    table.add_column("state", no_wrap=True)
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    for member in found["members"]:
        table.add_row(*_row(member)[: 2 + len(columns)])
    return table


def _row(member: dict[str, Any]) -> tuple[Text | str, ...]:
    roles = [word for word, holds in (("leader", member["leads"]), ("witness", member["witness"])) if holds]
    name = Text.assemble(member["name"], (f" {', '.join(roles)}" if roles else "", "dim"))
    share, trains = member["training_share"], not member["witness"]
    return (
        name,
        Text(member["state"], style=PHASE_COLOURS.get(member["state"], "yellow")),
        f"{member['round']:,}",
        f"{member['tokens']:,}" if trains else "",
        f"{member['tokens_per_s']:,}" if trains and not member["gone"] else "",
        f"{member['loss']:.3f}" if member["loss"] is not None else "",
        f"{share:.1%}" if share is not None else "",
        size(member["sent_bytes"]),
        size(member["received_bytes"]),
    )


def _events(found: dict[str, Any]) -> list[Text]:
    lines = []
    newest = sorted(found["events"], key=lambda event: (event["at"], event["id"]), reverse=True)
    for event in newest[:EVENTS_SHOWN]:
        ago = f"{seconds(max(0.0, found['now'] - event['at']))} ago"
        lines.append(Text.assemble((f"{ago:>16}  ", "dim"), (event["text"], "red" if event["kind"] == "bad" else "")))
    return lines
