"""What a reward service costs beside its model: requests per second, milliseconds per completion, two clients.

python benchmarks/reward_service.py            # -> results/reward_service.json
python benchmarks/reward_service.py --faults   # what faults cost -> results/reward_faults.json
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
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.measure import machine  # noqa: E402 - the repository's root must be importable first
from rlxf.score.http import HttpSource, HttpSourceSettings  # noqa: E402
from rlxf.score.texts import Asked  # noqa: E402
from tests.http_world import Behaviour, Exchange, Service, answer, drip, hang_up, late, no_service, status  # noqa: E402
from tests.http_world import text as says  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
FUNCTION = "def reward(prompts, completions, completion_ids):\n    return [0.5] * len(completions)\n"
WORDS = 100  # of a completion: about 600 characters and 100 token ids
BATCH = 64


def completions(count: int) -> Asked:
    """Completions of a usual size."""
    return Asked(
        prompts=[f"prompt {i} " + "word " * 30 for i in range(count)],
        completions=[f"completion {i} " + "word5 " * WORDS for i in range(count)],
        completion_ids=[[40_000 + k for k in range(WORDS)] for _ in range(count)],
        columns={},
    )


@contextmanager
def served() -> Iterator[tuple[str, psutil.Process]]:
    """The script, serving a function that does nothing."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "nothing.py"
        file.write_text(FUNCTION)
        command = [sys.executable, "scripts/serve_reward.py", "--function", str(file), "--port", "0"]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        try:
            assert process.stdout is not None
            yield process.stdout.readline().split()[-1], psutil.Process(process.pid)
        finally:
            process.terminate()
            process.wait()


def client(url: str, batches: int, concurrency: int) -> dict[str, float]:
    """Seconds of one client for so many batches, and how much of it its processor was used."""
    source = HttpSource(HttpSourceSettings(url=url, batch_size=BATCH, concurrency=concurrency))
    source.ask(completions(BATCH))  # the thread is started
    asked = completions(batches * BATCH)
    begin, cpu = time.perf_counter(), time.process_time()
    found = source.ask(asked)
    seconds, cpu = time.perf_counter() - begin, time.process_time() - cpu
    source.close()
    assert found.scores == [0.5] * len(asked), found.problem
    return {"wall_s": seconds, "cpu_s": cpu}


def several(url: str, clients: int, batches: int, concurrency: int) -> list[dict[str, float]]:
    """As many clients at the same time, each in a process of its own."""
    command = [sys.executable, __file__, "--client", url, "--batches", str(batches), "--concurrency", str(concurrency)]
    started = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(clients)]
    return [json.loads(process.communicate()[0]) for process in started]


def measure(batches: int, repeats: int) -> dict[str, Any]:
    """Rows for one and two clients."""
    rows = []
    with served() as (url, server):
        for clients, concurrency in ((1, 1), (1, 4), (2, 4)):
            runs = []
            for _ in range(repeats):
                before = server.cpu_times()
                times = several(url, clients, batches, concurrency)
                after = server.cpu_times()
                count = clients * (batches + 1) * BATCH
                cpu = after.user + after.system - before.user - before.system
                wall = max(each["wall_s"] for each in times)
                runs.append(
                    {
                        "ms_per_completion": 1000 * statistics.mean(t["wall_s"] for t in times) / (batches * BATCH),
                        "requests_per_s": clients * batches / wall,
                        "client_cpu_ms": 1000 * sum(t["cpu_s"] for t in times) / (clients * batches * BATCH),
                        "server_cpu_ms": 1000 * cpu / count,
                        "slower_to_faster": wall / min(each["wall_s"] for each in times),
                    }
                )
            rows.append({"clients": clients, "concurrency": concurrency} | {key: spread(runs, key) for key in runs[0]})
    settings = {"batch_size": BATCH, "batches": batches, "repeats": repeats, "words": WORDS}
    return {"machine": machine(), "load": os.getloadavg()[0], "settings": settings, "rows": rows}


def spread(runs: list[dict[str, float]], key: str) -> dict[str, float]:
    values = sorted(run[key] for run in runs)
    return {"median": round(statistics.median(values), 4), "min": round(values[0], 4), "max": round(values[-1], 4)}


def good(exchange: Exchange) -> None:
    exchange.json({"scores": [0.5] * len(exchange.body["completions"])})


def faults() -> dict[str, Any]:
    """Time and misses of 256 completions in 4 requests, by what the server does to each of them."""
    found: dict[str, tuple[Behaviour, ...]] = {
        "none": (good,),
        "slow: 10 s": (late(10, good),),
        "a byte now and then": (drip,),
        "500": (status(500, "boom"),),
        "500 twice, then well": (*[status(500)] * 8, good),
        "429, Retry-After: 2": (*[status(429, Retry_After="2")] * 4, good),
        "hangs up": (hang_up,),
        "NaN": (says('{"scores": [NaN]}'),),
        "wrong length": (answer({"scores": [0.5]}),),
        "no JSON": (says("<html>"),),
        "redirect": (status(302, Location="http://other:8000/score"),),
        "too large": (says(b" " * (2**20 + 1)),),
    }
    rows = []
    for name, behaviours in found.items():
        with Service(*behaviours) as service:
            rows.append({"fault": name, **fault(service.url)})
    rows.append({"fault": "down", **fault(no_service())})
    return {"machine": machine(), "settings": {"timeout_s": 5, "tries": 3, "concurrency": 4}, "rows": rows}


def fault(url: str) -> dict[str, Any]:
    source = HttpSource(HttpSourceSettings(url=url, batch_size=BATCH, timeout_s=5))
    begin = time.perf_counter()
    answered = source.ask(completions(4 * BATCH))
    seconds = time.perf_counter() - begin
    source.close()
    return {"seconds": round(seconds, 2), "missing": answered.scores.count(None), "problem": answered.problem}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", type=int, default=50, help="requests of a client")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--faults", action="store_true")
    parser.add_argument("--client", metavar="URL", help="be one client, and print its times")
    parser.add_argument("--concurrency", type=int, default=4, help="of --client")
    arguments = parser.parse_args()
    if arguments.client:
        print(json.dumps(client(arguments.client, arguments.batches, arguments.concurrency)))
        return
    name = "reward_faults" if arguments.faults else "reward_service"
    result = faults() if arguments.faults else measure(arguments.batches, arguments.repeats)
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    for row in result["rows"]:
        print(row)


if __name__ == "__main__":
    main()
