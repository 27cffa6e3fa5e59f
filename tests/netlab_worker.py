"""A process with a ZeroMQ transport that a test steers from outside: in a host of the network lab, say.

:class:`Remote` is the test's side. It writes JSON lines to the process, ``{"id": 3, "do": "get", ...}``, and reads an
answer to each, ``{"id": 3, "result": ...}``, and what the transport tells, ``{"notice": "Received", ...}``.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any, Final

import trio
from blake3 import blake3

from prime_async.bench.netlab import Lab, address
from prime_async.errors import PrimeAsyncError
from prime_async.messages import ChunkInfo, ChunkKey, Goodbye
from prime_async.transport import keys
from prime_async.transport.base import Chunk, Denied, Reachable, Received, Transport
from prime_async.transport.zeromq import ZmqSettings, open_zmq
from tests.processes import ROOT

PATIENCE_S: Final = 60.0
"""How long a test waits for what must happen."""


def key_of(chunk: int) -> ChunkKey:
    return ChunkKey(kind="mean", round=0, chunk=chunk)


def content(chunk: int, size: int) -> bytes:
    """What chunk number ``chunk`` of ``size`` bytes holds, everywhere."""
    return Random(chunk).randbytes(size)


class Remote:
    """The test's side of one process."""

    def __init__(self, name: str, process: trio.Process) -> None:
        self.name = name
        self.id = ""
        self.control = ""
        self.bulk = ""
        self.heard: list[tuple[float, str, str]] = []  # (when, peer, text) of control messages, on trio's clock
        self.reachable: list[tuple[float, str, bool]] = []  # (when, peer, whether)
        self._process = process
        self._answers: dict[int, Any] = {}
        self._last = 0
        self._writing = trio.Lock()
        self._changed = trio.Event()

    async def dial(self, other: Remote, bulk: bool = True) -> None:
        await self.ask("dial", peer=other.id, control=other.control, bulk=other.bulk if bulk else "")

    async def send(self, other: Remote, text: str) -> bool:
        return bool(await self.ask("send", peer=other.id, text=text))

    async def hold(self, chunks: int, size: int) -> None:
        """Serve ``chunks`` chunks of ``size`` bytes."""
        await self.ask("hold", chunks=chunks, size=size)

    async def fetch(self, other: Remote, chunks: int, size: int, timeout_s: float = PATIENCE_S) -> float:
        """Get all chunks of ``other`` at once, and compare them. Gives the seconds that it took."""
        result = await self.ask("fetch", peer=other.id, chunks=chunks, size=size, timeout_s=timeout_s)
        assert result["error"] is None, f"{self.name} from {other.name}: {result['error']}"
        return float(result["took_s"])

    async def fetch_error(self, other: Remote, timeout_s: float) -> str:
        """The name of the error with which a get ends."""
        result = await self.ask("fetch", peer=other.id, chunks=1, size=1, timeout_s=timeout_s)
        return str(result["error"]).partition(":")[0]

    async def until(self, condition: Callable[[], bool], limit_s: float = PATIENCE_S) -> None:
        """Wait until ``condition`` holds, which is looked at whenever the process tells something."""
        with trio.fail_after(limit_s):
            while not condition():
                await self._changed.wait()

    async def until_reachable(self, other: Remote, reachable: bool, limit_s: float = PATIENCE_S) -> None:
        """Wait until the last notice about ``other`` says so."""
        await self.until(lambda: [r for _, p, r in self.reachable if p == other.id][-1:] == [reachable], limit_s)

    async def ask(self, do: str, **arguments: object) -> Any:
        assert self._process.stdin is not None
        self._last += 1
        number = self._last
        line = json.dumps({"id": number, "do": do, **arguments}) + "\n"
        async with self._writing:
            await self._process.stdin.send_all(line.encode())
        await self.until(lambda: number in self._answers, 4 * PATIENCE_S)
        return self._answers.pop(number)

    async def listen(self) -> None:
        """Read what the process says, until it ends."""
        assert self._process.stdout is not None
        buffer = b""
        async for data in self._process.stdout:
            *lines, buffer = (buffer + data).split(b"\n")
            for line in lines:
                self._take(json.loads(line))
            self._changed.set()
            self._changed = trio.Event()

    def _take(self, item: dict[str, Any]) -> None:
        match item:
            case {"id": number, "result": result}:
                self._answers[number] = result
            case {"started": [str(id), str(control), str(bulk)]}:
                self.id, self.control, self.bulk = id, control, bulk
            case {"notice": "Received", "peer": peer, "text": text}:
                self.heard.append((trio.current_time(), peer, text))
            case {"notice": "Reachable", "peer": peer, "reachable": reachable}:
                self.reachable.append((trio.current_time(), peer, reachable))
            case _:
                raise AssertionError(f"{self.name} says {item}")


@asynccontextmanager
async def remote(lab: Lab, host: int, **settings: object) -> AsyncIterator[Remote]:
    """A transport in ``host`` of the lab, for as long as the block lasts. ``settings``: of :class:`ZmqSettings`."""
    arguments = json.dumps({"advertise": address(host), **settings})
    command = lab.command(host, [sys.executable, "-m", "tests.netlab_worker", arguments])
    process = await trio.lowlevel.open_process(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=Path(ROOT))
    try:
        async with trio.open_nursery() as nursery:
            node = Remote(f"host {host}", process)
            nursery.start_soon(node.listen)
            await node.until(lambda: bool(node.id))
            yield node
            nursery.cancel_scope.cancel()
    finally:
        with trio.CancelScope(shield=True):
            process.kill()
            await process.wait()


# The process's side.


@dataclass
class _Shelf:
    chunks: dict[ChunkKey, bytes] = field(default_factory=dict)

    async def provide(self, peer: str, key: ChunkKey) -> Chunk:  # noqa: ARG002
        if key not in self.chunks:
            await trio.sleep_forever()
        payload = self.chunks[key]
        return Chunk(ChunkInfo(digest=blake3(payload).digest()), memoryview(payload))


class _Worker:
    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._shelf = _Shelf()
        transport.serve(self._shelf)

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._tell)
            buffer = b""
            async for data in trio.lowlevel.FdStream(sys.stdin.fileno()):
                *lines, buffer = (buffer + data).split(b"\n")
                for line in lines:
                    nursery.start_soon(self._obey, json.loads(line))
            nursery.cancel_scope.cancel()

    async def _tell(self) -> None:
        async for notice in self._transport.notices:
            match notice:
                case Received(peer=peer, message=Goodbye(text=text)):
                    say({"notice": "Received", "peer": peer, "text": text})
                case Reachable(peer=peer, reachable=reachable):
                    say({"notice": "Reachable", "peer": peer, "reachable": reachable})
                case Denied() | Received():
                    pass
                case _:
                    say({"notice": repr(notice)})

    async def _obey(self, item: dict[str, Any]) -> None:
        say({"id": item["id"], "result": await self._do(item)})

    async def _do(self, item: dict[str, Any]) -> Any:
        match item:
            case {"do": "dial", "peer": peer, "control": control, "bulk": bulk}:
                self._transport.dial(peer, control, bulk)
            case {"do": "send", "peer": peer, "text": text}:
                return self._transport.send(peer, Goodbye(incarnation=0, text=text))
            case {"do": "hold", "chunks": chunks, "size": size}:
                self._shelf.chunks.update({key_of(chunk): content(chunk, size) for chunk in range(chunks)})
            case {"do": "fetch", "peer": peer, "chunks": chunks, "size": size, "timeout_s": timeout_s}:
                return await self._fetch(peer, chunks, size, timeout_s)
        return None

    async def _fetch(self, peer: str, chunks: int, size: int, timeout_s: float) -> dict[str, Any]:
        wanted = [content(chunk, size) for chunk in range(chunks)]
        errors: list[str] = []
        began = trio.current_time()

        async def one(chunk: int) -> None:
            try:
                if (await self._transport.get(peer, key_of(chunk), timeout_s)).payload != wanted[chunk]:
                    errors.append(f"chunk {chunk} is not what it was")
            except PrimeAsyncError as error:
                errors.append(f"{type(error).__name__}: {error}")

        async with trio.open_nursery() as nursery:
            for chunk in range(chunks):
                nursery.start_soon(one, chunk)
        return {"took_s": trio.current_time() - began, "error": errors[0] if errors else None}


def say(item: dict[str, Any]) -> None:
    print(json.dumps(item), flush=True)


async def main() -> None:
    settings = ZmqSettings(
        **{"key": keys.generate(), "allow": lambda _id: True, "io_threads": 1, **json.loads(sys.argv[1])}
    )
    async with open_zmq(settings) as transport:
        say({"started": [transport.id, transport.control_address, transport.bulk_address]})
        await _Worker(transport).run()


if __name__ == "__main__":
    trio.run(main)
