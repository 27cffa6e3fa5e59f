"""Checkpoints by themselves: files that the members of a group give each other, in somebody's own program.

A group (:mod:`prime_async.node.membership`) whose checkpoint actor shares files instead of a ledger. A file is named by
the digest of its manifest, which holds the digest of each chunk: whoever knows the name, 64 digits, gets the file whole
and right, or not at all, from whomever. It comes from all members that have it at once; one that dies is replaced by
another; what has come to disk is not fetched again.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Final, cast

import trio
from torch import Tensor

from prime_async.actors.runner import Runner
from prime_async.actors.sharing import Contents, SharingActor
from prime_async.config.schema import Config
from prime_async.errors import LocalError
from prime_async.ledger.contents import (
    MAX_MANIFEST_BYTES,
    BytesContent,
    ComingBytes,
    ComingFile,
    Content,
    FileContent,
    manifest_digest,
)
from prime_async.machines.leadership import MembershipSettings
from prime_async.machines.sharing import SharingSettings
from prime_async.messages import ChunkKey
from prime_async.node.allow import AllowList
from prime_async.node.build import CATCH_UP_BYTES, FETCH_TIMEOUTS, GETS_PER_PEER, allow_list, open_transport
from prime_async.node.membership import Group, of_group, open_group
from prime_async.node.switchboard import Performer
from prime_async.transport.base import Chunk, Transport

BYTES_PER_ELEMENT: Final = 4
"""What a chunk's elements have."""


class Shelf:
    """The files that a group shares, as one member sees them. Made by :func:`open_checkpoint`."""

    def __init__(self, config: Config, allow: AllowList) -> None:
        self._chunk_bytes = BYTES_PER_ELEMENT * config.run.exchange.chunk_elements
        self._contents = Contents(lambda peer: not allow.may_only_ask(peer), self._announce)
        self._actor: SharingActor | None = None
        self._group: Group | None = None
        self._turns: dict[bytes, trio.StrictFIFOLock] = {}
        self._left = False

    @property
    def group(self) -> Group:
        """The members: their ``view`` and ``changes``; ``events``, ``traffic``, ``contact``."""
        assert self._group is not None
        return self._group

    async def share(self, what: Path | bytes | Mapping[str, Tensor]) -> str:
        """Give this to whoever asks, until the block is left. Returns its name, 64 hexadecimal digits.

        The name follows from the bytes, and ``run.exchange.chunk_elements``: members that share the same have the same
        name for it, and all give of it. A file is read once now, held open, and given from where it is; if somebody
        writes into it afterwards it is not given any more. Tensors are copied, in the format of safetensors.

        Raises :class:`StorageError` for what cannot be read, :class:`LocalError` for more than 256 files.
        """
        self._there()
        content = await trio.to_thread.run_sync(self._content_of, what)
        digest = manifest_digest(content.manifest)
        self._add(digest, content)
        return digest.hex()

    def unshare(self, name: str) -> None:
        """Do not give it any more. Nothing if it was not shared."""
        self._contents.drop(_digest(name))

    async def fetch(self, name: str, path: Path) -> None:
        """Get the file of this ``name`` from the members that have it, to ``path``, which it replaces at the end.

        It waits for as long as nobody has it, and says so in the events. If it is at ``path`` already nothing is
        fetched. From then on this member gives it, too. What has come of it stands beside ``path``, under a name that
        ends in ``.part``: cancelled, or after a crash, the next call of the same name and path goes on from there.

        Raises :class:`LocalError` for what is no name, and after this member has left, :class:`StorageError`.
        """
        self._there()
        digest = _digest(name)
        self._contents.check_room(digest)
        async with self._turn(digest):
            content = await trio.to_thread.run_sync(self._found, path, digest)
            if content is None:
                coming = await trio.to_thread.run_sync(ComingFile, path, digest)
                content = await self._get(digest, coming)
            self._add(digest, content)

    async def fetch_bytes(self, name: str) -> bytes:
        """As :meth:`fetch`, into memory, where it stays the caller's: it is not given to others, unless it is shared.

        Cancelled, what has come is lost.
        """
        self._there()
        digest = _digest(name)
        async with self._turn(digest):
            return cast(BytesContent, await self._get(digest, ComingBytes())).data

    async def fetch_tensors(self, name: str) -> dict[str, Tensor]:
        """As :meth:`fetch_bytes`, of tensors that were shared, or of a safetensors file. They are on the host.

        Raises :class:`LocalError` if it is no such file.
        """
        data = await self.fetch_bytes(name)
        return await trio.to_thread.run_sync(_tensors, name, data)

    @asynccontextmanager
    async def _turn(self, digest: bytes) -> AsyncIterator[None]:
        """Of those that want the same file: the second finds it here, perhaps."""
        lock = self._turns.setdefault(digest, trio.StrictFIFOLock())
        try:
            async with lock:
                yield
        finally:
            if not (lock.locked() or lock.statistics().tasks_waiting):
                self._turns.pop(digest, None)

    async def _get(self, digest: bytes, coming: ComingFile | ComingBytes) -> Content:
        here = self._contents.find(digest)
        if here is not None:
            return await trio.to_thread.run_sync(_copied, here, coming)
        return await self._there().fetch(digest, coming)

    # --- what is here -------------------------------------------------------------------------------------------

    def _found(self, path: Path, digest: bytes) -> Content | None:
        """What is at ``path``, if it is that file."""
        if not path.is_file():
            return None
        content = FileContent.open(path, self._chunk_bytes, trio.from_thread.check_cancelled)
        if manifest_digest(content.manifest) == digest:
            return content
        content.close()
        return None

    def _content_of(self, what: Path | bytes | Mapping[str, Tensor]) -> Content:
        match what:
            case Path():
                return FileContent.open(what, self._chunk_bytes, trio.from_thread.check_cancelled)
            case bytes():
                return BytesContent(what, self._chunk_bytes)
            case Mapping():
                return BytesContent(_safetensors(what), self._chunk_bytes)
            case _:
                raise LocalError(f"a {type(what).__name__} cannot be shared: give a Path, bytes, or tensors by name")

    def _add(self, digest: bytes, content: Content) -> None:
        try:
            self._there()
            self._contents.add(digest, content)
        except LocalError:
            content.close()
            raise

    def _there(self) -> SharingActor:
        if self._left or self._actor is None:
            raise LocalError("this member has left its group: share and fetch inside the `async with` block")
        return self._actor

    def _announce(self) -> None:
        if self._actor is not None and not self._left:
            self._actor.announce()

    # --- as a part of a group -----------------------------------------------------------------------------------

    def settings(self, membership: MembershipSettings) -> SharingSettings:
        """See :class:`~prime_async.node.membership.Sharer`, as for the next two."""
        return SharingSettings(
            me=membership.me.id,
            window=max(2, min(GETS_PER_PEER, CATCH_UP_BYTES // self._chunk_bytes)),
            fetch_timeout_s=FETCH_TIMEOUTS * membership.failure_timeout_s,
            ask_again_s=membership.heartbeat_s,
        )

    def start(self, transport: Transport, nursery: trio.Nursery, runner: Runner) -> Performer:
        actor = SharingActor(transport, self._contents, self._chunk_bytes, nursery, runner.post, runner.retract)
        self._actor = actor
        return actor

    async def provide(self, peer: str, key: ChunkKey) -> Chunk:
        return await self._contents.provide(peer, key)

    def close(self) -> None:
        """Nothing is given any more, and nothing comes."""
        self._left = True
        self._contents.close()
        if self._actor is not None:
            self._actor.close()


def _digest(name: str) -> bytes:
    if not re.fullmatch("[0-9a-f]{64}", name):
        raise LocalError(
            f"{name!r} is not the name of a shared file: give the 64 hexadecimal digits that share returned"
        )
    return bytes.fromhex(name)


def _copied(content: Content, coming: ComingFile | ComingBytes) -> Content:
    """What is here already, in another place."""
    manifest = content.manifest
    try:
        for chunk in coming.begin(manifest, trio.from_thread.check_cancelled):
            trio.from_thread.check_cancelled()
            coming.write(chunk, content.read(chunk))
        return coming.finish()
    except BaseException:
        coming.leave()
        raise


def _safetensors(tensors: Mapping[str, Tensor]) -> bytes:
    from safetensors.torch import save

    try:
        return save({name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()})
    except (TypeError, AttributeError, ValueError, RuntimeError) as error:
        raise LocalError(f"these tensors cannot be shared: {error}") from error


def _tensors(name: str, data: bytes) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        return load(data)
    except SafetensorError as error:
        raise LocalError(f"{name} is no safetensors file ({error}): fetch it as bytes, or to a path") from error


@asynccontextmanager
async def open_checkpoint(config: Config, *, transport: Transport | None = None) -> AsyncIterator[Shelf]:
    """Share files with the other members of a group, and fetch theirs, for as long as the block lasts.

    Of ``config`` counts what does for :func:`prime_async.open_membership`, and ``run.exchange.chunk_elements``: a chunk
    has four bytes for each; it is equal on all members. Leaving the block, cancellation and errors: as there. Files are
    given for as long as the block lasts; a member that comes again shares them again.
    """
    config, allow = of_group(config, "files", config.run.exchange.chunk_elements), allow_list(config.node)
    shelf = Shelf(config, allow)
    async with AsyncExitStack() as stack:
        if transport is None:
            largest = max(shelf._chunk_bytes, MAX_MANIFEST_BYTES)
            transport = await stack.enter_async_context(open_transport(config.node, largest, allow))
        shelf._group = Group(config, transport, allow, files=shelf)
        try:
            await stack.enter_async_context(open_group(shelf._group))
            yield shelf
        finally:
            shelf.close()
