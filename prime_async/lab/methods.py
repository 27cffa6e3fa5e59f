"""What is compared: named ways to train with many workers, and with which one each is compared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from prime_async.config.schema import RunSpec
from prime_async.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """A way to train. ``run``: settings that differ from the experiment's. ``against``: what its loss is compared with.

    ``sync``: share of the rounds, and at least one, in whose place there are as many inner steps with a round each
    (``run.warmup_sync_steps``). ``delay``: share of H, the inner steps after which the same weights are exchanged
    again, that a worker does before it applies a round's means. ``rounds_late``: as of
    :class:`~prime_async.lab.team.Team`. ``together``: data-parallel.
    """

    name: str
    about: str
    against: str = ""
    run: Mapping[str, Any] = field(default_factory=dict)
    sync: float = 0.0
    delay: float = 0.0
    rounds_late: int = 0
    together: bool = False

    def spec(self, base: RunSpec) -> RunSpec:
        """``base`` with its settings; as many inner steps in all. Raises :class:`ConfigError` if that does not go."""
        values = base.model_dump()
        for key, value in self.run.items():
            group, _, name = key.rpartition(".")
            (values[group] if group else values)[name] = value
        run = RunSpec.model_validate(values)
        if run.round.inner_steps % run.fragment_count:
            raise ConfigError([f'method "{self.name}": inner steps must be a multiple of {run.fragment_count}'])
        run = run.model_copy(update={"rounds": base.rounds * run.fragment_count})
        return self._with_sync_steps(run) if self.sync else run

    def _with_sync_steps(self, run: RunSpec) -> RunSpec:
        replaced = max(1, round(self.sync * run.rounds))
        if replaced >= run.rounds:
            raise ConfigError([f'method "{self.name}": needs at least 2 rounds, of which one is of synchronous steps'])
        steps = replaced * run.steps_per_round
        return run.model_copy(update={"warmup_sync_steps": steps, "rounds": run.rounds - replaced + steps})

    def delay_steps(self, run: RunSpec) -> int:
        """Of each round: at most those of one."""
        return min(round(self.delay * run.round.inner_steps), run.steps_per_round)


def _overlapped(percent: int, **run: Any) -> Method:
    return Method(
        name=f"overlapped-{percent}",
        about=f"overlapped, applied after {percent} % of H",
        against="blocking",
        run={"mode": "overlapped", **run},
        delay=percent / 100,
    )


def _codec(name: str, about: str, **exchange: Any) -> Method:
    run = {f"exchange.{key}": value for key, value in exchange.items()}
    return Method(name=name, about=about, against="fp32", run=run)


_ALL: Final = (
    Method(name="data-parallel", about="one model, the batches of all workers in each step", together=True),
    Method(name="blocking", about="DiLoCo, int8", against="data-parallel"),
    _overlapped(5),
    _overlapped(25),
    _overlapped(100),
    Method(
        name="streaming-5",
        about="streaming, 4 fragments, applied after 5 % of H",
        against="blocking",
        run={"mode": "streaming", "fragments": 4},
        delay=0.05,
    ),
    Method(
        name="eager",
        about="eager, applied after a whole round",
        against="blocking",
        run={"mode": "eager"},
        delay=1.0,
    ),
    Method(
        name="warmup",
        about="blocking, the first tenth data-parallel",
        against="blocking",
        sync=0.1,
    ),
    Method(name="naive", about="means a round late, without a correction", against="blocking", rounds_late=1),
    Method(name="fp32", about="blocking, fp32", against="data-parallel", run={"exchange.codec": "fp32"}),
    _codec("fp16", "blocking, fp16", codec="fp16"),
    _codec("int8", "blocking, int8", codec="int8"),
    _codec("int4", "blocking, int4 both ways", codec="int4"),
    _codec("int4-int8", "blocking, int4, means in int8", codec="int4", mean_codec="int8"),
    _codec("e3m0", "blocking, e3m0 both ways", codec="e3m0"),
    _codec("int4-feedback", "int4 with error feedback", codec="int4", error_feedback=True),
    _codec("e3m0-feedback", "e3m0 with error feedback", codec="e3m0", error_feedback=True),
    Method(name="rda", about="direction and size averaged apart", against="blocking", run={"exchange.reduce": "rda"}),
    _codec("topk", "topk with error feedback, sparse means", codec="topk", error_feedback=True),
    _codec("topk-int8", "topk with error feedback, int8 means", codec="topk", mean_codec="int8", error_feedback=True),
    Method(
        name="muon-fp32",
        about="blocking, inner Muon, fp32",
        against="fp32",
        run={"inner.optimizer": "muon", "exchange.codec": "fp32"},
    ),
    Method(
        name="muon-int4",
        about="blocking, inner Muon, int4 both ways",
        against="muon-fp32",
        run={"inner.optimizer": "muon", "exchange.codec": "int4"},
    ),
)
METHODS: Final[Mapping[str, Method]] = {method.name: method for method in _ALL}


def find_methods(names: list[str]) -> list[Method]:
    """Those of these names, or all of them, and whatever they are compared with. Raises :class:`ConfigError`."""
    wanted = list(names or METHODS)
    for name in wanted:
        if name not in METHODS:
            raise ConfigError([f'method "{name}": not one of {", ".join(METHODS)}'])
        against = METHODS[name].against
        if against and against not in wanted:
            wanted.append(against)
    return [method for name, method in METHODS.items() if name in wanted]
