"""Serve a reward model, a reward function or a rule over HTTP: one server scores for many runs.

python scripts/serve_reward.py --load MODEL | --function FILE | --rule NAME [--port 8000] [--token-env NAME]
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # also without an installed package

from rlxf.config.kinds import Device, ReadAt  # noqa: E402
from rlxf.core.errors import RlxfError  # noqa: E402

FOR_FUNCTIONS = ("options", "timeout_s")
FOR_MODELS = ("batch_size", "max_wait_ms", "read_at", "seq_length", "device", "bf16", "trust_remote_code")


def _number(kind: type[int] | type[float], least: float, most: float = math.inf) -> Callable[[str], float]:
    """A reader of an option's number between two bounds."""

    def read(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not least <= value <= most or math.isinf(value):
            what = "a whole number" if kind is int else "a number"
            bounds = f"at least {least:g}" + (f", at most {most:g}" if most < math.inf else "")
            raise argparse.ArgumentTypeError(f"expected {what} {bounds}, got {text!r}")
        return value

    return read


def read_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Scores of a reward model or a reward function over HTTP.")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--load", type=Path, metavar="MODEL", help="Hugging Face folder of a reward model")
    what.add_argument("--function", type=Path, metavar="FILE", help="Python file with `reward`, as reward.function")
    what.add_argument("--rule", metavar="NAME", help="rule that comes with rlxf, such as math (docs/rewards.md)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (127.0.0.1: this machine only)")
    parser.add_argument("--port", type=_number(int, 0, 65535), default=8000, help="0: any that is free (8000)")
    parser.add_argument("--token-env", metavar="NAME", help="environment variable with a token that requests must bear")
    parser.add_argument("--max-mb", type=_number(float, 0.001), default=64.0, help="largest request, in MiB (64)")
    function = parser.add_argument_group("with --function or --rule")
    function.add_argument("--options", type=_mapping, metavar="JSON", help='of the rule, as {"column": "answer"}')
    function.add_argument(
        "--timeout-s", type=_number(float, 0.1), default=60.0, help="a request that takes longer is ended (60)"
    )
    model = parser.add_argument_group("with --load")
    model.add_argument("--batch-size", type=_number(int, 1), default=64, help="completions scored together (64)")
    model.add_argument(
        "--max-wait-ms", type=_number(float, 0, 60000), default=5.0, help="wait for a full batch, milliseconds (5)"
    )
    model.add_argument("--read-at", choices=get_args(ReadAt), default="auto", help="as reward.read_at (auto)")
    model.add_argument("--seq-length", type=_number(int, 1), help="longest text in tokens (all positions of the model)")
    model.add_argument("--device", choices=get_args(Device), default="auto")
    model.add_argument("--bf16", action="store_true", help="compute in bfloat16 instead of float32")
    model.add_argument("--trust-remote-code", action="store_true", help="let the folder run Python code of its own")
    found = parser.parse_args(arguments)
    for name in FOR_MODELS if found.load is None else FOR_FUNCTIONS:
        if getattr(found, name) != parser.get_default(name):
            option = f"--{name.replace('_', '-')}"
            if found.load is None:
                parser.error(f"{option} is an option of --load; a reward function does not read it")
            parser.error(f"{option} is an option of --function and --rule; a reward model does not read it")
    if found.options is not None and found.rule is None:
        parser.error("--options is an option of --rule; a reward function does not read it")
    return found


def _mapping(text: str) -> dict[str, Any]:
    """A JSON object."""
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected a JSON object: {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"expected a JSON object, got {text!r}")
    return value


def main() -> int:
    arguments = read_arguments()
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    from rlxf.tools.serve.command import Settings, serve

    try:
        return serve(Settings(**vars(arguments)))
    except RlxfError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
