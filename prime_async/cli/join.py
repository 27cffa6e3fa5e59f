"""``prime-async join``: from a string to a node that trains, with one question."""

from __future__ import annotations

import socket
import sys
from pathlib import Path
from typing import Final

import trio
from rich.console import Console

from prime_async.cli.init import ALLOW_FILE, ALLOW_TEXT, CONFIG_FILE, KEY_FILE
from prime_async.cli.options import Flag
from prime_async.cli.preflight import print_findings, try_config
from prime_async.cli.prospect import prospect
from prime_async.config.contact import Contact
from prime_async.config.invitation import Invitation
from prime_async.config.load import config_from, load_config
from prime_async.config.schema import Config, RunSpec
from prime_async.config.spec import run_id
from prime_async.config.template import node_toml
from prime_async.errors import ConfigError, EnvironmentFault
from prime_async.node.invite import open_door
from prime_async.transport.keys import KeyPair, read_key_file, write_key_file

PORT_PAIRS: Final = 50


def join(
    string: str,
    directory: Path | None = None,
    /,
    *,
    name: str = "",
    device: str = "auto",
    data_path: Path | None = None,
    micro_batch_size: int = 0,
    advertise: str = "",
    yes: Flag = False,
    run: bool = True,
) -> int:
    """Join a run with the string that a member printed: `prime-async invite`.

    Fetches the run spec from a member and checks that it is the one of the string, checks this machine, measures an
    inner step, asks once, writes node.toml and its key, and trains. A run spec names models and data of this program
    alone: nothing of it is run as code.

    Parameters
    ----------
    string
        All of it.
    directory
        Where node.toml, the key and the state are kept; by default a folder called like the run.
    name
        Shown to people; by default this machine's name.
    device
        As node.device.
    data_path
        As node.data_path: the token file, if the run trains on one.
    micro_batch_size
        As node.micro_batch_size: smaller takes less memory.
    advertise
        As node.advertise: where others dial this node, if that is not what this machine thinks.
    yes
        Do not ask.
    run
        Train at once; otherwise say how.
    """
    invitation = Invitation.parse(string)
    home = directory or Path(invitation.name)
    _require_a_beginning(home / CONFIG_FILE, yes)
    key = _key(home)
    say = Console(soft_wrap=True, highlight=False, markup=False).print
    say(f"Asking {', '.join(f'{m.host}:{m.port}' for m in invitation.members)} about the run {invitation.name!r} ...")
    spec = trio.run(_read_run, invitation, key)
    _require_data(spec, data_path)
    node: dict[str, object] = {
        "name": name or socket.gethostname()[:64],
        "key": str(home / KEY_FILE),
        "directory": str(home / "state"),
        "device": device,
        "encrypt": invitation.encrypt,
        "micro_batch_size": micro_batch_size,
        "advertise": advertise,
        "data_path": "" if data_path is None else str(data_path.absolute()),
    }
    config = _config(spec, {**node, **_free_ports("0.0.0.0")}, invitation.members)
    _require_a_ready_machine(config)
    say("Measuring an inner step ...")
    say(prospect(config))
    if not yes and input("Join and train? [Y/n] ").strip().lower() not in ("", "y", "yes"):
        say("Nothing was written but the key.")
        return 1
    members = trio.run(_let_in, invitation, key, config.node.name)
    _write(home, _config(spec, {**node, **_ports_of(config), "allow_file": ALLOW_FILE}, members))
    say(f"Wrote {home / CONFIG_FILE}.")
    if not run:
        say(f"  prime-async run {home / CONFIG_FILE}")
        return 0
    from prime_async.cli.run import run as run_node

    return run_node(home / CONFIG_FILE)


def _require_a_beginning(path: Path, yes: bool) -> None:
    """Raises :class:`ConfigError` if there is a node already, or nobody who could be asked."""
    if path.exists():
        raise ConfigError([f"{path}: is there already: `prime-async run {path}`, or name another directory"])
    if not yes and not sys.stdin.isatty():
        raise ConfigError(["stdin is no terminal, where a question could be asked: add --yes"])


def _require_data(spec: RunSpec, data_path: Path | None) -> None:
    """Raises :class:`ConfigError` if the run trains on a file that was not named."""
    if spec.data == "tokens" and data_path is None:
        digest = f", whose digest is {spec.data_digest}" if spec.data_digest else ""
        raise ConfigError(
            [f"this run trains on a token file{digest}: get it from whoever runs it, and add --data-path"]
        )


def _require_a_ready_machine(config: Config) -> None:
    """Tell what was found. Raises :class:`ConfigError` if the node could not run."""
    findings = trio.run(try_config, config, f"run {config.run.name!r}, run id {run_id(config.run).hex()[:16]}")
    print_findings(findings)
    if any(f.verdict == "problem" for f in findings):
        raise ConfigError(["this machine is not ready: mend what is marked bad, and join again"])


def _key(home: Path) -> KeyPair:
    """The key that is there, from an earlier try, or a new one."""
    home.mkdir(parents=True, exist_ok=True)
    path = home / KEY_FILE
    return read_key_file(path) if path.exists() else write_key_file(path)


async def _read_run(invitation: Invitation, key: KeyPair) -> RunSpec:
    async with open_door(invitation, key) as door:
        return await door.read_run()


async def _let_in(invitation: Invitation, key: KeyPair, name: str) -> tuple[Contact, ...]:
    async with open_door(invitation, key) as door:
        return await door.let_in(name)


def _config(run: RunSpec, node: dict[str, object], members: tuple[Contact, ...]) -> Config:
    return config_from({"run": run.model_dump(), "node": {**node, "join": [str(m) for m in members]}}, "join")


def _ports_of(config: Config) -> dict[str, int]:
    return {"port": config.node.port, "bulk_port": config.node.bulk_port}


def _free_ports(host: str) -> dict[str, int]:
    """Two, one after the other: the usual ones, if no other node of this machine has them."""
    for port in range(7700, 7700 + 2 * PORT_PAIRS, 2):
        try:
            for number in (port, port + 1):
                with socket.socket() as probe:
                    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    probe.bind((host, number))
        except OSError:
            continue
        return {"port": port, "bulk_port": port + 1}
    raise EnvironmentFault(f"no two ports from 7700 to {7700 + 2 * PORT_PAIRS} are free: stop what listens there")


def _write(home: Path, config: Config) -> None:
    """The file, with paths relative to its folder."""
    own = {"key": Path(KEY_FILE), "directory": Path("state")}
    node = config.node.model_copy(update=own)
    allow_file = home / ALLOW_FILE
    if not allow_file.exists():
        allow_file.write_text(ALLOW_TEXT, encoding="utf-8")
    (home / CONFIG_FILE).write_text(node_toml(config.model_copy(update={"node": node})), encoding="utf-8")
    load_config(home / CONFIG_FILE)
