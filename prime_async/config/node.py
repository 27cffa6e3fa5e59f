"""``[node]``: what belongs to one node."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from prime_async.config.contact import MAX_HOST_LENGTH
from prime_async.config.kinds import (
    AllowText,
    ContactText,
    FilePath,
    OptionalPath,
    Settings,
    SinkText,
    check_dashboard,
    check_host,
    words,
)


class NodeSettings(Settings):
    """The settings of one node. Paths are relative to the folder of the file."""

    name: Annotated[
        str,
        Field(
            max_length=64,
            pattern=r"^\P{Cc}*$",
            description='shown to people; "": the first digits of the key',
            json_schema_extra=words("at most 64 characters on one line"),
        ),
    ] = ""
    key: Annotated[FilePath, Field(description="file with this node's secret key, made by `prime-async init`")] = Path(
        "node.key"
    )
    directory: Annotated[
        FilePath, Field(description="folder of the ledger: snapshots of the outer state and the means since")
    ] = Path("state")
    snapshot_every: Annotated[
        int,
        Field(
            ge=0,
            le=2**20,
            description="a snapshot of the outer state, 8 bytes per parameter, is written every so many rounds; 0: "
            "only when the node leaves",
        ),
    ] = 10
    keep_snapshots: Annotated[int, Field(ge=1, le=256, description="the newest so many snapshots are kept")] = 2
    keep_rounds: Annotated[
        int,
        Field(
            ge=0,
            le=2**20,
            description="the means of the last so many rounds are kept, and always those since the oldest kept "
            "snapshot; who was away for no longer fetches means, a byte per parameter each, and not the whole state",
        ),
    ] = 20
    remote: Annotated[
        str,
        Field(
            max_length=1024,
            pattern=r"^\P{Cc}*$",
            description="where copies of the snapshots, and of the means since the newest, are kept, as an fsspec URL "
            'such as "s3://bucket/run" (needs `prime-async[remote]` and the protocol\'s package); "": nowhere',
            json_schema_extra=words('a URL, or ""'),
        ),
    ] = ""
    host: Annotated[
        str,
        AfterValidator(check_host),
        Field(
            min_length=1,
            description="local address to listen on; 0.0.0.0: all of this machine",
            json_schema_extra=words("a host name or address without a port"),
        ),
    ] = "0.0.0.0"
    port: Annotated[int, Field(ge=0, le=65535, description="TCP port of the control plane; 0: any free one")] = 7700
    bulk_port: Annotated[int, Field(ge=0, le=65535, description="TCP port of the bulk plane; 0: any free one")] = 7701
    advertise: Annotated[
        str,
        AfterValidator(check_host),
        Field(
            max_length=MAX_HOST_LENGTH,
            description='name or address that other nodes dial; "": found from the route to the first contact',
            json_schema_extra=words('a host name or address without a port, or ""'),
        ),
    ] = ""
    join: Annotated[
        tuple[ContactText, ...],
        Field(strict=False, max_length=64, description="members to ask; empty: this node founds the run"),
    ] = ()
    allow: Annotated[
        tuple[AllowText, ...],
        Field(strict=False, description='public keys that may join; "any": every key (encrypted, not authenticated)'),
    ] = ()
    allow_file: Annotated[
        OptionalPath, Field(description="more public keys, one a line, # comments; read again when it changes")
    ] = None
    encrypt: Annotated[bool, Field(description="CURVE on both planes; false only among machines you trust")] = True
    streams: Annotated[
        int, Field(ge=1, le=64, description="TCP connections per peer for chunks; more fill a long link better")
    ] = 4
    witness: Annotated[
        bool,
        Field(
            description="take part without training: vote, keep and serve the outer state, need no GPU and, with "
            "run.vocab_size, no data; the settings from device to evaluate_every mean nothing then, but for threads"
        ),
    ] = False
    device: Annotated[
        str,
        Field(
            pattern=r"^(auto|cpu|cuda(:[0-9]{1,4})?)$",
            description="where the model is trained; auto: on a GPU if there is one",
            json_schema_extra=words('"auto", "cpu", "cuda" or "cuda:N"'),
        ),
    ] = "auto"
    precision: Annotated[
        Literal["auto", "float32", "bfloat16"],
        Field(description="of the forward and backward pass; auto: bfloat16 autocast where the device has it"),
    ] = "auto"
    compile: Annotated[bool, Field(description="torch.compile the model")] = False
    threads: Annotated[int, Field(ge=0, le=4096, description="torch threads; 0: the cores this process may use")] = 0
    micro_batch_size: Annotated[
        int,
        Field(
            ge=0,
            le=2**20,
            description="sequences at once, a divisor of batch_size; smaller: less memory, gradients add up; "
            "0: the whole batch",
        ),
    ] = 0
    data_path: Annotated[OptionalPath, Field(description='"tokens" only: the token file')] = None
    evaluate_every: Annotated[
        int,
        Field(
            ge=0,
            le=2**40,
            description="held-out loss every so many rounds; 0: only before the first and after the last",
        ),
    ] = 0
    dashboard: Annotated[
        str,
        AfterValidator(check_dashboard),
        Field(
            max_length=MAX_HOST_LENGTH + 8,
            description="where a browser finds the run's web page, /metrics, /healthz and /readyz, such as "
            '"127.0.0.1:8080"; with "0.0.0.0:8080" everybody who reaches this machine may look, and no more than that '
            '(needs `prime-async[dashboard]`); "": nowhere',
            json_schema_extra=words('HOST:PORT, or ""'),
        ),
    ] = ""
    sinks: Annotated[
        tuple[SinkText, ...],
        Field(
            strict=False,
            max_length=8,
            description='where this node\'s losses, speed and round times go too: "tensorboard:FOLDER", '
            '"wandb:PROJECT", "trackio:PROJECT" (each needs the package of its name)',
        ),
    ] = ()
    record: Annotated[OptionalPath, Field(description="file to write the message log to")] = None
    audit: Annotated[
        OptionalPath,
        Field(
            description="folder to write every contribution of this node and every mean that it settles to, for "
            '`prime-async audit`; grows by two encoded vectors in a round, and nothing is deleted; "": none'
        ),
    ] = None
    log_format: Annotated[Literal["console", "json"], Field(description="of the log on stderr")] = "console"
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"], Field(description="the least severe events that are logged")
    ] = "info"
