"""Convert model weights: Hugging Face <-> megatron. See ``--help``, and docs/convert.md for examples."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # also without an installed package

from rlxf.core.errors import RlxfError  # noqa: E402 (the path comes first)


def say(line: str) -> None:
    print(f"[convert] {line}", flush=True)


def main() -> int:
    from rlxf.tools.convert.command import read_command

    # torch's checkpoint writer warns that it works in one process; that is intended here.
    warnings.filterwarnings("ignore", module="torch.distributed.checkpoint")
    try:
        request = read_command(sys.argv[1:])
        from rlxf.tools.convert.convert import convert

        convert(request, say)
    except (RlxfError, OSError) as error:
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
        return error.exit_code if isinstance(error, RlxfError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
