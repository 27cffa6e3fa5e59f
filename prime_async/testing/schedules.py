"""Schedules of what goes wrong, and what must be true again after it: made by chance, from a seed alone."""

from __future__ import annotations

import pickle
import random
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from prime_async.machines.ballot import is_quorum
from prime_async.machines.membership import Membership
from prime_async.messages import Commit, View
from prime_async.testing.host import FIRST_STATE, SimNode, digest_of
from prime_async.testing.properties import Properties
from prime_async.testing.settings import SimulationSettings
from prime_async.testing.simulation import STARTS_APART, Simulation

MODES = ("blocking", "overlapped", "streaming", "eager")
ROUNDS_AFTER = 3
SPOILS = 0.25
"""The chance, with each disturbance, that somebody's inner steps end in NaN."""
GARBLES = 0.25
"""That what somebody, or what everybody, contributes next cannot be used."""
LIMIT_S = 180.0
"""Virtual seconds after the healing, in which everybody must be active and the run that many rounds further."""


def random_settings(chance: random.Random) -> SimulationSettings:
    """A joiner must be able to fetch the means of a round within a round: slow networks have long rounds."""
    latency_s = chance.choice([(0.001, 0.01), (0.01, 0.1), (0.01, 0.1), (0.05, 0.5)])
    slow = latency_s[1] > 0.2
    return SimulationSettings(
        min_members=chance.choice([1, 1, 2]),
        straggler_timeout_s=chance.choice([0.0, 0.0, 2.0]),
        loss=chance.choice([0, 0.02, 0.1, 0.2]),
        doubled=chance.choice([0, 0.1]),
        chunk_count=chance.randint(1, 3 if slow else 5),
        inner_steps=chance.randint(6, 10) if slow else chance.randint(2, 8),
        latency_s=latency_s,
        disk_s=chance.choice([(0.001, 0.01), (0.01, 0.3)]),
        snapshot_every=chance.choice([1, 2, 4, 1000]),
        keep_snapshots=chance.choice([1, 2]),
        keep_rounds=chance.choice([0, 2, 6]),
        step_s_of={} if chance.random() < 0.7 else {"n1": 1.0},
        nat=frozenset(chance.choice([(), (), (), ("n2",), ("n1", "n3")])),
        witnesses=frozenset(chance.choice([(), (), (), ("n2",)])),
    )


class Chaos:
    """Does things to a simulation, by chance or as told, and knows what is to be expected after them."""

    def __init__(self, simulation: Simulation, properties: Properties, chance: random.Random) -> None:
        self.simulation = simulation
        self.properties = properties
        self.chance = chance
        self.leaving: set[str] = set()
        self.done: list[str] = []

    def snapshot(self) -> bytes:
        """All of it as it is now, to go on from more than once."""
        return pickle.dumps(self, protocol=pickle.HIGHEST_PROTOCOL)

    @staticmethod
    def restored(data: bytes) -> Chaos:
        chaos = pickle.loads(data)
        assert isinstance(chaos, Chaos)
        return chaos

    # --- what goes wrong ----------------------------------------------------------------------------------------

    def note(self, text: str) -> None:
        self.done.append(f"{self.simulation.now:.2f} {text}")

    def wait(self, *range_s: float) -> None:
        self.simulation.run_for(self.chance.uniform(*range_s))

    def some(self) -> str:
        return self.chance.choice(list(self.simulation.nodes))

    def crash(self, name: str) -> None:
        self.note(f"crash {name}")
        self.simulation.crash(name)

    def restart(self, name: str, *, wiped: bool = False) -> None:
        self.note(f"start {name}{' wiped' if wiped else ''}")
        self.leaving.discard(name)
        self.simulation.start(name, wiped=wiped)

    def join(self, count: int = 1) -> None:
        for _ in range(count):
            self.restart(f"n{len(self.simulation.nodes)}")

    def corrupt(self, name: str) -> None:
        if self.simulation.nodes[name].running:
            self.note(f"corrupt {name}")
            self.simulation.corrupt(name)

    def spoil(self, name: str) -> None:
        if self.simulation.nodes[name].running:
            self.note(f"the inner steps of {name} end in NaN")
            self.simulation.spoil(name)

    def garble(self, name: str, share: float) -> None:
        if self.simulation.nodes[name].running:
            self.note(f"{share:.0%} of what {name} contributes next cannot be used")
            self.simulation.garble(name, share=share)

    def damage(self, name: str) -> None:
        self.note(f"damage {self.simulation.damage(name)} on the disk of {name}")

    def pause(self, name: str, seconds: float) -> None:
        self.note(f"pause {name} for {seconds:.2f} s")
        self.simulation.pause(name)
        self.simulation.run_for(seconds)
        self.simulation.resume(name)

    def leave(self, name: str, *, at_once: bool) -> None:
        if self.simulation.nodes[name].running:
            self.note(f"leave {name}{' at once' if at_once else ''}")
            self.leaving.add(name)
            self.simulation.leave(name, at_once=at_once)

    def split(self, minority: int, seconds: float) -> None:
        names = list(self.simulation.nodes)
        self.chance.shuffle(names)
        self.note(f"split off {names[:minority]} for {seconds:.2f} s")
        self.simulation.split(names[minority:], names[:minority])
        self.simulation.run_for(seconds)
        self.simulation.split()

    def cut(self, a: str, b: str, seconds: float, *, both_ways: bool) -> None:
        self.note(f"cut {a} {b}{' both ways' if both_ways else ''} for {seconds:.2f} s")
        self.simulation.cut(a, b, both_ways=both_ways)
        self.simulation.run_for(seconds)
        self.simulation.network.cuts.clear()

    # --- by chance ----------------------------------------------------------------------------------------------

    def disturb(self) -> None:
        """One thing that goes wrong, with anybody."""
        ways = (
            (4, self._crash_one),
            (3, self._crash_and_restart),
            (1, self._crash_some),
            (3, lambda: self.pause(self.some(), self.chance.uniform(0, 30))),
            (3, lambda: self.split(self.chance.randint(1, max(1, len(self.simulation.nodes) // 2)), self._length_s())),
            (2, self._cut_one),
            (2, lambda: self.join(1)),
            (2, lambda: self.leave(self.some(), at_once=self.chance.random() < 0.5)),
            (1, self._flap),
            (1, self._restart_all),
            (1, lambda: self.corrupt(self.some())),
            (2, lambda: self.damage(self.some())),
        )
        self.chance.choices([way for _, way in ways], [weight for weight, _ in ways])[0]()

    def _length_s(self) -> float:
        return self.chance.choice([self.chance.uniform(0, 3), self.chance.uniform(5, 30)])

    def _crash_one(self) -> None:
        self.crash(self.some())

    def _crash_and_restart(self) -> None:
        name = self.some()
        self.crash(name)
        self.simulation.run_for(self.chance.choice([0, 0.1, 5, 15]))
        self.restart(name, wiped=self.chance.random() < 0.3)

    def _crash_some(self) -> None:
        names = list(self.simulation.nodes)
        for name in self.chance.sample(names, max(1, len(names) // 2)):
            self.crash(name)

    def _cut_one(self) -> None:
        if len(self.simulation.nodes) > 1:
            a, b = self.chance.sample(list(self.simulation.nodes), 2)
            self.cut(a, b, self._length_s(), both_ways=self.chance.random() < 0.5)

    def _flap(self) -> None:
        if len(self.simulation.nodes) > 1:
            a, b = self.chance.sample(list(self.simulation.nodes), 2)
            self.note(f"the link {a} {b} flaps")
            self.simulation.flap(a, b)

    def _restart_all(self) -> None:
        names = list(self.simulation.nodes)
        for name in names:
            self.crash(name)
        self.wait(0, 5)
        for name in names:
            self.restart(name)

    # --- afterwards ---------------------------------------------------------------------------------------------

    def heal(self) -> None:
        self.note("heal")
        self.simulation.heal()
        for name in self.simulation.nodes:
            self.simulation.resume(name)

    def staying(self) -> list[SimNode]:
        return [n for n in self.simulation.running if n.id not in self.leaving]

    def why_stuck(self) -> str:
        """Why nobody could go on from here, however good the program; "" if there is no reason."""
        view, nodes = self.properties.newest, self.staying()
        if view is None:
            return "the run was never founded"
        nat, witnesses = self.simulation.settings.nat, self.simulation.settings.witnesses
        if sum(n.id not in witnesses for n in nodes) < max(1, self.simulation.settings.min_members):
            return "too few trainers"
        for number in (view.number - 1, view.number):
            if not self._has_quorum(number):
                return f"no quorum of view {number}"
        ballots = [n.disk.ballot for n in self.simulation.running if n.disk.ballot is not None]
        accepted = [b.view for b in ballots if b.view is not None and b.view.number > view.number]  # it may be decided
        for proposed in accepted:
            if not is_quorum(proposed, self._voters_here(proposed)):
                return f"no quorum of view {proposed.number}, which may be decided"
        voters = self._voters_here(view)
        stay = [name for name in voters if name not in self.leaving]
        if all(name in nat for name in stay or [n.id for n in nodes]):
            return "no voter can be dialled"
        for commit in dict.fromkeys(v.commit for v in (view, *accepted) if v.commit is not None):
            if not self._can_follow(commit):
                return f"nobody holds the state, or the means, of round {commit.round}"
        for node in nodes:
            if node.id not in self._voters_here(view) and not self._knows_somebody(node):
                return f"{node.id} knows nobody who is here"
        return ""

    def _can_follow(self, commit: Commit) -> bool:
        """Whether the state after this commit is somewhere, or can be made of what is there, on several disks maybe."""
        nodes = self.simulation.running
        states = {FIRST_STATE} | {n.state for n in nodes}
        states |= {(round, s.digest) for n in nodes for round, s in n.disk.snapshots.items()}
        here = {info.digest for n in nodes for key, info in n.chunks.items() if key.kind == "mean"}
        on_disk = [m for n in nodes for m in n.disk.means.values()]
        here |= {info.digest for means in on_disk for chunk, info in means.infos.items() if chunk not in means.damaged}
        return any(self._leads_to(state, commit, here) for state in states)

    def _leads_to(self, state: tuple[int, bytes], commit: Commit, here: set[bytes]) -> bool:
        """Whether this outer state is one that the run went through, and the means since then are all here."""
        rounds = self.properties.rounds
        round, digest = state
        if round == commit.round + 1:
            means = rounds.means.get(commit.digest)
            return means is None or digest == digest_of(commit.state, *means)
        while round <= commit.round:
            made = rounds.commits.get(round, commit)
            means = rounds.means.get(made.digest)
            if made.round != round or made.state != digest or means is None or not here.issuperset(means):
                return False
            round, digest = round + 1, digest_of(digest, *means)
        return True

    def _knows_somebody(self, node: SimNode) -> bool:
        """Whether it can ask anybody who leads."""
        ballot = node.disk.ballot
        views = (ballot.view, ballot.before) if ballot is not None else ()
        known = {c.id for c in node.settings.membership.contacts}
        known |= {m.id for v in views if v is not None for m in v.members}
        return any(n.id in known for n in self.simulation.running if n is not node)

    def _has_quorum(self, number: int) -> bool:
        view = self.properties.views.chosen.get(number)
        return view is None or is_quorum(view, self._voters_here(view))

    def _voters_here(self, view: View) -> list[str]:
        """Those that run, and can prove that they are the ones that the view calls so.

        One that is told to leave before it has found its leader goes without a word.
        """
        nodes = [n for n in self.simulation.running if n.id not in self.leaving or not self._seeks(n)]
        here = {n.id: n.disk.ballot.incarnations for n in nodes if n.disk.ballot is not None}
        return [v.id for v in view.voters if v.incarnation in here.get(v.id, ())]

    @staticmethod
    def _seeks(node: SimNode) -> bool:
        membership = node.machines["membership"]
        return isinstance(membership, Membership) and membership.role in ("starting", "asking")

    def is_active(self, node: SimNode) -> bool:
        view = self.properties.newest
        mine = view.member(node.id) if view else None
        return mine is not None and mine.active and node.start <= mine.incarnation < node.start + STARTS_APART

    def expect_progress(self, rounds: int = ROUNDS_AFTER, limit_s: float = LIMIT_S) -> None:
        """Everybody who stays is active in good time, and the run goes on."""
        failed = [(n.id, n.failure) for n in self.simulation.nodes.values() if n.alive and n.failure]
        assert not failed, f"{failed}; {self.simulation.where()}"
        goal = max(n.state[0] for n in self.simulation.nodes.values()) + rounds
        self.simulation.run_until(
            lambda: all(n.state[0] >= goal and self.is_active(n) for n in self.staying()), limit_s
        )

    def expect_agreement(self, limit_s: float = LIMIT_S) -> None:
        """At some time all who stay have the same outer state."""
        self.simulation.run_until(lambda: len({n.state for n in self.staying()}) <= 1, limit_s)


def mode_settings(settings: SimulationSettings, mode: str) -> SimulationSettings:
    """``settings`` of a run in this mode."""
    fragments = min(2, settings.chunk_count) if mode == "streaming" else 1
    return replace(settings, overlaps=mode != "blocking", eager=mode == "eager", fragments=fragments)


def run_schedule(
    seed: int,
    mode: str = "",
    *,
    record: bool = False,
    disturbances: int = 5,
    spoils: bool = True,
    sync_rounds: int = 0,
) -> Chaos:
    """Some disturbances; then all is well, and everybody must be active and three rounds further in good time.

    In one of ``MODES``; without ``mode`` they take turns with the seeds. ``spoils``: inner steps may end in NaN, and
    contributions be of no use. ``sync_rounds``: the first so many are of one inner step each, which goes with all modes
    but ``streaming``.
    """
    chance, to_spoil, to_garble = random.Random(seed), random.Random(f"spoils {seed}"), random.Random(f"garbles {seed}")
    mode = mode or MODES[seed % len(MODES)]
    nodes = chance.randint(2, 5)
    settings = replace(mode_settings(random_settings(chance), mode), sync_rounds=sync_rounds)
    simulation = Simulation(nodes, seed, settings)
    if record:
        simulation.record()
    chaos = Chaos(simulation, Properties(simulation).watch(), chance)
    try:
        chaos.wait(0, 20)
        for _ in range(chance.randint(1, disturbances)):
            if spoils and to_spoil.random() < SPOILS:
                chaos.spoil(to_spoil.choice(list(simulation.nodes)))
            if spoils and to_garble.random() < GARBLES:
                _garble_some(chaos, to_garble)
            chaos.disturb()
            chaos.wait(0, 20)
        chaos.heal()
        if not chaos.why_stuck():
            chaos.expect_progress()
            chaos.expect_agreement()
    except Exception as error:
        error.add_note("\n".join([f"mode {mode}, what was done:", *chaos.done]))
        if record:
            _write(simulation, error)
        raise
    return chaos


def _garble_some(chaos: Chaos, chance: random.Random) -> None:
    names = list(chaos.simulation.nodes)
    share = chance.choice([0.5, 1.0])
    for name in names if chance.random() < 0.5 else [chance.choice(names)]:
        chaos.garble(name, share)


def _write(simulation: Simulation, error: Exception) -> None:
    path = Path(tempfile.gettempdir()) / f"prime-async-schedule-{simulation.seed}.txt"
    simulation.trace_to(path)
    error.add_note(f"every event and effect: {path}")


def explore(seeds: range, run: Callable[[int], object] = run_schedule) -> None:
    """Run schedules. One that fails is run again, and recorded."""
    for seed in seeds:
        try:
            run(seed)
        except Exception:
            if run is run_schedule:
                run_schedule(seed, record=True)
            raise
