"""The newest outer weights that a node's directory leads to, for whoever wants the model and not the run.

What holds always: nothing is written, and the node may run meanwhile. What it deletes while that is read is no damage:
then there is something newer, and it is begun again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from prime_async.config.load import run_from
from prime_async.config.schema import Config, RunSpec
from prime_async.config.spec import run_id
from prime_async.errors import ConfigError, StorageError
from prime_async.ledger.errors import DamagedError, translated
from prime_async.ledger.examination import split_vectors
from prime_async.ledger.files import LOCAL_FILES
from prime_async.ledger.inspection import Report, inspect_directory
from prime_async.ledger.ledger import Ledger, Restored
from prime_async.ledger.snapshots import DIRECTORY as SNAPSHOTS
from prime_async.ledger.snapshots import WHOLE
from prime_async.ledger.tensors import HeaderError, read_header
from prime_async.work.factory import build_model, model_vocabulary
from prime_async.work.inner import Span
from prime_async.work.witness import flat_weights, outer_workload

TRIES: Final = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Newest:
    """The outer state after ``round`` rounds of ``run``: its ``digest``, and the weights alone.

    ``weights``: fp32 on the host, by the parameters' names; views of one vector in the order of these.
    """

    run: RunSpec
    run_id: bytes
    round: int
    digest: bytes
    weights: Mapping[str, Tensor]


def read_newest(directory: Path, config: Config | None = None) -> Newest:
    """Read a node's ``directory``: the newest snapshot that is whole, and the means since, as the node itself would.

    The settings of the run are those that stand in its snapshots; before the first of them those of ``config``, which
    is the node's. Every byte is compared with its digest.

    Raises :class:`StorageError` if nothing that can be used is there, and :class:`ConfigError` if it is of another run
    than ``config``, or nothing says of which.
    """
    for _ in range(TRIES):
        report = inspect_directory(directory, verify=False)
        try:
            return _read(directory, report, config)
        except StorageError:
            if _files(inspect_directory(directory, verify=False)) == _files(report):
                raise  # nothing was deleted meanwhile: it is damaged
    raise StorageError(f"{directory}: changes faster than it can be read; stop the node, or copy the directory first")


def _files(report: Report) -> tuple[list[int], list[int]]:
    return [s.round for s in report.snapshots], [m.round for m in report.means]


def _read(directory: Path, report: Report, config: Config | None) -> Newest:
    if report.newest_round == 0 and not any(s.whole for s in report.snapshots):
        raise StorageError(
            f"{directory}: no node has done a round there; name a node's node.directory, or its TOML file"
        )
    run, known = _run_of(report, config), bytes.fromhex(report.run_id)
    theta, spans = _beginning(report, run, config)
    workload = outer_workload(run, theta, spans)
    before = workload.state_digest()
    restored = Ledger(directory, known, report.settings, workload, run.exchange.chunk_elements).restore(mend=False)
    _check(report, restored, before)
    weights = {span.name: theta[span.start : span.stop].view(span.shape) for span in spans}
    return Newest(run=run, run_id=known, round=restored.round, digest=restored.digest, weights=weights)


def _run_of(report: Report, config: Config | None) -> RunSpec:
    if config is not None and run_id(config.run).hex() != report.run_id:
        raise ConfigError(
            [
                f"{report.directory}: holds run {report.run_id[:16]}, the configuration is of run "
                f"{run_id(config.run).hex()[:16]}: mend its [run] table, or name the directory itself"
            ]
        )
    if config is not None:
        return config.run
    if not report.settings:
        raise ConfigError(
            [
                f"{report.directory}: no snapshot there says yet what is trained; name the node's TOML file instead, "
                "or wait for the first snapshot"
            ]
        )
    return run_from(report.settings, f"{report.directory}: the settings in its newest snapshot")


def _beginning(report: Report, run: RunSpec, config: Config | None) -> tuple[Tensor, list[Span]]:
    """Room for the weights, if a snapshot will fill it; else those that the run began with."""
    sound = [s for s in report.snapshots if s.whole and not s.problem and s.run_id == report.run_id]
    if sound:
        spans = _spans(Path(report.directory) / SNAPSHOTS / f"{sound[-1].round:012d}{WHOLE}")
        return torch.zeros(spans[-1].stop), spans
    if config is None:
        raise ConfigError(
            [
                f"{report.directory}: has no whole snapshot yet: name the node's TOML file instead, which says what "
                "the initial weights are"
            ]
        )
    return flat_weights(build_model(run, model_vocabulary(run, config.node)))


def _spans(path: Path) -> list[Span]:
    """Of the weights in the snapshot at ``path``."""
    with translated(path, "the snapshot could not be read"), LOCAL_FILES.open(path, create=False) as file:
        try:
            entries = read_header(file).entries
        except HeaderError as error:
            raise DamagedError(path, None, str(error)) from error
    spans: list[Span] = []
    start = 0
    for entry in split_vectors(entries)[0]:
        stop = start + entry.nbytes // 4
        spans.append(Span(entry.name, start, stop, entry.shape))
        start = stop
    return spans


def _check(report: Report, restored: Restored, before: bytes) -> None:
    """That what was there was whole."""
    if restored.round < report.newest_round or restored.digest == before:
        raise StorageError(
            f"{report.directory}: only {restored.round} of {report.newest_round} rounds can be read, the rest is "
            "damaged or was just deleted: see `prime-async inspect`, or take the directory of another member"
        )
