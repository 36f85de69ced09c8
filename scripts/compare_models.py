"""Which of two models answers better, by a reward model, a reward function or a judge.

python scripts/compare_models.py A B --data prompts.jsonl --reward-model DIR [--sample] [--out FOLDER]
python scripts/compare_models.py A B --data alpaca_eval.json --format alpaca_eval --judge-url URL --judge-model NAME
"""

from __future__ import annotations

import argparse
import math
import re
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # also without an installed package

from rlxf.config.kinds import Device, ReadAt  # noqa: E402
from rlxf.core.errors import ConfigError, RlxfError  # noqa: E402


def _number(
    kind: type[int] | type[float], above: float, most: float = math.inf, *, inclusive: bool = True
) -> Callable[[str], float]:
    """A reader of an option's number: at least ``above`` (above it if not ``inclusive``), and at most ``most``."""

    def read(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (value >= above if inclusive else value > above) or not value <= most or math.isinf(value):
            bounds = f"{'at least' if inclusive else 'above'} {above:g}" + (
                f", at most {most:g}" if most < math.inf else ""
            )
            what = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"expected {what} {bounds}, got {text!r}")
        return value

    return read


def read_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Win rate of model A over model B, with confidence intervals.")
    positive, count = _number(int, 1), _number(int, 0)
    parser.add_argument("a", metavar="A", type=Path, help="Hugging Face folder, or a run folder (its policy)")
    parser.add_argument("b", metavar="B", type=Path, help="the same; a model against itself is even")
    parser.add_argument("--data", type=Path, required=True, help="file of prompts, as actor_rollout.data_path")
    parser.add_argument(
        "--format",
        choices=("prompts", "alpaca_eval", "arena_hard"),
        default="prompts",
        help="what the data is: prompts, or the questions of a benchmark, whose files --out then gets (prompts)",
    )
    judge = parser.add_mutually_exclusive_group(required=True)
    judge.add_argument("--reward-model", type=Path, help="folder of a reward model that scores the answers")
    judge.add_argument("--reward-function", type=Path, help="Python file with `reward`, as reward.function")
    judge.add_argument("--judge-function", type=Path, help="Python file with `judge`, as judge.function")
    judge.add_argument("--judge-url", help="OpenAI-compatible server that judges, as judge.base_url")
    judge.add_argument("--judge-load", type=Path, help="folder of a classifier over two answers, as judge.load")
    parser.add_argument("--judge-model", help="name of the model of --judge-url")
    parser.add_argument(
        "--judge-set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="another key of the section judge (docs/config.md), such as token_env=OPENAI_API_KEY; may be repeated",
    )
    parser.add_argument(
        "--read-at",
        choices=get_args(ReadAt),
        default="auto",
        help="where the reward model's score is read, as reward.read_at (auto)",
    )
    parser.add_argument("--num-prompts", type=positive, help="the first ones of the data (256; all of a benchmark's)")
    parser.add_argument("--prompt-key", default="prompt", help="column with the prompt (prompt)")
    parser.add_argument(
        "--max-prompt-length", type=positive, default=512, help="tokens; longer ones are left out (512)"
    )
    parser.add_argument("--max-new-tokens", type=positive, default=512, help="tokens of an answer (512)")
    parser.add_argument(
        "--sample", action="store_true", help="sample the answers instead of taking the likeliest tokens"
    )
    parser.add_argument("--temperature", type=_number(float, 0, inclusive=False), help="of --sample (1)")
    parser.add_argument("--top-p", type=_number(float, 0, 1, inclusive=False), help="of --sample (1)")
    parser.add_argument("--seed", type=count, default=1, help="of samples and bootstrap (1)")
    parser.add_argument(
        "--missing-eos-penalty", type=_number(float, 0), default=0.0, help="off a score without EOS (0)"
    )
    parser.add_argument("--confidence", type=_number(float, 0.5, 0.9999), default=0.95, help="of the intervals (0.95)")
    parser.add_argument("--resamples", type=_number(int, 100), default=2000, help="of the bootstrap (2000)")
    parser.add_argument("--batch-size", type=positive, default=64, help="prompts that are answered at a time (64)")
    parser.add_argument("--engine", choices=("hf", "vllm"), default="hf", help="what answers (hf)")
    parser.add_argument("--device", choices=get_args(Device), default="auto")
    parser.add_argument("--bf16", action="store_true", help="answer in bfloat16 instead of float32")
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="let model folders run Python code of their own"
    )
    parser.add_argument("--out", type=Path, help="folder for pairs.jsonl and summary.json")
    found = parser.parse_args(arguments)
    for name in ("temperature", "top_p"):
        if getattr(found, name) is not None and not found.sample:
            parser.error(f"--{name.replace('_', '-')} needs --sample: without it answers are the likeliest tokens")
    if found.judge_model is not None and found.judge_url is None:
        parser.error("--judge-model needs --judge-url")
    has_judge = found.judge_function or found.judge_url or found.judge_load
    if found.judge_set and not has_judge:
        parser.error("--judge-set needs --judge-function, --judge-url or --judge-load")
    if found.format != "prompts" and not has_judge:
        parser.error(f"--format {found.format} needs a judge: --judge-function, --judge-url or --judge-load")
    if has_judge and found.missing_eos_penalty:
        parser.error("--missing-eos-penalty needs a reward: a judge gives no scores")
    if found.num_prompts is None:
        found.num_prompts = 256 if found.format == "prompts" else sys.maxsize
    return found


def judge_section(arguments: argparse.Namespace) -> dict[str, Any]:
    """The section judge of a recipe; empty if a reward judges."""
    import yaml

    named = {"function": arguments.judge_function, "base_url": arguments.judge_url, "load": arguments.judge_load}
    section: dict[str, Any] = {key: str(value) for key, value in named.items() if value is not None}
    if not section:
        return {}
    if arguments.judge_model is not None:
        section["model"] = arguments.judge_model
    if "load" in section:
        section["load_as"] = "pair_classifier"  # a reward model is named with --reward-model
    for setting in arguments.judge_set:
        key, equals, text = setting.partition("=")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"--judge-set {setting}: the value cannot be read: {error}") from error
        if not equals or key in named:
            raise ConfigError(f"--judge-set {setting}: expected a key of the section judge, such as max_calls=100")
        section[key] = value
    return section


def names_of(arguments: argparse.Namespace) -> tuple[str, str]:
    """What both models are called in a benchmark's files: their folders, told apart if they have the same name."""
    one, two = (_name(path) for path in (arguments.a, arguments.b))
    return (one, two) if one != two else (f"{one}_a", f"{two}_b")


def _name(path: Path) -> str:
    return re.sub(r"[^A-Za-z0-9._-]", "_", path.absolute().name) or "model"


def require_writable(folder: Path | None) -> None:
    """Check, before any model is loaded, that ``folder`` can be written and holds no other results."""
    if folder is None:
        return
    taken = [name for name in ("pairs.jsonl", "summary.json") if (folder / name).exists()]
    if taken:
        raise ConfigError(f"--out {folder}: holds {taken[0]} already; name another folder")
    place = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise ConfigError(f"--out {folder}: cannot be written: {error.strerror}") from error


def run(arguments: argparse.Namespace) -> None:
    require_writable(arguments.out)
    from rich.console import Console

    from rlxf.tools.compare.models import Settings, compare
    from rlxf.tools.compare.report import judge, judge_name, summary, table, write, write_files

    settings = Settings(
        data_path=arguments.data,
        num_prompts=arguments.num_prompts,
        data_format=arguments.format,
        judge=judge_section(arguments),
        verdicts=arguments.out,
        reward_model=arguments.reward_model,
        reward_function=arguments.reward_function,
        read_at=arguments.read_at,
        prompt_key=arguments.prompt_key,
        max_prompt_length=arguments.max_prompt_length,
        max_new_tokens=arguments.max_new_tokens,
        temperature=(arguments.temperature or 1.0) if arguments.sample else 0.0,
        top_p=arguments.top_p or 1.0,
        seed=arguments.seed,
        missing_eos_penalty=arguments.missing_eos_penalty,
        prompts_per_call=arguments.batch_size,
        engine=arguments.engine,
        device=arguments.device,
        bf16=arguments.bf16,
        trust_remote_code=arguments.trust_remote_code,
    )
    found = compare(arguments.a, arguments.b, settings)
    confidence = arguments.confidence
    rate = judge(found, confidence=confidence, resamples=arguments.resamples, seed=arguments.seed)
    Console().print(table(found, rate, (str(arguments.a), str(arguments.b)), confidence=confidence))
    if arguments.out is not None:
        write(arguments.out, found, summary(found, rate, confidence=confidence))
        print(f"pairs and summary: {arguments.out}")
        if settings.data_format != "prompts":
            name = judge_name(settings.judge)
            for path in write_files(arguments.out, settings.data_format, found, names_of(arguments), name):
                print(path)


def main() -> int:
    arguments = read_arguments()
    try:
        run(arguments)
    except RlxfError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
