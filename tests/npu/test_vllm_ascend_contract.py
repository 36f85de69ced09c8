"""Everything of vLLM that the rollout engine uses exists in the NPU lane's vLLM 0.23.0 and vllm-ascend 0.23.0.

Read, not run: the engine's own source says what it uses, the wheels' source says what there is.
"""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

import rlxf.rollout.vllm
import rlxf.rollout.vllm_worker
from rlxf.platform.npu import NpuPlatform
from tests.npu.wheels import source

VLLM = "vllm==0.23.0"
ASCEND = "vllm-ascend==0.23.0"
ENGINE = ast.parse(Path(rlxf.rollout.vllm.__file__).read_text())
WORKER = ast.parse(Path(rlxf.rollout.vllm_worker.__file__).read_text())
LLM_FILE = "vllm/entrypoints/llm.py"

pytestmark = [pytest.mark.npu, pytest.mark.slow]  # the vLLM wheel has 274 MB


@cache
def tree(requirement: str, path: str) -> ast.Module:
    return ast.parse(source(requirement, path))


def class_in(requirement: str, path: str, name: str) -> ast.ClassDef:
    return next(node for node in tree(requirement, path).body if isinstance(node, ast.ClassDef) and node.name == name)


def fields(node: ast.ClassDef) -> set[str]:
    """Annotated fields of a dataclass or struct."""
    return {ast.unparse(item.target) for item in node.body if isinstance(item, ast.AnnAssign)}


def methods(node: ast.ClassDef) -> dict[str, set[str]]:
    """Parameter names of each method."""
    found = {}
    for item in node.body:
        if isinstance(item, ast.FunctionDef):
            arguments = item.args
            found[item.name] = {a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)}
    return found


def calls(module: ast.Module, function: str) -> list[ast.Call]:
    nodes = [node for node in ast.walk(module) if isinstance(node, ast.Call) and ast.unparse(node.func) == function]
    assert nodes, f"the engine no longer calls {function}"
    return nodes


def keywords(call: ast.Call) -> set[str]:
    return {keyword.arg for keyword in call.keywords if keyword.arg}


def test_llm_accepts_every_argument_of_the_engine_and_of_the_platform() -> None:
    (call,) = calls(ENGINE, "LLM")
    ours = keywords(call) | set(NpuPlatform().vllm_arguments(colocated=True))
    own = methods(class_in(VLLM, LLM_FILE, "LLM"))["__init__"]
    passed_on = fields(class_in(VLLM, "vllm/engine/arg_utils.py", "EngineArgs"))
    assert ours >= {"worker_extension_cls", "max_model_len", "additional_config"}
    assert ours <= own | passed_on


def test_sampling_parameters_have_every_field_that_is_set() -> None:
    (shared,) = [node for node in ast.walk(ENGINE) if isinstance(node, ast.Dict) and len(node.keys) > 5]
    (call,) = calls(ENGINE, "SamplingParams")
    ours = {ast.literal_eval(key) for key in shared.keys if key} | keywords(call)
    assert ours >= {"temperature", "seed", "stop_token_ids"}
    assert ours <= fields(class_in(VLLM, "vllm/sampling_params.py", "SamplingParams"))


@pytest.mark.parametrize("method", ["generate", "collective_rpc", "reset_prefix_cache"])
def test_llm_has_every_method_that_is_called(method: str) -> None:
    theirs = methods(class_in(VLLM, LLM_FILE, "LLM"))[method]
    for call in calls(ENGINE, f"self._llm.{method}"):
        assert keywords(call) <= theirs


def test_the_executors_and_the_block_size_are_where_the_engine_looks() -> None:
    assert 'DistributedExecutorBackend = Literal["ray", "mp", "uni"' in source(VLLM, "vllm/config/parallel.py")
    assert "block_size" in fields(class_in(VLLM, "vllm/config/cache.py", "CacheConfig"))
    assert "self.vllm_config = vllm_config" in source(VLLM, "vllm/v1/engine/llm_engine.py")
    assert "cache_config.block_size = 128" in source(ASCEND, "vllm_ascend/utils.py")
    assert NpuPlatform().kv_block_size == 128


def test_layerwise_reload_takes_what_the_worker_gives() -> None:
    theirs = {
        node.name: [argument.arg for argument in node.args.args]
        for node in tree(VLLM, "vllm/model_executor/model_loader/reload/layerwise.py").body
        if isinstance(node, ast.FunctionDef)
    }
    assert theirs["initialize_layerwise_reload"] == ["model"]
    assert theirs["finalize_layerwise_processing"] == ["model", "model_config"]  # finalize_layerwise_reload calls it
    exported = source(VLLM, "vllm/model_executor/model_loader/reload/__init__.py")
    for name, count in (("initialize_layerwise_reload", 1), ("finalize_layerwise_reload", 2)):
        assert f'"{name}"' in exported
        assert all(len(call.args) == count for call in calls(WORKER, name))


def test_ascend_updates_its_own_weights_by_the_same_pair() -> None:
    text = source(ASCEND, "vllm_ascend/worker/worker.py")
    assert "with torch.device(self.device):\n                initialize_layerwise_reload(model)" in text
    assert "finalize_layerwise_reload(model, self.model_config)" in text


def test_the_worker_has_what_the_extension_uses_and_no_name_of_its_own() -> None:
    text = source(ASCEND, "vllm_ascend/worker/worker.py")
    worker = class_in(ASCEND, "vllm_ascend/worker/worker.py", "NPUWorker")
    assert "self.model_runner" in text
    assert "self.device = " in text
    assert "self.vllm_config = vllm_config" in source(VLLM, "vllm/v1/worker/worker_base.py")
    assert not any(name.startswith("rlxf_") for name in methods(worker))


def test_rebuilding_a_tied_head_is_a_step_that_the_model_knows() -> None:
    path = "vllm/model_executor/layers/vocab_parallel_embedding.py"
    head = methods(class_in(VLLM, path, "UnquantizedEmbeddingMethod"))
    assert head["process_weights_after_loading"] == {"self", "layer"}


def test_the_private_weight_layout_is_off_by_both_switches() -> None:
    assert '"VLLM_ASCEND_ENABLE_NZ": lambda' in source(ASCEND, "vllm_ascend/envs.py")
    assert '"weight_nz_mode"' in source(ASCEND, "vllm_ascend/ascend_config.py")
    assert '"VLLM_ENABLE_V1_MULTIPROCESSING"' in source(VLLM, "vllm/envs.py")
    assert NpuPlatform().rollout_environment(1, 1)["VLLM_ASCEND_ENABLE_NZ"] == "0"
    assert NpuPlatform().vllm_arguments(colocated=False)["additional_config"] == {"weight_nz_mode": 0}
