"""Every setting, with its default, bounds and meaning. The field descriptions are also the config reference.

``[run]`` (:mod:`.run`) is the run spec: it must be equal on all nodes, and its digest is the run id. ``[node]``
(:mod:`.node`) belongs to one node. Conditions on more than one setting are in :mod:`.rules`.

Error messages, the file that ``prime-async init`` writes and docs/configuration.md are made from what stands
there: a description reads well behind "learning_rate: ", and ``words`` names what a pattern allows.
"""

from __future__ import annotations

from pydantic import ValidationError, model_validator

from prime_async.config.kinds import Settings
from prime_async.config.node import NodeSettings
from prime_async.config.rules import RULE_ERROR, RULES, Rule, rule_error
from prime_async.config.run import (
    MAX_MEMBERS,
    MAX_ROUND_STEPS,
    MAX_ROUND_TOKENS,
    CodecName,
    ContributionCodec,
    ExchangeSettings,
    InnerSettings,
    LlamaSettings,
    OuterSettings,
    ReducerName,
    RoundSettings,
    RunSpec,
)

__all__ = [
    "MAX_MEMBERS",
    "MAX_ROUND_STEPS",
    "MAX_ROUND_TOKENS",
    "RULES",
    "RULE_ERROR",
    "CodecName",
    "Config",
    "ContributionCodec",
    "ExchangeSettings",
    "InnerSettings",
    "LlamaSettings",
    "NodeSettings",
    "OuterSettings",
    "ReducerName",
    "RoundSettings",
    "Rule",
    "RunSpec",
    "Settings",
]


class Config(Settings):
    """A whole configuration file."""

    run: RunSpec
    node: NodeSettings = NodeSettings()

    @model_validator(mode="after")
    def _obeys_the_rules(self) -> Config:
        broken = [(rule, text) for rule in RULES if (text := rule.broken(self)) is not None]
        if broken:
            raise ValidationError.from_exception_data("Config", [rule_error(rule, text) for rule, text in broken])
        return self
