"""The rules that a source of ``reward.sources`` can name (``rule: math``), and the options of each.

The code of the rules is in ``rlxf/score/rules``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, cast, get_args

from pydantic import BeforeValidator, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from rlxf.config.fields import as_list, as_tuple
from rlxf.config.kinds import Finite, Positive, Strict
from rlxf.config.problems import Problem, expectation, show, wrong
from rlxf.core.errors import ConfigError
from rlxf.core.words import nearest

RuleName = Literal[
    "math",
    "exact",
    "regex",
    "json_schema",
    "length",
    "format",
    "classifier",
    "accuracy_reward",
    "reasoning_accuracy_reward",
    "think_format_reward",
    "get_repetition_penalty_reward",
    "get_soft_overlong_punishment",
    "get_cosine_scaled_reward",
]

# Short names of TRL's rewards, and the names that TRL logs them by.
RULE_ALIASES: dict[str, RuleName] = {
    "accuracy": "accuracy_reward",
    "reasoning_accuracy": "reasoning_accuracy_reward",
    "think_format": "think_format_reward",
    "repetition_penalty": "get_repetition_penalty_reward",
    "repetition_penalty_reward": "get_repetition_penalty_reward",
    "soft_overlong_punishment": "get_soft_overlong_punishment",
    "soft_overlong_punishment_reward": "get_soft_overlong_punishment",
    "cosine_scaled": "get_cosine_scaled_reward",
    "cosine_scaled_reward": "get_cosine_scaled_reward",
}


def as_rule(value: Any) -> Any:
    """The rule that a short name stands for; any other value as it is."""
    return RULE_ALIASES.get(value, value) if isinstance(value, str) else value


Rule = Annotated[RuleName, BeforeValidator(as_rule)]
"""The type of a key that names a rule."""


def _as_pattern(value: Any) -> Any:
    """Text that is a regular expression."""
    import regex

    if isinstance(value, str):
        try:
            regex.compile(value)
        except regex.error as error:
            raise ValueError(f"a regular expression: {error}") from None
    return value


def _as_absolute(value: Any) -> Any:
    """A path relative to the folder where the command is typed; workers run in other folders."""
    return str(Path(value).expanduser().absolute()) if isinstance(value, str) and value else value


def _as_label(value: Any) -> Any:
    if value is None or isinstance(value, str) or (isinstance(value, int) and not isinstance(value, bool)):
        return value
    raise ValueError("the name of a label, or its index")


def _as_schema(value: Any) -> Any:
    """A JSON schema: a mapping in which all keywords have the right form."""
    import jsonschema

    if isinstance(value, Mapping):
        try:
            jsonschema.validators.validator_for(value).check_schema(value)
        except jsonschema.SchemaError as error:
            raise ValueError(f"a JSON schema: {error.json_path}: {error.message}") from None
    return value


Pattern = Annotated[str, BeforeValidator(_as_pattern)]
Path_ = Annotated[str, BeforeValidator(_as_absolute)]
Seconds = Annotated[Finite, Field(gt=0)]
Length = Annotated[int, Field(ge=0)]


class MathOptions(Strict):
    """1 if the answer of a completion equals the column's, as mathematics; else 0."""

    column: str = "answer"
    """Column of the data with the right answer: a number, an expression or LaTeX."""
    column_after: str | None = None
    """Read only what follows the last of these texts in the column, such as `####`."""
    after: str | None = None
    """Read only what follows the last of these texts in the completion, such as `</think>`. A completion without it
    gets 0."""
    timeout_s: Positive = 5
    """Seconds for reading an answer, and again for the comparison. What takes longer gets 0."""


class ExactOptions(Strict):
    """1 if the completion is the column's text, else 0."""

    column: str = "answer"
    """Column of the data with the right text, or with a list of right texts."""
    ignore_case: bool = False
    """Do not tell upper and lower case apart."""
    strip: bool = True
    """Ignore white space at both ends."""
    ignore_punctuation: bool = False
    """Ignore punctuation marks."""


class RegexOptions(Strict):
    """1 if the pattern matches the completion, else 0."""

    pattern: Pattern | None = None
    """Regular expression. Set either this or `column`."""
    column: str | None = None
    """Column of the data with a regular expression per row."""
    match: Literal["anywhere", "whole"] = "anywhere"
    """Whether a part of the completion may match, or the whole of it must."""
    ignore_case: bool = False
    """Do not tell upper and lower case apart."""
    timeout_s: Seconds = 1.0
    """Seconds for one completion. A search that takes longer gives no score."""

    @model_validator(mode="after")
    def _one_source(self) -> RegexOptions:
        _require_one(self, "pattern", "column")
        return self


class JsonSchemaOptions(Strict):
    """1 if the completion, or the first fenced block in it, is JSON that fits the schema; else 0."""

    file: Path_ | None = None
    """File with the JSON schema. Set one of `file`, `inline` and `column`."""
    inline: Annotated[dict[str, Any], BeforeValidator(_as_schema)] | None = None
    """The JSON schema itself."""
    column: str | None = None
    """Column of the data with a schema per row: a mapping, or one in JSON."""
    timeout_s: Seconds = 1.0
    """Seconds for one pattern of the schema. A completion that takes longer gets no score."""

    @model_validator(mode="after")
    def _one_source(self) -> JsonSchemaOptions:
        _require_one(self, "file", "inline", "column")
        return self


class LengthOptions(Strict):
    """1 if the completion's length is between `min` and `max`, both included; else 0, or less by its distance."""

    unit: Literal["tokens", "words", "characters"] = "tokens"
    """What is counted."""
    min: Length | None = None
    """Shortest length. Unset: no limit."""
    max: Length | None = None
    """Longest length. Unset: no limit."""
    slack: Length = 0
    """Distance from the limits over which the score falls from 1 to 0, linearly. 0: at once."""

    @model_validator(mode="after")
    def _limits(self) -> LengthOptions:
        if self.min is None and self.max is None:
            raise ValueError("min, max or both")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(f"a max of at least min = {self.min}")
        return self


class FormatOptions(Strict):
    """1 if the completion has all parts, else 0."""

    parts: Annotated[tuple[Pattern, ...], BeforeValidator(as_list), Field(min_length=1)]
    """Regular expressions; each must match somewhere in the completion."""
    in_order: bool = False
    """Each part must begin after the end of the one before."""
    partial: bool = False
    """The score is the share of the parts that are there."""
    timeout_s: Seconds = 1.0
    """Seconds for one part of one completion. A search that takes longer gives no score."""


class ClassifierOptions(Strict):
    """What a Hugging Face classifier says of a label."""

    load: Path_
    """Folder of a Hugging Face `*ForSequenceClassification` with its tokenizer."""
    label: Annotated[str | int | None, BeforeValidator(_as_label)] = None
    """Name or index of the label. Unset: the only one."""
    output: Literal["probability", "logit"] = "probability"
    """`probability`: of the label, between 0 and 1. `logit`: the number before."""
    text: Literal["completion", "joined", "pair"] = "completion"
    """What the classifier reads: the completion; prompt and completion as one text; or both as a pair of texts."""
    batch_size: Positive = 16
    """Texts per forward pass."""
    max_length: Positive | None = None
    """Longest text, in tokens; the rest is cut off. Unset: what the model can read."""


class AccuracyOptions(Strict):
    """TRL's `accuracy_reward`: 1 if the LaTeX answer equals the solution, else 0; no score without a solution."""

    column: str = "solution"
    """Column of the data with the solution."""


class ReasoningAccuracyOptions(AccuracyOptions):
    """TRL's `reasoning_accuracy_reward`: the same of the text after the reasoning; 0 if the reasoning does not end."""

    reasoning_delimiters: Annotated[tuple[str, ...], BeforeValidator(as_tuple), Field(min_length=1)] = ("</think>",)
    """Texts that end the reasoning; the first of these that the completion has counts."""


class ThinkFormatOptions(Strict):
    """TRL's `think_format_reward`: 1 for `<think>...</think>...`, else 0."""


class RepetitionOptions(Strict):
    """TRL's `get_repetition_penalty_reward`: share of repeated n-grams of tokens, times the penalty."""

    ngram_size: Positive = 3
    """Tokens of an n-gram."""
    max_penalty: Finite = Field(-1.0, le=0)
    """Score of a completion of nothing but repetitions."""


class SoftOverlongOptions(Strict):
    """TRL's `get_soft_overlong_punishment`: from 0 down to -1 over the last tokens before the limit (DAPO, eq. 13)."""

    max_completion_len: Positive
    """Length from which on a completion gets -1, in tokens."""
    soft_punish_cache: Length
    """Tokens before it over which the score falls."""

    @model_validator(mode="after")
    def _fits(self) -> SoftOverlongOptions:
        if self.soft_punish_cache > self.max_completion_len:
            raise ValueError(f"a soft_punish_cache of at most max_completion_len = {self.max_completion_len}")
        return self


class CosineOptions(AccuracyOptions):
    """TRL's `get_cosine_scaled_reward`: right answers get more the shorter they are, wrong ones less."""

    max_len: Positive
    """Length at which the schedule ends, in tokens."""
    min_value_wrong: Finite = -1.0
    """Score of a wrong completion without a token."""
    max_value_wrong: Finite = -0.5
    """Score of a wrong completion of `max_len` tokens or more."""
    min_value_correct: Finite = 0.5
    """Score of a right completion of `max_len` tokens or more."""
    max_value_correct: Finite = 1.0
    """Score of a right completion without a token."""


RULE_OPTIONS: dict[RuleName, type[Strict]] = {
    "math": MathOptions,
    "exact": ExactOptions,
    "regex": RegexOptions,
    "json_schema": JsonSchemaOptions,
    "length": LengthOptions,
    "format": FormatOptions,
    "classifier": ClassifierOptions,
    "accuracy_reward": AccuracyOptions,
    "reasoning_accuracy_reward": ReasoningAccuracyOptions,
    "think_format_reward": ThinkFormatOptions,
    "get_repetition_penalty_reward": RepetitionOptions,
    "get_soft_overlong_punishment": SoftOverlongOptions,
    "get_cosine_scaled_reward": CosineOptions,
}


def _require_one(options: Strict, *keys: str) -> None:
    given = [key for key in keys if key in options.model_fields_set and getattr(options, key) is not None]
    if len(given) != 1:
        found = f"{' and '.join(given)} are set" if given else "none is set"
        raise ValueError(f"one of {', '.join(keys)}; {found}")


# What people write for an option of a rule.
_SYNONYMS = {
    "schema": "inline",
    "path": "file",
    "model": "load",
    "key": "column",
    "solution": "column",
    "answer": "column",
    "minimum": "min",
    "maximum": "max",
    "min_tokens": "min",
    "max_tokens": "max",
    "patterns": "parts",
    "case_sensitive": "ignore_case",
}


def rule_problems(key: str, name: str, options: Mapping[str, Any] | None, *, files: bool = True) -> Iterator[Problem]:
    """Wrong and unknown options of a rule, one line each.

    Args:
        key: of the options in the recipe, such as ``reward.sources.math.options``; the lines begin with it.
        name: of the rule, or a short one. An unknown name is a problem, too.
        options: as the recipe has them; None is none.
        files: whether the files that the options name must exist (a dry run plans for another machine).
    """
    rule = as_rule(name)
    if rule not in RULE_OPTIONS:
        near = nearest(name, [*RULE_OPTIONS, *RULE_ALIASES])
        hint = f'; did you mean "{near}"?' if near else f"; known: {', '.join(RULE_OPTIONS)}"
        yield Problem((key,), f"{key}: {show(name)} is no rule{hint}")
        return
    if options is not None and not isinstance(options, Mapping):
        yield wrong(key, options, "expected a section with options of its own")
        return
    model = RULE_OPTIONS[cast(RuleName, rule)]
    try:
        valid = model.model_validate({} if options is None else dict(options))
    except ValidationError as error:
        seen: dict[tuple[str | int, ...], ErrorDetails] = {}
        for found in error.errors(include_url=False):
            seen.setdefault(found["loc"][:1], found)  # a list with three wrong entries is one wrong option
        yield from (_problem(key, rule, model, found, options or {}) for found in seen.values())
        return
    if files:
        yield from _file_problems(key, valid)


def rule_options(name: str, options: Mapping[str, Any] | None) -> Strict:
    """The checked options of a rule, its defaults filled in, paths absolute.

    Raises:
        ConfigError: what ``rule_problems`` says without a look at files.
    """
    problems = [problem.text for problem in rule_problems(f"options of rule {name}", name, options, files=False)]
    if problems:
        raise ConfigError(*problems)
    return RULE_OPTIONS[as_rule(name)].model_validate(dict(options or {}))


def _problem(key: str, rule: str, model: type[Strict], error: ErrorDetails, options: Mapping[str, Any]) -> Problem:
    if not error["loc"]:  # several options together
        return wrong(key, dict(options), expectation(error))
    option = str(error["loc"][0])
    place, known = f"{key}.{option}", list(model.model_fields)
    if error["type"] == "extra_forbidden":
        other = _SYNONYMS.get(option)
        near = other if other in known else nearest(option, known)
        hint = f'; did you mean "{near}"?' if near else f"; it has {', '.join(known) or 'none'}"
        return Problem((key, place), f"{place}: unknown option of rule {rule}{hint}")
    if error["type"] == "missing":
        meaning = " ".join(str(model.model_fields[option].description).split())
        return Problem((key, place), f"{place} is required: {meaning[:1].lower()}{meaning[1:].rstrip('.')}")
    value = error["input"] if len(error["loc"]) == 1 else options.get(option)
    expected = "expected at least one" if error["type"] == "too_short" else expectation(error)
    return Problem((place, key), f"{place} = {show(value)}: {expected}")


def _file_problems(key: str, options: Strict) -> Iterator[Problem]:
    if isinstance(options, JsonSchemaOptions) and options.file is not None:
        yield from _schema_file(f"{key}.file", key, Path(options.file))
    if isinstance(options, ClassifierOptions):
        yield from _classifier_folder(f"{key}.load", key, options)


def _schema_file(place: str, key: str, path: Path) -> Iterator[Problem]:
    try:
        schema = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        yield wrong(place, str(path), f"expected a file with a JSON schema: {error.strerror}", key)
        return
    except ValueError as error:
        yield wrong(place, str(path), f"expected a file with a JSON schema, but it is not JSON: {error}", key)
        return
    if not isinstance(schema, dict):
        yield wrong(place, str(path), "expected a file with a JSON schema, a mapping", key)
        return
    try:
        _as_schema(schema)
    except ValueError as error:
        yield wrong(place, str(path), f"expected {error}", key)


def classifier_labels(folder: Path) -> list[str]:
    """The labels of a Hugging Face classifier, by index.

    Raises:
        ValueError: its ``config.json`` is missing or broken, or describes no ``*ForSequenceClassification``.
    """
    path = folder / "config.json"
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"a Hugging Face folder with a classifier: config.json: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"a Hugging Face folder with a classifier, but config.json is not JSON: {error}") from None
    names = settings.get("architectures") if isinstance(settings, dict) else None
    classes = names if isinstance(names, list) else []
    if not any(str(name).endswith("ForSequenceClassification") for name in classes):
        found = ", ".join(map(str, classes)) or "nothing"
        raise ValueError(f"a folder with a *ForSequenceClassification; its config.json names {found}")
    labels = settings.get("id2label")
    if not isinstance(labels, dict) or not labels:
        return [f"LABEL_{index}" for index in range(int(settings.get("num_labels") or 2))]
    return [str(labels[index]) for index in sorted(labels, key=int)]


def label_index(label: str | int | None, labels: list[str]) -> int:
    """The index of the label that is meant.

    Raises:
        ValueError: there is no such label, or none is named and there are several.
    """
    shown = ", ".join(f"{name} ({index})" for index, name in enumerate(labels))
    if label is None:
        if len(labels) > 1:
            raise ValueError(f"one of the labels {shown}")
        return 0
    if isinstance(label, int) and 0 <= label < len(labels):
        return label
    if label in labels:
        return labels.index(str(label))
    near = nearest(label, labels) if isinstance(label, str) else None
    raise ValueError(f"one of the labels {shown}" + (f'; did you mean "{near}"?' if near else ""))


def _classifier_folder(place: str, key: str, options: ClassifierOptions) -> Iterator[Problem]:
    try:
        labels = classifier_labels(Path(options.load))
    except ValueError as error:
        yield wrong(place, options.load, f"expected {error}", key)
        return
    try:
        label_index(options.label, labels)
    except ValueError as error:
        yield wrong(f"{key}.label", options.label, f"expected {error}", key)


def rule_names() -> tuple[str, ...]:
    """Every name by which a recipe may call a rule."""
    return (*get_args(RuleName), *RULE_ALIASES)
