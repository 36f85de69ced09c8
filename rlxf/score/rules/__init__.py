"""Rules that come with the program: functions that score completions without a model of their own, and a classifier.

No rule runs code from a completion.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from rlxf.config import rules as options
from rlxf.score.rules.rule import RewardFunction

if TYPE_CHECKING:
    from rlxf.score.functions import FunctionSource

__all__ = ["RULES", "RewardFunction", "make_rule"]

# A rule's imports are inside its function: math-verify, jsonschema and transformers take seconds.


def _math(given: options.MathOptions) -> RewardFunction:
    from rlxf.score.rules.maths import Math

    return Math(given)


def _exact(given: options.ExactOptions) -> RewardFunction:
    from rlxf.score.rules.match import Exact

    return Exact(given)


def _regex(given: options.RegexOptions) -> RewardFunction:
    from rlxf.score.rules.match import Regex

    return Regex(given)


def _json_schema(given: options.JsonSchemaOptions) -> RewardFunction:
    from rlxf.score.rules.json_schema import JsonSchema

    return JsonSchema(given)


def _length(given: options.LengthOptions) -> RewardFunction:
    from rlxf.score.rules.length import Length

    return Length(given)


def _format(given: options.FormatOptions) -> RewardFunction:
    from rlxf.score.rules.match import Format

    return Format(given)


def _classifier(given: options.ClassifierOptions) -> RewardFunction:
    from rlxf.score.rules.classifier import Classifier

    return Classifier(given)


def _accuracy(given: options.AccuracyOptions) -> RewardFunction:
    from rlxf.score.rules.maths import Accuracy

    return Accuracy(given)


def _think_format(given: options.ThinkFormatOptions) -> RewardFunction:
    from rlxf.score.rules.match import think_format

    return think_format


def _repetition(given: options.RepetitionOptions) -> RewardFunction:
    from rlxf.score.rules.length import Repetition

    return Repetition(given)


def _soft_overlong(given: options.SoftOverlongOptions) -> RewardFunction:
    from rlxf.score.rules.length import SoftOverlong

    return SoftOverlong(given)


def _cosine(given: options.CosineOptions) -> RewardFunction:
    from rlxf.score.rules.maths import Cosine

    return Cosine(given)


# Each takes its model of RULE_OPTIONS (rlxf/config/rules.py).
RULES: dict[options.RuleName, Callable[[Any], RewardFunction]] = {
    "math": _math,
    "exact": _exact,
    "regex": _regex,
    "json_schema": _json_schema,
    "length": _length,
    "format": _format,
    "classifier": _classifier,
    "accuracy_reward": _accuracy,
    "reasoning_accuracy_reward": _accuracy,
    "think_format_reward": _think_format,
    "get_repetition_penalty_reward": _repetition,
    "get_soft_overlong_punishment": _soft_overlong,
    "get_cosine_scaled_reward": _cosine,
}


def make_rule(name: str, given: Mapping[str, Any] | None = None) -> RewardFunction:
    """The reward function of a rule, by its name or a short one, with these options.

    Raises:
        ConfigError: there is no such rule, an option is wrong, or a file that it names, or a package is missing.
    """
    checked = options.rule_options(name, given)
    return RULES[options.as_rule(name)](checked)


def rule_source(name: str, given: Mapping[str, Any] | None, shown: str) -> FunctionSource:
    """The rule as a source of scores; ``shown``: how messages name it.

    Raises:
        ConfigError: an option is wrong, or a file that it names.
    """
    from rlxf.score.functions import FunctionSource

    return FunctionSource(make_rule(options.as_rule(name), given), shown)
