"""Everything of vLLM that the rollout engine uses exists in the NPU lane's vLLM 0.23.0 and vllm-ascend 0.23.0.

Read, not run: the engine's own source says what it uses, the wheels' source says what there is. How requests go into
an engine and completions come out is read in the installed vLLM, too: the engine uses only what both have.
"""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

import rlxf.rollout.vllm
import rlxf.rollout.vllm_requests
import rlxf.rollout.vllm_worker
from rlxf.platform.npu import NpuPlatform
from tests.npu.wheels import INSTALLED, source

VLLM = "vllm==0.23.0"
ASCEND = "vllm-ascend==0.23.0"
ENGINE = ast.parse(Path(rlxf.rollout.vllm.__file__).read_text())
REQUESTS = ast.parse(Path(rlxf.rollout.vllm_requests.__file__).read_text())
WORKER = ast.parse(Path(rlxf.rollout.vllm_worker.__file__).read_text())
LLM_FILE = "vllm/entrypoints/llm.py"
LLM_ENGINE = "vllm/v1/engine/llm_engine.py"
OUTPUTS = "vllm/v1/engine/output_processor.py"

both = pytest.mark.parametrize("version", [VLLM, INSTALLED])

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


def positional(node: ast.ClassDef | ast.Module, function: str) -> list[str]:
    """Names of a function's parameters that may be given without their names."""
    found = next(item for item in node.body if isinstance(item, ast.FunctionDef) and item.name == function)
    return [argument.arg for argument in (*found.args.posonlyargs, *found.args.args)]


def calls(module: ast.Module, function: str) -> list[ast.Call]:
    nodes = [node for node in ast.walk(module) if isinstance(node, ast.Call) and ast.unparse(node.func) == function]
    assert nodes, f"the engine no longer calls {function}"
    return nodes


def keywords(call: ast.Call) -> set[str]:
    return {keyword.arg for keyword in call.keywords if keyword.arg}


def test_llm_accepts_every_argument_of_the_engine_and_of_the_platform() -> None:
    (call,) = calls(ENGINE, "LLM")
    ours = keywords(call) | set(NpuPlatform().vllm_arguments(colocated=True)) | {"max_num_seqs"}
    own = methods(class_in(VLLM, LLM_FILE, "LLM"))["__init__"]
    passed_on = fields(class_in(VLLM, "vllm/engine/arg_utils.py", "EngineArgs"))
    assert ours >= {"worker_extension_cls", "max_model_len", "additional_config"}
    assert ours <= own | passed_on


@both
def test_sampling_parameters_have_every_field_that_is_set(version: str) -> None:
    (shared,) = [node for node in ast.walk(REQUESTS) if isinstance(node, ast.Dict) and len(node.keys) > 5]
    (call,) = calls(REQUESTS, "SamplingParams")
    forms = [node for node in ast.walk(REQUESTS) if isinstance(node, ast.Dict) and len(node.keys) == 1]
    ours = {ast.literal_eval(key) for node in (shared, *forms) for key in node.keys if key} | keywords(call)
    assert ours >= {"temperature", "seed", "stop_token_ids", "structured_outputs", "output_kind"}
    assert ours <= fields(class_in(version, "vllm/sampling_params.py", "SamplingParams"))
    kinds = class_in(version, "vllm/sampling_params.py", "RequestOutputKind")
    names = {ast.unparse(target) for item in kinds.body if isinstance(item, ast.Assign) for target in item.targets}
    assert names >= {"DELTA", "FINAL_ONLY"}


@pytest.mark.parametrize("method", ["collective_rpc", "reset_prefix_cache"])
def test_llm_has_every_method_that_is_called(method: str) -> None:
    theirs = methods(class_in(VLLM, LLM_FILE, "LLM"))[method]
    for call in calls(ENGINE, f"self._llm.{method}"):
        assert keywords(call) <= theirs


@both
def test_the_engine_takes_requests_and_steps_as_they_are_given(version: str) -> None:
    engine = class_in(version, LLM_ENGINE, "LLMEngine")
    expected = {
        "add_request": ["self", "request_id", "prompt", "params"],
        "step": ["self"],
        "abort_request": ["self", "request_ids"],
        "has_unfinished_requests": ["self"],
    }
    used = {
        node.func.attr
        for node in ast.walk(REQUESTS)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
        if ast.unparse(node.func.value) == "self._engine"
    }
    assert used == set(expected)
    for method, parameters in expected.items():
        assert positional(engine, method)[: len(parameters)] == parameters
        for call in calls(REQUESTS, f"self._engine.{method}"):
            assert (len(call.args), call.keywords) == (len(parameters) - 1, [])
    assert positional(tree(version, "vllm/inputs/engine.py"), "tokens_input") == ["prompt_token_ids"]
    assert '"tokens_input"' in source(version, "vllm/inputs/__init__.py")
    # A prompt with a type is taken as it is; others would be rendered first.
    assert 'isinstance(prompt, dict) and "type" in prompt' in source(version, "vllm/v1/engine/input_processor.py")
    assert 'TokensInput(type="token", prompt_token_ids=prompt_token_ids)' in source(version, "vllm/inputs/engine.py")
    assert "max_num_seqs" in fields(class_in(version, "vllm/config/scheduler.py", "SchedulerConfig"))
    assert "self.vllm_config = vllm_config" in source(version, LLM_ENGINE)
    config = class_in(version, "vllm/config/vllm.py", "VllmConfig")
    assert fields(config) >= {"scheduler_config", "cache_config", "model_config", "structured_outputs_config"}


@both
def test_an_output_has_the_name_that_was_given_and_so_has_a_request_that_is_taken_back(version: str) -> None:
    """Inside vLLM a name gets a random end; outside it is what it was."""
    assert "request.external_req_id = request.request_id" in source(version, "vllm/v1/engine/input_processor.py")
    text = source(version, OUTPUTS)
    assert "request_id=external_req_id,  # request_id is what was provided externally" in text
    assert "self.external_req_ids.pop(request_id, [])" in text  # of abort_request, where `internal` is not given
    assert "self.output_processor.abort_requests(request_ids, internal)" in source(version, LLM_ENGINE)
    given = methods(class_in(version, "vllm/outputs.py", "RequestOutput"))["__init__"]
    assert given >= {"request_id", "outputs", "finished"}
    assert fields(class_in(version, "vllm/outputs.py", "CompletionOutput")) >= {"token_ids", "logprobs"}


@both
def test_a_request_gives_its_tokens_at_the_end_or_as_they_come(version: str) -> None:
    text = source(version, OUTPUTS)
    assert "if not finished and final_only:" in text
    assert "delta = self.output_kind == RequestOutputKind.DELTA" in text
    assert "logprobs = logprobs[-" in text  # of a delta: those of its own tokens


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
