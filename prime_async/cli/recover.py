"""``prime-async recover``: go on when the others, or so many of them, are lost for good."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from prime_async.config.load import load_config
from prime_async.config.spec import run_id
from prime_async.errors import ConfigError
from prime_async.ledger import BallotFile, Report, inspect_directory
from prime_async.machines.ballot import new_lineage
from prime_async.transport.keys import read_key_file


def recover(config: Path, /, *, force: bool = False, adopt: bool = False) -> int:
    """Carry on from what this node holds, or give up what it took part in. Stop the node first.

    Without a flag: say what is on disk, and change nothing.

    Parameters
    ----------
    config
        The node's TOML file.
    force
        This node alone goes on, from its saved outer state, as a new lineage of the run. Only when the others are lost
        for good: two lineages never become one again. Nodes of the old one are refused until they adopt the new one.
    adopt
        Forget what this node voted for, so that it can join another lineage. Its outer state stays until it fetches
        that lineage's.
    """
    if force and adopt:
        raise ConfigError(["--force and --adopt: choose one; the first makes a lineage, the second joins one"])
    settings = load_config(config)
    say = Console(highlight=False, soft_wrap=True, markup=False).print
    ballots = BallotFile(settings.node.directory, run_id(settings.run))
    ballot = ballots.load()
    if ballot is None or ballot.view is None:
        raise ConfigError([f"{ballots.path}: this node was never a member of the run, there is nothing to recover"])
    report = _inspect(settings.node.directory)
    view = ballot.view
    say(f"lineage {view.lineage.hex()[:16]}, view {view.number}, {len(view.voters)} voters:")
    for member in view.members:
        say(f"  {member.name:<16} {'votes' if member.voter else 'no vote yet'}")
    for problem in report.problems:
        say(problem)
    say(f"outer state on disk: {report.conclusion}")
    if adopt:
        ballots.path.replace(ballots.path.with_suffix(".given-up"))
        say("the ballot is given up: `prime-async run` asks node.join, and takes that run's outer state")
    elif force:
        ballots.save(new_lineage(ballot, read_key_file(settings.node.key).id, report.tip))
        say("a new lineage begins: `prime-async run` goes on alone, and others may join after `recover --adopt`")
    else:
        say("nothing was changed: --force goes on from here alone, --adopt gives this up to join another lineage")
    return 0


def _inspect(directory: Path) -> Report:
    """What is there, chunk by chunk: the node will begin with what is sound. A ballot of the run is there.

    Raises :class:`ConfigError` if a snapshot is of another run: the node would not begin.
    """
    report = inspect_directory(directory, verify=True)
    foreign = [f"snapshot {s.round}" for s in report.snapshots if s.whole and s.run_id not in ("", report.run_id)]
    if foreign:
        text = "choose another node.directory, or move the files away"
        raise ConfigError([f"{directory}: {', '.join(foreign)}: of another run than the ballot: {text}"])
    return report
