"""What can go wrong, split by whose fault it is.

``LocalError``       we, or our user, did something wrong: mend the call or the configuration.
``RemoteError``      a peer broke a rule or refused us: the peer is dropped and counted, or we are told why.
``EnvironmentFault`` neither: a port is taken, a disk is full, a peer cannot be reached.

A library's own exceptions are translated once, at the boundary where the library is called.
Every message names the thing, says what was expected, and ends with what to do.
"""

from __future__ import annotations

from collections.abc import Sequence


class PrimeAsyncError(Exception):
    """The root of every error this package raises on purpose."""


class LocalError(PrimeAsyncError):
    """We, or our user, did something wrong."""


class RemoteError(PrimeAsyncError):
    """A peer did something wrong, or refused us."""


class EnvironmentFault(PrimeAsyncError):
    """The world did something that neither side could help."""


class ConfigError(LocalError):
    """One or more settings are wrong. ``problems`` lists all of them, one line each."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(self.problems))


class DataError(LocalError):
    """A corpus, a tokenizer file or a batch is not what its format says."""


class NonFiniteError(LocalError):
    """A tensor that must be finite holds NaN or infinity."""


class ReplayMismatchError(LocalError):
    """A machine driven from a log did not produce the recorded effects. ``index``: of the event in the log, from 0."""

    def __init__(self, text: str, index: int) -> None:
        self.index = index
        super().__init__(text)


class LogFormatError(LocalError):
    """A file is not a message log of this version."""


class ProtocolError(RemoteError):
    """A peer sent bytes that the protocol does not allow."""


class RefusedError(RemoteError):
    """The run refused this node. ``reason`` is a code of the protocol, ``differences`` the settings that differ."""

    def __init__(self, reason: str, text: str, differences: Sequence[str] = ()) -> None:
        self.reason = reason
        self.differences = tuple(differences)
        super().__init__("\n".join([text, *(f"  {d}" for d in self.differences)]))


class ChunkUnavailableError(RemoteError):
    """A peer answered that it does not have, and will not get, the chunk asked for."""


class PeerUnreachableError(EnvironmentFault):
    """There is no way to a peer at the moment."""


class DeadlineError(EnvironmentFault):
    """What was asked of a peer did not come in time."""


class AddressInUseError(EnvironmentFault):
    """The address to listen on belongs to another process, or is not one of this machine."""


class StorageError(EnvironmentFault):
    """A file could not be written or read back whole."""
