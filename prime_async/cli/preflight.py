"""The checks of ``prime-async check``: each gives findings, and none of them changes anything."""

from __future__ import annotations

import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, TypeAlias

import trio
from msgspec import Struct
from rich.console import Console

from prime_async.config.load import load_config
from prime_async.config.schema import Config
from prime_async.config.spec import run_id
from prime_async.errors import ConfigError, PrimeAsyncError
from prime_async.node.address import advertised_host, contacts_of
from prime_async.transport.keys import read_key_file
from prime_async.watch.station import open_listener

CONNECT_TIMEOUT_S = 3.0
MIB = 2**20
Verdict: TypeAlias = Literal["good", "warning", "problem"]


class Finding(Struct, frozen=True, kw_only=True):
    """What was found about one subject, and what to do about it ("": nothing)."""

    subject: str
    verdict: Verdict
    text: str
    fix: str = ""


async def preflight(path: Path) -> list[Finding]:
    """All findings about the node that ``path`` configures, most basic first."""
    try:
        config = load_config(path)
    except ConfigError as error:
        return [
            _problem("config", text, "mend it, or write a new file with `prime-async init`") for text in error.problems
        ]
    return await try_config(config, f"{path}: run {config.run.name!r}, run id {run_id(config.run).hex()[:16]}")


async def try_config(config: Config, name: str) -> list[Finding]:
    """All findings about the node of ``config``, which is called ``name`` in the first one."""
    findings = [_good("config", name)]
    findings += [*_key(config), *_ports(config), *_address(config), *_dashboard(config), *_beginning(config)]
    findings += await _contacts(config)
    findings += await trio.to_thread.run_sync(lambda: list(_machine(config)))
    return findings


def print_findings(findings: list[Finding]) -> None:
    """One line each, all texts below each other, and the fix under those that need one."""
    say = Console(highlight=False, soft_wrap=True).print
    marks = {"good": "[green]ok[/green]  ", "warning": "[yellow]note[/yellow]", "problem": "[red]bad[/red] "}
    width = max((len(finding.subject) for finding in findings), default=0)
    for finding in findings:
        say(f"{marks[finding.verdict]} [bold]{finding.subject:<{width}}[/bold] ", end="")
        say(finding.text, markup=False)
        if finding.fix:
            say(f"{'':<{len('note')}} {'':<{width}} fix: {finding.fix}", markup=False)


def _good(subject: str, text: str) -> Finding:
    return Finding(subject=subject, verdict="good", text=text)


def _problem(subject: str, text: str, fix: str) -> Finding:
    return Finding(subject=subject, verdict="problem", text=text, fix=fix)


def _warning(subject: str, text: str, fix: str) -> Finding:
    return Finding(subject=subject, verdict="warning", text=text, fix=fix)


def _key(config: Config) -> Iterator[Finding]:
    try:
        key = read_key_file(config.node.key)
    except PrimeAsyncError as error:
        yield _problem("key", str(error), "write one with `prime-async init`, or set node.key to the file")
        return
    yield _good("key", f"{config.node.key}: public key {key.id}")
    if any(c.id == key.id for c in contacts_of(config.node)):
        yield _problem(
            "key", "node.join names this node's own key", "name another member, or leave join empty to found"
        )
    if not config.node.join and not config.node.allow and config.node.allow_file is None:
        yield _warning(
            "allow",
            "nobody may join: node.allow is empty and there is no node.allow_file",
            "add the others' public keys",
        )


def _ports(config: Config) -> Iterator[Finding]:
    node = config.node
    for name, port in (("port", node.port), ("bulk_port", node.bulk_port)):
        family = socket.AF_INET6 if ":" in node.host else socket.AF_INET
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((node.host, port))
            except OSError as error:
                yield _problem(
                    "ports",
                    f"node.{name}: cannot listen on {node.host}:{port}: {error.strerror}",
                    f"set node.{name} to a free port (or node.host to an address of this machine), "
                    "or stop the process that uses it",
                )
            else:
                yield _good("ports", f"node.{name}: {node.host}:{port or 'any free port'} can be listened on")


def _address(config: Config) -> Iterator[Finding]:
    host = advertised_host(config.node)
    try:
        socket.getaddrinfo(host, config.node.port or None)
    except OSError as error:
        yield _problem(
            "address", f"{host}: {error.strerror}", "set node.advertise to a name or address others can dial"
        )
        return
    if host.startswith("127.") or host == "::1":
        yield _warning(
            "address",
            f"others are told to dial {host}: only this machine can",
            "set node.advertise to a reachable address",
        )
    else:
        yield _good(
            "address", f"others are told to dial {host}; open ports {config.node.port} and {config.node.bulk_port}"
        )


def _dashboard(config: Config) -> Iterator[Finding]:
    address = config.node.dashboard
    if not address:
        return
    try:
        listener = open_listener(config)
    except PrimeAsyncError as error:
        what, _, fix = str(error).partition(". ")
        yield _problem("dashboard", what, fix or "install it, or take node.dashboard away")
        return
    if listener is not None:
        listener.close()
        yield _good("dashboard", f"node.dashboard: {address} can be listened on")


async def _contacts(config: Config) -> list[Finding]:
    findings: list[Finding] = []

    async def try_contact(host: str, port: int) -> None:
        try:
            with trio.fail_after(CONNECT_TIMEOUT_S):
                stream = await trio.open_tcp_stream(host, port)
            await stream.aclose()
        except (OSError, trio.TooSlowError) as error:
            reason = "no answer" if isinstance(error, trio.TooSlowError) else str(error)
            fix = "see that the member runs, that the address is right, and that its firewall lets the port in"
            findings.append(_problem("join", f"{host}:{port} cannot be reached: {reason}", fix))
        else:
            findings.append(_good("join", f"{host}:{port} can be reached"))

    async with trio.open_nursery() as nursery:
        for contact in contacts_of(config.node):
            nursery.start_soon(try_contact, contact.host, contact.port)
    return findings


def _machine(config: Config) -> Iterator[Finding]:
    """Device, data, model, memory and disk. Imports torch, so it runs last and in a thread."""
    from prime_async.work.device import Device, host_memory
    from prime_async.work.factory import open_corpus

    try:
        device = Device.open(config.node.device, config.node.precision)
        memory = device.memory()
        yield _good("device", f"{device.torch_device}, {memory.available_bytes / MIB:,.0f} MiB free")
    except PrimeAsyncError as error:
        yield _problem("device", str(error), 'set node.device to "auto" or "cpu"')
        return
    try:
        corpus = open_corpus(config.run, config.node)
        corpus.batch(0, 0, 1, config.run.sequence_length)
        next(iter(corpus.heldout(1, config.run.sequence_length)))
        yield _good("data", f"{config.run.data}: a batch can be read, vocabulary {corpus.vocab_size}")
    except PrimeAsyncError as error:
        yield _problem("data", str(error), "mend run.data or node.data_path")
        return
    yield from _memory(config, corpus.vocab_size, memory.available_bytes, host_memory().available_bytes, device.is_cuda)
    yield from _disk(config, corpus.vocab_size)


def _memory(config: Config, vocab_size: int, on_device: int, on_host: int, is_cuda: bool) -> Iterator[Finding]:
    from prime_async.work.sizes import estimate_memory, run_size

    run, node = config.run, config.node
    if ":" in run.model:
        yield _warning("memory", f"{run.model}: how much memory your own model needs is not known here", "")
        return
    try:
        size = run_size(run, vocab_size)
    except PrimeAsyncError as error:
        yield _problem("model", str(error), "set run.model to a named size, or to package.module:factory")
        return
    need = estimate_memory(size, node.micro_batch_size or run.inner.batch_size, run.sequence_length)
    parts = (
        [("device memory", need.device_bytes, on_device), ("host memory", need.host_bytes, on_host)]
        if is_cuda
        else [("memory", need.device_bytes + need.host_bytes, on_host)]
    )
    for name, needed, there in parts:
        text = f"{name}: about {needed / MIB:,.0f} MiB needed, {there / MIB:,.0f} MiB free"
        fix = "lower node.micro_batch_size or run.sequence_length, or take a smaller run.model"
        yield _good("memory", text) if needed <= there else _problem("memory", text, fix)


def _disk(config: Config, vocab_size: int) -> Iterator[Finding]:
    """Room for what the node will keep. What is in its directory already is part of that."""
    from prime_async.work.sizes import estimate_disk, parameter_count, run_size

    if ":" in config.run.model:
        return
    place = config.node.directory
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    need = estimate_disk(config.run, config.node, parameter_count(run_size(config.run, vocab_size)))
    more = max(0, need.total_bytes - _used_bytes(config.node.directory))
    text = (
        f"{config.node.directory}: about {more / MIB:,.0f} MiB more needed, {free / MIB:,.0f} MiB free (snapshots "
        f"{need.snapshot_bytes / MIB:,.0f}, means {need.mean_bytes / MIB:,.0f}, inner optimiser "
        f"{need.inner_bytes / MIB:,.0f} MiB)"
    )
    fix = (
        "free some space, set node.directory to another disk, or lower node.keep_snapshots, node.snapshot_every and "
        "node.keep_rounds"
    )
    yield _good("disk", text) if more <= free else _problem("disk", text, fix)
    if need.grows:
        yield _warning(
            "disk",
            "with node.snapshot_every = 0 all means since the beginning are kept, a byte or so per parameter each",
            "set node.snapshot_every, or run.rounds",
        )


def _used_bytes(directory: Path) -> int:
    return sum(path.lstat().st_blocks * 512 for path in directory.rglob("*") if path.is_file())


def _beginning(config: Config) -> Iterator[Finding]:
    """The weights that the run begins with, if they are not made from the seed."""
    run, node = config.run, config.node
    if not run.initial_digest:
        return
    from prime_async.ledger.files import LOCAL_FILES, list_rounds
    from prime_async.ledger.snapshots import DIRECTORY, WHOLE

    if list_rounds(LOCAL_FILES, node.directory / DIRECTORY, WHOLE):
        yield _good("weights", f"{node.directory} holds an outer state to begin with")
    elif node.join:
        yield _good("weights", f"{run.initial_digest[:16]} are fetched from a member")
    else:
        yield _problem(
            "weights",
            f"run.initial_digest: the run begins with weights that are not in {node.directory}",
            "write them there with `prime-async import`, or name members that have them as node.join",
        )
