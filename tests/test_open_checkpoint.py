"""Files that members of a group give each other: real nodes, in memory; README's program over the real network."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import trio

import prime_async.guest
from prime_async.config.schema import Config
from prime_async.errors import LocalError, RefusedError, StorageError
from prime_async.guest.side import trio_side
from prime_async.ledger.contents import BytesContent
from prime_async.machines.facts import Fact, FileFetched, FileNowhere, PeerDropped
from prime_async.node import Shelf, open_checkpoint, open_membership
from tests.memory_nodes import LIMIT_S, Place
from tests.programs import block, program, replayed
from tests.zeromq_nodes import allow, configuration, key_of

pytestmark = pytest.mark.xdist_group("real time")
TIMES = {"heartbeat_s": 0.05, "failure_timeout_s": 0.5}
CHUNK = 1024
DATA = random.Random(1).randbytes(64 * CHUNK + 100)
NOBODYS = "0123456789abcdef" * 4


@asynccontextmanager
async def member(place: Place, name: int) -> AsyncIterator[Shelf]:
    async with (
        place.network.open(place.id(name)) as transport,
        open_checkpoint(place.config(name, **TIMES), transport=transport) as shelf,
    ):
        yield shelf


@asynccontextmanager
async def some(place: Place, count: int) -> AsyncIterator[list[Shelf]]:
    with trio.fail_after(LIMIT_S):
        async with AsyncExitStack() as stack:
            shelves = [await stack.enter_async_context(member(place, n)) for n in range(count)]
            for shelf in shelves:
                await has(shelf, count)
            yield shelves


async def has(shelf: Shelf, count: int) -> None:
    async for change in shelf.group.changes():
        if len(change.view.members) == count:
            return


async def next_fact(shelf: Shelf, kind: type[Fact]) -> Any:
    """The next fact of a kind; others are passed over."""
    async for fact in shelf.group.events:
        if isinstance(fact, kind):
            return fact
    raise AssertionError(f"the events ended without a {kind.__name__}")


def names_in(directory: Path, pattern: str) -> list[str]:
    return sorted(path.name for path in directory.glob(pattern))


async def test_a_file_comes_from_all_that_share_it_and_is_given_on(place: Place, tmp_path: Path) -> None:
    """Given two that share the same file, when a third fetches it, then both give of it; and a fourth gets it of three.

    And all logs replay.
    """
    (tmp_path / "model").write_bytes(DATA)
    async with some(place, 4) as [first, second, third, fourth]:
        name = await first.share(tmp_path / "model")
        assert await second.share(DATA) == name

        await third.fetch(name, tmp_path / "copy")
        assert (tmp_path / "copy").read_bytes() == DATA
        fact = await next_fact(third, FileFetched)
        assert (fact.digest, fact.providers) == (name, 2)
        assert fact.fetched_bytes == len(DATA)

        assert await fourth.fetch_bytes(name) == DATA
        assert (await next_fact(fourth, FileFetched)).providers == 3
        first.unshare(name)
        second.unshare(name)
        third.unshare(name)
        with trio.move_on_after(0.2) as scope:
            await fourth.fetch_bytes(name)
        assert scope.cancelled_caught
    assert all(place.replayed(n) > 20 for n in range(4))
    assert names_in(tmp_path, "[cm]o*") == ["copy", "model"]


async def test_tensors_come_as_they_were(place: Place) -> None:
    tensors = {
        "weight": torch.randn(30, 20).T,
        "steps": torch.tensor(7),
        "half": torch.randn(5, dtype=torch.float32).bfloat16().requires_grad_(),
    }
    async with some(place, 2) as [first, second]:
        name = await first.share(tensors)
        assert await second.share({k: t.clone() for k, t in tensors.items()}) == name
        second.unshare(name)

        came = await second.fetch_tensors(name)

        assert came.keys() == tensors.keys()
        assert all(torch.equal(came[k], t) and came[k].dtype == t.dtype for k, t in tensors.items())
        no_tensors = await first.share(b"hello")
        with pytest.raises(LocalError, match="is no safetensors file"):
            await second.fetch_tensors(no_tensors)


async def test_a_file_of_nothing_and_one_of_a_single_byte_come_too(place: Place, tmp_path: Path) -> None:
    async with some(place, 2) as [first, second]:
        for data in (b"", b"x"):
            name = await first.share(data)
            assert await second.fetch_bytes(name) == data
            await second.fetch(name, tmp_path / "copy")
            assert (tmp_path / "copy").read_bytes() == data


async def test_a_wrong_chunk_is_fetched_elsewhere_and_counted_against_who_sent_it(place: Place) -> None:
    """Given a member that gives wrong bytes under a right manifest, then the file comes from the other, whole."""

    class Lying(BytesContent):
        def read(self, chunk: int) -> memoryview:
            return memoryview(bytes(super().read(chunk).nbytes))

    async with some(place, 3) as [honest, liar, third]:
        name = await honest.share(DATA)
        liar._contents.add(bytes.fromhex(name), Lying(DATA, CHUNK))

        assert await third.fetch_bytes(name) == DATA

        assert third.group.traffic.violations[liar.group.id] >= 1
        assert honest.group.id not in third.group.traffic.violations
        dropped = await next_fact(third, PeerDropped)
        assert dropped.peer == liar.group.id
        assert "is not what its manifest says" in dropped.reason
    assert place.replayed(2) > 20


async def test_a_wrong_manifest_is_fetched_elsewhere_and_counted(place: Place) -> None:
    async with some(place, 3) as [honest, liar, third]:
        name = await honest.share(DATA)
        liar._contents.add(bytes.fromhex(name), BytesContent(DATA[::-1], CHUNK))
        honest.unshare(name)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(third.fetch_bytes, name)
            while not third.group.traffic.violations:  # noqa: ASYNC110
                await trio.sleep(0.001)
            await honest.share(DATA)
        dropped = await next_fact(third, PeerDropped)
        assert "does not have the digest that names its file" in dropped.reason


async def test_a_file_that_somebody_writes_to_is_not_given_any_more(place: Place, tmp_path: Path) -> None:
    """Given two that share a file, when one's is changed, then the other gives all of it, and nobody is blamed."""
    (tmp_path / "model").write_bytes(DATA)
    async with some(place, 3) as [first, second, third]:
        name = await first.share(tmp_path / "model")
        await second.share(DATA)
        (tmp_path / "model").write_bytes(DATA[::-1])

        assert await third.fetch_bytes(name) == DATA

        assert third.group.traffic.violations == {}
        assert (await next_fact(third, FileFetched)).providers == 1


async def test_a_member_that_dies_in_the_middle_is_replaced(place: Place, tmp_path: Path) -> None:
    """Given two that give, when one is cut off before the end, then all comes, the rest of it from the other."""
    async with some(place, 3) as [first, second, third]:
        name = await first.share(DATA)
        await second.share(DATA)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(third.fetch, name, tmp_path / "copy")
            await until_received(third, len(DATA) // 4)
            place.network.cut(second.group.id)
        assert (tmp_path / "copy").read_bytes() == DATA
        fact = await next_fact(third, FileFetched)
        assert fact.providers == 2
    assert place.replayed(2) > 20


async def until_received(shelf: Shelf, size: int) -> None:
    while shelf.group.traffic.bulk_received < size:  # noqa: ASYNC110  (nothing tells a user)
        await trio.sleep(0.0005)


async def test_what_has_come_before_a_restart_is_not_fetched_again(place: Place, tmp_path: Path) -> None:
    """Given a fetch that ended half-way with its node, when the node is back, then the rest comes; and then nothing."""
    path, data = tmp_path / "copy", 4 * DATA
    with trio.fail_after(LIMIT_S):
        async with member(place, 0) as first:
            name = await first.share(data)
            with trio.CancelScope() as life:
                async with member(place, 1) as second, trio.open_nursery() as nursery:
                    nursery.start_soon(second.fetch, name, path)
                    await until_received(second, len(data) // 2)
                    life.cancel()
                    await trio.lowlevel.checkpoint()
            assert not path.exists()
            assert names_in(tmp_path, "copy.*") == [f"copy.{name[:16]}.part"]

            async with member(place, 1) as second:
                await second.fetch(name, path)
                assert path.read_bytes() == data
                fact = await next_fact(second, FileFetched)
                assert 0 < fact.fetched_bytes < 0.75 * len(data)  # a few chunks had come, and were not stored

                sent = first.group.traffic.bulk_sent
                await second.fetch(name, path)
                await second.fetch(name, tmp_path / "another")
                assert (tmp_path / "another").read_bytes() == data
            async with member(place, 1) as second:
                await second.fetch(name, path)
                assert second._contents.numbers
            assert first.group.traffic.bulk_sent == sent
    assert names_in(tmp_path, "*.part") == []


async def test_what_nobody_has_is_waited_for_and_said(place: Place) -> None:
    async with some(place, 2) as [first, second]:
        came: list[bytes] = []

        async def fetch() -> None:
            came.append(await second.fetch_bytes(name))

        name = await first.share(DATA)
        first.unshare(name)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(fetch)
            async for fact in second.group.events:
                if isinstance(fact, FileNowhere):
                    assert (fact.digest, fact.members) == (name, 1)
                    break
            await first.share(DATA)
        assert came == [DATA]


async def test_several_files_come_at_once_and_one_that_nobody_has_holds_up_none(place: Place, tmp_path: Path) -> None:
    files = {f"file {n}": random.Random(n).randbytes(n * CHUNK) for n in range(6)}
    async with some(place, 2) as [first, second]:
        names = {file: await first.share(data) for file, data in files.items()}
        async with trio.open_nursery() as waiting:
            waiting.start_soon(second.fetch_bytes, NOBODYS)
            async with trio.open_nursery() as nursery:
                for file, name in names.items():
                    nursery.start_soon(second.fetch, name, tmp_path / file)
                    nursery.start_soon(second.fetch, name, tmp_path / f"{file} again")
                    nursery.start_soon(second.fetch_bytes, name)
            waiting.cancel_scope.cancel()
        for file, data in files.items():
            assert (tmp_path / file).read_bytes() == (tmp_path / f"{file} again").read_bytes() == data


async def test_a_fetch_that_was_given_up_can_be_made_anew_to_another_place(place: Place, tmp_path: Path) -> None:
    async with some(place, 2) as [first, second]:
        name = await first.share(DATA)
        for n in range(5):
            with trio.CancelScope() as scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(second.fetch, name, tmp_path / f"try {n}")
                    await until_received(second, second.group.traffic.bulk_received + n * CHUNK)
                    scope.cancel()
        assert await second.fetch_bytes(name) == DATA
        await second.fetch(name, tmp_path / "copy")
        assert (tmp_path / "copy").read_bytes() == DATA


async def test_what_cannot_be_shared_or_fetched_is_told_at_once(place: Place, tmp_path: Path) -> None:
    async with some(place, 1) as [alone]:
        with pytest.raises(StorageError, match="none: the file cannot be read"):
            await alone.share(tmp_path / "none")
        with pytest.raises(StorageError, match="a directory cannot be shared"):
            await alone.share(tmp_path)
        with pytest.raises(LocalError, match="a str cannot be shared: give a Path, bytes, or tensors by name"):
            await alone.share("model")  # type: ignore[arg-type]
        with pytest.raises(LocalError, match="these tensors cannot be shared"):
            await alone.share({"x": [1.0]})  # type: ignore[dict-item]
        for name in ("", "model", NOBODYS.upper(), NOBODYS + "0"):
            with pytest.raises(LocalError, match="is not the name of a shared file: give the 64 hexadecimal digits"):
                await alone.fetch(name, tmp_path / "copy")
            with pytest.raises(LocalError, match="is not the name"):
                alone.unshare(name)
        with pytest.raises(StorageError, match="nothing can be written there"):
            await alone.fetch(NOBODYS, tmp_path / "no" / "such")
        with pytest.raises(StorageError, match="is a directory"):
            await alone.fetch(NOBODYS, tmp_path)
        for n in range(256):
            await alone.share(bytes([n]))
        with pytest.raises(LocalError, match="256 files are shared already"):
            await alone.share(b"one more")
        with pytest.raises(LocalError, match="256 files are shared already"):
            await alone.fetch(NOBODYS, tmp_path / "copy")
        alone.unshare(await alone.share(b"\0"))
        await alone.share(b"one more")
    for call in (lambda: alone.share(b"x"), lambda: alone.fetch_bytes(NOBODYS)):
        with pytest.raises(LocalError, match="this member has left its group"):
            await call()
    assert names_in(tmp_path, "*.part") == []


async def test_a_call_that_waits_when_the_member_leaves_is_told(place: Place) -> None:
    async with some(place, 1) as [alone], trio.open_nursery() as nursery:

        async def wait() -> None:
            with pytest.raises(LocalError, match="has left its group, and the file had not come"):
                await alone.fetch_bytes(NOBODYS)

        nursery.start_soon(wait)
        await trio.testing.wait_all_tasks_blocked(0.01)
        alone.group.stop()


async def test_a_disk_that_is_full_ends_the_fetch_and_nothing_else(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prime_async.ledger.contents import ComingFile
    from prime_async.ledger.errors import DiskFullError

    def full(*_: object) -> None:
        raise DiskFullError("the disk is full")

    async with some(place, 2) as [first, second]:
        name = await first.share(DATA)
        with monkeypatch.context() as patch:
            patch.setattr(ComingFile, "write", full)
            with pytest.raises(DiskFullError):
                await second.fetch(name, tmp_path / "copy")
        await second.fetch(name, tmp_path / "copy")
        assert (tmp_path / "copy").read_bytes() == DATA


async def test_who_has_other_chunks_or_shares_nothing_is_of_another_group(place: Place) -> None:
    with trio.fail_after(LIMIT_S):
        async with member(place, 0):
            with pytest.raises(RefusedError, match=r"run\.exchange\.chunk_elements: 256 in the run, 512 at the node"):
                async with (
                    place.network.open(place.id(1)) as transport,
                    open_checkpoint(place.config(1, **TIMES, exchange={"chunk_elements": 512}), transport=transport),
                ):
                    pass
            with pytest.raises(RefusedError, match='"files" in the run, "members" at the node'):
                async with (
                    place.network.open(place.id(2)) as transport,
                    open_membership(place.config(2, **TIMES), transport=transport),
                ):
                    pass


def test_files_come_in_asyncio_too(place: Place, tmp_path: Path) -> None:
    @asynccontextmanager
    async def guest(number: int) -> AsyncIterator[prime_async.guest.GuestShelf]:
        async with trio_side() as side, side.holding(place.network.open(place.id(number))) as transport:
            config = place.config(number, **TIMES)
            async with prime_async.guest.open_checkpoint(config, transport=transport) as shelf:
                yield shelf

    async def main() -> None:
        async with asyncio.timeout(LIMIT_S), guest(0) as first, guest(1) as second:
            name = await first.share({"x": torch.arange(1000.0)})
            assert torch.equal((await second.fetch_tensors(name))["x"], torch.arange(1000.0))
            await second.fetch(name, tmp_path / "copy")
            assert await first.fetch_bytes(name) == (tmp_path / "copy").read_bytes()
            first.unshare(name)
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.05):
                    await second.fetch_bytes(NOBODYS)
            assert {m.name for m in second.group.view.members} == {"n0", "n1"}

    asyncio.run(main())
    with pytest.raises(RuntimeError):
        trio.lowlevel.current_trio_token()


# --- processes ------------------------------------------------------------------------------------------------------

BIG = 48 << 20
SLOW: dict[str, Any] = {"heartbeat_s": 0.2, "failure_timeout_s": 1.5, "exchange": {"chunk_elements": 65536}}
"""Chunks of 256 KiB."""


def big_file(home: Path) -> Path:
    (home / "files.py").write_text(block("python", "open_checkpoint"))
    path = home / "model"
    path.write_bytes(random.Random(2).randbytes(BIG))
    return path


def joining(config: Config, contact: str) -> Config:
    return config.model_copy(update={"node": config.node.model_copy(update={"join": (contact,)})})


async def test_a_process_that_is_killed_while_it_gives_is_replaced_by_another(tmp_path: Path) -> None:
    """Given README's program giving a file in two processes, and a member here that fetches it over the real network.

    When one process is killed in the middle, then the file comes whole, from both, and its chunks of the other.
    """
    model = big_file(tmp_path)
    configs = [configuration(tmp_path, name, **SLOW) for name in ("here", "one", "two")]
    allow(tmp_path, "here", key_of(tmp_path, "one"), key_of(tmp_path, "two"))

    with trio.fail_after(100):
        async with AsyncExitStack() as stack:
            here = await stack.enter_async_context(open_checkpoint(configs[0]))
            one, two = [
                await stack.enter_async_context(
                    program(tmp_path, joining(config, here.group.contact), "files.py", str(model))
                )
                for config in configs[1:]
            ]
            name = await one.until("I give ")
            assert await two.until("I give ") == name
            async with trio.open_nursery() as nursery:
                nursery.start_soon(here.fetch, name, tmp_path / "copy")
                await until_received(here, BIG // 4)
                one.process.kill()
                assert here.group.traffic.bulk_received < BIG * 3 // 4
            fact = await next_fact(here, FileFetched)
            assert (fact.fetched_bytes, fact.providers) == (BIG, 2)
    assert (tmp_path / "copy").read_bytes() == model.read_bytes()
    assert replayed(tmp_path / "here" / "messages.log") > 200


async def test_a_process_that_is_killed_while_it_fetches_goes_on_from_there(tmp_path: Path) -> None:
    """Given README's program that fetches a file from here, when it is killed in the middle and started again.

    Then what had come is not sent again.
    """
    model = big_file(tmp_path)
    configs = [configuration(tmp_path, name, **SLOW) for name in ("here", "one")]
    allow(tmp_path, "here", key_of(tmp_path, "one"))
    copy = tmp_path / "copy"

    with trio.fail_after(100):
        async with open_checkpoint(configs[0]) as here:
            name = await here.share(model)
            there = joining(configs[1], here.group.contact)
            async with program(tmp_path, there, "files.py", str(copy), name) as one:
                while here.group.traffic.bulk_sent < BIG // 2:  # noqa: ASYNC110
                    await trio.sleep(0.0005)
                one.process.kill()
                await one.process.wait()
            assert not copy.exists()
            sent = here.group.traffic.bulk_sent
            async with program(tmp_path, there, "files.py", str(copy), name) as one:
                assert await one.until("I give ") == name
            assert 0 < here.group.traffic.bulk_sent - sent < 0.75 * BIG
    assert copy.read_bytes() == model.read_bytes()
