"""What each named chat template writes; the expected texts are the public definitions of the templates."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import jinja2
import pytest
from transformers import PreTrainedTokenizerFast

from rlxf.core.errors import ConfigError
from rlxf.core.types import Messages
from rlxf.data.templates import EOS_TOKENS, TEMPLATE_NAMES, chat_template
from tests.data_world import chat_tokenizer

CHAT: Messages = [
    {"role": "system", "content": "S"},
    {"role": "user", "content": "Q1"},
    {"role": "assistant", "content": "A1"},
    {"role": "user", "content": "Q2"},
    {"role": "assistant", "content": "A2"},
]
QUESTION: Messages = [{"role": "user", "content": "Q"}]
WRITE_EOS_ONCE = {"chatglm2", "chatglm3", "chatglm3_system", "glm4", "baichuan2"}

GLM_SYSTEM = (
    "You are ChatGLM3, a large language model trained by Zhipu.AI. Follow the user's instructions carefully. "
    "Respond using markdown."
)
R1 = (
    "A conversation between User and Assistant. The user asks a question, and the Assistant solves it. The assistant "
    "first thinks about the reasoning process in the mind and then provides the user with the answer. The reasoning "
    "process and answer are enclosed within <think> </think> and <answer> </answer> tags, respectively, i.e., <think> "
    "reasoning process here </think><answer> answer here </answer>Put your final answer within "
) + r"\\boxed{}. "
ALPACA = "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
CHATML = (
    "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQ1<|im_end|>\n<|im_start|>assistant\nA1<|im_end|>\n"
    "<|im_start|>user\nQ2<|im_end|>\n<|im_start|>assistant\nA2<|im_end|>"
)
CHATML_Q = "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n"
USER_ASSISTANT = "<s>S\n\nUser: Q1\n\nAssistant:A1</s>User: Q2\n\nAssistant:A2</s>", "<s>User: Q\n\nAssistant:"
MISTRAL = "<s>S[INST] Q1 [/INST] A1</s>[INST] Q2 [/INST] A2</s>", "<s>[INST] Q [/INST]"

# The whole of CHAT, and QUESTION with the opening of the answer; <s> and </s> are the tokenizer's BOS and EOS.
GOLDEN: dict[str, tuple[str, str]] = {
    "alpaca": (
        "S### Instruction:\nQ1\n\n### Response:\nA1</s>\n\n### Instruction:\nQ2\n\n### Response:\nA2</s>",
        ALPACA + "### Instruction:\nQ\n\n### Response:\n",
    ),
    "baichuan2": (
        "S<reserved_106>Q1<reserved_107>A1<reserved_106>Q2<reserved_107>A2</s>",
        "<reserved_106>Q<reserved_107>",
    ),
    "chatglm2": (
        "[gMASK]sopS[Round 0]\n\n问：Q1\n\n答：A1\n\n[Round 1]\n\n问：Q2\n\n答：A2</s>",
        "[gMASK]sop[Round 0]\n\n问：Q\n\n答：",
    ),
    "chatglm3": (
        "[gMASK]sop<|system|>\nS<|user|>\nQ1<|assistant|>\nA1<|user|>\nQ2<|assistant|>\nA2</s>",
        "[gMASK]sop<|user|>\nQ<|assistant|>",
    ),
    "chatglm3_system": (
        "[gMASK]sop<|system|>\nS<|user|>\nQ1<|assistant|>\nA1<|user|>\nQ2<|assistant|>\nA2</s>",
        f"[gMASK]sop<|system|>\n{GLM_SYSTEM}<|user|>\nQ<|assistant|>",
    ),
    "chatml": (CHATML, CHATML_Q),
    "chatml_de": (
        CHATML,
        "<|im_start|>system\nDu bist ein freundlicher und hilfsbereiter KI-Assistent.<|im_end|>\n" + CHATML_Q,
    ),
    "cpm": ("<s>S<用户>Q1<AI>A1</s><用户>Q2<AI>A2</s>", "<s><用户>Q<AI>"),
    "deepseek2": USER_ASSISTANT,
    "deepseek2-lite": USER_ASSISTANT,
    "deepseek3": (
        "<s>S<｜User｜>Q1<｜Assistant｜>A1</s><｜User｜>Q2<｜Assistant｜>A2</s>",
        "<s><｜User｜>Q<｜Assistant｜>",
    ),
    "empty": ("SQ1A1Q2A2", "Q"),
    "gemma": (
        "<s><start_of_turn>user\nS\n\nQ1<end_of_turn>\n<start_of_turn>model\nA1<end_of_turn>\n"
        "<start_of_turn>user\nQ2<end_of_turn>\n<start_of_turn>model\nA2<end_of_turn>",
        "<s><start_of_turn>user\nQ<end_of_turn>\n<start_of_turn>model\n",
    ),
    "glm4": (
        "[gMASK]<sop><|system|>\nS<|user|>\nQ1<|assistant|>\nA1<|user|>\nQ2<|assistant|>\nA2</s>",
        "[gMASK]<sop><|user|>\nQ<|assistant|>",
    ),
    "hunyuan": (
        "<|startoftext|>S<|extra_4|>Q1<|extra_0|>A1<|eos|>Q2<|extra_0|>A2<|eos|>",
        "<|startoftext|>You are a helpful assistant.<|extra_4|>Q<|extra_0|>",
    ),
    "intern2": ("<s>" + CHATML, "<s>" + CHATML_Q),
    "llama2": (
        "<s>[INST] <<SYS>>\nS\n<</SYS>>\n\nQ1 [/INST] A1</s><s>[INST] Q2 [/INST] A2</s>",
        "<s>[INST] Q [/INST]",
    ),
    "llama3": (
        "<s><|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nQ1<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nA1<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nQ2<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nA2<|eot_id|>",
        "<s><|start_header_id|>user<|end_header_id|>\n\nQ<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
    "minicpm3": USER_ASSISTANT,
    "mistral": MISTRAL,
    "mixtral": MISTRAL,
    "qwen": (CHATML, "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n" + CHATML_Q),
    "qwen_math_r1": (
        CHATML,
        "<|im_start|>system\nPlease reason step by step, and put your final answer within \\boxed{}.<|im_end|>\n"
        + CHATML_Q,
    ),
    "qwen_r1": (
        CHATML.replace("user\n", "user\n" + R1),
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n" + CHATML_Q.replace("user\n", "user\n" + R1),
    ),
    "trl": ("<s>SQ1A1Q2A2", "<s>Q"),
}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return chat_tokenizer()


def render(tokenizer: PreTrainedTokenizerFast, name: str, messages: Messages, **options: bool) -> str:
    text: Any = tokenizer.apply_chat_template(
        messages, tokenize=False, chat_template=chat_template(name).jinja, **options
    )
    assert isinstance(text, str)
    return text


def test_every_name_has_its_expected_text() -> None:
    assert set(GOLDEN) == set(TEMPLATE_NAMES) - {"default"}
    assert len(TEMPLATE_NAMES) == 26


def test_the_page_lists_every_name() -> None:
    page = (Path(__file__).parents[3] / "docs" / "preprocessing.md").read_text()
    listed = re.search(r"Jinja file in `rlxf/data/templates`: ([^.]+)\.", page)
    assert listed is not None
    assert tuple(re.split(r",\s", listed[1])) == TEMPLATE_NAMES


@pytest.mark.parametrize("name", GOLDEN)
def test_a_template_writes_system_and_several_turns(name: str, tokenizer: PreTrainedTokenizerFast) -> None:
    assert render(tokenizer, name, CHAT) == GOLDEN[name][0]


@pytest.mark.parametrize("name", GOLDEN)
def test_a_template_opens_the_answer_to_a_question(name: str, tokenizer: PreTrainedTokenizerFast) -> None:
    assert render(tokenizer, name, QUESTION, add_generation_prompt=True) == GOLDEN[name][1]


@pytest.mark.parametrize("name", GOLDEN)
def test_a_conversation_begins_as_it_was_before_its_last_turn(name: str, tokenizer: PreTrainedTokenizerFast) -> None:
    texts = []
    for end in range(2, len(CHAT) + 1):
        texts.append(render(tokenizer, name, CHAT[:end]))
        if CHAT[end - 1]["role"] == "user":
            texts.append(render(tokenizer, name, CHAT[:end], add_generation_prompt=True))
    for before, after in pairwise(texts):
        begin = before.removesuffix("</s>") if name in WRITE_EOS_ONCE else before
        assert after.startswith(begin)


@pytest.mark.parametrize("name", GOLDEN)
def test_what_the_assistant_says_is_marked(name: str, tokenizer: PreTrainedTokenizerFast) -> None:
    encoded: Any = tokenizer.apply_chat_template(
        CHAT,
        chat_template=chat_template(name).jinja,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    said = tokenizer.decode([t for t, m in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if m])
    prompt = render(tokenizer, name, CHAT[:-1], add_generation_prompt=True)
    last = GOLDEN[name][0].removeprefix(prompt)  # the last answer with whatever ends it
    first = last.removesuffix("</s>") if name in WRITE_EOS_ONCE else last
    assert said == first.replace("A2", "A1") + last


@pytest.mark.parametrize("name", GOLDEN)
def test_a_begun_answer_can_be_continued(name: str, tokenizer: PreTrainedTokenizerFast) -> None:
    text = render(tokenizer, name, CHAT, continue_final_message=True)
    assert text.endswith("A2")
    assert GOLDEN[name][0].startswith(text)


def test_the_end_of_a_turn_is_an_eos() -> None:
    assert chat_template("llama3").eos_tokens == ("<|eot_id|>",)
    assert chat_template("qwen").eos_tokens == ("<|im_end|>",)
    assert chat_template("glm4").eos_tokens == ("<|user|>", "<|observation|>")
    assert chat_template("deepseek3").eos_tokens == ()


@pytest.mark.parametrize("name", GOLDEN)
def test_what_stands_behind_an_answer_is_an_eos(name: str) -> None:
    behind = GOLDEN[name][0].rpartition("A2")[2]
    assert behind in ("", "</s>", *chat_template(name).eos_tokens)


def test_eos_tokens_are_those_of_templates_that_write_them() -> None:
    for name, tokens in EOS_TOKENS.items():
        text = chat_template(name).jinja
        assert text is not None
        assert [token for token in tokens if token not in text] == []


def test_default_is_the_tokenizers_own(tokenizer: PreTrainedTokenizerFast) -> None:
    assert chat_template("default").jinja is None
    assert render(tokenizer, "default", QUESTION, add_generation_prompt=True) == "<s>[user]Q</s>[assistant]"


def test_an_empty_system_message_gives_the_default_one(tokenizer: PreTrainedTokenizerFast) -> None:
    messages = [{"role": "system", "content": ""}, *QUESTION]
    assert render(tokenizer, "qwen", messages) == render(tokenizer, "qwen", QUESTION)


def test_an_answer_of_a_tool_has_its_own_turn(tokenizer: PreTrainedTokenizerFast) -> None:
    messages = [*CHAT[1:3], {"role": "tool", "content": "R"}]
    assert render(tokenizer, "chatml", messages).endswith("<|im_end|>\n<|im_start|>tool\nR<|im_end|>\n")
    assert render(tokenizer, "mistral", messages).endswith("</s>[INST] R [/INST]")


@pytest.mark.parametrize("role", ["system", "function_call"])
def test_a_role_that_a_template_cannot_write_is_refused(role: str, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(jinja2.TemplateError, match=f"llama3 has no place for role {role}"):
        render(tokenizer, "llama3", [*QUESTION, {"role": role, "content": "X"}])


def test_braces_and_quotes_of_a_message_stay_as_they_are(tokenizer: PreTrainedTokenizerFast) -> None:
    content = "{{ 1 + 1 }} '\"\\n{content}{eos}{% if %}"
    assert render(tokenizer, "empty", [{"role": "user", "content": content}]) == content


def test_a_wrong_name_is_told_the_nearest() -> None:
    with pytest.raises(
        ConfigError, match=r'"lama3" is not .* Did you mean "llama3"\? Known: alpaca, baichuan2, .*, trl'
    ):
        chat_template("lama3")
