"""How a member of a group that shares files gets one: from whom each chunk, and what it tells others of its own.

The checkpoint actor's machine where there is no ledger. The rules:

* A file is known by the digest of its manifest, which holds the digest of each chunk. In keys, events and effects the
  file's number, made of the digest, stands where a ledger has a round; the manifest, which the whole digest proves, is
  what counts.
* Whoever wants a file asks all members what they have (``AskLedger``), again and again; the numbers of whole files are
  among the answer's snapshots. First the manifest is fetched, then what is missing here, from all that have it at once
  (:mod:`~prime_async.machines.providers`). What came stays, whoever dies.
* A chunk that is not as the manifest says, or a manifest without its digest, is asked of others, and of the member that
  sent it nothing any more.
* Several files may be wanted at once. If nobody has one that is said, once, and it is waited for.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from msgspec import Struct

from prime_async.machines.catchup import Filling, manifest_key, state_key
from prime_async.machines.facts import FileFetched, FileNowhere, LedgerTrouble
from prime_async.machines.providers import Download, Providers
from prime_async.machines.units import to_ms
from prime_async.machines.vocabulary import (
    ChunkStored,
    Effect,
    Event,
    Fetched,
    FetchFailed,
    FetchFile,
    FinishSnapshot,
    Heard,
    LeaveFile,
    LedgerAt,
    LedgerFailed,
    ManifestRead,
    OpenSnapshot,
    ReadManifest,
    Report,
    RunAt,
    Send,
    SnapshotOpened,
    SnapshotStored,
    StoreChunk,
    Tick,
    ViewChanged,
    WakeAt,
)
from prime_async.messages import AskLedger, ChunkKey, Holdings, Message, file_number

NOWHERE_AFTER = 10
"""After so many times of asking in vain it is said that nobody has the file."""


class SharingSettings(Struct, frozen=True, kw_only=True):
    """What a sharing machine is made with. ``window``: gets under way from each member."""

    me: str
    window: int = 2
    fetch_timeout_s: float = 60.0
    ask_again_s: float = 1.0


@dataclass(slots=True)
class Wanted:
    """A file that is being fetched. ``filling``: once its manifest is verified."""

    digest: bytes
    since: float
    filling: Filling | None = None
    come: int = 0  # bytes of the chunks that came
    givers: set[str] = field(default_factory=set)
    asked_in_vain: int = 0


@dataclass(slots=True)
class Sharing:
    """See the module's rules. ``here``: the numbers of the files that this node has whole."""

    settings: SharingSettings
    here: tuple[int, ...] = ()
    files: dict[int, Wanted] = field(default_factory=dict)
    asked_at: float | None = None
    wake_at: float | None = None
    providers: Providers = field(init=False)
    download: Download = field(init=False)

    def __post_init__(self) -> None:
        s = self.settings
        self.providers = Providers(me=s.me, window=s.window, pause_s=5 * s.ask_again_s)
        self.download = Download(providers=self.providers, timeout_s=s.fetch_timeout_s)

    # --- the one way in -----------------------------------------------------------------------------------------

    def handle(self, now: float, event: Event) -> list[Effect]:
        out: list[Effect] = []
        match event:
            case FetchFile(digest=digest):
                self._want(now, digest)
            case LeaveFile(digest=digest):
                self._leave(file_number(digest), out)
            case LedgerAt(snapshots=numbers):
                self.here = numbers
            case ViewChanged(view=view):
                self.providers.see(view)
                self.download.leave_the_gone(out)
            case Heard(peer=peer, message=message):
                self._on_message(peer, message, out)
            case Tick():
                self.wake_at = None
            case RunAt():
                pass  # of a run without rounds
            case _:
                self._on_outcome(now, event, out)
        self._go_on(now, out)
        return out

    def _want(self, now: float, digest: bytes) -> None:
        number = file_number(digest)
        if number not in self.files:
            self.files[number] = Wanted(digest=digest, since=now)
            self.download.want([manifest_key(number)], first=True)
            self.asked_at = None

    def _leave(self, number: int, out: list[Effect]) -> None:
        if self.files.pop(number, None) is not None:
            self.download.forget(number, out)

    def _on_message(self, peer: str, message: Message, out: list[Effect]) -> None:
        if peer not in self.providers.members:
            return
        if isinstance(message, Holdings):
            self.providers.heard(peer, message)
        elif isinstance(message, AskLedger):
            out.append(Send(peer=peer, message=Holdings(round=0, means_from=0, snapshots=self.here)))

    # --- asking -------------------------------------------------------------------------------------------------

    def _go_on(self, now: float, out: list[Effect]) -> None:
        """Ask for whatever can be asked for now."""
        if not self.files:
            return
        if self.asked_at is None or now >= self.asked_at + self.settings.ask_again_s:
            self.asked_at = now
            self._ask(now, out)
        self.download.pump(now, out)
        at = self.asked_at + self.settings.ask_again_s
        if self.wake_at is None or self.wake_at > at:
            self.wake_at = at
            out.append(WakeAt(at=at))

    def _ask(self, now: float, out: list[Effect]) -> None:
        out += [Send(peer=peer, message=AskLedger()) for peer in self.providers.members]
        for number, file in self.files.items():
            somebody = self.providers.somebody_has(manifest_key(number))
            file.asked_in_vain = 0 if somebody else file.asked_in_vain + 1
            if file.asked_in_vain == NOWHERE_AFTER:
                members, seconds = len(self.providers.members), to_ms(now - file.since)
                out.append(Report(fact=FileNowhere(digest=file.digest.hex(), members=members, seconds=seconds)))

    # --- what comes ---------------------------------------------------------------------------------------------

    def _on_outcome(self, now: float, event: Event, out: list[Effect]) -> None:
        match event:
            case Fetched(peer=peer, key=key, size=size):
                if self.download.came(now, peer, key, size, out):
                    self._take(peer, key, size, out)
            case FetchFailed(peer=peer, key=key, fault=fault):
                self.download.failed(now, peer, key, fault)
            case ManifestRead():
                self._on_manifest(event, out)
            case SnapshotOpened(round=number, missing=missing):
                self._on_opened(number, missing, out)
            case ChunkStored(key=key):
                self._on_stored(key, out)
            case SnapshotStored(round=number):
                self._on_whole(now, number, out)
            case LedgerFailed(round=number, damaged=damaged, text=text):
                out.append(Report(fact=LedgerTrouble(round=0, damaged=damaged, text=text)))
                self._leave(number, out)
            case _:
                raise TypeError(f"sharing has no use for {type(event).__name__}")

    def _take(self, peer: str, key: ChunkKey, size: int, out: list[Effect]) -> None:
        file = self.files[key.round]  # of one that was left nothing is under way
        if key.kind == "manifest":
            out.append(ReadManifest(peer=peer, key=key))
        else:
            file.come += size
            file.givers.add(peer)
            out.append(StoreChunk(peer=peer, key=key))

    def _on_manifest(self, read: ManifestRead, out: list[Effect]) -> None:
        file = self.files.get(read.round)
        if file is None or file.filling is not None or file.digest != read.digest:
            return  # it was left, and perhaps is wanted anew
        self.download.done(manifest_key(read.round))
        file.filling = Filling()
        out.append(OpenSnapshot(round=read.round))

    def _on_opened(self, number: int, missing: tuple[int, ...], out: list[Effect]) -> None:
        file = self.files.get(number)
        if file is not None and file.filling is not None and file.filling.missing is None:
            file.filling.missing = set(missing)
            self.download.want([state_key(number, chunk) for chunk in missing])
            self._close(number, file.filling, out)

    def _on_stored(self, key: ChunkKey, out: list[Effect]) -> None:
        self.download.done(key)
        file = self.files.get(key.round)
        if file is not None and file.filling is not None and file.filling.missing is not None:
            file.filling.missing.discard(key.chunk)
            self._close(key.round, file.filling, out)

    def _close(self, number: int, filling: Filling, out: list[Effect]) -> None:
        if not filling.missing and not filling.closing:
            filling.closing = True
            out.append(FinishSnapshot(round=number))

    def _on_whole(self, now: float, number: int, out: list[Effect]) -> None:
        file = self.files.pop(number, None)
        if file is not None:
            fact = FileFetched(
                digest=file.digest.hex(),
                fetched_bytes=file.come,
                providers=len(file.givers),
                seconds=to_ms(now - file.since),
            )
            out.append(Report(fact=fact))
