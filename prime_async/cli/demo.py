"""``prime-async demo``: several nodes on this machine train one model together."""

from __future__ import annotations

import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import trio
from cyclopts import Parameter
from cyclopts.validators import Number
from rich.console import Console
from rich.live import Live

from prime_async.cli.chaos import Incident, require_enough, upset
from prime_async.cli.demo_report import final_report, progress_table
from prime_async.cli.options import Flag, Json, Repetitions
from prime_async.cli.report import interruptible
from prime_async.config.load import config_from
from prime_async.config.schema import Config
from prime_async.errors import ConfigError, EnvironmentFault
from prime_async.node.children import Child, node_process, wait_for_all, wait_started
from prime_async.transport.keys import write_key_file

REFRESH_PER_S = 4
SAMPLE_TOKENS = 240
PROMPT = "KING HENRY.\n"

DEMO_RUN: dict[str, Any] = {
    "name": "demo",
    "model": "llama-1m",
    "sequence_length": 128,
    "round": {"inner_steps": 50},
    "inner": {"batch_size": 8, "learning_rate": 2e-3, "warmup_steps": 20},
    # Few rounds: less momentum than the default 0.9, which needs more of them to pay.
    "outer": {"learning_rate": 0.7, "momentum": 0.5},
    # About a million parameters: smaller chunks, so that every node owns some.
    "exchange": {"chunk_elements": 2**16},
}
"""The run of the demo: what differs from the defaults, and why."""
CHAOS_RUN: dict[str, Any] = {"failure_timeout_s": 5.0}
"""What differs from that where a node is killed: the others wait for it half as long."""


def demo(
    *,
    nodes: Annotated[int, Parameter(validator=Number(gte=1, lte=16))] = 3,
    rounds: Repetitions = 8,
    json_: Json = False,
    keep: Annotated[Path | None, Parameter(negative="")] = None,
    chaos: Flag = False,
) -> int:
    """Train a model of a million parameters on this machine, with several nodes that exchange encrypted chunks.

    Parameters
    ----------
    nodes
        How many node processes.
    rounds
        How many rounds, of 50 inner steps each.
    keep
        A new directory for the nodes' files (configuration, log, message log, outer state), which stays afterwards.
    chaos
        Kill the leader in the middle of an exchange, start it again, and in the end make every mean anew from what
        went into it, to compare the bytes.
    """
    if chaos:
        require_enough(nodes, rounds)
    console = Console(stderr=json_, highlight=False)
    with _directory(keep) as directory:
        result = trio.run(_demo, Plan(nodes, rounds, chaos, directory), console)
    if json_:
        print(json.dumps(result))
    return 0


@contextmanager
def _directory(keep: Path | None) -> Iterator[Path]:
    """Where the nodes keep their files: ``keep``, or a temporary directory that goes in the end."""
    if keep is None:
        directory = Path(tempfile.mkdtemp(prefix="prime-async-demo-"))
        try:
            yield directory
        finally:
            shutil.rmtree(directory, ignore_errors=True)
        return
    try:
        keep.mkdir(parents=True)
    except FileExistsError as error:
        raise ConfigError([f"--keep {keep}: is already there: name a new directory"]) from error
    yield keep.resolve()


@dataclass(frozen=True, slots=True)
class Plan:
    """What the demo is to do."""

    nodes: int
    rounds: int
    chaos: bool
    directory: Path

    @property
    def names(self) -> list[str]:
        return [f"node-{i + 1}" for i in range(self.nodes)]


async def _demo(plan: Plan, console: Console) -> dict[str, Any]:
    async with interruptible():
        result = await _train(plan, console)
    final_report(console, result)
    return result


async def _train(plan: Plan, console: Console) -> dict[str, Any]:
    began = time.monotonic()
    for name in plan.names:
        (plan.directory / name).mkdir()
    keys = [write_key_file(plan.directory / name / "node.key").id for name in plan.names]
    children: list[Child] = []
    incident: Incident | None = None
    with Live(console=console, refresh_per_second=REFRESH_PER_S, transient=False) as live:

        def refresh() -> None:
            table = progress_table(children, plan.rounds, time.monotonic() - began)
            live.update(table, refresh=not console.is_terminal)

        quiet = (lambda: None) if not console.is_terminal else refresh
        async with AsyncExitStack() as stack:

            async def start(name: str, contact: str, before: Child | None = None) -> Child:
                config = _node_config(plan, name, keys, contact)
                return await stack.enter_async_context(node_process(config, plan.directory / name, quiet, before))

            for name in plan.names:
                children.append(await start(name, children[0].contact if children else ""))
                if len(children) == 1:
                    await wait_started(children[0])  # the others join it
            if plan.chaos:

                async def start_again(victim: Child, contact: Child) -> Child:
                    return await start(victim.name, contact.contact, victim)

                incident = await upset(children, plan.rounds, began, start_again, console.print)
            await wait_for_all(children, late=incident.again if incident else None)
            refresh()
            nodes_s = time.monotonic() - began
        console.print()
    result = _result(children, plan)
    if incident is not None:
        found = await trio.to_thread.run_sync(_audit, plan.directory)
        result["chaos"] = {**incident.figures(children, CHAOS_RUN["failure_timeout_s"]), "audit": found}
    steady = next(name for name in plan.names if incident is None or name != incident.kill.victim.name)
    sample = await trio.to_thread.run_sync(_sample, plan.directory / steady)
    wall_s = time.monotonic() - began
    return {**result, "sample": sample, "nodes_s": round(nodes_s, 2), "wall_s": round(wall_s, 2)}


def _node_config(plan: Plan, name: str, keys: Sequence[str], contact: str) -> Config:
    home = plan.directory / name
    run = {**DEMO_RUN, "rounds": plan.rounds, "min_members": plan.nodes}
    if plan.chaos:
        run |= {**CHAOS_RUN, "min_members": plan.nodes - 1}
    return config_from(
        {
            "run": run,
            "node": {
                "name": name,
                "key": str(home / "node.key"),
                "directory": str(home),
                "host": "127.0.0.1",
                "advertise": "127.0.0.1",
                "port": 0,
                "bulk_port": 0,
                "join": [contact] if contact else [],
                "allow": list(keys),
                "threads": 1,
                "record": str(home / "messages.log"),
                "audit": str(home / "audit") if plan.chaos else "",
                "log_level": "warning",
            },
        }
    )


def _audit(directory: Path) -> dict[str, Any]:
    """Every mean that a node settled, made anew from what went into it."""
    from prime_async.audit import audit
    from prime_async.cli.audit import figures

    return figures(audit([directory]))


def _sample(home: Path) -> str:
    """A few lines of the trained model, from the outer state that a node saved."""
    from prime_async.ledger import read_newest
    from prime_async.work.corpus import ByteCodec
    from prime_async.work.generate import Sampling, generate
    from prime_async.work.llama import load_llama
    from prime_async.work.sizes import llama_shape

    newest = read_newest(home)
    model = load_llama(llama_shape(newest.run, newest.weights), newest.weights)
    return PROMPT + "".join(generate(model, ByteCodec(), PROMPT, Sampling(max_tokens=SAMPLE_TOKENS)))


def _result(children: Sequence[Child], plan: Plan) -> dict[str, Any]:
    """All figures of the demo, from what the nodes said."""
    parameters = children[0].parameters
    heldout = {after: loss for child in children for after, loss in child.meter.heldout.items()}
    digests = [c.meter.state_digests for c in children]
    if not plan.chaos and any(d.keys() != set(range(1, plan.rounds + 1)) for d in digests):
        raise EnvironmentFault(f"not every node took part in all {plan.rounds} rounds: {[sorted(d) for d in digests]}")
    per_step = 2 * (plan.nodes - 1) / plan.nodes * 4 * parameters  # ring all-reduce: each node sends so many bytes
    data_parallel = [round(per_step * c.meter.inner_steps) for c in children]
    sent = [c.bytes_sent for c in children]
    return {
        "nodes": plan.nodes,
        "rounds": plan.rounds,
        "inner_steps": [c.meter.inner_steps for c in children],
        "parameters": parameters,
        "tokens": sum(c.meter.tokens for c in children),
        "heldout_loss_before": heldout[0],
        "heldout_loss_after": heldout[plan.rounds],
        "state_digests": [d[plan.rounds] for d in digests if plan.rounds in d],
        "equal_after_every_round": all(len({d[r] for d in digests if r in d}) == 1 for r in set().union(*digests)),
        "bytes_sent": sent,
        "bytes_data_parallel_fp32": data_parallel,
        "reduction": round(sum(data_parallel) / max(sum(sent), 1), 1),
        "training_share": [round(c.meter.training_share, 4) for c in children],
        "tokens_per_s": round(statistics.median(c.meter.tokens_per_s for c in children)),
    }
