"""The run as Prometheus reads it: base units, counters that end in ``_total``.

https://prometheus.io/docs/practices/naming/
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily
from prometheus_client.metrics_core import Metric

from prime_async.watch.board import Board
from prime_async.watch.history import Row

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
MEMBER_LABELS = ("member", "key")

MEMBER_COUNTERS: Sequence[tuple[str, str, Callable[[Row], float]]] = (
    ("tokens", "Tokens that a member trained on.", lambda r: r.total("tokens")),
    ("inner_steps", "Inner steps of a member.", lambda r: r.total("inner_steps")),
    ("sent_bytes", "Bytes that a member sent.", lambda r: r.total("sent_bytes")),
    ("received_bytes", "Bytes that a member received.", lambda r: r.total("received_bytes")),
    ("training_seconds", "Time that a member spent in inner steps.", lambda r: r.total("training_ms") / 1000),
    ("round_seconds", "Time that a member spent in rounds, training included.", lambda r: r.total("elapsed_ms") / 1000),
)
MEMBER_GAUGES: Sequence[tuple[str, str, Callable[[Row], float | None]]] = (
    ("up", "1 if the member is in the run, 0 if it was lost or left.", lambda r: float(not r.gone)),
    ("active", "1 if the member takes part in rounds.", lambda r: float(r.active)),
    ("leader", "1 if the member leads.", lambda r: float(r.leads)),
    ("tokens_per_second", "Speed of the last inner steps of a member.", lambda r: r.tokens_per_s),
    ("round", "Outer steps in the outer state of a member.", lambda r: r.round),
    ("loss_nats", "Mean loss of the last inner steps of a member, nats per token.", lambda r: r.loss),
    ("silence_seconds", "How long ago the leader heard the member.", lambda r: r.silent_s),
    ("checkpoint_round", "Round of the newest checkpoint that a member has on disk.", lambda r: r.snapshot_round),
)


class _Collector:
    """Makes the metrics anew each time, from the board: there is one truth, and nothing to keep in step with it."""

    def __init__(self, board: Board) -> None:
        self._board = board

    def collect(self) -> Iterator[Metric]:
        yield from _of_run(self._board)
        yield from _of_members(self._board)


def exposition(board: Board) -> bytes:
    """The text that a scrape gets."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Collector(board))
    return generate_latest(registry)


def _of_run(board: Board) -> Iterator[Metric]:
    totals, history = board.history.totals(), board.history
    about = {k: str(board.about[k]) for k in ("run", "run_id", "model", "mode", "node", "version")}
    yield InfoMetricFamily("prime_async", "What this node takes part in.", value=about)
    yield _gauge("ready", "1 if this node is an active member that holds the run's state.", board.readiness()[0])
    yield _gauge("connected", "1 if this node hears a leader.", totals["connected"])
    yield _gauge("round", "The round that is open: outer steps that the run has taken.", totals["round"])
    yield _gauge("view", "Number of the newest view.", totals["view"])
    yield _gauge("epoch", "Epoch of the leader.", totals["epoch"])
    members = GaugeMetricFamily("prime_async_members", "Members, by whether they take part.", labels=("state",))
    members.add_metric(("active",), totals["active"])
    members.add_metric(("waiting",), max(0, totals["members"] - totals["active"]))
    yield members
    if totals["heldout_loss"] is not None:
        yield _gauge("heldout_loss_nats", "Held-out loss of the outer weights, nats per token.", totals["heldout_loss"])
        yield _gauge("heldout_round", "Outer steps in the weights that have this loss.", totals["heldout_round"])
    yield _counter("members_lost", "Members that were removed for their silence.", history.state.lost)
    yield _counter("chunks_redone", "Chunks done again for members that were lost.", history.state.redone_chunks)


def _of_members(board: Board) -> Iterator[Metric]:
    rows = list(board.history.state.rows.values())
    for name, text, value in MEMBER_COUNTERS:
        counter = CounterMetricFamily(f"prime_async_member_{name}", text, labels=MEMBER_LABELS)
        for row in rows:
            counter.add_metric((row.name, row.id[:16]), value(row))
        yield counter
    for name, text, read in MEMBER_GAUGES:
        gauge = GaugeMetricFamily(f"prime_async_member_{name}", text, labels=MEMBER_LABELS)
        for row in rows:
            amount = read(row)
            if amount is not None:
                gauge.add_metric((row.name, row.id[:16]), amount)
        yield gauge


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(f"prime_async_{name}", text, value=float(value))


def _counter(name: str, text: str, value: float) -> Metric:
    return CounterMetricFamily(f"prime_async_{name}", text, value=float(value))
