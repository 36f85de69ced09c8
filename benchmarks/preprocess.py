"""Preprocessing against the tokenizer alone: rows per CPU second of one worker, and the memory of each.

    python benchmarks/preprocess.py                    # -> results/preprocess.json

The same texts go through `preprocess` (open, read, write as chat, tokenize, split, write the files) and through the
Hugging Face tokenizer in one call, in turn, in one process with one thread; the cost of a run of one row is subtracted.
"worker" is what a worker process does: read, write as chat, tokenize, split; "command" is all of it. Texts: the
repository's own documentation, cut into pieces of lognormal length.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil  # type: ignore[import-untyped]

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import measure, turns  # noqa: E402 - the root must be importable first
from rlxf.core.jsonl import RowProblems  # noqa: E402
from rlxf.core.types import Messages  # noqa: E402
from rlxf.data.handlers import HANDLERS, Columns  # noqa: E402
from rlxf.data.hub import open_input  # noqa: E402
from rlxf.data.templates import chat_template  # noqa: E402
from rlxf.models.tokenizer import load_tokenizer  # noqa: E402
from rlxf.tools.preprocess import CHUNK_ROWS, Options, make_encoder, preprocess  # noqa: E402

PROMPT_TYPE = "qwen"
PAIRS = "AlpacaStylePairwiseHandler"
HANDLER_COLUMNS = {
    "PPOAlpacaStyleInstructionHandler": ("instruction",),
    PAIRS: ("instruction", "chosen", "rejected"),
    "AlpacaStyleInstructionHandler": ("instruction", "output"),
    "GeneralPretrainHandler": ("text",),
}


def main() -> None:
    arguments = parse()
    os.environ.update(measure.environment(), TOKENIZERS_PARALLELISM="false")
    report: dict[str, Any] = {
        "rows": arguments.rows,
        "repeats": arguments.repeats,
        "tokenizer": arguments.tokenizer.name,
        "machine": measure.machine(),
        "handlers": {},
    }
    with tempfile.TemporaryDirectory(prefix="rlxf") as scratch:
        folder = Path(scratch)
        for name, columns in HANDLER_COLUMNS.items():
            rows = write_rows(folder / f"{name}.jsonl", arguments.rows, columns)
            options = Options(
                input=str(folder / f"{name}.jsonl"),
                tokenizer_name_or_path=str(arguments.tokenizer),
                output_prefix=str(folder / "out" / "rows"),
                handler_name=name,
                prompt_type=None if name == "GeneralPretrainHandler" else PROMPT_TYPE,
                log_interval=10**9,
            )
            report["handlers"][name] = compare(options, rows, arguments.repeats)
            print(name, json.dumps(report["handlers"][name]))
        report["memory_mb"] = memory(folder, arguments.tokenizer)
        print("memory_mb", json.dumps(report["memory_mb"]))
    turns.write_results(arguments.output, report)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, default=ROOT / "models" / "smollm2-135m")
    parser.add_argument("--rows", type=int, default=3000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "preprocess.json")
    return parser.parse_args()


def write_rows(path: Path, num_rows: int, columns: Sequence[str]) -> list[dict[str, str]]:
    """Rows of these columns: instructions of about 300 characters, other texts of about 800."""
    book = "\n".join(file.read_text(encoding="utf-8") for file in sorted((ROOT / "docs").glob("*.md")))
    draw = np.random.default_rng(0)

    def piece(mean: int) -> str:
        length = int(np.clip(draw.lognormal(np.log(mean), 0.8), 20, 8 * mean))
        start = int(draw.integers(len(book) - length))
        return book[start : start + length].strip() or "nothing"

    rows = [{name: piece(300 if name == "instruction" else 800) for name in columns} for _ in range(num_rows)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return rows


def compare(options: Options, rows: list[dict[str, str]], repeats: int) -> dict[str, Any]:
    """CPU seconds of both, in turn, and their ratio: 1 is a preprocessing that costs nothing beside tokenizing."""
    tokenizer = load_tokenizer(options.tokenizer_name_or_path)
    texts = texts_of(options, rows, tokenizer)
    special = options.prompt_type is None

    first = Path(options.input).with_suffix(".first.jsonl")
    first.write_text(Path(options.input).read_text(encoding="utf-8").partition("\n")[0], encoding="utf-8")
    one = replace(options, input=str(first))

    def ours() -> None:
        preprocess(options, lambda line: None)

    def alone() -> None:
        tokenizer(texts, add_special_tokens=special)

    template = None if options.prompt_type is None else chat_template(options.prompt_type)
    columns = Columns(HANDLERS[options.handler_name], {})
    encoder = make_encoder(options, columns, load_tokenizer(options.tokenizer_name_or_path), template, print)
    file = open_input(options.input, RowProblems())

    def worker() -> None:
        for start in range(0, len(file), CHUNK_ROWS):
            encoder([file[row] for row in range(start, min(start + CHUNK_ROWS, len(file)))])

    ours(), alone(), worker()  # imports, and what all keep
    begin = statistics.median(cpu_seconds(lambda: preprocess(one, lambda line: None)) for _ in range(repeats))
    took = [(cpu_seconds(alone), cpu_seconds(worker), cpu_seconds(ours) - begin) for _ in range(repeats)]
    seconds = {name: [turn[i] for turn in took] for i, name in enumerate(("tokenizer", "worker", "command"))}
    ratios = {name: [turn[0] / turn[i] for turn in took] for i, name in ((1, "worker"), (2, "command"))}
    return {
        "texts_per_row": len(texts) / len(rows),
        "tokens_per_text": sum(map(len, tokenizer(texts[:500])["input_ids"])) / len(texts[:500]),
        "start_cpu_s": begin,
        "cpu_s": {name: statistics.median(values) for name, values in seconds.items()},
        "rows_per_cpu_s": len(rows) / statistics.median(seconds["worker"]),
        "ratio": {name: statistics.median(values) for name, values in ratios.items()},
        "ratio_spread": {name: [min(values), max(values)] for name, values in ratios.items()},
    }


def texts_of(options: Options, rows: list[dict[str, str]], tokenizer: Any) -> list[str]:
    """What the handler has to tokenize: a prompt; a prompt, alone and with each answer; an example; a text."""
    makes = HANDLERS[options.handler_name].makes
    if options.prompt_type is None:
        return [row["text"] for row in rows]
    jinja = chat_template(options.prompt_type).jinja

    def write(row: dict[str, str], answer: str | None) -> str:
        chat: Messages = [{"role": "user", "content": row["instruction"]}]
        chat += [{"role": "assistant", "content": row[answer]}] if answer else []
        text: str = tokenizer.apply_chat_template(
            chat, tokenize=False, chat_template=jinja, add_generation_prompt=answer is None
        )
        return text

    answers = {"prompt": [None], "pair": [None, "chosen", "rejected"], "example": ["output"]}[makes]
    return [write(row, answer) for answer in answers for row in rows]


def cpu_seconds(work: Callable[[], None]) -> float:
    begin = time.process_time()
    work()
    return time.process_time() - begin


def memory(folder: Path, tokenizer: Path) -> dict[str, float]:
    """Largest resident memory of the command and, of each of two workers, what it does not share with the others."""
    words = [sys.executable, str(ROOT / "scripts" / "preprocess_data.py"), "--workers", "2"]
    words += ["--input", str(folder / f"{PAIRS}.jsonl"), "--output-prefix", str(folder / "out" / "memory")]
    words += ["--tokenizer-name-or-path", str(tokenizer), "--handler-name", PAIRS, "--prompt-type", PROMPT_TYPE]
    with subprocess.Popen(words, stderr=subprocess.DEVNULL) as process:
        command, largest = psutil.Process(process.pid), {"command": 0.0, "worker": 0.0}
        while process.poll() is None:
            try:
                largest["command"] = max(largest["command"], command.memory_info().rss / 2**20)
                for worker in command.children():
                    largest["worker"] = max(largest["worker"], worker.memory_full_info().uss / 2**20)
            except psutil.NoSuchProcess:
                continue
            time.sleep(0.05)
    if process.returncode:
        raise SystemExit(f"the command failed: {' '.join(words)}")
    return largest


if __name__ == "__main__":
    main()
