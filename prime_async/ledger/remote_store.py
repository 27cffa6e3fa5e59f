"""Somewhere that files can be kept, named by an fsspec URL: seven verbs, and what can go wrong with them.

The only place that knows fsspec, which is imported when a store is opened. What holds always: under its final name a
file is whole or is not there. Object stores put files so; elsewhere a file is written beside its place and renamed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final
from urllib.parse import unquote

from prime_async.errors import ConfigError, PrimeAsyncError, StorageError
from prime_async.ledger.errors import DiskFullError, is_full
from prime_async.ledger.files import LOCAL_FILES

ATOMIC: Final = frozenset({"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss"})
"""A file that is put there appears when all of it has come, or not at all."""

S3: Final = ("s3://", "s3a://")
PART_BYTES: Final = 1 << 24
MAX_PARTS: Final = 10_000
"""S3 takes no more of one file."""

S3_OPTIONS: Final = {"max_concurrency": 2, "default_block_size": PART_BYTES}
"""So many parts are in memory at once; s3fs alone would take ten of 50 MB, which training may have no room for."""

SENDING: Final = ".sending"
INSTALL: Final = "install `prime-async[remote]` and the protocol's package, such as s3fs for s3://, or gcsfs for gs://"


class RemoteCopyError(StorageError):
    """The remote copy could not be read or written. ``url``: of what, without its secrets."""

    def __init__(self, url: str, text: str) -> None:
        self.url = url
        super().__init__(f"{url}: {text}")


class Store:
    """The files below ``url``. Synchronous, used by one thread. All names are relative, with slashes.

    Verbs raise :class:`RemoteCopyError`; what was there before is then still there.
    """

    def __init__(self, url: str) -> None:
        self.url, self._secrets = hide_secrets(url)
        self._fs, self._root = self._open(url)
        named = self._fs.protocol
        protocols = {named} if isinstance(named, str) else set(named)
        self._is_atomic = bool(ATOMIC & protocols)
        self._is_local = "file" in protocols
        self._is_s3 = url.startswith(S3)

    def list(self, folder: str) -> dict[str, int]:
        """Name and bytes of each file that is directly in it."""
        with self._calling(folder, "could not be listed"):
            self._fs.invalidate_cache()
            try:
                entries = self._fs.ls(self._path(folder), detail=True)
            except (FileNotFoundError, NotADirectoryError):
                return {}
            files = [entry for entry in entries if entry["type"] == "file"]
            return {f"{folder}/{entry['name'].rsplit('/', 1)[-1]}": int(entry["size"]) for entry in files}

    def read(self, name: str) -> bytes | None:
        """A small file; ``None`` if it is not there."""
        with self._calling(name, "could not be read"):
            self._fs.invalidate_cache()
            try:
                return bytes(self._fs.cat_file(self._path(name)))
            except FileNotFoundError:
                return None

    def write(self, name: str, data: bytes) -> None:
        """A small file, in place of one that is there."""
        with self._placing(name) as path:
            self._fs.pipe_file(path, data)

    def put(self, local: Path, name: str) -> None:
        """A file of this machine, in place of one that is there. Raises :class:`StorageError` if that is gone."""
        with self._placing(name) as path:
            try:
                parts = {"chunksize": _part_bytes(local.stat().st_size)} if self._is_s3 else {}
                self._fs.put_file(str(local), path, **parts)
            except FileNotFoundError as error:
                if not local.exists():
                    raise StorageError(f"{local}: is gone; copy what is there now") from error
                raise

    def get(self, name: str, local: Path) -> bool:
        """Into a file of this machine, of which a part may be there if it raises. Returns ``False`` if there is none.

        Raises :class:`DiskFullError` if this machine has no room.
        """
        with self._calling(name, "could not be read"):
            try:
                self._fs.get_file(self._path(name), str(local))
            except FileNotFoundError:
                return False
            except OSError as error:
                if is_full(error):  # of the store it only reads
                    raise DiskFullError(f"{local}: could not be written: {error.strerror}; make room") from error
                raise
        return True

    def remove(self, name: str) -> None:
        """Nothing if it is not there."""
        with self._calling(name, "could not be removed"), suppress(FileNotFoundError):
            self._fs.rm_file(self._path(name))

    def where(self, name: str) -> str:
        """For people."""
        return f"{self.url.rstrip('/')}/{name}"

    def _open(self, url: str) -> tuple[Any, str]:
        try:
            from fsspec.core import url_to_fs

            fs, root = url_to_fs(url, **(S3_OPTIONS if url.startswith(S3) else {}))
        except ImportError as error:
            raise ConfigError([f"node.remote: {self.url}: {self._reason(error)}: {INSTALL}"]) from error
        except Exception as error:  # each backend has its own
            text = f"not a URL that fsspec can open: {self._reason(error)}; {INSTALL}, or mend node.remote"
            raise ConfigError([f"node.remote: {self.url}: {text}"]) from self._cause(error)
        return fs, str(root).rstrip("/")

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    @contextmanager
    def _placing(self, name: str) -> Iterator[str]:
        """Inside, the file is made under the path that this gives; then it is, whole, where it belongs."""
        path = self._path(name)
        with self._calling(name, "could not be written"):
            if self._is_atomic:
                yield path
                return
            self._fs.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
            beside = path + SENDING
            try:
                yield beside
                if self._is_local:  # what it is to take the place of goes soon
                    self._sync(Path(beside))
                self._fs.mv(beside, path)
                if self._is_local:
                    LOCAL_FILES.sync_directory(Path(path).parent)
            except Exception:
                with suppress(Exception):
                    self._fs.rm_file(beside)
                raise

    @staticmethod
    def _sync(path: Path) -> None:
        with LOCAL_FILES.open(path, create=True) as file:
            file.sync()

    @contextmanager
    def _calling(self, name: str, failure: str) -> Iterator[None]:
        """Inside, what a backend raises becomes :class:`RemoteCopyError`."""
        try:
            yield
        except PrimeAsyncError:
            raise
        except ImportError as error:
            raise ConfigError([f"node.remote: {self.url}: {self._reason(error)}: {INSTALL}"]) from error
        except Exception as error:  # a backend's own library has its own: botocore, aiohttp, paramiko
            text = f"{failure}: {self._reason(error)}; {_advice(error)}"
            raise RemoteCopyError(self.where(name), text) from self._cause(error)

    def _cause(self, error: Exception) -> Exception | None:
        """A traceback would tell the secrets."""
        return None if self._secrets else error

    def _reason(self, error: Exception) -> str:
        text = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return " ".join(text.split())


def hide_secrets(url: str) -> tuple[str, tuple[str, ...]]:
    """The URL as it may be shown, without ``user:password@`` and what is behind a ``?``; and what must not be shown."""
    users = re.findall(r"//([^/?#]*)@", url)
    queries = re.findall(r"\?(.+)", url)
    passwords = [part for user in users for part in user.split(":", 1)[1:]]
    passwords += [value for query in queries for value in re.findall(r"=([^&#]+)", query)]
    secrets = {*users, *queries, *passwords, *map(unquote, passwords)} - {""}
    shown = re.sub(r"//[^/?#]*@", "//***@", re.sub(r"\?.+", "?***", url))
    return shown, tuple(sorted(secrets, key=len, reverse=True))


def _part_bytes(size: int) -> int:
    """Of a file of ``size`` bytes."""
    return max(PART_BYTES, -(-size // MAX_PARTS))


def _advice(error: Exception) -> str:
    if isinstance(error, PermissionError) or "Credentials" in type(error).__name__:
        return "give this machine the right to it; the protocol's fsspec package says where it looks for credentials"
    if isinstance(error, FileNotFoundError):
        return "see that it exists: buckets are not made here"
    if isinstance(error, OSError) and is_full(error):
        return "make room there"
    return "see that it can be reached; the next copy goes on where this one stopped"
