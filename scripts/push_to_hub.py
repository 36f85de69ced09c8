"""Upload a policy to a Hugging Face hub: ``python scripts/push_to_hub.py FOLDER REPO [--private] [--dry-run]``.

The only command of this repository that sends a model anywhere.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # also without an installed package

from rlxf.core.errors import RlxfError  # noqa: E402 (the path comes first)


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Upload a policy, with a model card made from its run folder.")
    parser.add_argument("folder", type=Path, help="run folder (its policy), or a Hugging Face folder")
    parser.add_argument("repo", help="name on the hub: NAME or ORGANISATION/NAME")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--dry-run", action="store_true", help="list what would be uploaded, and send nothing")
    parser.add_argument("--base-model", help="name on the hub of the model that was trained, for the card")
    parser.add_argument("--message", default="Upload with rlxf", help="of the commit")
    parser.add_argument("--endpoint", help="address of the hub (HF_ENDPOINT, or the public one)")
    return parser.parse_args()


def run(arguments: argparse.Namespace) -> None:
    from rlxf.tools.hub import collect, push, require_name

    require_name(arguments.repo)
    files = collect(arguments.folder, base_model=arguments.base_model)
    total = sum(upload.num_bytes for upload in files)
    for upload in files:
        print(f"{upload.num_bytes:>15,}  {upload.name}{'' if isinstance(upload.content, Path) else '  (made)'}")
    print(f"{total:>15,}  bytes in {len(files)} files")
    if arguments.dry_run:
        kind = "private" if arguments.private else "public"
        print(f"dry run: nothing was sent; {arguments.repo} would be created as {kind} if it does not exist")
        return
    address = push(
        files, arguments.repo, private=arguments.private, message=arguments.message, endpoint=arguments.endpoint
    )
    print(f"uploaded: {address}")


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
