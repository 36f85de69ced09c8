"""Tokenize a data file once, to Megatron's indexed files: ``scripts/preprocess_data.py --help``."""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also without an installed package

from rlxf.core.errors import ConfigError, RlxfError
from rlxf.core.words import nearest
from rlxf.data.handlers import HANDLERS
from rlxf.data.indexed import merge_indexed
from rlxf.data.templates import TEMPLATE_NAMES
from rlxf.tools.preprocess import Options, Summary, preprocess


class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong, with the nearest flag."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; --help lists the flags")


def at_least(least: int) -> Any:
    def whole_number(text: str) -> int:
        if not text.lstrip("-").isdigit() or int(text) < least:
            raise argparse.ArgumentTypeError(f"expected a whole number, at least {least}, got {text!r}")
        return int(text)

    return whole_number


def mapping(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(
            f"""expected a JSON object such as '{{"prompt": "question"}}', got {text!r}: {error.msg} """
            f"at column {error.colno}"
        ) from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"expected a JSON object, got {text!r}")
    return value


def make_parser() -> Parser:
    parser = Parser(description=__doc__.split(":")[0] if __doc__ else None, allow_abbrev=False)
    add = parser.add_argument
    add("--input", required=True, help="file, folder, saved Hugging Face data set, or owner/name of one on the Hub")
    add("--output-prefix", required=True, help="folder and beginning of the file names; the folder is made")
    add("--tokenizer-name-or-path", help="folder with the model's tokenizer")
    add("--tokenizer-type", default="PretrainedFromHF", help="PretrainedFromHF is the only one")
    add("--tokenizer-not-use-fast", action="store_true", help="accepted: transformers has one tokenizer per model")
    add("--handler-name", default="GeneralPretrainHandler", help=", ".join(HANDLERS))
    add("--prompt-type", help=f"chat template (default: the tokenizer's own): {', '.join(TEMPLATE_NAMES)}")
    add("--map-keys", type=mapping, default={}, help='JSON object: text of the handler -> column; "" for no column')
    add("--json-keys", nargs="+", default=["text"], help="columns that GeneralPretrainHandler takes")
    add("--dataset-additional-keys", nargs="*", default=[], help="columns whose text is written, too")
    add("--seq-length", type=at_least(2), help="tokens; longer rows are left out and counted")
    add("--append-eod", action="store_true", help="end every row with EOS, unless an end-of-turn token ends it")
    add("--pack", action="store_true", help="join examples to rows of --seq-length tokens")
    add("--neat-pack", action="store_true", help="with --pack: number the examples of a row in its attention mask")
    add("--workers", type=at_least(1), default=1, help="processes; the files are the same for any number")
    add("--n-subs", type=at_least(1), default=1, help="accepted: the rows are cut for the workers by themselves")
    add("--log-interval", type=at_least(1), default=100, help="rows between two lines of progress")
    add("--max-samples", type=at_least(1), help="take only the first rows")
    add("--max-bad-rows", type=at_least(0), help="bad rows that are left out before it stops (default: 1 in 100)")
    add("--streaming", action="store_true", help="of a data set on the Hub fetch only --max-samples rows")
    add("--cache-dir", help="where a data set of the Hub is kept")
    add("--seed", type=int, default=1234, help="accepted: rows keep their order; training shuffles them")
    add("--merge-group-keys", nargs="+", help="instead: join the indexed files in --input whose names hold a key")
    add("--mix-strategy", default="concat", help="concat is the only one")
    add("--interleave-probs", help="refused: several sources are mixed in training (data_weights)")
    return parser


def parse(words: list[str]) -> argparse.Namespace:
    parser = make_parser()
    flags, unknown = parser.parse_known_args(words)
    for word in unknown:
        known = [option for action in parser._actions for option in action.option_strings]
        close = nearest(word.split("=")[0], known) if word.startswith("--") else None
        hint = f" Did you mean {close}?" if close else ""
        raise ConfigError(f"{word} is not a flag.{hint} --help lists the flags")
    if flags.tokenizer_type != "PretrainedFromHF":
        raise ConfigError(f"--tokenizer-type {flags.tokenizer_type}: only PretrainedFromHF, a Hugging Face tokenizer")
    if flags.interleave_probs is not None or flags.mix_strategy != "concat":
        raise ConfigError(
            "--mix-strategy and --interleave-probs: sources are not mixed here; make one prefix of each and mix them "
            "in training, by actor_rollout.data_path=[a,b] and actor_rollout.data_weights=[0.3,0.7]"
        )
    if flags.tokenizer_name_or_path is None and flags.merge_group_keys is None:
        raise ConfigError("--tokenizer-name-or-path is missing; expected the folder of the model that is trained")
    return flags


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def run(flags: argparse.Namespace) -> None:
    if flags.merge_group_keys is not None:
        for path in merge_indexed(flags.input, flags.merge_group_keys, flags.output_prefix):
            say(f"wrote {path}.bin and .idx")
        return
    if flags.tokenizer_not_use_fast:
        say("--tokenizer-not-use-fast: transformers 5 has one tokenizer per model, the fast one; its ids are the same")
    if flags.n_subs > 1:
        say("--n-subs: not needed; --workers splits the rows, and the files are the same")
    values = {option.name: getattr(flags, option.name) for option in fields(Options)}
    values |= {name: tuple(values[name]) for name in ("json_keys", "dataset_additional_keys")}
    begin = time.perf_counter()
    tell(preprocess(Options(**values), say), time.perf_counter() - begin)


def tell(summary: Summary, seconds: float) -> None:
    for line in summary.bad_rows:
        say(f"left out: {line}")
    for reason, count in summary.dropped.most_common():
        say(f"left out: {count} rows because {reason}")
    num_left_out = summary.num_bad + summary.dropped.total()
    say(
        f"wrote {summary.num_written} rows of {summary.num_tokens} tokens from {summary.num_rows} rows in "
        f"{seconds:.1f} s; left out {num_left_out}, of which {summary.num_bad} were bad"
    )
    for path in summary.files:
        say(f"{path}.bin and .idx")


def main(words: list[str]) -> int:
    try:
        run(parse(words))
    except RlxfError as error:
        say(f"error: {error}")
        return error.exit_code
    except KeyboardInterrupt:
        say("stopped; nothing was written")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
