"""Reward functions in processes of their own: what they may do there, and what happens to one that hangs or dies."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from textwrap import dedent
from threading import Timer

import psutil
import pytest

from rlxf.core.errors import ConfigError, ScoreError, StopRequested
from rlxf.core.stop import Stop
from rlxf.score.functions import FunctionSource
from rlxf.score.processes import ProcessSource
from rlxf.score.texts import Asked

ASKED = Asked(
    prompts=["a", "a", "b", "b", "c", "c"],
    completions=["1", "2", "3", "4", "5", "6"],
    completion_ids=[[1], [2], [3], [4], [5], [6]],
    columns={"number": [0, 0, 1, 1, 2, 2]},
)

Made = Callable[..., ProcessSource]


@pytest.fixture
def made(tmp_path: Path) -> Iterator[Made]:
    """Makes a source of a function's code."""
    sources: list[ProcessSource] = []

    def make(code: str, *, workers: int = 1, timeout_s: float = 60, stop: Stop | None = None) -> ProcessSource:
        path = tmp_path / "my_reward.py"
        path.write_text(dedent(code))
        start = partial(FunctionSource.from_file, path)
        source = ProcessSource(start, "reward.function=x", workers=workers, timeout_s=timeout_s, stop=stop or Stop())
        sources.append(source)
        return source

    yield make
    for source in sources:
        source.close()


def children() -> list[psutil.Process]:
    return [child for child in psutil.Process().children() if "resource_tracker" not in " ".join(child.cmdline())]


def test_it_keeps_its_state_and_logs(made: Made) -> None:
    code = """
        import os
        calls = 0
        async def reward(prompts, completions, completion_ids, number, log_extra, log_metric):
            global calls
            calls += 1
            log_extra("words", [len(text) for text in completions])
            log_metric("pid", os.getpid())
            return [calls + n for n in number]
    """
    source = made(code)
    first, second = source.ask(ASKED), source.ask(ASKED)
    assert first.scores == [1, 1, 2, 2, 3, 3]
    assert second.scores == [2, 2, 3, 3, 4, 4]
    assert first.extra == {"words": [1] * 6}
    assert first.metrics["pid"] == second.metrics["pid"] != os.getpid()


def test_several_processes_share_the_prompts(made: Made) -> None:
    code = """
        def reward(prompts, completions, completion_ids, log_extra, log_metric, **columns):
            assert len(set(prompts)) < 3 and all(prompts.count(prompt) == 2 for prompt in prompts)
            log_extra("number", columns["number"])
            log_metric("size", len(prompts))
            return [float(text) for text in completions]
    """
    found = made(code, workers=2).ask(ASKED)
    assert found.scores == [1, 2, 3, 4, 5, 6]
    assert found.extra == {"number": [0, 0, 1, 1, 2, 2]}
    assert found.metrics == {"size": 3}  # the mean of the processes


def test_a_function_that_hangs_is_ended_and_the_next_call_gets_a_new_process(made: Made) -> None:
    code = """
        import time
        calls = 0
        def reward(prompts, completions, completion_ids, **columns):
            global calls
            calls += 1
            if calls == 2:
                while True:
                    time.sleep(1)
            return [float(calls)] * len(prompts)
    """
    source = made(code, timeout_s=2)
    assert source.ask(ASKED).scores == [1.0] * 6
    with pytest.raises(ScoreError, match=r"reward.function=x: no answer within reward.timeout_s = 2 s"):
        source.ask(ASKED)
    assert source.ask(ASKED).scores == [1.0] * 6  # its state is lost


def test_a_call_whose_process_is_lost_is_made_again(
    made: Made, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    flag = tmp_path / "lost"
    source = made(f"""
        import os
        from pathlib import Path
        def reward(prompts, completions, completion_ids, **columns):
            if not Path({str(flag)!r}).exists():
                Path({str(flag)!r}).touch()
                os.kill(os.getpid(), 9)
            return [float(sum(ids)) for ids in completion_ids]
    """)
    assert source.ask(ASKED).scores == [float(sum(ids)) for ids in ASKED.completion_ids]
    rows = [vars(record)["rlxf_event"] for record in caplog.records if "rlxf_event" in vars(record)]
    assert [(row["event"], row["who"]) for row in rows if row["event"] == "lost"] == [("lost", "reward.function=x")]


def test_a_function_that_ends_its_process_costs_the_call(made: Made) -> None:
    source = made("import os\ndef reward(prompts, **rest):\n    os._exit(3)\n")
    with pytest.raises(ScoreError, match="ended in the middle of a call, exit code 3, for the second time"):
        source.ask(ASKED)


def test_a_function_that_calls_exit_costs_the_call_and_not_the_run(made: Made) -> None:
    source = made("import sys\ndef reward(prompts, **rest):\n    sys.exit(0)\n")
    for _ in range(2):
        with pytest.raises(ScoreError, match=r"^reward.function=x: .*it called for the end of its process"):
            source.ask(ASKED)


def test_what_is_logged_is_what_files_can_hold(made: Made) -> None:
    code = """
        def reward(prompts, log_extra, **rest):
            log_extra("found", [1, 2.5, None, float("nan"), (lambda: 0).__class__, {"a": [object]}])
            return [0.0] * len(prompts)
    """
    (found,) = made(code).ask(ASKED).extra.values()
    assert found == [1, 2.5, None, "nan", "<class 'function'>", {"a": ["<class 'object'>"]}]


def test_what_the_function_raises_arrives(made: Made) -> None:
    source = made("def reward(prompts, **rest):\n    return 1 / 0\n")
    with pytest.raises(ScoreError, match=r"my_reward.py:2: ZeroDivisionError"):
        source.ask(ASKED)


def test_a_wrong_file_is_told_at_the_start(made: Made) -> None:
    before = children()
    with pytest.raises(ConfigError, match="defines no function `reward`"):
        made("x = 1\n")
    assert set(children()) <= set(before)


def test_a_stop_request_does_not_wait_for_it(made: Made) -> None:
    stop = Stop()
    source = made("import time\ndef reward(prompts, **rest):\n    time.sleep(60)\n", stop=stop)
    begun = time.monotonic()
    Timer(0.5, stop._on_signal, (15, None)).start()
    with pytest.raises(StopRequested), stop.interruptible():
        source.ask(ASKED)
    assert time.monotonic() - begun < 30  # the function sleeps for 60 s


def test_no_process_outlives_a_killed_run(tmp_path: Path) -> None:
    """Not even one whose function hangs."""
    (tmp_path / "my_reward.py").write_text(
        "import os, time\ndef reward(prompts, **rest):\n    print(os.getpid(), flush=True)\n    time.sleep(600)\n"
    )
    program = f"""
        from functools import partial
        from pathlib import Path
        from rlxf.core.stop import Stop
        from rlxf.score.functions import FunctionSource
        from rlxf.score.processes import ProcessSource
        from rlxf.score.texts import Asked

        if __name__ == "__main__":
            make = partial(FunctionSource.from_file, Path({str(tmp_path / "my_reward.py")!r}))
            source = ProcessSource(make, "x", workers=1, timeout_s=600, stop=Stop())
            source.ask(Asked(prompts=["a"], completions=["b"], completion_ids=[[1]], columns={{}}))
    """
    script = tmp_path / "run.py"
    script.write_text(dedent(program))
    run = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    assert run.stdout is not None
    child = psutil.Process(int(run.stdout.readline()))
    run.kill()
    run.wait()
    assert not psutil.wait_procs([child], timeout=20)[1]


def test_the_process_of_a_function_needs_no_torch() -> None:
    program = "import sys, rlxf.score.processes; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
