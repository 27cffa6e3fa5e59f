"""``[run]``: what must be equal on all nodes."""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

from pydantic import Field, model_validator

from prime_async.config.kinds import Decay, Positive, Ratio, Seconds, Settings, UpToADay, words

MAX_MEMBERS: Final = 2**16
"""Bits in the protocol's bitmap of contributors."""
MAX_ROUND_TOKENS: Final = 2**36
"""Weights are tokens; those of ``MAX_MEMBERS`` contributors must add up exactly in fp64, which holds 2^53."""
MAX_ROUND_STEPS: Final = 2**20
"""Inner steps of one contribution, also where rounds end with the clock."""


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
            json_schema_extra=words("1 to 64 letters, digits, dots, underscores or hyphens"),
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
            json_schema_extra=words('a name such as "llama-1m", or "package.module:factory"'),
        ),
    ] = "llama-1m"
    initial_digest: Annotated[
        str,
        Field(
            pattern=r"^([0-9a-f]{64})?$",
            description="digest of the outer state that the run begins with, if `prime-async import` made it of "
            'weights from elsewhere: who has it not gets it from a member; "": the weights follow from the seed',
            json_schema_extra=words('64 lower-case hexadecimal digits, or ""'),
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
            json_schema_extra=words('"shakespeare", "tokens" or "package.module:factory"'),
        ),
    ] = "shakespeare"
    data_digest: Annotated[
        str,
        Field(
            pattern=r"^([0-9a-f]{64})?$",
            description='"tokens" only: the digest of the token file, so that all nodes read the same; "": any file',
            json_schema_extra=words('64 lower-case hexadecimal digits, or ""'),
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
