"""What the demo shows: a table while it runs, and the figures at its end."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from prime_async.node.children import Child
from prime_async.watch.words import size


def progress_table(children: Sequence[Child], rounds: int, elapsed_s: float) -> Table:
    """One row a node."""
    title = f"prime-async demo, nodes run for {elapsed_s:.0f} s"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("node")
    table.add_column("state", min_width=10)
    for name in ("round", "steps", "loss", "tokens/s", "sent", "training"):
        table.add_column(name, justify="right")
    for child in children:
        meter = child.meter
        table.add_row(
            child.name,
            child.state,
            f"{meter.round}/{rounds}",
            str(meter.inner_steps),
            _number(meter.loss, ".3f"),
            f"{meter.tokens_per_s:,.0f}",
            size(child.bytes_sent),
            _number(meter.training_share * 100, ".1f", " %"),
        )
    return table


def final_report(console: Console, result: dict[str, Any]) -> None:
    """The figures, and what they mean."""
    equal = len(set(result["state_digests"])) == 1 and result["equal_after_every_round"]
    sent, parallel = sum(result["bytes_sent"]), sum(result["bytes_data_parallel_fp32"])
    shares = ", ".join(f"{share:.1%}" for share in result["training_share"])
    then = "the audit and the text below" if "chaos" in result else "the text below"
    lines = (
        ("held-out loss", f"{result['heldout_loss_before']:.3f} -> {result['heldout_loss_after']:.3f} nats per byte"),
        ("trained on", f"{result['tokens']:,} bytes of text, {result['parameters']:,} parameters"),
        ("bytes sent", f"{size(sent)} by all nodes, headers and heartbeats included"),
        ("data-parallel", f"{size(parallel)} for the same steps (fp32 ring all-reduce at every step)"),
        ("reduction", f"{result['reduction']:.0f} times fewer bytes"),
        ("weights", f"{'bitwise equal' if equal else 'DIFFERENT'} on all nodes after every round"),
        ("state digest", result["state_digests"][0]),
        ("training share", f"{shares} of the time"),
        ("wall time", f"{result['wall_s']:.0f} s: the {result['nodes_s']:.0f} s of the nodes, and then {then}"),
    )
    for name, value in (*lines, *(_chaos_lines(result["chaos"]) if "chaos" in result else ())):
        console.print(f"[bold]{name:>15}[/bold]  {value}", soft_wrap=True)
    console.print(Panel(Text(result["sample"].strip()), title="the model writes", title_align="left", expand=False))


def _chaos_lines(chaos: dict[str, Any]) -> Sequence[tuple[str, str]]:
    """What was done to whom, and what came of it. People count rounds from 1."""
    audit, lost, back = chaos["audit"], sum(chaos["lost_tokens"].values()), chaos["back_in_round"]
    values = "all equal" if not audit["differences"] else f"{len(audit['differences'])} DIFFERENT"
    unchecked = f", {len(audit['unchecked'])} could not be checked" if audit["unchecked"] else ""
    return (
        (
            "killed",
            f"{chaos['killed']}, the leader, by {chaos['signal']} after {chaos['killed_at_s']:.0f} s, "
            f"in the exchange of round {chaos['in_exchange_of_round'] + 1}",
        ),
        (
            "the others",
            f"ended that round {chaos['round_ended_after_s']:.1f} s later (failure timeout "
            f"{chaos['failure_timeout_s']:.0f} s), and lost {lost or 'none'} of the tokens that they trained on",
        ),
        ("started again", f"and back in round {back + 1}" if back is not None else "too late to take part again"),
        (
            "audit",
            f"{audit['means']} means made anew from the contributions that they name, and compared with the "
            f"{audit['copies']} that the nodes settled: {values}{unchecked}",
        ),
    )


def _number(value: float, form: str, unit: str = "") -> str:
    return "" if math.isnan(value) else f"{value:{form}}{unit}"
