"""What a node keeps on disk: snapshots of the outer state, the means since, its ballot, the inner optimiser's state.

Everything here is synchronous, for worker threads, and reads and writes chunk by chunk. What it finds on disk is
checked against digests before anybody uses it, so a crash at any moment, or a flipped bit, costs work and not the run.
People look at it with :mod:`prime_async.ledger.inspection`; :mod:`prime_async.ledger.remote` copies it elsewhere.
"""

from __future__ import annotations

from prime_async.ledger.ballots import BALLOT_FILE, RESERVE_FILE, BallotFile, StoredBallot
from prime_async.ledger.errors import DamagedError, DiskFullError
from prime_async.ledger.files import LOCAL_FILES, File, Files, LocalFiles
from prime_async.ledger.inner import INNER_FILE, InnerFile
from prime_async.ledger.inspection import Report, inspect_directory
from prime_async.ledger.ledger import Ledger, Restored, SnapshotJob
from prime_async.ledger.means import MeansFiles, StoredMeans, included
from prime_async.ledger.newest import Newest, read_newest
from prime_async.ledger.remote import PushReport, RemoteCopy
from prime_async.ledger.remote_store import RemoteCopyError
from prime_async.ledger.snapshot_format import SnapshotInfo
from prime_async.ledger.snapshots import PartialSnapshot, Snapshots

__all__ = [
    "BALLOT_FILE",
    "INNER_FILE",
    "LOCAL_FILES",
    "RESERVE_FILE",
    "BallotFile",
    "DamagedError",
    "DiskFullError",
    "File",
    "Files",
    "InnerFile",
    "Ledger",
    "LocalFiles",
    "MeansFiles",
    "Newest",
    "PartialSnapshot",
    "PushReport",
    "RemoteCopy",
    "RemoteCopyError",
    "Report",
    "Restored",
    "SnapshotInfo",
    "SnapshotJob",
    "Snapshots",
    "StoredBallot",
    "StoredMeans",
    "included",
    "inspect_directory",
    "read_newest",
]
