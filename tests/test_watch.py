"""The web server, the metrics, the sinks and ``prime-async status``: over real sockets, and with the real libraries."""

from __future__ import annotations

import io
import json
import os
import socket
import sqlite3
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console, RenderableType
from structlog.testing import capture_logs

from prime_async.cli.preflight import _dashboard
from prime_async.cli.status import ask, report, status
from prime_async.errors import AddressInUseError, ConfigError, EnvironmentFault, ProtocolError
from prime_async.machines.facts import Fact, HeldOutLoss, InnerStepDone, RoundFinished, SnapshotWritten
from prime_async.watch import board as board_module
from prime_async.watch.board import MAX_VIEWERS, Board, events
from prime_async.watch.history import History
from prime_async.watch.metrics import exposition
from prime_async.watch.server import listen, serve_until_cancelled, url_of
from prime_async.watch.sinks import Feeder, Sink, open_sink
from prime_async.watch.station import open_station
from tests.watch_harness import STORY, a_board, config, seen

PATIENCE_S = 120.0


@asynccontextmanager
async def station(tmp_path: Path, *facts: Fact) -> AsyncIterator[tuple[str, Board]]:
    """A station that serves on loopback; its URL, and its board."""
    with open_station(config(tmp_path, dashboard="127.0.0.1:0"), "1") as made:
        for fact in facts:
            made.add(fact)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(made.run)
            yield url_of(made._listener or socket.socket()), made.board
            nursery.cancel_scope.cancel()


async def get(url: str, method: str = "GET", **headers: str) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body."""

    def fetch() -> tuple[int, dict[str, str], bytes]:
        request = urllib.request.Request(url, method=method, headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=20) as answer:
                return answer.status, dict(answer.headers), answer.read()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, dict(error.headers), error.read()

    return await trio.to_thread.run_sync(fetch)


# --- the server -----------------------------------------------------------------------------------------------------


async def test_it_serves_the_page_and_all_that_the_page_asks_for_from_the_package(tmp_path: Path) -> None:
    async with station(tmp_path) as (url, _):
        _, headers, page = await get(url)
        assert headers["content-type"].startswith("text/html")
        assert "default-src 'self'" in headers["content-security-policy"]
        for name in ("app.js", "charts.js", "format.js", "style.css", "icon.svg"):
            code, headers, data = await get(f"{url}{name}")
            assert (code, len(data) > 200) == (200, True), name
            assert name.encode() in page or name in ("charts.js", "format.js")
            assert (await get(f"{url}{name}", **{"if-none-match": headers["etag"]}))[0] == 304
            assert b"http" not in data.replace(b"http://www.w3.org/", b""), f"{name} has an address of elsewhere"


async def test_it_answers_get_alone(tmp_path: Path) -> None:
    async with station(tmp_path) as (url, _):
        for method in ("POST", "PUT", "DELETE", "PATCH"):
            for path in ("", "api/run", "api/events", "metrics", "healthz"):
                assert (await get(url + path, method))[0] == 405
        assert (await get(url + "../../../etc/passwd"))[0] == 404
        assert (await get(url + "server.py"))[0] == 404


async def test_what_it_shows_holds_no_address_path_or_secret(tmp_path: Path) -> None:
    async with station(tmp_path, *STORY) as (url, _):
        shown = (await get(url + "api/run"))[2].decode() + (await get(url + "metrics"))[2].decode()
    for word in (str(tmp_path), "127.0.0.1", "tcp://", "7700", "node.key", "secret"):
        assert word not in shown


async def test_ready_is_an_active_member_that_hears_its_leader(tmp_path: Path) -> None:
    async with station(tmp_path) as (url, board):
        assert (await get(url + "healthz"))[0] == 200
        code, _, body = await get(url + "readyz")
        assert (code, json.loads(body)["ready"]) == (503, False)
        board.add(seen("1"))
        code, _, body = await get(url + "readyz")
        assert (code, json.loads(body)["ready"]) == (200, True)


async def test_the_events_begin_with_the_whole_and_go_on_with_what_changes(tmp_path: Path) -> None:
    board = a_board(tmp_path, seen("1", "2"))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(board.run)
        stream = events(board)
        first = await anext(stream)
        assert first.startswith("retry: 2000\nevent: whole\ndata: {")
        board.add(HeldOutLoss(round=7, loss=1.5))
        with trio.fail_after(20):
            while "heldout_round" not in (text := await anext(stream)) or '"heldout_round": 7' not in text:
                pass
        assert text.startswith("event: delta\ndata: {")
        await stream.aclose()  # type: ignore[attr-defined]
        nursery.cancel_scope.cancel()


async def test_a_viewer_that_does_not_keep_up_is_let_go(tmp_path: Path) -> None:
    board = a_board(tmp_path)
    with board.viewer() as deltas:
        for number in range(100):
            board._send(str(number))
        assert not board._viewers
        got = [text async for text in deltas]
    assert got == [str(n) for n in range(board_module.VIEWER_BACKLOG)]


async def test_there_are_so_many_viewers_and_no_more(tmp_path: Path) -> None:
    async with station(tmp_path) as (url, board):
        channels = [board.viewer() for _ in range(MAX_VIEWERS)]
        for channel in channels:
            channel.__enter__()
        code, headers, _ = await get(url + "api/events")
        assert (code, headers["retry-after"]) == (503, "30")
        for channel in channels:
            channel.__exit__(None, None, None)


def test_a_port_in_use_is_an_error_that_names_the_setting(tmp_path: Path) -> None:
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with (
            pytest.raises(AddressInUseError, match=r"node\.dashboard: cannot listen on 127\.0\.0\.1"),
            open_station(config(tmp_path, dashboard=f"127.0.0.1:{port}"), "1"),
        ):
            pass


async def test_a_server_that_fails_is_logged_and_nothing_else_ends() -> None:
    """given a socket that was closed behind its back; then serving ends, without an exception"""

    async def application(scope: Any, receive: Any, send: Any) -> None:
        raise AssertionError(f"not called with {scope}, {receive}, {send}")

    listener = listen("127.0.0.1", 0)
    listener.close()
    with trio.fail_after(20), capture_logs() as said:
        await serve_until_cancelled(listener, application)
    assert [(line["event"], line["log_level"]) for line in said] == [("dashboard_failed", "error")]


def test_check_tries_the_address_and_says_what_to_do(tmp_path: Path) -> None:
    with listen("127.0.0.1", 0) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        [problem] = _dashboard(config(tmp_path, dashboard=address))
    assert (problem.verdict, problem.subject) == ("problem", "dashboard")
    assert "cannot listen" in problem.text
    assert "Choose another port" in problem.fix
    [good] = _dashboard(config(tmp_path, dashboard="127.0.0.1:0"))
    assert good.verdict == "good"
    assert list(_dashboard(config(tmp_path))) == []


def test_a_mistake_in_what_is_shown_is_logged_once_and_does_not_reach_the_node(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def mistaken(history: History, fact: Fact, at: float) -> bool:
        raise KeyError(f"{fact} at {at} in {history.name}")

    monkeypatch.setattr(History, "add", mistaken)
    with open_station(config(tmp_path), "1") as made, capture_logs() as said:
        made.add(STORY[0])
        made.add(STORY[0])
    assert [line["event"] for line in said] == ["dashboard_failed"]


# --- metrics --------------------------------------------------------------------------------------------------------


def test_the_metrics_are_what_prometheus_reads_with_units_and_totals(tmp_path: Path) -> None:
    text = exposition(a_board(tmp_path, *STORY)).decode()
    found = {family.name: family for family in text_string_to_metric_families(text)}
    lost = found["prime_async_members_lost"]
    assert (lost.type, [s.value for s in lost.samples]) == ("counter", [1.0])
    assert found["prime_async_chunks_redone"].samples[0].value == 12
    assert found["prime_async_heldout_loss_nats"].samples[0].value == 2.5
    up = {s.labels["member"]: s.value for s in found["prime_async_member_up"].samples}
    assert up == {"node-1": 1.0, "node-2": 1.0, "node-3": 0.0}
    tokens = found["prime_async_member_tokens"]
    assert {s.name for s in tokens.samples} == {"prime_async_member_tokens_total"}
    for family in found.values():
        assert family.documentation
        assert "ms" not in family.name.split("_")
        assert not family.name.endswith(("_mb", "_minutes"))


# --- sinks ----------------------------------------------------------------------------------------------------------

FIGURES: list[Fact] = [
    InnerStepDone(round=0, step=1, loss=3.0, tokens=100, seconds=0.5),
    InnerStepDone(round=0, step=2, loss=float("nan"), tokens=100, seconds=0.5),
    RoundFinished(round=0, state_digest="ab", tokens=200, training_s=1.0, exchange_s=0.25),
    HeldOutLoss(round=1, loss=2.5),
    SnapshotWritten(round=1),
]


async def feed(feeder: Feeder) -> None:
    """Until all is taken, or the sink was let go."""
    for fact in FIGURES:
        feeder.add(fact)
    async with trio.open_nursery() as nursery:

        async def run() -> None:
            await feeder.run()
            nursery.cancel_scope.cancel()

        nursery.start_soon(run)
        with trio.fail_after(PATIENCE_S):
            while feeder.waiting:  # noqa: ASYNC110  (a queue without an event: nobody else waits for it)
                await trio.sleep(0.05)
        nursery.cancel_scope.cancel()


async def test_tensorboard_gets_the_figures(tmp_path: Path) -> None:
    await feed(Feeder("tensorboard", lambda: open_sink("tensorboard:logs", "node-1", {}, tmp_path), steps_before=40))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(tmp_path / "logs" / "node-1"))
    read.Reload()
    found = {tag: [(s.step, s.value) for s in read.Scalars(tag)] for tag in read.Tags()["scalars"]}
    assert found["train/loss"] == [(41, 3.0)]
    assert found["train/tokens_per_second"] == [(41, 200.0), (42, 200.0)]
    assert found["round/exchange_seconds"] == [(42, 0.25)]
    assert found["heldout/loss"] == [(42, 2.5)]


OFFLINE = """
import sys
from pathlib import Path
from prime_async.watch.sinks import open_sink

sink = open_sink(sys.argv[1], "node-1", {"run": "watched"}, Path(sys.argv[2]))
sink.write(41, {"train/loss": 3.0})
sink.write(42, {"heldout/loss": 2.5})
sink.close()
"""


def offline(tmp_path: Path, text: str, **environment: str) -> None:
    """In a process of its own: these libraries start threads, and processes, as they like."""
    known = {**os.environ, "HOME": str(tmp_path), **environment}
    words = [sys.executable, "-c", OFFLINE, text, str(tmp_path)]
    subprocess.run(words, env=known, cwd=tmp_path, check=True, timeout=PATIENCE_S, capture_output=True)


def test_wandb_gets_the_figures_offline(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    offline(tmp_path, "wandb:mine", WANDB_MODE="offline", WANDB_DIR=str(tmp_path), WANDB_SILENT="true")
    [file] = tmp_path.glob("wandb/offline-run-*/*.wandb")
    data = file.read_bytes()
    assert all(word in data for word in (b"train/loss", b"heldout/loss"))


def test_trackio_gets_the_figures_on_this_machine(tmp_path: Path) -> None:
    pytest.importorskip("trackio")
    offline(tmp_path, "trackio:mine", TRACKIO_DIR=str(tmp_path / "trackio"))
    [file] = tmp_path.glob("trackio/mine*.db")
    with closing(sqlite3.connect(file)) as database:
        rows = database.execute("SELECT step, metrics FROM metrics ORDER BY step").fetchall()
    assert [(step, json.loads(values)) for step, values in rows] == [
        (41, {"train/loss": 3.0}),
        (42, {"heldout/loss": 2.5}),
    ]


class Broken:
    def __init__(self) -> None:
        self.closed = False

    def write(self, step: int, values: Any) -> None:
        raise OSError(f"no space left for step {step} of {len(values)}")

    def close(self) -> None:
        self.closed = True


def refuses() -> Sink:
    raise RuntimeError("no login")


@pytest.mark.parametrize("opens", [Broken, refuses])
async def test_a_sink_that_fails_is_logged_and_let_go(opens: Callable[[], Sink]) -> None:
    feeder = Feeder("broken", opens)
    feeder.add(FIGURES[0])
    with capture_logs() as said, trio.fail_after(PATIENCE_S):
        await feeder.run()  # it ends by itself
    assert [line["event"] for line in said] == ["sink_failed"]


def test_a_queue_that_is_full_counts_what_it_misses() -> None:
    feeder = Feeder("slow", Broken)
    for _ in range(5000):
        feeder.add(FIGURES[0])
    assert feeder.missed == 5000 - 4096


def test_a_package_that_is_missing_is_named_with_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match="pip install wandb"):
        open_sink("wandb:mine", "node-1", {}, tmp_path)


# --- the command ----------------------------------------------------------------------------------------------------


async def test_status_shows_the_members_and_what_happened(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    async with station(tmp_path, *STORY) as (url, _):
        address = url.removeprefix("http://").rstrip("/")
        assert await trio.to_thread.run_sync(lambda: status(address)) == 0
        shown = capsys.readouterr().out
        for words in ("watched", "round 42", "node-3", "lost", "held-out loss 2.500", "done again by node-1"):
            assert words in shown
        assert await trio.to_thread.run_sync(lambda: status(address, json=True)) == 0
        assert json.loads(capsys.readouterr().out)["totals"]["round"] == 42


async def test_status_tells_the_last_of_what_happened_first_and_fits_a_terminal_of_80_columns(tmp_path: Path) -> None:
    """Given a history with a line that was written early, and renewed since: of the newest checkpoint.

    When its status is shown in a narrow terminal, and in a wide one, then that line comes first; in the narrow one no
    word is cut off, and what has no room is left out.
    """
    async with station(tmp_path, *STORY) as (url, _):
        found = await trio.to_thread.run_sync(ask, url)
    found["events"][0]["at"] = found["now"]
    narrow, wide = (shown_in(width, report(found)) for width in (80, 120))
    for shown in (narrow, wide):
        first = next(line for line in shown.splitlines() if " ago  " in line)
        assert first.split(" ago  ")[1].startswith(found["events"][0]["text"][:40])
    assert "…" not in narrow
    assert "tokens/s" in narrow
    assert "training" in narrow
    assert "received" not in narrow
    assert "received" in wide


def shown_in(width: int, what: RenderableType) -> str:
    console = Console(width=width, file=io.StringIO())
    with console.capture() as captured:
        console.print(what)
    return captured.get()


@contextmanager
def answering(data: bytes) -> Iterator[str]:
    """Something that answers every connection with the same bytes."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(data)

        thread = threading.Thread(target=answer)
        thread.start()
        yield f"127.0.0.1:{server.getsockname()[1]}"
        thread.join()


def test_status_says_what_is_wrong_with_an_address() -> None:
    with pytest.raises(ConfigError, match="expected HOST:PORT, such as 127"):
        ask("nowhere")
    with listen("127.0.0.1", 0) as closed:
        port = closed.getsockname()[1]
    with pytest.raises(EnvironmentFault, match=rf"nobody answers at 127.0.0.1:{port}.*dashboard = "):
        ask(f"127.0.0.1:{port}")


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.0 404 Not Found\r\n\r\n",
        b"HTTP/1.0 200 OK\r\n\r\nhello",
        b'HTTP/1.0 200 OK\r\n\r\n{"about": 1}',
    ],
)
def test_status_tells_a_dashboard_from_something_else(answer: bytes) -> None:
    with answering(answer) as address, pytest.raises(ProtocolError, match="no dashboard of prime-async"):
        ask(address)
