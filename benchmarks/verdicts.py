"""Do the verdicts say what is wrong? More than a hundred small runs, most made to fail, and what the rules say of each.

    python benchmarks/verdicts.py                        # makes the runs that are not recorded, then prints the tables
    python benchmarks/verdicts.py --kinds good length    # only these
    python benchmarks/verdicts.py --only-table

A run is a recipe of the tiny world in one process, or of a few kinds on Ray, with the Hugging Face engine
(``verdict_kinds.py``). Its rows are kept in ``results/verdicts/<kind>.json.gz``, without memory and in one process
without times; the tests of the rules read them. Thresholds were chosen on the runs with odd seeds; the table shows
those with even seeds apart.
"""

from __future__ import annotations

import argparse
import gzip
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.verdict_kinds import BROKEN_BELOW, KINDS, REWARDS, Kind  # noqa: E402 - the root must be importable first
from rlxf.health import RULES, Health, RunFacts, Verdict, facts_of  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "verdicts"
SETTINGS = (
    *("runtime=local", "log.tensorboard=false", "log.samples_interval=0", "log.report=false", "log.eval_answers=0"),
    *("log.interval=1000", "eval.greedy=false"),
)
# What no rule can read in a run of one process, or what says nothing of a policy.
POOLS = ("timing/idle_", "timing/gen", "rollout/tail_s")  # kept of runs on Ray
LEFT_OUT = ("timing/", "memory/", "pipeline/", "prompt_length/", "rollout/tokens_per_s", "rollout/tail_s", "sync/")
DIGITS = 5


@dataclass(frozen=True, eq=False)  # equal only to itself, so that what rules say of it is kept
class Recorded:
    """A run as it is kept."""

    kind: str
    seed: int
    exit_code: int
    facts: dict[str, Any]  # of its config.yaml
    rows: list[dict[str, float | None]]
    evaluations: list[dict[str, float | None]]

    @property
    def valid(self) -> float | None:
        """Share of texts in the grammar at the last evaluation; None where nothing is sampled."""
        found = [row["eval/valid"] for row in self.evaluations if row.get("eval/valid") is not None]
        return found[-1] if found else None

    @property
    def broken(self) -> bool:
        return self.valid is not None and self.valid < BROKEN_BELOW

    @cached_property
    def verdicts(self) -> tuple[Verdict, ...]:
        """What the rules say after the last row."""
        facts = dict(self.facts, sharing=tuple(self.facts["sharing"]))
        if KINDS[self.kind].on_ray:
            facts["on_cpu"] = False
        health = Health(RunFacts(**facts))
        health.restore(self.rows, self.evaluations)
        return health.verdicts

    @property
    def raised(self) -> set[str]:
        return {verdict.name for verdict in self.verdicts}


def main() -> None:
    arguments = parse()
    kinds = [KINDS[name] for name in arguments.kinds]
    if not arguments.only_table:
        record(kinds, arguments.minutes)
    print("\n".join(report([run for kind in kinds for run in recorded(kind.name)])))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices=[*KINDS], default=[*KINDS])
    parser.add_argument("--minutes", type=float, default=1000.0, help="begin no run after this time")
    parser.add_argument("--only-table", action="store_true", help="make no run")
    return parser.parse_args()


def record(kinds: Sequence[Kind], minutes: float) -> None:
    """Make the runs that are not recorded, all kinds side by side."""
    import tests.runs.warm  # noqa: F401  each run is forked from this process, which has imported all that runs import

    end = time.monotonic() + 60 * minutes
    wanted = [(place / len(kind.seeds), kind, seed) for kind in kinds for place, seed in enumerate(kind.seeds)]
    done = {kind.name: {run.seed for run in recorded(kind.name)} for kind in kinds}
    with tempfile.TemporaryDirectory(prefix="rlxf") as scratch:
        rewards = write_rewards(Path(scratch, "rewards"))
        for _, kind, seed in sorted(wanted, key=lambda item: item[0]):
            if seed in done[kind.name] or time.monotonic() > end:
                continue
            begin = time.monotonic()
            run = make(kind, seed, Path(scratch, f"{kind.name}_{seed}"), rewards)
            keep(run)
            valid = "" if run.valid is None else f", valid {run.valid:.2f}"
            seconds = time.monotonic() - begin
            print(
                f"{kind.name} {seed}: {len(run.rows)} steps, exit {run.exit_code}, {seconds:.0f} s{valid}", flush=True
            )


def write_rewards(folder: Path) -> Path:
    folder.mkdir()
    for name, code in REWARDS.items():
        (folder / f"{name}.py").write_text(code)
    pairs = (ROOT / "models" / "tiny" / "preferences.jsonl").read_text().splitlines(keepends=True)
    (folder / "few_pairs.jsonl").write_text("".join(pairs[:256]))
    return folder


def make(kind: Kind, seed: int, run_dir: Path, rewards: Path) -> Recorded:
    """One run in a process of its own."""
    overrides = [override.replace("{rewards}", str(rewards)) for override in kind.overrides]
    steps = f"training.train_iters={kind.steps}"
    command = ["--config-name", kind.recipe, f"hydra.run.dir={run_dir}", f"training.seed={seed}", steps]
    arguments = [*command, *SETTINGS, *overrides]
    exit_code = on_ray(arguments) if kind.on_ray else forked(arguments, run_dir, stale=kind.stale)
    config = yaml.safe_load((run_dir / "config.yaml").read_text())
    return Recorded(
        kind=kind.name,
        seed=seed,
        exit_code=exit_code,
        facts=asdict(facts_of(config)),
        rows=[shortened(row, kept=POOLS if kind.on_ray else ()) for row in read(run_dir / "metrics.jsonl")],
        evaluations=[shortened(row) for row in read(run_dir / "eval.jsonl")],
    )


def on_ray(arguments: Sequence[str]) -> int:
    """The command as it is typed, with a cluster of its own; its exit code."""
    environment = {**os.environ, "RAY_ADDRESS": "local", "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    command = [sys.executable, "ray_gpt.py", *arguments, "runtime=ray", "rollout.engine=hf"]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, check=False).returncode


def forked(arguments: list[str], run_dir: Path, *, stale: bool) -> int:
    """In a process that has imported all that runs import; its exit code."""
    target = multiprocessing.get_context("fork").Process(target=run_here, args=(arguments, run_dir, stale))
    target.start()
    target.join()
    return target.exitcode or 0


def run_here(arguments: list[str], run_dir: Path, stale: bool) -> None:
    """What ``python ray_gpt.py`` does, with its output in the run's folder."""
    from workers.train import main as train

    run_dir.mkdir(parents=True, exist_ok=True)
    output = os.open(run_dir / "output.txt", os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.chdir(ROOT)
    if stale:
        keep_first_weights()
    code = train(("python", "ray_gpt.py"), arguments)
    sys.stdout.flush()
    os._exit(code)


def keep_first_weights() -> None:
    """From the second push on, engines get the weights and do not use them."""
    from torch import Tensor

    from rlxf.rollout.hf import HfEngine
    from rlxf.sync.plan import Bucket

    load, end, pushes = HfEngine.load_bucket, HfEngine.end_update, [0]

    def load_first(self: HfEngine, bucket: Bucket, payload: Tensor) -> None:
        if not pushes[0]:
            load(self, bucket, payload)
        self._missing -= {name for name, _ in bucket.views(payload)}

    def end_and_count(self: HfEngine, version: int) -> None:
        pushes[0] += 1
        end(self, version)

    HfEngine.load_bucket = load_first  # type: ignore[method-assign]
    HfEngine.end_update = end_and_count  # type: ignore[method-assign]


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def shortened(row: Mapping[str, Any], *, kept: tuple[str, ...] = ()) -> dict[str, float | None]:
    """Without what no rule reads, but with names that begin as ``kept`` says, and of fewer digits."""
    left = [name for name in row if name.startswith(kept) or not (name.startswith(LEFT_OUT) or name == "answers")]
    return {
        name: value if value is None or name == "step" else float(f"{value:.{DIGITS}g}")
        for name in left
        for value in [row[name]]
    }


def keep(run: Recorded) -> None:
    """Add a run to the file of its kind: a column for each metric, which compresses best."""
    runs = sorted([*recorded(run.kind), run], key=lambda one: one.seed)
    data = [
        {
            **{name: getattr(one, name) for name in ("seed", "exit_code", "facts")},
            **{name: columns(getattr(one, name)) for name in ("rows", "evaluations")},
        }
        for one in runs
    ]
    RESULTS.mkdir(parents=True, exist_ok=True)
    text = json.dumps(data, separators=(",", ":"))
    (RESULTS / f"{run.kind}.json.gz").write_bytes(gzip.compress(text.encode(), mtime=0))


def columns(rows: Sequence[Mapping[str, float | None]]) -> dict[str, list[float | None]]:
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


def recorded(kind: str) -> list[Recorded]:
    """The runs of a kind, by seed."""
    path = RESULTS / f"{kind}.json.gz"
    if not path.is_file():
        return []
    found = json.loads(gzip.decompress(path.read_bytes()))
    for run in found:
        for name in ("rows", "evaluations"):
            cut = run[name]
            run[name] = [dict(zip(cut, values, strict=True)) for values in zip(*cut.values(), strict=True)]
    return [Recorded(kind=kind, **run) for run in found]


def wrong(run: Recorded) -> list[str]:
    """What the rules say of a run that was not expected, and what they do not say."""
    kind, raised = KINDS[run.kind], run.raised
    found = [f"not raised: {name}" for name in kind.must if name not in raised]
    if run.broken and kind.if_broken and not raised.intersection(kind.if_broken):
        found.append(f"left the grammar, and none of {', '.join(kind.if_broken)} is raised")
    expected = {*kind.must, *kind.may, *kind.if_broken}
    return found + [f"raised: {name}" for name in raised - expected]


def report(runs: Sequence[Recorded]) -> Iterator[str]:
    """The tables as lines of Markdown."""
    yield from by_rule(runs)
    yield ""
    yield from by_kind(runs)
    yield ""
    for run in runs:
        yield from (f"{run.kind} {run.seed}: {line}" for line in wrong(run))


def by_rule(runs: Sequence[Recorded]) -> Iterator[str]:
    """For each rule, over all runs and over those with even seeds: right and wrong answers."""
    yield "| rule | must: raised | must: missed | may: raised | must not: raised | must not: silent |"
    yield "|---|---|---|---|---|---|"
    for name in RULES:
        cells = []
        for part in (runs, [run for run in runs if run.seed % 2 == 0]):
            counts = Counter(answer(run, name) for run in part)
            cells.append([counts[key] for key in ("hit", "missed", "allowed", "false", "silent")])
        yield f"| `{name}` | " + " | ".join(f"{a} ({b})" for a, b in zip(*cells, strict=True)) + " |"


def answer(run: Recorded, rule: str) -> str:
    kind, raised = KINDS[run.kind], rule in run.raised
    if rule in kind.must:
        return "hit" if raised else "missed"
    if rule in (*kind.may, *kind.if_broken):
        return "allowed" if raised else "silent, allowed"
    return "false" if raised else "silent"


def by_kind(runs: Sequence[Recorded]) -> Iterator[str]:
    """For each kind of run, how many runs raised what, and the step of the first verdict."""
    yield "| runs | number | left the grammar | verdicts (runs that raised it) | first verdict at step |"
    yield "|---|---|---|---|---|"
    for kind in KINDS.values():
        mine = [run for run in runs if run.kind == kind.name]
        if not mine:
            continue
        found = [run.verdicts for run in mine]
        counts = Counter(verdict.name for verdicts in found for verdict in verdicts)
        raised = ", ".join(f"`{name}` {count}" for name, count in counts.most_common()) or "none"
        first = [min(verdict.step for verdict in verdicts) for verdicts in found if verdicts]
        span = f"{min(first)}-{max(first)}" if first else "-"
        broken = str(sum(run.broken for run in mine)) if any(run.valid is not None for run in mine) else "-"
        yield f"| {kind.what} | {len(mine)} | {broken} | {raised} | {span} |"


if __name__ == "__main__":
    main()
