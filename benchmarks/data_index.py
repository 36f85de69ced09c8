"""CPU seconds and memory of opening a large data file: every row read and checked, nothing tokenized but one row.

    OMP_NUM_THREADS=1 python benchmarks/data_index.py                # writes results/data_index.json

Every measurement is a fresh process. It opens a small file of the same kind first, so that the loading of libraries is
not counted. Memory is the peak resident memory minus what the process held at the start of the measurement; pages of
mapped files are included.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import measure  # noqa: E402 - the repository's root must be importable first

GOAL_CPU_S, GOAL_BYTES = 2.0, 64 * 2**20  # for 100,000 prompts
NUM_ROWS, WARM_ROWS = 100_000, 50
Row = dict[str, Any]


def main() -> None:
    arguments = parse()
    if arguments.one:
        print(json.dumps(one(*arguments.one)))
        return
    cases = []
    with tempfile.TemporaryDirectory() as name:
        for kind, write in KINDS.items():
            large, small = (write(Path(name), f"{kind}_{count}", count) for count in (arguments.rows, WARM_ROWS))
            runs = [in_a_fresh_process(small, large) for _ in range(arguments.repeats)]
            cases.append({"kind": kind, "num_bytes": num_bytes(large), "runs": runs})
            print(line(cases[-1]), flush=True)
    report = {"machine": measure.machine(), "rows": arguments.rows, "repeats": arguments.repeats, "cases": cases}
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(report, indent=1) + "\n")
    print(f"\nwritten: {arguments.output}")
    missed = [case["kind"] for case in cases if not meets(case)]
    if missed:
        raise SystemExit(f"above the goal of {GOAL_CPU_S:g} CPU s and {GOAL_BYTES >> 20} MiB: {', '.join(missed)}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=NUM_ROWS)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "data_index.json")
    return parser.parse_args()


def prompts(count: int) -> Iterator[Row]:
    for number in range(count):
        yield {"prompt": f"Question {number}: " + "how much is the fish? " * 8, "answer": str(number)}


def chats(count: int) -> Iterator[Row]:
    for row in prompts(count):
        yield {"prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": row["prompt"]}]}


def lines(path: Path, rows: Iterator[Row]) -> Path:
    with path.open("w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return path


def json_list(folder: Path, name: str, count: int) -> Path:
    path = folder / f"{name}.json"
    path.write_text(json.dumps(list(prompts(count)), indent=1))
    return path


def csv_file(folder: Path, name: str, count: int) -> Path:
    path = folder / f"{name}.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ("prompt", "answer"))
        writer.writeheader()
        writer.writerows(prompts(count))
    return path


def parquet(folder: Path, name: str, count: int) -> Path:
    import pyarrow.parquet

    path = folder / f"{name}.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(prompts(count))), path, row_group_size=10_000)
    return path


def dataset(folder: Path, name: str, count: int) -> Path:
    import datasets

    datasets.Dataset.from_generator(prompts, gen_kwargs={"count": count}, cache_dir=str(folder / "cache")).save_to_disk(
        folder / name
    )
    return folder / name


def folder_of_files(folder: Path, name: str, count: int) -> Path:
    inside = folder / name
    inside.mkdir()
    rows = list(prompts(count))
    for part in range(8):
        lines(inside / f"{part}.jsonl", iter(rows[part::8]))
    return inside


KINDS: dict[str, Callable[[Path, str, int], Path]] = {
    "jsonl": lambda folder, name, count: lines(folder / f"{name}.jsonl", prompts(count)),
    "jsonl, chats": lambda folder, name, count: lines(folder / f"{name}.jsonl", chats(count)),
    "json list": json_list,
    "csv": csv_file,
    "parquet": parquet,
    "dataset on disk": dataset,
    "folder of 8 jsonl": folder_of_files,
}


def in_a_fresh_process(small: Path, large: Path) -> dict[str, float]:
    command = [sys.executable, __file__, "--one", str(small), str(large)]
    done = subprocess.run(command, cwd=ROOT, env=measure.environment(), capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def one(small: str, large: str) -> dict[str, float]:
    """What opening ``large`` costs a process that has opened ``small``."""
    from rlxf.assembly.data import open_prompts
    from rlxf.data.prompts import PromptFile
    from tests.data_world import chat_tokenizer, recipe

    tokenizer = chat_tokenizer()

    def opened(path: str) -> PromptFile:
        return open_prompts(recipe(actor_rollout={"model": "tiny", "data_path": path}), tokenizer)

    opened(small)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    held = psutil.Process().memory_info().rss
    begin = time.process_time()
    source = opened(large)
    cpu_s = time.process_time() - begin
    return {"cpu_s": cpu_s, "bytes": max(0, peak_rss() - held), "rows": len(source)}


def peak_rss() -> int:
    """Peak resident memory of this process, bytes. (``getrusage`` would start from its parent's memory.)"""
    status = Path("/proc/self/status").read_text()
    return next(int(text.split()[1]) * 1024 for text in status.splitlines() if text.startswith("VmHWM"))


def num_bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*")) if path.is_dir() else path.stat().st_size


def meets(case: Mapping[str, Any]) -> bool:
    return all(run["cpu_s"] <= GOAL_CPU_S and run["bytes"] <= GOAL_BYTES for run in case["runs"])


def line(case: Mapping[str, Any]) -> str:
    """A row of the table in README.md."""
    seconds, memory = ([run[key] for run in case["runs"]] for key in ("cpu_s", "bytes"))
    return (
        f"| {case['kind']} | {case['num_bytes'] / 1e6:.0f} | {statistics.median(seconds):.2f} "
        f"({min(seconds):.2f}-{max(seconds):.2f}) | {statistics.median(memory) / 2**20:.1f} "
        f"({min(memory) / 2**20:.1f}-{max(memory) / 2**20:.1f}) |"
    )


if __name__ == "__main__":
    main()
