"""Remote copies: in folders, in memory, and on an S3 server on loopback; and what is found after any failure."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFile, MemoryFileSystem

from prime_async.cli import app
from prime_async.cli.init import init
from prime_async.cli.restore import restore
from prime_async.config.load import load_config
from prime_async.config.spec import run_id
from prime_async.errors import ConfigError, LocalError, StorageError
from prime_async.ledger import DamagedError, DiskFullError, PushReport, RemoteCopy, RemoteCopyError, inspect_directory
from prime_async.ledger.remote_store import PART_BYTES, Store, hide_secrets
from tests.ledger_directory import RUN, flip, write_ledger, write_means, write_snapshot

OTHER = b"o" * 32
BUCKET = "prime-async"
STORES = ("path", "file", "memory", "s3")


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """A real server in a process of its own; the URL of a bucket. It chooses its port, and says it when it listens."""
    pytest.importorskip("s3fs", reason="s3fs is not installed")
    pytest.importorskip("moto.server", reason="moto's S3 server is not installed")
    import botocore.session

    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"]
    with (
        pytest.MonkeyPatch.context() as patch,
        subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as server,
    ):
        assert server.stderr is not None
        try:
            said = next(line for line in server.stderr if "Running on" in line)
            patch.setenv("AWS_ENDPOINT_URL", said.split()[-1])
            patch.setenv("AWS_ACCESS_KEY_ID", "testing")
            patch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
            patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
            client = botocore.session.get_session().create_client("s3")
            client.create_bucket(Bucket=BUCKET)
            client.close()
            yield f"s3://{BUCKET}"
        finally:
            server.terminate()


@pytest.fixture(params=STORES)
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where nothing is yet."""
    match request.param:
        case "path":
            return str(tmp_path / "remote")
        case "file":
            return f"file://{tmp_path / 'remote'}"
        case "memory":
            MemoryFileSystem.store.clear()
            return "memory://remote"
        case _:
            return f"{request.getfixturevalue('s3_server')}/{random.randbytes(8).hex()}/run"


@pytest.fixture
def node(tmp_path: Path) -> Path:
    return write_ledger(tmp_path / "state")


Set = tuple[tuple[int, ...], tuple[int, ...]]
"""The rounds of the snapshots, and of the means."""


def push(url: str, node: Path, which: Set) -> PushReport:
    return RemoteCopy(url, node, RUN).push(*which)


def pull(url: str, to: Path) -> dict[str, bytes]:
    names = RemoteCopy(url, to, RUN).pull()
    found = contents(to)
    assert sorted(names) == sorted(found)
    return found


def contents(directory: Path) -> dict[str, bytes]:
    return {f.relative_to(directory).as_posix(): f.read_bytes() for f in directory.rglob("*") if f.is_file()}


def local(node: Path, which: Set) -> dict[str, bytes]:
    names = [f"snapshots/{r:012d}.safetensors" for r in which[0]] + [f"means/{r:012d}.means" for r in which[1]]
    return {name: (node / name).read_bytes() for name in names}


def remote_names(url: str) -> set[str]:
    store = Store(url)
    found = [*store.list("snapshots"), *store.list("means")]
    return {*found, *(name for name in ("ledger.json", "ledger.next.json") if store.read(name) is not None)}


FIRST: Set = (30,), (30, 31, 32)
SECOND: Set = (30, 40), (40, 41, 42)


# --- in every store ---


def test_what_was_pushed_is_pulled_byte_for_byte_and_carries_on(url: str, node: Path, tmp_path: Path) -> None:
    report = push(url, node, SECOND)
    assert report.sent == tuple(local(node, SECOND))
    assert report.sent_bytes == sum(map(len, local(node, SECOND).values()))
    assert pull(url, tmp_path / "new") == local(node, SECOND)
    assert inspect_directory(tmp_path / "new", verify=True).conclusion == (
        "carries on from round 43: snapshot 40 and 3 rounds of means"
    )


def test_a_push_sends_what_is_new_and_deletes_what_is_not_wanted(url: str, node: Path, tmp_path: Path) -> None:
    push(url, node, FIRST)
    report = push(url, node, SECOND)
    assert report.sent == tuple(name for name in local(node, SECOND) if "30." not in name)
    assert report.kept == ("snapshots/000000000030.safetensors",)
    assert set(report.removed) == set(local(node, FIRST)) - set(local(node, SECOND))
    assert remote_names(url) == {*local(node, SECOND), "ledger.json"}
    again = push(url, node, SECOND)
    assert (again.sent, again.removed, again.sent_bytes) == ((), (), 0)
    assert pull(url, tmp_path / "new") == local(node, SECOND)


def test_a_file_that_has_changed_under_its_name_is_put_beside_the_old_one(url: str, node: Path, tmp_path: Path) -> None:
    push(url, node, FIRST)
    write_means(node, 31, view=9)
    report = push(url, node, FIRST)
    assert len(report.sent) == 1
    assert report.sent[0].startswith("means/000000000031.")
    assert report.removed == ("means/000000000031.means",)
    assert pull(url, tmp_path / "new") == local(node, FIRST)
    write_means(node, 31, view=4)
    assert push(url, node, FIRST).sent == ("means/000000000031.means",)
    assert pull(url, tmp_path / "newer") == local(node, FIRST)


def test_the_index_names_sizes_digests_and_the_newest_round(url: str, node: Path) -> None:
    push(url, node, SECOND)
    data = Store(url).read("ledger.json")
    assert data is not None
    index = json.loads(data)
    assert (index["run_id"], index["round"]) == (RUN.hex(), 43)
    assert [(f["name"], f["bytes"]) for f in index["files"]] == [
        (name, len(content)) for name, content in local(node, SECOND).items()
    ]


def test_a_copy_of_another_run_is_refused_by_push_and_pull(url: str, node: Path, tmp_path: Path) -> None:
    push(url, node, FIRST)
    with pytest.raises(ConfigError, match="the copy of another run"):
        RemoteCopy(url, node, OTHER).push(*FIRST)
    with pytest.raises(ConfigError, match="the copy of another run"):
        RemoteCopy(url, tmp_path / "new", OTHER).pull()
    assert pull(url, tmp_path / "new") == local(node, FIRST)


def test_what_others_have_put_there_is_left_alone(url: str, node: Path) -> None:
    store = Store(url)
    for name in ("notes.txt", "means/mine.txt", "snapshots/000000000030.safetensors.bak"):
        store.write(name, b"mine")
    push(url, node, FIRST)
    push(url, node, SECOND)
    assert store.read("notes.txt") == store.read("means/mine.txt") == b"mine"
    assert store.read("snapshots/000000000030.safetensors.bak") == b"mine"


def test_without_a_copy_there_is_nothing_to_pull(url: str, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"ledger\.json: there is no copy of a ledger") as caught:
        RemoteCopy(url, tmp_path / "new", RUN).pull()
    assert str(caught.value).startswith(url)


def test_a_damaged_or_missing_file_of_the_copy_is_named(url: str, node: Path, tmp_path: Path) -> None:
    push(url, node, FIRST)
    store, name = Store(url), "means/000000000031.means"
    good = local(node, FIRST)[name]
    for bad in (good[:-1] + bytes([good[-1] ^ 1]), good[:-1], good + b"x", b""):
        store.write(name, bad)
        with pytest.raises(StorageError, match=rf"{name}: is damaged"):
            RemoteCopy(url, tmp_path / "new", RUN).pull()
    store.remove(name)
    with pytest.raises(StorageError, match=rf"{name}: is missing"):
        RemoteCopy(url, tmp_path / "new", RUN).pull()
    assert push(url, node, FIRST).sent == (name,)  # the next push mends it, and the next pull goes on
    assert pull(url, tmp_path / "new") == local(node, FIRST)


def test_a_damaged_index_is_named_with_what_to_do(url: str, node: Path, tmp_path: Path) -> None:
    push(url, node, FIRST)
    store = Store(url)
    data = store.read("ledger.json")
    assert data is not None
    evil = data.replace(b'"name": "means/000000000031.means"', b'"name": "means/../../../evil"')
    assert evil != data
    for bad in (b"", b"{", b"\xff", b"[" * 100_000, data[:-20], evil):
        store.write("ledger.json", bad)
        for act in (lambda: push(url, node, FIRST), lambda: pull(url, tmp_path / "new")):
            with pytest.raises(StorageError, match=r"ledger\.json: is damaged .*: remove it"):
                act()
    store.write("ledger.json", data.replace(b"remote copy 1", b"remote copy 9"))
    with pytest.raises(StorageError, match="another version"):
        pull(url, tmp_path / "new")
    store.remove("ledger.json")
    push(url, node, FIRST)
    assert pull(url, tmp_path / "new") == local(node, FIRST)


def test_large_files_are_sent_and_fetched_in_pieces(s3_server: str, tmp_path: Path) -> None:
    size = 2 * PART_BYTES + 1000  # s3fs sends what is less than two parts at once
    big = tmp_path / "big"
    with big.open("wb") as file:
        file.truncate(size)
        file.seek(size - 4)
        file.write(b"last")
    store = Store(f"{s3_server}/big")
    store.put(big, "snapshots/1")
    assert store.list("snapshots") == {"snapshots/1": size}
    assert store.get("snapshots/1", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == big.read_bytes()
    store.remove("snapshots/1")


# --- what is not sent, and where nothing is put ---


def test_a_damaged_file_does_not_take_the_place_of_a_good_copy(node: Path, tmp_path: Path) -> None:
    url = str(tmp_path / "remote")
    push(url, node, FIRST)
    good = local(node, FIRST)
    for name in ("snapshots/000000000030.safetensors", "means/000000000031.means"):
        flip(node / name, -500 if "snapshots" in name else 100)
        with pytest.raises(DamagedError, match=name):
            push(url, node, FIRST)
        flip(node / name, -500 if "snapshots" in name else 100)
    assert pull(url, tmp_path / "new") == good


def test_means_that_are_not_committed_and_files_of_another_run_are_not_copied(node: Path, tmp_path: Path) -> None:
    write_means(node, 43, committed=False)
    with pytest.raises(LocalError, match="not committed"):
        push(str(tmp_path / "remote"), node, ((), (43,)))
    write_snapshot(node, 50, run=OTHER)
    with pytest.raises(ConfigError, match="of another run"):
        push(str(tmp_path / "remote"), node, ((50,), ()))
    with pytest.raises(StorageError, match=r"000000000060\.safetensors: .*No such file"):
        push(str(tmp_path / "remote"), node, ((60,), ()))
    with pytest.raises(LocalError, match="give its id"):
        RemoteCopy(str(tmp_path / "remote"), node, None).push(*FIRST)
    assert not (tmp_path / "remote" / "ledger.json").exists()


def test_nothing_is_pulled_into_a_directory_that_is_not_empty(node: Path, tmp_path: Path) -> None:
    url = str(tmp_path / "remote")
    push(url, node, FIRST)
    before = contents(node)
    with pytest.raises(ConfigError, match=r"is not empty \(ballot\.cbor, .*choose another node\.directory"):
        pull(url, node)
    assert contents(node) == before


def test_what_a_file_system_has_in_its_root_is_not_in_the_way(
    node: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Defect: a node whose directory was a volume of its own could not be restored, for there was lost+found in it."""
    url, new = str(tmp_path / "remote"), tmp_path / "new"
    push(url, node, FIRST)
    (new / "lost+found").mkdir(parents=True)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rmdir", lambda _: (_ for _ in ()).throw(OSError(errno.EIO, os.strerror(errno.EIO))))
        with pytest.raises(StorageError, match="could not be put in its place"):
            pull(url, new)
    assert pull(url, new) == local(node, FIRST)
    assert (new / "lost+found").is_dir()


def test_a_disk_that_fills_up_while_pulling_is_said_to_be_full_and_the_pull_can_be_gone_on_with(
    node: Path, tmp_path: Path, faulty: type[FaultyStore]
) -> None:
    push("faulty://remote", node, FIRST)
    faulty.reading = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    faulty.readings = 2
    with pytest.raises(DiskFullError, match="No space left on device; make room"):
        pull("faulty://remote", tmp_path / "new")
    assert set(os.listdir(tmp_path / "new")) == {"restore.part"}  # noqa: PTH208
    faulty.log.clear()
    assert pull("faulty://remote", tmp_path / "new") == local(node, FIRST)
    assert len([line for line in faulty.log if line.startswith("get_file")]) == 2  # of four


def test_a_pull_that_is_cut_off_while_what_came_gets_its_place_is_ended_by_the_next(
    node: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, new = str(tmp_path / "remote"), tmp_path / "new"
    push(url, node, FIRST)
    replace, rmdir = Path.replace, Path.rmdir

    def cut_off(at: str) -> None:
        def replace_or_not(self: Path, target: Path) -> Path:
            if self.parent.name == "restore.part" and self.name == at:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return replace(self, target)

        def rmdir_or_not(self: Path) -> None:
            if self.name == at:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            rmdir(self)

        monkeypatch.setattr(Path, "replace", replace_or_not)
        monkeypatch.setattr(Path, "rmdir", rmdir_or_not)

    for at in ("snapshots", "means", "restore.part"):
        cut_off(at)
        with pytest.raises(StorageError, match="could not be put in its place: Input/output error"):
            pull(url, new)
        cut_off("")
        assert pull(url, new) == local(node, FIRST)
        assert not (new / "restore.part").exists()
        shutil.rmtree(new)


# --- what goes wrong with a store ---


def test_a_protocol_that_is_unknown_or_whose_package_is_missing_is_a_configuration_error(
    node: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=r"Protocol not known: nonsense; install `prime-async\[remote\]`"):
        push("nonsense://x/y", node, FIRST)
    with pytest.raises(ConfigError, match=r"adlfs.*install `prime-async\[remote\]`"):
        push("abfs://user:secret@x/y", node, FIRST)
    monkeypatch.setitem(sys.modules, "fsspec.core", None)
    with pytest.raises(ConfigError, match=r"install `prime-async\[remote\]`"):
        push("memory://x", node, FIRST)


def test_a_bucket_that_is_not_there_is_a_remote_error(s3_server: str, node: Path) -> None:
    del s3_server
    with pytest.raises(RemoteCopyError, match="bucket does not exist; see that it exists: buckets are not made here"):
        push("s3://no-such-bucket/run", node, FIRST)


def test_missing_credentials_and_a_server_that_is_gone_are_remote_errors(node: Path) -> None:
    pytest.importorskip("s3fs")
    code = f"""
import sys
from pathlib import Path
from prime_async.ledger import RemoteCopy, RemoteCopyError
try:
    RemoteCopy("s3://bucket/run", Path({str(node)!r}), {RUN!r}).push([30], [])
except RemoteCopyError as error:
    print(error)
"""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("AWS_")}
    env = {**clean, "AWS_EC2_METADATA_DISABLED": "true", "HOME": str(node), "AWS_ENDPOINT_URL": "http://127.0.0.1:9"}
    said = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout
    assert said.startswith("s3://bucket/run/ledger.json: could not be read: Unable to locate credentials; give this")
    keys = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "y", "AWS_MAX_ATTEMPTS": "1"}
    code = code.replace("import sys", "import s3fs; s3fs.S3FileSystem.retries = 1")
    done = subprocess.run([sys.executable, "-c", code], env=env | keys, capture_output=True, text=True, check=True)
    assert "see that it can be reached; the next copy goes on where this one stopped" in done.stdout


class Library(Exception):
    """What a backend's own library raises."""


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (PermissionError(errno.EACCES, "Access Denied"), "Access Denied; give this machine the right to it"),
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device; make room there"),
        (Library("login of me:hidden at\nhost failed"), r"login of \*\*\* at host failed; see that it can be reached"),
        (TimeoutError(), "TimeoutError; see that"),
    ],
)
def test_errors_of_a_backend_name_the_url_and_what_to_do_and_hide_its_secrets(
    node: Path, faulty: type[FaultyStore], error: Exception, says: str
) -> None:
    faulty.error, faulty.fail_at = error, 2
    with pytest.raises(RemoteCopyError, match=says) as caught:
        push("faulty://me:hidden@host/run", node, FIRST)
    assert str(caught.value).startswith("faulty://***@host/run/")
    assert "hidden" not in str(caught.value)
    assert caught.value.__cause__ is None


def test_secrets_are_hidden_wherever_a_url_may_have_them() -> None:
    assert hide_secrets("s3://bucket/run") == ("s3://bucket/run", ())
    shown, secrets = hide_secrets("simplecache::ftp://me:p%40ss@host:21/run@home?token=abc&x=y")
    assert shown == "simplecache::ftp://***@host:21/run@home?***"
    assert {"me:p%40ss", "p%40ss", "p@ss", "abc"} <= set(secrets)


# --- failures at any moment ---


class Crash(BaseException):
    """The process is gone: nothing is cleaned up."""


class FaultyStore(MemoryFileSystem):  # type: ignore[misc]  # fsspec ships no types
    """Fails at one of the operations that change it, having done half of it; ``before`` is called before each."""

    protocol: Any = "faulty"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    fail_at: ClassVar[int | None] = None
    error: ClassVar[BaseException] = Crash()
    count: ClassVar[int] = 0
    log: ClassVar[list[str]] = []
    before: ClassVar[Callable[[], object] | None] = None
    reading: ClassVar[BaseException | None] = None
    readings: ClassVar[int] = 0

    @classmethod
    def reset(cls) -> None:
        FaultyStore.store.clear()
        FaultyStore.pseudo_dirs[:] = [""]
        FaultyStore.fail_at, FaultyStore.error, FaultyStore.count, FaultyStore.before = None, Crash(), 0, None
        FaultyStore.reading, FaultyStore.readings = None, 0
        FaultyStore.log.clear()

    def _operation(self, name: str, half: Callable[[], object] = lambda: None) -> None:
        number, FaultyStore.count = FaultyStore.count, FaultyStore.count + 1
        FaultyStore.log.append(name)
        if FaultyStore.before is not None:
            FaultyStore.before()
        if number == FaultyStore.fail_at:
            half()
            raise FaultyStore.error

    def _place(self, path: str, data: bytes) -> None:
        path = self._strip_protocol(path)
        self.store[path] = MemoryFile(self, path, data)

    def put_file(self, lpath: str, rpath: str, *_: Any, **__: Any) -> None:
        data = Path(lpath).read_bytes()
        self._operation(f"put_file {rpath}", lambda: self._half(rpath, data))
        self._place(rpath, data)

    def pipe_file(self, path: str, value: bytes, *_: Any, **__: Any) -> None:
        self._operation(f"pipe_file {path}", lambda: self._half(path, value))
        self._place(path, value)

    def _half(self, path: str, data: bytes) -> None:
        self._place(path, data[: len(data) // 2])

    def mv(self, path1: str, path2: str, *_: Any, **__: Any) -> None:
        self._operation(f"mv {path2}")
        self._place(path2, self.store.pop(self._strip_protocol(path1)).getvalue())

    def rm_file(self, path: str) -> None:
        self._operation(f"rm_file {path}")
        super().rm_file(path)

    def get_file(self, rpath: str, lpath: str, *args: Any, **kwargs: Any) -> None:
        FaultyStore.log.append(f"get_file {rpath}")
        if FaultyStore.reading is not None:
            FaultyStore.readings -= 1
            if FaultyStore.readings < 0:
                error, FaultyStore.reading = FaultyStore.reading, None
                raise error
        super().get_file(rpath, lpath, *args, **kwargs)


class AtomicFaultyStore(FaultyStore):
    """As object stores: half a file is none."""

    protocol = ("atomicfaulty", "gs")

    def _half(self, path: str, data: bytes) -> None:
        pass


@pytest.fixture
def faulty() -> type[FaultyStore]:
    fsspec.register_implementation("faulty", FaultyStore, clobber=True)
    fsspec.register_implementation("atomicfaulty", AtomicFaultyStore, clobber=True)
    FaultyStore.reset()
    return FaultyStore


OLD: Set = (30,), (30, 31, 32)
NEW: Set = (40,), (31, 40, 41)


class Change:
    """A node whose copy goes from an old set to a new one, in which a file has changed under its name."""

    def __init__(self, url: str, home: Path, faulty: type[FaultyStore]) -> None:
        self.url, self.home, self.faulty = url, home, faulty
        self.node = write_ledger(home / "state")
        self.old = local(self.node, OLD)
        self.pulls = 0

    def begin(self) -> None:
        """The copy holds the old set, and the node the new one."""
        self.faulty.reset()
        write_means(self.node, 31, view=4)
        assert local(self.node, OLD) == self.old
        push(self.url, self.node, OLD)
        write_means(self.node, 31, view=9)
        self.new = local(self.node, NEW)
        self.faulty.count = 0
        self.faulty.log.clear()

    def read(self) -> dict[str, bytes]:
        self.pulls += 1
        found = pull(self.url, self.home / f"pulled-{self.pulls}")
        assert found in (self.old, self.new)
        return found

    def push(self) -> PushReport:
        return push(self.url, self.node, NEW)


@pytest.fixture(params=["faulty://remote", "atomicfaulty://remote"])
def change(request: pytest.FixtureRequest, tmp_path: Path, faulty: type[FaultyStore]) -> Change:
    return Change(request.param, tmp_path, faulty)


@pytest.mark.parametrize("error", [Crash(), OSError(errno.ENOSPC, "full"), Library("broken")])
def test_after_a_failure_at_any_moment_a_reader_finds_one_set_and_the_next_push_goes_on(
    change: Change, faulty: type[FaultyStore], error: BaseException
) -> None:
    change.begin()
    change.push()
    operations, seen, resumed = faulty.count, set(), set()
    assert operations >= 9
    for at in range(operations):
        change.begin()
        faulty.error, faulty.fail_at = error, at
        with pytest.raises((Crash, RemoteCopyError)):
            change.push()
        how = faulty.log[at]
        came = Store(change.url).list("snapshots") | Store(change.url).list("means")
        seen.add(change.read() == change.new)
        report = change.push()
        assert change.read() == change.new, how
        assert remote_names(change.url) == {*report.sent, *report.kept, "ledger.json"}, how
        assert not set(report.sent) & set(came), how  # what has come is not sent again
        resumed.add(len(report.sent))
    assert seen == {True, False}
    assert resumed == {0, 1, 2, 3, 4}


def test_who_reads_at_any_moment_of_a_push_finds_one_set_whole(change: Change, faulty: type[FaultyStore]) -> None:
    change.begin()
    found: list[bool] = []
    faulty.before = lambda: found.append(change.read() == change.new)
    change.push()
    assert found == sorted(found)  # and never goes back
    assert len(found) >= 9
    faulty.before = None
    assert change.read() == change.new


def test_who_reads_while_a_push_deletes_what_is_being_read_begins_again(
    change: Change, monkeypatch: pytest.MonkeyPatch
) -> None:
    change.begin()
    get_file = FaultyStore.get_file
    pushed: list[PushReport] = []

    def get_and_push(self: FaultyStore, rpath: str, lpath: str, *args: Any, **kwargs: Any) -> None:
        get_file(self, rpath, lpath, *args, **kwargs)
        if not pushed:
            pushed.append(change.push())

    monkeypatch.setattr(FaultyStore, "get_file", get_and_push)
    assert change.read() == change.new


def test_a_push_that_died_is_completed_by_one_of_another_set(change: Change, faulty: type[FaultyStore]) -> None:
    change.begin()
    change.push()
    for at in range(faulty.count):
        change.begin()
        faulty.fail_at = at
        with pytest.raises(Crash):
            change.push()
        write_means(change.node, 31, view=4)  # it has changed back, or once more
        for which in (OLD, ((30, 40), (40, 42))):
            push(change.url, change.node, which)
            assert pull(change.url, change.home / f"other-{at}-{len(which[0])}") == local(change.node, which)
            assert len(remote_names(change.url)) == len(local(change.node, which)) + 1


def test_two_pushes_that_died_leave_no_file_that_a_third_takes_for_another(
    change: Change, faulty: type[FaultyStore]
) -> None:
    """The first sends a file, which then changes under its name; the second says so, and dies before it is sent."""
    url, node = change.url, change.node
    which: Set = (), (41,)
    push(url, node, which)
    operations = faulty.count
    for first in range(operations):
        for second in range(operations):
            faulty.reset()
            for at, view in ((first, 9), (second, 8)):
                write_means(node, 41, view=view)
                faulty.fail_at, faulty.count = at, 0
                with suppress(Crash):
                    push(url, node, which)
            faulty.fail_at = None
            push(url, node, which)
            assert pull(url, change.home / f"twice-{first}-{second}") == local(node, which), (first, second)


def test_a_file_that_changes_while_it_is_sent_is_an_error_and_not_in_the_copy(
    change: Change, faulty: type[FaultyStore]
) -> None:
    change.begin()
    faulty.before = lambda: write_means(change.node, 41, view=int(faulty.count + 10))
    with pytest.raises(StorageError, match=r"000000000041\.means: was changed while it was copied"):
        change.push()
    faulty.before = None
    assert change.read() == change.old
    change.new = local(change.node, NEW)
    change.push()
    assert change.read() == change.new


# --- the command ---


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """The TOML file of a node whose copy, which another machine made, is at ``node.remote``."""
    config = configure(tmp_path / "config", str(tmp_path / "remote"))
    lost, run = tmp_path / "lost", run_id(load_config(config).run)
    for round in (40, 41):
        write_means(lost, round, run=run)
    write_snapshot(lost, 40, run=run)
    RemoteCopy(str(tmp_path / "remote"), lost, run).push([40], [40, 41])
    return config


def configure(folder: Path, remote: str) -> Path:
    init(folder, set_=(f'node.remote="{remote}"',))
    return folder / "node.toml"


def test_the_command_restores_into_an_empty_directory_and_says_what_is_there(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert restore(config) == 0
    said = capsys.readouterr().out
    assert said.startswith("3 files fetched\n")
    assert said.strip().endswith("carries on from round 42: snapshot 40 and 2 rounds of means")
    assert contents(load_config(config).node.directory) == contents(tmp_path / "lost")
    with pytest.raises(ConfigError, match="is not empty"):
        restore(config)


def test_the_command_refuses_the_copy_of_another_run_and_a_node_without_a_copy(node: Path, tmp_path: Path) -> None:
    push(str(tmp_path / "remote"), node, SECOND)
    with pytest.raises(ConfigError, match="the copy of another run"):
        restore(configure(tmp_path / "config", str(tmp_path / "remote")))
    with pytest.raises(ConfigError, match=r"node\.toml: node\.remote is not set: say there where"):
        restore(configure(tmp_path / "none", ""))


def test_the_command_line_knows_restore(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        app(["restore", str(config), "--json"])
    assert ended.value.code == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["newest_round"] == 42
