"""``scripts/supervise.sh``: what is started again, when, in which folder, and what a signal does."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import rlxf.core.errors
from tests.test_scripts import ROOT, run

SUPERVISE = ROOT / "scripts" / "supervise.sh"
QUICK = ("--backoff", "0.01", "--max-backoff", "0.04")

# Writes its arguments, one a line, then ends with the next of the exit codes in the file `codes`.
RUN = """\
#!/usr/bin/env bash
printf '%s\\n' "$@" -- >>starts
read -r code rest <codes
echo "$rest" >codes
exit "$code"
"""


class Program:
    """A stand-in for the run, in a folder of its own: ends with one exit code after the other."""

    def __init__(self, folder: Path, name: str = "ray_gpt.py") -> None:
        self.folder = folder
        self.path = folder / name
        self.path.write_text(RUN)
        self.path.chmod(0o755)

    def supervised(
        self, codes: str, *options: str, arguments: tuple[str, ...] = ()
    ) -> subprocess.CompletedProcess[str]:
        (self.folder / "codes").write_text(codes + "\n")
        (self.folder / "starts").write_text("")
        return run(SUPERVISE, *QUICK, *options, "--", self.path, *arguments, cwd=self.folder)

    @property
    def starts(self) -> list[list[str]]:
        """The arguments of each start."""
        return [start.splitlines() for start in (self.folder / "starts").read_text().split("--\n")[:-1]]


@pytest.fixture
def program(tmp_path: Path) -> Program:
    return Program(tmp_path)


def pauses(text: str) -> list[str]:
    return re.findall(r"starting again in ([\d.]+) s", text)


def test_exit_code_75_starts_the_same_command_again(program: Program) -> None:
    result = program.supervised("75 75 0", arguments=("a=1",))
    assert result.returncode == 0, result.stderr
    assert program.starts == [["a=1"]] * 3
    assert "exit code 75 after 0 s: starting again in 0.01 s (1 of 10)" in result.stderr


@pytest.mark.parametrize("code", [0, 1, 2, 3, 4, 74, 76, 126, 130, 137, 143])
def test_every_other_exit_code_is_passed_on_at_once(code: int, program: Program) -> None:
    result = program.supervised(f"{code} 0")
    assert result.returncode == code
    assert len(program.starts) == 1
    assert result.stderr == ""


def test_a_recipe_with_a_wrong_key_is_not_tried_again(tmp_path: Path) -> None:
    command = (sys.executable, ROOT / "ray_gpt.py", "--config-name", "online_dpo_trainer_tiny", "training.sead=1")
    result = run(SUPERVISE, *QUICK, "--", *command, cwd=tmp_path)
    assert result.returncode == 2
    assert result.stderr.count("training.sead") == 1
    assert "training.seed" in result.stderr
    assert "starting again" not in result.stderr
    assert not list(tmp_path.iterdir())


def test_a_program_that_does_not_exist_is_not_tried_again(tmp_path: Path) -> None:
    result = run(SUPERVISE, *QUICK, "--", tmp_path / "gone")
    assert result.returncode == 127
    assert "starting again" not in result.stderr


def test_restarts_in_a_row_have_a_limit_and_leave_the_exit_code(program: Program) -> None:
    result = program.supervised("75 75 75 0", "--max-restarts", "2")
    assert result.returncode == 75
    assert len(program.starts) == 3
    assert "giving up" in result.stderr.splitlines()[-1]
    assert program.supervised("75 0", "--max-restarts=0").returncode == 75
    assert len(program.starts) == 1


def test_the_pause_doubles_up_to_a_limit(program: Program) -> None:
    began = time.monotonic()
    result = program.supervised("75 75 75 75 0")
    assert pauses(result.stderr) == ["0.01", "0.02", "0.04", "0.04"]
    assert time.monotonic() - began >= 0.11


def test_after_a_long_run_pause_and_count_begin_anew(program: Program) -> None:
    program.path.write_text(RUN.replace("read", "[[ $(wc -l <starts) != 3 ]] || sleep 0.6\nread", 1))
    options = ("--max-restarts", "2", "--long-run", "0.5")
    result = program.supervised("75 75 75 75 75 0", *options)
    assert result.returncode == 75
    assert pauses(result.stderr) == ["0.01", "0.02", "0.01", "0.02"]
    assert len(program.starts) == 5


def test_a_killed_run_is_started_again_only_if_asked(program: Program) -> None:
    program.path.write_text(RUN.replace("exit", "((code != 137)) || kill -KILL $$\nexit", 1))
    assert program.supervised("137 0").returncode == 137
    assert len(program.starts) == 1
    assert program.supervised("137 0", "--on-kill").returncode == 0
    assert len(program.starts) == 2
    assert program.supervised("139 0", "--on-kill").returncode == 139


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no command"),
        (["--"], "no command"),
        (["--max-restarts", "many", "true"], "--max-restarts many"),
        (["--max-restarts", "-1", "true"], "--max-restarts -1"),
        (["--backoff", "1m", "true"], "--backoff 1m is not a number of seconds"),
        (["--backoff", "0.0001", "true"], "--backoff 0.0001"),
        (["--max-backoff=a[$(touch x)]", "true"], "--max-backoff"),
        (["--long-run"], "needs a value"),
        (["--restarts", "3", "true"], "unknown argument --restarts"),
    ],
)
def test_wrong_options_are_refused_in_one_line(arguments: list[str], message: str, tmp_path: Path) -> None:
    result = run(SUPERVISE, *arguments, cwd=tmp_path)
    assert result.returncode == 2
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_options_may_have_leading_zeros_and_fractions(program: Program) -> None:
    result = program.supervised("75 0", "--backoff", "0.08", "--max-backoff", "09", "--max-restarts", "08")
    assert result.returncode == 0, result.stderr
    assert "in 0.08 s (1 of 8)" in result.stderr


# The run folder.


def test_words_reach_the_command_as_they_were_typed(tmp_path: Path) -> None:
    folder = tmp_path / "a  checkout's"
    folder.mkdir()
    program = Program(folder, "a program")
    script = Path(shutil.copy(SUPERVISE, folder))
    (folder / "codes").write_text("75 0\n")
    words = ["a b", "", "*", "$HOME", "'x'", '"y"', "a\\b", "--on-kill", "-x"]
    result = run(script, *QUICK, "--", program.path, *words, cwd=folder)
    assert result.returncode == 0, result.stderr
    assert program.starts == [words] * 2


RECIPE = ("--config-name", "online_dpo_trainer_tiny")


@pytest.mark.parametrize(
    "recipe", [RECIPE, ("--config-name=online_dpo_trainer_tiny.yaml",), ("-cn", "online_dpo_trainer_tiny")]
)
def test_a_run_without_a_folder_gets_one_for_all_starts(recipe: tuple[str, ...], program: Program) -> None:
    result = program.supervised("75 0", arguments=(*recipe, "training.seed=1"))
    first, second = program.starts
    assert first == second
    assert first[:-1] == [*recipe, "training.seed=1"]
    assert re.fullmatch(r"hydra\.run\.dir=outputs/online_dpo_trainer_tiny/\d{4}(-\d\d){2}_\d\d(-\d\d){2}", first[-1])
    assert first[-1].partition("=")[2] in result.stderr


def test_the_installed_command_gets_a_folder_too(tmp_path: Path) -> None:
    program = Program(tmp_path, "rlxf")
    program.supervised("0", arguments=("train", *RECIPE))
    assert program.starts[0][-1].startswith("hydra.run.dir=outputs/online_dpo_trainer_tiny/")


@pytest.mark.parametrize(
    "arguments",
    [
        (*RECIPE, "hydra.run.dir=outputs/mine"),
        (*RECIPE, "++hydra.run.dir='outputs/a b'"),
        (*RECIPE, "training.resume=last"),
        (*RECIPE, "training.resume=auto", "hydra.run.dir=outputs/mine"),
        ("training.seed=1",),  # without a recipe, which the program itself refuses
    ],
)
def test_a_folder_that_is_the_same_anyway_is_left_alone(arguments: tuple[str, ...], program: Program) -> None:
    assert program.supervised("75 0", arguments=arguments).returncode == 0
    assert program.starts == [list(arguments)] * 2


def test_other_commands_are_left_alone(tmp_path: Path) -> None:
    program = Program(tmp_path, "train.sh")
    program.supervised("75 0", arguments=(*RECIPE, "--multirun", "training.resume=never"))
    assert program.starts == [[*RECIPE, "--multirun", "training.resume=never"]] * 2


def test_a_restart_takes_the_checkpoints_that_the_first_start_refused_to_find(program: Program) -> None:
    program.supervised("75 0", arguments=(*RECIPE, "++training.resume=never", "hydra.run.dir=x"))
    first, second = program.starts
    assert first == [*RECIPE, "++training.resume=never", "hydra.run.dir=x"]
    assert second == [*RECIPE, "training.resume=auto", "hydra.run.dir=x"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((*RECIPE, "hydra.run.dir=outputs/${now:%H-%M}"), "another folder at each start"),
        ((*RECIPE, "training.resume=outputs/x/checkpoints/iter_0000010"), "would begin from there at each start"),
        ((*RECIPE, "--multirun", "training.seed=1,2"), "a sweep cannot be continued"),
        (("-cn", "a b"), "hydra.run.dir=FOLDER"),
    ],
)
def test_a_run_that_would_not_continue_is_refused(arguments: tuple[str, ...], message: str, program: Program) -> None:
    result = program.supervised("75 0", arguments=arguments)
    assert result.returncode == 2
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert program.starts == []


# Signals. The run notes each one, and ends half a second after the first; `deaf` waits for the second.

LISTENER = """\
import pathlib, signal, sys, time
heard = pathlib.Path("heard")
numbers = []
def note(number, frame):
    numbers.append(number)
    with heard.open("a") as file:
        print(signal.Signals(number).name, file=file)
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, note)
print("ready", flush=True)
wanted, code = int(sys.argv[1]), int(sys.argv[2])
while len(numbers) < wanted:
    time.sleep(0.01)
end = time.monotonic() + 0.3  # time for a signal too many
while time.monotonic() < end:
    time.sleep(0.01)
sys.exit(code)
"""


def not_ignored() -> None:
    """A suite that is started with `nohup ... &` ignores some signals, and so would everything below it."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL)


def listening(folder: Path, wanted: int, code: int, *options: str) -> subprocess.Popen[str]:
    """A supervised program that has started and ends with ``code`` after ``wanted`` signals."""
    (folder / "listen.py").write_text(LISTENER)
    command = [str(SUPERVISE), *options, "--", sys.executable, "listen.py", str(wanted), str(code)]
    process = subprocess.Popen(
        command, cwd=folder, stdout=subprocess.PIPE, text=True, start_new_session=True, preexec_fn=not_ignored
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def heard(folder: Path) -> list[str]:
    return (folder / "heard").read_text().split()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_reaches_the_run_once_and_ends_the_restarts(number: signal.Signals, tmp_path: Path) -> None:
    process = listening(tmp_path, 1, 75, *QUICK)
    process.send_signal(number)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 75  # as the run said
    assert output == ""  # and no second start
    assert heard(tmp_path) == [number.name]


def test_ctrl_c_at_a_terminal_reaches_the_run_once(tmp_path: Path) -> None:
    """It goes to every process of the foreground group."""
    process = listening(tmp_path, 1, 130)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(timeout=30) == 130
    assert heard(tmp_path) == ["SIGINT"]


def test_a_second_signal_is_handed_on_too(tmp_path: Path) -> None:
    process = listening(tmp_path, 2, 143)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.2)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 143
    assert heard(tmp_path) == ["SIGTERM", "SIGTERM"]


def test_a_signal_that_reaches_everybody_is_not_handed_on(tmp_path: Path) -> None:
    process = listening(tmp_path, 1, 75, *QUICK, "--no-forward")
    process.send_signal(signal.SIGTERM)
    time.sleep(0.2)
    assert not (tmp_path / "heard").exists()
    (child,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(child), signal.SIGTERM)
    assert process.communicate(timeout=30)[0] == ""
    assert process.returncode == 75
    assert heard(tmp_path) == ["SIGTERM"]


@pytest.mark.parametrize("options", [(), ("--no-forward",)])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_in_the_pause_ends_it(
    number: signal.Signals, code: int, options: tuple[str, ...], program: Program
) -> None:
    (program.folder / "codes").write_text("75 0\n")
    command = [str(SUPERVISE), "--backoff", "300", *options, "--", str(program.path)]
    process = subprocess.Popen(command, cwd=program.folder, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    assert "starting again in 300 s" in process.stderr.readline()
    began = time.monotonic()
    process.send_signal(number)
    errors = process.communicate(timeout=30)[1]
    assert process.returncode == code
    assert time.monotonic() - began < 10
    assert f"stopped by {number.name}" in errors
    assert len(program.starts) == 1
    assert not Path(f"/proc/{process.pid}").exists()


def test_signals_at_any_moment_of_starting_end_the_script(tmp_path: Path) -> None:
    """Between two starts as well: the script never misses one, and never goes on after it."""
    (tmp_path / "program.sh").write_text("echo >>starts\nexit 75\n")
    for delay in range(12):
        command = [str(SUPERVISE), "--backoff", "0.001", "--max-backoff", "0.001", "--max-restarts", "999999"]
        process = subprocess.Popen([*command, "--", "bash", "program.sh"], cwd=tmp_path, stderr=subprocess.DEVNULL)
        while not (tmp_path / "starts").exists():
            time.sleep(0.002)
        time.sleep(0.003 * delay)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=10) in (75, 143)
        (tmp_path / "starts").unlink()


def table(heading: str) -> list[list[str]]:
    """The rows of the table under a heading of docs/supervise.md."""
    text = (
        (ROOT / "docs" / "supervise.md").read_text(encoding="utf-8").partition(f"## {heading}\n")[2].split("\n## ")[0]
    )
    return [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| ")
    ]


def test_the_page_says_of_every_exit_code_whether_it_is_tried_again(program: Program) -> None:
    rows = [(code, again) for codes, _, again in table("Exit codes")[1:] for code in codes.split(", ")]
    codes = {int(code): again for code, again in rows if code.isdigit()}
    errors = [error for error in vars(rlxf.core.errors).values() if isinstance(error, type)]
    assert {getattr(error, "exit_code", 1) for error in errors} <= set(codes)
    assert [code for code, again in codes.items() if again == "yes"] == [75]
    for code in codes:
        program.supervised(f"{code} 0")
        assert len(program.starts) == (2 if code == 75 else 1)


def test_the_page_and_the_help_name_the_defaults_of_the_script() -> None:
    usage, source = run(SUPERVISE, "--help").stdout, SUPERVISE.read_text()
    rows = {option.strip("`").split()[0]: default for option, default, _ in table("Options")[1:]}
    assert set(rows) == set(re.findall(r"^  (--[\w-]+)", usage, re.MULTILINE))
    for option, default in rows.items():
        name = option.removeprefix("--").replace("-", "_")
        if default.isdigit():
            assert f"default {default})" in usage.partition(f"  {option} ")[2].split("  --")[0]
            assert re.search(rf"\b{name}={default}(000)?\b", source)


def test_the_page_shows_a_command_that_is_understood(program: Program) -> None:
    """The example of the script's help, with a stand-in for the run."""
    lines = run(SUPERVISE, "--help").stdout.splitlines()
    (example,) = [line for line in lines if line.startswith("  scripts/supervise.sh -- ")]
    words = shlex.split(example)[2:]
    assert words[:2] == ["python", "ray_gpt.py"]
    program.supervised("0", arguments=tuple(words[2:]))
    assert program.starts == [words[2:]]
