"""Make the tiny world of the quick start and the tests: ``scripts/build_tiny_world.py [--fresh] [--out FOLDER]``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # also without an installed package

from rlxf.core.errors import RlxfError  # noqa: E402 (the path comes first)
from rlxf.tools.tiny.assets import ensure, read_report  # noqa: E402


def say(line: str) -> None:
    print(f"[tiny world] {line}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description="Make the tiny world: tokenizer, first policy, reward model, prompts.")
    parser.add_argument("--out", type=Path, default=ROOT / "models" / "tiny", help="folder (default: models/tiny)")
    parser.add_argument("--fresh", action="store_true", help="make it anew even if it is there")
    arguments = parser.parse_args()
    try:
        made = ensure(arguments.out, fresh=arguments.fresh, say=say)
    except RlxfError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    if not made:
        say(f"{arguments.out} is up to date")
        return 0
    report = read_report(arguments.out)
    first = report["first_policy"]
    say(
        f"done in {report['cpu_seconds']['all']:.0f} CPU s: "
        f"first policy {first['valid']:.1%} valid and {first['positive']:.1%} positive, "
        f"reward model right on {report['reward_accuracy']:.1%} of unseen pairs"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
