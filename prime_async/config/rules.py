"""Conditions on more than one setting."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final, NamedTuple

from pydantic_core import InitErrorDetails, PydanticCustomError

from prime_async.config.run import MAX_ROUND_TOKENS, LlamaSettings

if TYPE_CHECKING:
    from prime_async.config.schema import Config


class Rule(NamedTuple):
    """A condition on several settings. The first of ``keys`` is blamed; ``broken`` says what it should be."""

    keys: tuple[str, ...]
    broken: Callable[[Config], str | None]


RULE_ERROR: Final = "rule"
"""The type of pydantic error that a broken rule makes; its ``ctx`` holds ``text`` and ``keys``."""


def rule_error(rule: Rule, text: str) -> InitErrorDetails:
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
