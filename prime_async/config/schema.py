"""Every setting, with its default, bounds and meaning. The field descriptions are also the config reference.

``[run]`` is the run spec: it must be equal on all nodes, and its digest is the run id.
``[node]`` belongs to one node.

Error messages, the file that ``prime-async init`` writes and the reference in README.md are made from what stands
here: a description reads well behind "learning_rate: ", and ``expected=`` names in words what a pattern allows.
Conditions on more than one setting are the rules at the end.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Final, Literal, NamedTuple, TypeAlias

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from prime_async.config.contact import MAX_HOST_LENGTH, Contact, is_host
from prime_async.errors import ConfigError

MAX_MEMBERS: Final = 2**16
"""Bits in the protocol's bitmap of contributors."""
MAX_ROUND_TOKENS: Final = 2**36
"""Weights are tokens; those of ``MAX_MEMBERS`` contributors must add up exactly in fp64, which holds 2^53."""
MAX_ROUND_STEPS: Final = 2**20
"""Inner steps of one contribution, also where rounds end with the clock."""


def _words(text: str) -> dict[str, Any]:
    """What error messages and the reference say is expected, where a pattern would say it badly."""
    return {"expected": text}


def _path(value: Any) -> Any:
    return Path(value) if isinstance(value, str) and value else value


def _optional_path(value: Any) -> Any:
    return None if value == "" else _path(value)


def _contact(text: str) -> str:
    try:
        return str(Contact.parse(text))
    except ConfigError as error:
        raise PydanticCustomError("contact", "{text}", {"text": str(error)}) from error


def _host(text: str) -> str:
    if text and not is_host(text):
        raise PydanticCustomError("host", "not a host name or address")
    return text


def _dashboard(text: str) -> str:
    host, colon, port = text.rpartition(":")
    inside = host.removeprefix("[").removesuffix("]")
    valid = colon and is_host(inside) and port.isascii() and port.isdigit() and int(port) < 65536
    if text and not valid:
        raise PydanticCustomError("dashboard", "not HOST:PORT")
    return text


Positive = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(gt=0, le=3600)]  # a Get on the wire waits an hour at most
UpToADay = Annotated[float, Field(ge=0, le=86_400)]
Ratio = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]
# An empty path would be the current folder, which nobody means.
FilePath: TypeAlias = Annotated[Path, BeforeValidator(_path)]
OptionalPath: TypeAlias = Annotated[Path | None, BeforeValidator(_optional_path)]
ContactText: TypeAlias = Annotated[
    str, AfterValidator(_contact), Field(json_schema_extra=_words('a contact "KEY@HOST:PORT"'))
]
SinkText: TypeAlias = Annotated[
    str,
    Field(
        max_length=1024,
        pattern=r"^(tensorboard|wandb|trackio):\P{Cc}+$",
        json_schema_extra=_words('"tensorboard:FOLDER", "wandb:PROJECT" or "trackio:PROJECT"'),
    ),
]
AllowText: TypeAlias = Annotated[
    str,
    Field(
        pattern=r"^([0-9a-f]{64}|any)$",
        json_schema_extra=_words('a public key of 64 lower-case hexadecimal digits, or "any"'),
    ),
]


class Settings(BaseModel):
    """Frozen; an unknown key, a value of another type (``"4"`` for 4), infinity and NaN are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())


class InnerSettings(Settings):
    """The optimiser that each node runs alone."""

    optimizer: Annotated[
        Literal["adamw", "muon", "sgd"],
        Field(
            description="adamw: AdamW, with decoupled weight decay; muon: Muon on the matrices of the layers, with the "
            "step size of AdamW, and AdamW on the rest (needs torch 2.9); sgd: plain, to compare with"
        ),
    ] = "adamw"
    learning_rate: Annotated[float, Field(gt=0, description="peak learning rate")] = 4e-4
    betas: Annotated[tuple[Decay, Decay], Field(strict=False, description="AdamW's decay rates of the two moments")] = (
        0.9,
        0.95,
    )
    weight_decay: Annotated[float, Field(ge=0, description="on matrices only, not on norms and biases")] = 0.1
    clip_norm: Annotated[float, Field(ge=0, description="gradients are scaled down to this norm; 0: not")] = 1.0
    batch_size: Annotated[Positive, Field(le=2**20, description="sequences per inner step and node")] = 16
    schedule: Annotated[
        Literal["cosine", "wsd", "constant"],
        Field(description="of the learning rate after warm-up; wsd: warm-up, stable, decay"),
    ] = "cosine"
    warmup_steps: Annotated[int, Field(ge=0, le=2**40, description="linear warm-up, in inner steps")] = 100
    total_steps: Annotated[
        int,
        Field(
            ge=0,
            le=2**40,
            description="inner steps at which the schedule ends; 0: rounds x inner_steps, and with "
            "rounds 0 it has no end: the rate stays at its peak. Must be given if rounds end after seconds, unless "
            "schedule is constant or rounds is 0",
        ),
    ] = 0
    decay_share: Annotated[Ratio, Field(description="wsd: the last share of the steps, in which the rate decays")] = 0.1
    min_learning_rate_ratio: Annotated[Ratio, Field(description="where the schedule ends, relative to the peak")] = 0.1
    max_z_loss: Annotated[float, Field(ge=0, description="weight of the max-z loss on the largest logit; 0: off")] = 0.0


class OuterSettings(Settings):
    """SGD with Nesterov momentum on the averaged pseudo-gradients (DiLoCo, arXiv 2311.08105)."""

    learning_rate: Annotated[float, Field(gt=0, description="how far the outer weights follow the mean")] = 0.7
    momentum: Annotated[Decay, Field(description="share of the last outer step that goes into the next; 0: none")] = 0.9
    schedule: Annotated[
        Literal["constant", "linear"],
        Field(
            description="of the learning rate after warm-up; linear: down to its end at run.rounds, which must be given"
        ),
    ] = "constant"
    warmup_rounds: Annotated[int, Field(ge=0, le=2**40, description="linear warm-up, in rounds")] = 0
    min_learning_rate_ratio: Annotated[Ratio, Field(description="where schedule linear ends, relative to the peak")] = (
        0.1
    )


class RoundSettings(Settings):
    """When a node has done its part of a round: after so many inner steps, or after so many seconds. Give one."""

    inner_steps: Annotated[
        int,
        Field(
            ge=0,
            le=MAX_ROUND_STEPS,
            description="inner steps after which a node exchanges the same weights again: H of the papers; 0: seconds "
            "is given",
        ),
    ] = 100
    seconds: Annotated[
        UpToADay,
        Field(
            description="seconds of inner steps per round, at least one step: nodes of unequal speed then do as much "
            "as they can, and weigh as much as they did; 0: inner_steps is given"
        ),
    ] = 0.0

    @model_validator(mode="before")
    @classmethod
    def _seconds_alone_are_enough(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("seconds") and "inner_steps" not in data:
            return {**data, "inner_steps": 0}
        return data


CodecName = Literal["int8", "int4", "e3m0", "fp16", "fp32", "topk", "sparse"]
"""``topk`` is of contributions alone, ``sparse`` of the means of those."""
ContributionCodec = Literal["int8", "int4", "e3m0", "fp16", "fp32", "topk"]
ReducerName = Literal["mean", "rda", "trimmed_mean", "median"]


class ExchangeSettings(Settings):
    """How pseudo-gradients are averaged."""

    codec: Annotated[
        ContributionCodec,
        Field(
            description="what contributions are encoded with, in 8.1, 4.1, 4.1, 16, 32, 0.23 bits per weight; fp32 is "
            "exact; topk is a 64th of the weights, with 2 bits each (SparseLoCo, arXiv 2508.15706), and needs "
            "error_feedback"
        ),
    ] = "int8"
    mean_codec: Annotated[
        Literal["same", "int8", "int4", "e3m0", "fp16", "fp32"],
        Field(
            description="what means are encoded with; same: as contributions, of topk each weight that any of "
            "them has, in 8 bits"
        ),
    ] = "same"
    error_feedback: Annotated[
        bool,
        Field(
            description="what a codec drops of a contribution stays in the local weights, and enters the next one "
            "(arXiv 1901.09847); for codecs of few bits. With topk it is kept apart, in 4 bytes per weight on the "
            "host, and fades by 5 % each time (2508.15706). The means have none"
        ),
    ] = False
    reduce: Annotated[
        ReducerName,
        Field(
            description="what owners make of the contributions to a chunk. mean: their mean, weighted by tokens; rda: "
            "the direction is the mean of their directions, the size that of their sizes (arXiv 2604.21428), for many "
            "nodes that disagree; trimmed_mean, median: of each element (1803.01498), whatever a few nodes contribute; "
            "these two count nodes and not tokens, and need 4 bytes for each element of a chunk and node"
        ),
    ] = "mean"
    trim: Annotated[
        Positive,
        Field(
            le=MAX_MEMBERS // 2,
            description="trimmed_mean leaves out so many of the largest values of each element, and as many of the "
            "smallest; with no more than twice as many nodes it is the median",
        ),
    ] = 1
    chunk_elements: Annotated[
        int,
        Field(
            ge=256, le=2**26, multiple_of=256, description="elements per chunk: the unit of exchange, and of ownership"
        ),
    ] = 2**20

    @property
    def codec_of_means(self) -> CodecName:
        """What ``mean_codec`` stands for."""
        if self.mean_codec != "same":
            return self.mean_codec
        return "sparse" if self.codec == "topk" else self.codec


class LlamaSettings(Settings):
    """The shape of the model where run.model is "llama". `prime-async import` writes it."""

    width: Annotated[int, Field(ge=0, le=2**20, description="elements of a token's vector; 0: a named size")] = 0
    layers: Annotated[int, Field(ge=0, le=2**12, description="layers; 0: a named size")] = 0
    heads: Annotated[
        int, Field(ge=0, le=2**12, description="heads of attention, which divide width; 0: a named size")
    ] = 0
    kv_heads: Annotated[
        int, Field(ge=0, le=2**12, description="heads of keys and values, which divide heads; 0: a named size")
    ] = 0
    ffn_width: Annotated[
        int, Field(ge=0, le=2**22, description="elements between the matrices of an MLP; 0: a named size")
    ] = 0
    rope_theta: Annotated[float, Field(gt=0, description="base of the rotary positions' wavelengths")] = 10_000.0
    norm_eps: Annotated[float, Field(gt=0, le=1, description="added to the mean square in RMSNorm")] = 1e-5
    tied_embeddings: Annotated[
        bool, Field(description="the output matrix is that of the tokens' vectors, and not one of its own")
    ] = False


class RunSpec(Settings):
    """Every setting that must be equal on all nodes. Their digest is the run id."""

    name: Annotated[
        str,
        Field(
            min_length=1,
            max_length=64,
            pattern=r"^[A-Za-z0-9._-]+$",
            description="name of the run",
            json_schema_extra=_words("1 to 64 letters, digits, dots, underscores or hyphens"),
        ),
    ]
    model: Annotated[
        str,
        Field(
            min_length=1,
            max_length=256,
            pattern=r"^[A-Za-z0-9._-]+(:[A-Za-z0-9._]+)?$",
            description='a named size, "llama" for one of the shape in run.llama, or "package.module:factory" for one '
            "of your own",
            json_schema_extra=_words('a name such as "llama-1m", or "package.module:factory"'),
        ),
    ] = "llama-1m"
    initial_digest: Annotated[
        str,
        Field(
            pattern=r"^([0-9a-f]{64})?$",
            description="digest of the outer state that the run begins with, if `prime-async import` made it of "
            'weights from elsewhere: who has it not gets it from a member; "": the weights follow from the seed',
            json_schema_extra=_words('64 lower-case hexadecimal digits, or ""'),
        ),
    ] = ""
    data: Annotated[
        str,
        Field(
            min_length=1,
            max_length=256,
            pattern=r"^(shakespeare|tokens|[A-Za-z0-9._]+:[A-Za-z0-9._]+)$",
            description='"shakespeare" is bundled, "tokens" is a file made by `prime-async data`, '
            '"package.module:factory" is your own',
            json_schema_extra=_words('"shakespeare", "tokens" or "package.module:factory"'),
        ),
    ] = "shakespeare"
    data_digest: Annotated[
        str,
        Field(
            pattern=r"^([0-9a-f]{64})?$",
            description='"tokens" only: the digest of the token file, so that all nodes read the same; "": any file',
            json_schema_extra=_words('64 lower-case hexadecimal digits, or ""'),
        ),
    ] = ""
    vocab_size: Annotated[
        int,
        Field(
            ge=0,
            le=2**24,
            description="tokens that the model knows, at least as many as the data have; with it a witness needs no "
            "data; 0: as many as the data have",
        ),
    ] = 0
    sequence_length: Annotated[Positive, Field(le=2**24, description="tokens per sequence")] = 256
    seed: Annotated[int, Field(ge=0, lt=2**63, description="of the initial weights and of the data order")] = 0
    rounds: Annotated[
        int, Field(ge=0, le=2**40, description="the run ends after so many rounds; 0: when it is stopped")
    ] = 0
    round: RoundSettings = RoundSettings()
    mode: Annotated[
        Literal["blocking", "overlapped", "streaming", "eager"],
        Field(
            description="blocking: exchange, then train on (INTELLECT-1, arXiv 2412.01152); overlapped: exchange while "
            "the next inner steps run, and wait only if they are done first; streaming: the same for one of fragments "
            "after the other (Streaming DiLoCo, 2501.18512), the same bytes with a lower peak; eager: the exchange may "
            "take a whole round, for the local weights move at once, by an estimate (2502.12996)"
        ),
    ] = "blocking"
    fragments: Annotated[
        Positive,
        Field(
            le=2**16,
            description="in mode streaming the weights are exchanged in so many parts; a round is that of one of them, "
            "and lasts as many times shorter, so that each is exchanged once in round.inner_steps; no more than chunks",
        ),
    ] = 4
    warmup_sync_steps: Annotated[
        int,
        Field(
            ge=0,
            le=2**20,
            description="the run begins with so many rounds of one inner step each, after which every node waits and "
            "takes the mean of all weights: data-parallel training with sgd and clip_norm 0, and nearly so with adamw "
            "and muon, where each node has moments of its own and clips by its own norm. They count in rounds; outer "
            "and exchange.reduce begin after them. Not with mode streaming, round.seconds or codec topk",
        ),
    ] = 0
    min_members: Annotated[
        Positive,
        Field(
            le=MAX_MEMBERS,
            description="with fewer active members that train (all but witnesses) nobody does, and no round is planned",
        ),
    ] = 1
    heartbeat_s: Annotated[Seconds, Field(description="seconds between two heartbeats")] = 1.0
    failure_timeout_s: Annotated[
        Seconds,
        Field(description="a member silent for so many seconds is removed; more than twice heartbeat_s"),
    ] = 10.0
    straggler_timeout_s: Annotated[
        UpToADay,
        Field(
            description="a round waits for slow nodes so many seconds after more than half of those that train, and at "
            "least min_members, are ready; who comes later keeps its steps for the next round. Long, since whoever "
            "misses a round by a little idles in the next; not for ever, so that one stuck machine does not hold up "
            "the run. 0: for ever"
        ),
    ] = 300.0
    llama: LlamaSettings = LlamaSettings()
    inner: InnerSettings = InnerSettings()
    outer: OuterSettings = OuterSettings()
    exchange: ExchangeSettings = ExchangeSettings()

    @property
    def overlaps(self) -> bool:
        """Whether inner steps go on while a contribution is exchanged."""
        return self.mode != "blocking"

    @property
    def fragment_count(self) -> int:
        """In how many parts the weights are exchanged."""
        return self.fragments if self.mode == "streaming" else 1

    @property
    def steps_per_round(self) -> int:
        """Inner steps from one contribution to the next; 0: they are those of :attr:`seconds_per_round`."""
        return self.round.inner_steps // self.fragment_count

    @property
    def seconds_per_round(self) -> float:
        """Seconds from one contribution to the next; 0: they are :attr:`steps_per_round`."""
        return self.round.seconds / self.fragment_count

    def is_synchronous(self, round: int) -> bool:
        """Whether ``round`` is one of the first, of one inner step each (``warmup_sync_steps``)."""
        return round < self.warmup_sync_steps


class NodeSettings(Settings):
    """The settings of one node. Paths are relative to the folder of the file."""

    name: Annotated[
        str,
        Field(
            max_length=64,
            pattern=r"^\P{Cc}*$",
            description='shown to people; "": the first digits of the key',
            json_schema_extra=_words("at most 64 characters on one line"),
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
            json_schema_extra=_words('a URL, or ""'),
        ),
    ] = ""
    host: Annotated[
        str,
        AfterValidator(_host),
        Field(
            min_length=1,
            description="local address to listen on; 0.0.0.0: all of this machine",
            json_schema_extra=_words("a host name or address without a port"),
        ),
    ] = "0.0.0.0"
    port: Annotated[int, Field(ge=0, le=65535, description="TCP port of the control plane; 0: any free one")] = 7700
    bulk_port: Annotated[int, Field(ge=0, le=65535, description="TCP port of the bulk plane; 0: any free one")] = 7701
    advertise: Annotated[
        str,
        AfterValidator(_host),
        Field(
            max_length=MAX_HOST_LENGTH,
            description='name or address that other nodes dial; "": found from the route to the first contact',
            json_schema_extra=_words('a host name or address without a port, or ""'),
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
            json_schema_extra=_words('"auto", "cpu", "cuda" or "cuda:N"'),
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
        AfterValidator(_dashboard),
        Field(
            max_length=MAX_HOST_LENGTH + 8,
            description="where a browser finds the run's web page, /metrics, /healthz and /readyz, such as "
            '"127.0.0.1:8080"; with "0.0.0.0:8080" everybody who reaches this machine may look, and no more than that '
            '(needs `prime-async[dashboard]`); "": nowhere',
            json_schema_extra=_words('HOST:PORT, or ""'),
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


class Config(Settings):
    """A whole configuration file."""

    run: RunSpec
    node: NodeSettings = NodeSettings()

    @model_validator(mode="after")
    def _obeys_the_rules(self) -> Config:
        broken = [(rule, text) for rule in RULES if (text := rule.broken(self)) is not None]
        if broken:
            raise ValidationError.from_exception_data("Config", [_rule_error(rule, text) for rule, text in broken])
        return self


class Rule(NamedTuple):
    """A condition on several settings. The first of ``keys`` is blamed; ``broken`` says what it should be."""

    keys: tuple[str, ...]
    broken: Callable[[Config], str | None]


RULE_ERROR: Final = "rule"
"""The type of pydantic error that a broken rule makes; its ``ctx`` holds ``text`` and ``keys``."""


def _rule_error(rule: Rule, text: str) -> InitErrorDetails:
    error = PydanticCustomError(RULE_ERROR, "{text}", {"text": text, "keys": rule.keys})
    return InitErrorDetails(type=error, loc=tuple(rule.keys[0].split(".")), input=None)


def _timeout_outlasts_heartbeats(config: Config) -> str | None:
    timeout, heartbeat = config.run.failure_timeout_s, config.run.heartbeat_s
    if timeout > 2 * heartbeat:
        return None
    return (
        f"expected more than twice run.heartbeat_s ({heartbeat}), so that one lost heartbeat is no death, got {timeout}"
    )


def _round_ends_in_one_way(config: Config) -> str | None:
    round = config.run.round
    if bool(round.inner_steps) != bool(round.seconds):
        return None
    if round.inner_steps:
        return (
            f"expected 0 since run.round.inner_steps is {round.inner_steps}: give one of the two, got {round.seconds}"
        )
    return "expected a number greater than 0 since run.round.inner_steps is 0: give one of the two, got 0.0"


def _outer_schedule_has_an_end(config: Config) -> str | None:
    run = config.run
    if run.outer.schedule == "constant" or run.rounds > run.warmup_sync_steps + run.outer.warmup_rounds:
        return None
    warmup = f"run.outer.warmup_rounds ({run.outer.warmup_rounds})"
    if run.warmup_sync_steps:
        warmup = f"run.warmup_sync_steps ({run.warmup_sync_steps}) and {warmup} together"
    return f"expected more than {warmup} for run.outer.schedule, got {run.rounds}"


def _warmup_fits_the_exchange(config: Config) -> str | None:
    run = config.run
    if not run.warmup_sync_steps:
        return None
    if run.mode == "streaming":
        why = 'run.mode is "streaming": such a round exchanges all weights, and not one of run.fragments'
    elif run.round.seconds:
        why = f"run.round.seconds is {run.round.seconds}: it goes with run.round.inner_steps alone"
    elif run.exchange.codec == "topk":
        why = 'run.exchange.codec is "topk", which sends a 64th of what an inner step changes'
    else:
        return None
    return f"expected 0 since {why}; got {run.warmup_sync_steps}"


def _run_outlasts_the_warmup(config: Config) -> str | None:
    run = config.run
    if not run.warmup_sync_steps or not run.rounds or run.rounds > run.warmup_sync_steps:
        return None
    return (
        f"expected more than run.warmup_sync_steps ({run.warmup_sync_steps}), which are rounds of the run, or 0 for no "
        f"end, got {run.rounds}"
    )


def _fragments_divide_the_round(config: Config) -> str | None:
    run = config.run
    if run.round.inner_steps % run.fragment_count == 0:
        return None
    return (
        f"expected a number that divides run.round.inner_steps ({run.round.inner_steps}), so that all rounds are "
        f"equally long, got {run.fragments}"
    )


def _round_weight_is_exact(config: Config) -> str | None:
    """Of a round that ends with the clock only one step is known; the machines limit what a contribution weighs."""
    run = config.run
    tokens = run.inner.batch_size * run.sequence_length * max(run.round.inner_steps, 1)
    if tokens <= MAX_ROUND_TOKENS:
        return None
    return (
        f"expected at most {MAX_ROUND_TOKENS} tokens per node and round, "
        f"got {tokens} (with run.sequence_length and run.round.inner_steps)"
    )


def _schedule_has_an_end(config: Config) -> str | None:
    run = config.run
    if not run.round.seconds or run.inner.total_steps or run.inner.schedule == "constant" or not run.rounds:
        return None
    return (
        f"expected the inner steps that a node does in all {run.rounds} rounds, since run.round.seconds does not say; "
        'or set run.inner.schedule = "constant", got 0'
    )


def _warmup_ends(config: Config) -> str | None:
    inner = config.run.inner
    if not inner.total_steps or inner.schedule == "constant" or inner.warmup_steps <= inner.total_steps:
        return None
    return f"expected at most run.inner.total_steps ({inner.total_steps}), got {inner.warmup_steps}"


def _decay_begins_after_warmup(config: Config) -> str | None:
    inner = config.run.inner
    room = inner.total_steps - inner.warmup_steps
    if inner.schedule != "wsd" or room < 0 or inner.decay_share * inner.total_steps <= room:
        return None
    return (
        f"expected the decay to fit between run.inner.warmup_steps ({inner.warmup_steps}) "
        f"and run.inner.total_steps ({inner.total_steps}), got {inner.decay_share}"
    )


def _shape_belongs_to_llama(config: Config) -> str | None:
    run, shape = config.run, config.run.llama
    if run.model != "llama":
        return None if shape == LlamaSettings() else f'expected no [run.llama], since run.model is "{run.model}"'
    numbers = {name: getattr(shape, name) for name in ("width", "layers", "heads", "kv_heads", "ffn_width")}
    missing = [f"run.llama.{name}" for name, number in numbers.items() if number == 0]
    if missing:
        return f'run.model = "llama" needs {", ".join(missing)}: numbers of at least 1'
    if shape.width % shape.heads or (shape.width // shape.heads) % 2:
        return f"expected an even multiple of run.llama.heads ({shape.heads}), got {shape.width}"
    if shape.heads % shape.kv_heads:
        return f"run.llama.kv_heads: expected a divisor of run.llama.heads ({shape.heads}), got {shape.kv_heads}"
    return None


def _digest_belongs_to_tokens(config: Config) -> str | None:
    if not config.run.data_digest or config.run.data == "tokens":
        return None
    return f'expected "" since run.data is "{config.run.data}" and not "tokens"'


def _tokens_have_a_file(config: Config) -> str | None:
    if config.run.data != "tokens" or config.node.data_path is not None:
        return None
    if config.node.witness and config.run.vocab_size:
        return None
    return 'missing; run.data = "tokens" needs the token file that `prime-async data` makes'


def _ports_differ(config: Config) -> str | None:
    node = config.node
    if node.port != node.bulk_port or node.port == 0:
        return None
    return f"expected another port than node.port, or 0 for any free one, got {node.bulk_port}"


def _micro_batches_fill_a_batch(config: Config) -> str | None:
    micro, batch = config.node.micro_batch_size, config.run.inner.batch_size
    if not micro or batch % micro == 0:
        return None
    return f"expected a divisor of run.inner.batch_size ({batch}), or 0 for the whole batch, got {micro}"


def _topk_has_feedback(config: Config) -> str | None:
    exchange = config.run.exchange
    if exchange.codec != "topk" or exchange.error_feedback:
        return None
    return (
        'expected true since run.exchange.codec is "topk": without feedback 63 of 64 weights would never learn what '
        "their node found, got false"
    )


def _topk_is_averaged(config: Config) -> str | None:
    exchange = config.run.exchange
    if exchange.codec != "topk" or exchange.reduce in ("mean", "rda"):
        return None
    return (
        'expected "mean" or "rda" since run.exchange.codec is "topk": most nodes send nothing of a weight, so what the '
        f'middle of them says is zero, got "{exchange.reduce}"'
    )


RULES: Final = (
    Rule(("run.failure_timeout_s", "run.heartbeat_s"), _timeout_outlasts_heartbeats),
    Rule(("run.round.seconds", "run.round.inner_steps"), _round_ends_in_one_way),
    Rule(
        ("run.rounds", "run.outer.schedule", "run.outer.warmup_rounds", "run.warmup_sync_steps"),
        _outer_schedule_has_an_end,
    ),
    Rule(
        ("run.warmup_sync_steps", "run.mode", "run.round.seconds", "run.exchange.codec"),
        _warmup_fits_the_exchange,
    ),
    Rule(("run.rounds", "run.warmup_sync_steps"), _run_outlasts_the_warmup),
    Rule(("run.fragments", "run.round.inner_steps", "run.mode"), _fragments_divide_the_round),
    Rule(("run.inner.batch_size", "run.sequence_length", "run.round.inner_steps"), _round_weight_is_exact),
    Rule(
        ("run.inner.total_steps", "run.inner.schedule", "run.rounds", "run.round.seconds"),
        _schedule_has_an_end,
    ),
    Rule(("run.inner.warmup_steps", "run.inner.total_steps", "run.inner.schedule"), _warmup_ends),
    Rule(
        ("run.inner.decay_share", "run.inner.warmup_steps", "run.inner.total_steps", "run.inner.schedule"),
        _decay_begins_after_warmup,
    ),
    Rule(
        ("run.llama.width", "run.model", "run.llama"),
        _shape_belongs_to_llama,
    ),
    Rule(("run.data_digest", "run.data"), _digest_belongs_to_tokens),
    Rule(("node.data_path", "run.data", "node.witness", "run.vocab_size"), _tokens_have_a_file),
    Rule(("run.exchange.error_feedback", "run.exchange.codec"), _topk_has_feedback),
    Rule(("run.exchange.reduce", "run.exchange.codec"), _topk_is_averaged),
    Rule(("node.bulk_port", "node.port"), _ports_differ),
    Rule(("node.micro_batch_size", "run.inner.batch_size"), _micro_batches_fill_a_batch),
)
