"""``deploy/``: the systemd unit, the Slurm script and the manifests, as far as that is possible without any of them.

With ``RLXF_CRDS``, a folder of custom resource definitions (``ray.io_rayjobs.yaml`` of KubeRay and
``batch.volcano.sh_jobs.yaml`` of Volcano), the manifests are validated against those.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from rlxf.core.stop import GRACE_S
from tests.test_scripts import ROOT, run

DEPLOY = ROOT / "deploy"
SLURM = DEPLOY / "slurm.sbatch"
MANIFESTS = sorted(DEPLOY.glob("*.yaml"))
SHELLCHECK = Path(sys.executable).with_name("shellcheck")
DRIVER = re.compile(r"scripts/supervise\.sh (?P<options>.*?)-- \S*python \S*ray_gpt\.py")


def manifest(name: str) -> dict[str, Any]:
    (found,) = yaml.safe_load_all((DEPLOY / name).read_text())
    assert isinstance(found, dict)
    return found


# systemd


def unit() -> dict[str, str]:
    lines = (DEPLOY / "rlxf.service").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if re.match(r"[A-Z]\w+=", line))


def verified(text: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """systemd's own check of the unit, with this checkout in place of /opt/rlxf."""
    verify = shutil.which("systemd-analyze")
    if verify is None:
        pytest.skip("systemd-analyze is not installed")
    file = folder / "rlxf.service"
    python, checkout = folder / "python", folder / "rlxf"  # names without the spaces that the real ones may have
    python.symlink_to(sys.executable)
    checkout.symlink_to(ROOT)
    text = text.replace("/opt/rlxf/.venv/bin/python", str(python)).replace("/opt/rlxf", str(checkout))
    file.write_text(text.replace("User=rlxf", f"User={os.getuid()}"))
    return run(verify, "verify", "--man=no", file)


def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
    result = verified((DEPLOY / "rlxf.service").read_text(), tmp_path)
    assert result.returncode == 0, result.stderr
    assert "rlxf.service" not in result.stderr


def test_systemd_sees_a_wrong_key(tmp_path: Path) -> None:
    text = (DEPLOY / "rlxf.service").read_text().replace("KillMode=", "KilMode=")
    assert "KilMode" in verified(text, tmp_path).stderr


def test_the_unit_leaves_restarts_to_the_script_and_time_to_save() -> None:
    settings = unit()
    assert re.search(r"supervise\.sh -- \S+/python ray_gpt\.py .* hydra\.run\.dir=", settings["ExecStart"])
    assert settings["Restart"] == "no"
    assert settings["KillMode"] == "mixed"  # SIGTERM to the script alone
    assert settings["SuccessExitStatus"].split() == ["130", "143"]
    minutes = int(settings["TimeoutStopSec"].removesuffix("min"))
    assert minutes * 60 >= GRACE_S + 600


# Slurm


def test_the_slurm_script_is_bash_that_stops_at_errors() -> None:
    text = SLURM.read_text()
    assert text.startswith("#!/usr/bin/env bash\n")
    assert "\nset -euo pipefail\n" in text
    result = run(SHELLCHECK, SLURM)
    assert result.returncode == 0, result.stdout


def test_slurm_reads_its_settings_before_the_first_command() -> None:
    head, _, rest = SLURM.read_text().partition("\nset -euo pipefail\n")
    assert "#SBATCH" not in rest
    settings = dict(re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", head, re.MULTILINE))
    assert settings["signal"].startswith("B:USR1@")  # only the script, not the steps with Ray in them
    assert int(settings["signal"].partition("@")[2]) >= GRACE_S + 600
    assert {"requeue", "exclusive", "open-mode"} <= set(settings)


def test_slurm_itself_accepts_the_script() -> None:
    sbatch = shutil.which("sbatch")
    if sbatch is None:
        pytest.skip("sbatch is not installed")
    result = run(sbatch, "--test-only", SLURM, cwd=ROOT)
    assert result.returncode == 0, result.stderr


# Stand-ins that note how they are called. The run ends with the next of the exit codes in the file `codes`, or, when
# there is none, with 143 half a second after SIGTERM.
SRUN = """\
#!/usr/bin/env bash
echo "srun $*" >>"$CALLS"
[[ $* == *" ${BROKEN:-none} "* ]] || exec sleep 90 # until the script ends
"""
SCONTROL = """\
#!/usr/bin/env bash
if [[ $1 == show ]]; then printf '%s\\n' $NODES; else echo "scontrol $*" >>"$CALLS"; fi
"""
CLUSTER = """\
#!/usr/bin/env bash
echo "cluster_up $*" >>"$CALLS"
[[ $* != *--print* ]] || exit "${REFUSAL:-0}"
if [[ $* == *"wait"*"--nodes ${SLOW:-x}" ]]; then exec sleep 60; fi
[[ $1 != wait ]] || exit "${WAIT:-0}"
"""
RUN = """\
#!/usr/bin/env bash
echo "run $RAY_ADDRESS $RAY_AUTH_MODE $*" >>"$CALLS"
if read -r code rest <codes; then echo "$rest" >codes; exit "$code"; fi
trap 'echo "TERM" >>"$CALLS"; sleep 0.3; exit 143' TERM
while true; do sleep 0.05; done
"""
RECIPE = ("--config-name", "online_dpo_trainer_tiny")


class Job:
    """The Slurm script in a checkout whose path holds a space, with stand-ins for Slurm, Ray and the run."""

    def __init__(self, folder: Path) -> None:
        self.checkout, self.calls_file = folder / "a checkout", folder / "calls"
        programs = folder / "bin"
        for path, text in (
            (programs / "srun", SRUN),
            (programs / "scontrol", SCONTROL),
            (self.checkout / "scripts" / "cluster_up.sh", CLUSTER),
            (self.checkout / ".venv" / "bin" / "python", RUN),
        ):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
            path.chmod(0o755)
        supervise = (ROOT / "scripts" / "supervise.sh").read_text().replace("backoff=10000", "backoff=1")
        (self.checkout / "scripts" / "supervise.sh").write_text(supervise)
        (self.checkout / "scripts" / "supervise.sh").chmod(0o755)
        (self.checkout / "codes").write_text("")
        self.environment = {
            "PATH": f"{programs}:{os.environ['PATH']}",
            "CALLS": str(self.calls_file),
            "NODES": "n1 n2 n3",
            "RLXF_HEAD_IP": "10.0.0.1",
            "SLURM_JOB_ID": "77",
            "SLURM_JOB_NODELIST": "n[1-3]",
            "SLURM_SUBMIT_DIR": str(self.checkout),
        }

    def ended(self, codes: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        (self.checkout / "codes").write_text(codes + "\n" if codes else "")
        return run("bash", SLURM, *arguments, cwd=self.checkout.parent, **{**self.environment, **environment})

    def started(self, *arguments: str) -> subprocess.Popen[str]:
        environment = {**os.environ, **self.environment}
        return subprocess.Popen(["bash", str(SLURM), *arguments], env=environment, stdout=subprocess.PIPE, text=True)

    def calls(self, program: str) -> list[str]:
        text = self.calls_file.read_text() if self.calls_file.exists() else ""
        return [line.partition(" ")[2] for line in text.splitlines() if line.split(" ")[0] == program]

    def wait_for(self, program: str) -> None:
        deadline = time.monotonic() + 30
        while not self.calls(program):
            assert time.monotonic() < deadline
            time.sleep(0.02)


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(tmp_path)


def test_a_slurm_job_starts_ray_on_every_node_and_then_the_run(job: Job) -> None:
    result = job.ended("0", *RECIPE, "a b=1", RLXF_NODE_RESOURCES='{"NPU": 8}')
    assert result.returncode == 0, result.stderr
    _, head, *_ = job.calls("cluster_up")
    assert head == "wait --address 10.0.0.1:6344 --nodes 1"
    steps = sorted(job.calls("srun"), key=lambda step: "worker" in step)
    assert "--nodelist=n1 scripts/cluster_up.sh head --node-ip 10.0.0.1" in steps[0]
    assert "--nodes=2 --ntasks=2 --exclude=n1 scripts/cluster_up.sh worker --address 10.0.0.1:6344" in steps[1]
    assert all(step.endswith('--resources {"NPU": 8} -- --block') for step in steps)
    assert job.calls("cluster_up")[-1] == "wait --address 10.0.0.1:6344 --nodes 3"
    (started,) = job.calls("run")
    assert started == (
        "10.0.0.1:6344 token ray_gpt.py --config-name online_dpo_trainer_tiny a b=1 hydra.run.dir=outputs/slurm-77"
    )
    assert job.calls("scontrol") == []


def test_one_node_and_a_run_folder_of_the_user(job: Job) -> None:
    assert job.ended("0", *RECIPE, "hydra.run.dir=outputs/x", NODES="n1").returncode == 0
    assert len(job.calls("srun")) == 1
    assert job.calls("run")[0].endswith("online_dpo_trainer_tiny hydra.run.dir=outputs/x")


@pytest.mark.parametrize("code", [0, 1, 2, 3, 4])
def test_no_other_exit_code_than_75_is_requeued(code: int, job: Job) -> None:
    assert job.ended(str(code), *RECIPE).returncode == code
    assert len(job.calls("run")) == 1
    assert job.calls("scontrol") == []


def test_exit_code_75_is_tried_again_in_the_job_and_then_in_the_next(job: Job) -> None:
    assert job.ended("75 75 75 75", *RECIPE).returncode == 75
    assert len(set(job.calls("run"))) == 1
    assert len(job.calls("run")) == 4
    assert job.calls("scontrol") == ["requeue 77"]
    assert job.ended("75 75 75 75", *RECIPE, SLURM_RESTART_COUNT="20").returncode == 75
    assert job.calls("scontrol") == ["requeue 77"]  # that of before


def test_nodes_that_do_not_come_are_waited_for_in_the_next_job(job: Job) -> None:
    assert job.ended("0", *RECIPE, WAIT="75").returncode == 75
    assert job.calls("run") == []
    assert job.calls("scontrol") == ["requeue 77"]


def test_wrong_settings_of_a_slurm_job_are_not_tried_again(job: Job, tmp_path: Path) -> None:
    assert job.ended("0", *RECIPE, REFUSAL="2").returncode == 2
    assert "is not a checkout" in job.ended("0", *RECIPE, SLURM_SUBMIT_DIR=str(tmp_path)).stderr
    assert "RLXF_HEAD_IP" in job.ended("0", *RECIPE, RLXF_HEAD_IP="127.0.1.1").stderr
    assert "runs in a Slurm job" in job.ended("0", *RECIPE, SLURM_JOB_ID="").stderr
    assert job.calls("run") == job.calls("scontrol") == []


@pytest.mark.parametrize(("step", "waiting"), [("head", "1"), ("worker", "3")])
def test_a_node_on_which_ray_does_not_start_ends_the_job_at_once(step: str, waiting: str, job: Job) -> None:
    began = time.monotonic()
    result = job.ended("0", *RECIPE, BROKEN=step, SLOW=waiting)
    assert time.monotonic() - began < 20
    assert result.returncode == 1
    assert "Ray has ended on a node" in result.stdout
    assert job.calls("run") == job.calls("scontrol") == []


@pytest.mark.parametrize(("number", "requeued"), [(signal.SIGUSR1, ["requeue 77"]), (signal.SIGTERM, [])])
def test_a_signal_of_slurm_lets_the_run_save_once(number: signal.Signals, requeued: list[str], job: Job) -> None:
    process = job.started(*RECIPE)
    job.wait_for("run")
    time.sleep(0.2)  # until it listens
    process.send_signal(number)
    assert process.wait(timeout=30) == 143
    assert len(job.calls("TERM")) == 1
    assert len(job.calls("run")) == 1
    assert job.calls("scontrol") == requeued


# Kubernetes


def strict(schema: dict[str, Any]) -> dict[str, Any]:
    """A definition's schema, in which an unknown field is an error, as kubectl treats it."""
    result = dict(schema)
    if "properties" in schema:
        result["properties"] = {name: strict(part) for name, part in schema["properties"].items()}
        if "additionalProperties" not in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
            result["additionalProperties"] = False
    for key in ("items", "additionalProperties"):
        if isinstance(schema.get(key), dict):
            result[key] = strict(schema[key])
    return result


@pytest.mark.parametrize(
    ("name", "definition"),
    [("kuberay.yaml", "ray.io_rayjobs.yaml"), ("volcano.yaml", "batch.volcano.sh_jobs.yaml")],
)
def test_a_manifest_fits_the_definition_of_its_resource(name: str, definition: str) -> None:
    folder = os.environ.get("RLXF_CRDS")
    if folder is None:
        pytest.skip("RLXF_CRDS names no folder of custom resource definitions")
    versions = yaml.safe_load((Path(folder) / definition).read_text())["spec"]["versions"]
    resource = manifest(name)
    (version,) = [version for version in versions if version["name"] == resource["apiVersion"].split("/")[1]]
    schema = strict(version["schema"]["openAPIV3Schema"])
    jsonschema.validate(resource, schema)
    resource["spec"]["unknown"] = 1  # the check sees what is wrong
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(resource, schema)


def templates(value: Any) -> Iterator[dict[str, Any]]:
    """Every pod template in a manifest."""
    if isinstance(value, dict):
        if "containers" in value.get("spec", {}):
            yield value["spec"]
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from templates(item)


# The fields of Kubernetes' API that the manifests use; a mistyped one is not among them.
POD = {"containers", "volumes", "restartPolicy", "terminationGracePeriodSeconds"}
CONTAINER = {"name", "image", "workingDir", "command", "args", "env", "lifecycle", "ports", "resources", "volumeMounts"}


@pytest.mark.parametrize("file", MANIFESTS, ids=lambda file: file.name)
def test_every_pod_has_time_to_save_and_shared_storage(file: Path) -> None:
    pods = list(templates(manifest(file.name)))
    assert len(pods) == 2
    for pod in pods:
        assert set(pod) <= POD
        assert pod["terminationGracePeriodSeconds"] >= GRACE_S + 600
        (container,) = pod["containers"]
        assert set(container) <= CONTAINER
        assert container["resources"]["requests"] == container["resources"]["limits"]  # as extended resources need
        volumes = {volume["name"] for volume in pod["volumes"]}
        assert {mount["name"] for mount in container["volumeMounts"]} == volumes
        assert {"data", "shm"} <= volumes
    driver = DRIVER.findall(" ".join(file.read_text().replace("\\\n", " ").split()))
    assert len(driver) == 1
    assert "hydra.run.dir=/data/" in file.read_text()


def shell_texts(value: Any) -> Iterator[str]:
    """What the manifests hand to `bash -c`."""
    for pod in templates(value):
        (container,) = pod["containers"]
        if "args" in container:
            yield container["args"][0]
        words = container.get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command", [])
        if words[:2] == ["bash", "-c"]:
            yield words[2]


@pytest.mark.parametrize(("file", "number"), [("kuberay.yaml", 1), ("volcano.yaml", 3)])
def test_the_shell_in_a_manifest_is_right(file: str, number: int) -> None:
    texts = list(shell_texts(manifest(file)))
    assert len(texts) == number
    for text in texts:
        result = subprocess.run(
            [SHELLCHECK, "--shell=bash", "-"], input=text, capture_output=True, text=True, check=False
        )
        assert result.returncode == 0, result.stdout
    flags = re.findall(r"cluster_up\.sh \w+|(?<= )--[a-z]+-?[a-z]*(?= )", " ".join(texts))
    known = (
        run(ROOT / "scripts" / "cluster_up.sh", "--help").stdout + run(ROOT / "scripts" / "supervise.sh", "-h").stdout
    )
    assert [flag for flag in flags if flag not in known and flag not in ("--config-name", "-- --block")] == []


def test_kuberay_restarts_nothing_itself_and_stops_the_job_before_the_pod() -> None:
    spec = manifest("kuberay.yaml")["spec"]
    cluster = spec["rayClusterSpec"]
    assert spec["backoffLimit"] == 0
    assert cluster["authOptions"] == {"mode": "token"}
    assert re.search(rf"^ray=={cluster['rayVersion']}$", (ROOT / "locks" / "cuda.txt").read_text(), re.MULTILINE)
    pod = cluster["headGroupSpec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["lifecycle"]["preStop"]["exec"]["command"][-1] == spec["jobId"]
    (wait,) = [entry["value"] for entry in container["env"] if entry["name"] == "RAY_JOB_STOP_WAIT_TIME_S"]
    assert GRACE_S + 600 <= int(wait) < pod["terminationGracePeriodSeconds"]
    assert "supervise.sh --no-forward --" in spec["entrypoint"]
    assert not set("&|;<>()$`\\\"'*") & set(spec["entrypoint"])  # KubeRay puts it into a line of shell as it is


def test_volcano_restarts_the_job_on_75_and_never_on_a_wrong_recipe() -> None:
    """The first policy that fits decides: exit codes come before the event that a pod has failed."""
    spec = manifest("volcano.yaml")["spec"]
    head, worker = spec["tasks"]

    def action(event: str, code: int | None = None) -> str:
        fits = (p["action"] for p in head["policies"] if p.get("event") == event or p.get("exitCode", -1) == code)
        return str(next(fits))

    assert action("PodFailed", 75) == "RestartJob"
    assert action("PodFailed", 143) == "RestartJob"
    for code in (1, 2, 3, 4):
        assert action("PodFailed", code) == "TerminateJob"
    assert action("TaskCompleted") == "CompleteJob"
    assert all(("event" in policy) != ("exitCode" in policy) for policy in head["policies"])
    assert "policies" not in worker
    assert spec["minAvailable"] == head["replicas"] + worker["replicas"]
    nodes = re.search(r"--nodes (\d+)", head["template"]["spec"]["containers"][0]["args"][0])
    assert nodes is not None
    assert int(nodes[1]) == spec["minAvailable"]
    for task in (head, worker):
        (container,) = task["template"]["spec"]["containers"]
        assert container["resources"]["limits"]["huawei.com/Ascend910"] == "8"
