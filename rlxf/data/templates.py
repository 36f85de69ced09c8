"""Chat templates by name (`--prompt-type`): Jinja for `tokenizer.apply_chat_template`, and the tokens that end a turn.

The names and texts are those of MindSpeed-LLM's table, so that its commands keep their meaning. Three entries follow
the model's own public template where that table does not: gemma ends every turn with ``<end_of_turn>``, hunyuan has
its separators, and the answers of llama2, mistral and mixtral begin with the space that their tokenizers put there.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from functools import lru_cache

from rlxf.core.errors import ConfigError
from rlxf.core.words import nearest


@dataclass(frozen=True, slots=True)
class Template:
    """How messages become one text."""

    name: str
    jinja: str | None  # what `apply_chat_template(chat_template=...)` takes; None: the tokenizer's own
    eos_tokens: tuple[str, ...]  # tokens that end a completion besides the tokenizer's EOS


def chat_template(name: str) -> Template:
    """The template of that name.

    Its Jinja takes `add_generation_prompt`, marks the assistant's text with `{% generation %}` and refuses messages
    that it cannot write. A rendered conversation is the beginning of the same conversation with another turn; of
    chatglm2, chatglm3, chatglm3_system, glm4 and baichuan2 without the EOS, which they write once, at the very end.

    Raises:
        ConfigError: no template has this name.
    """
    if name not in TEMPLATE_NAMES:
        known = ", ".join(TEMPLATE_NAMES)
        close = nearest(name, TEMPLATE_NAMES)
        hint = f' Did you mean "{close}"?' if close else ""
        raise ConfigError(f'"{name}" is not the name of a chat template.{hint} Known: {known}.')
    if name == "default":
        return Template(name, None, ())
    return Template(name, _jinja(name), _PARTS[name].eos_tokens)


@dataclass(frozen=True, slots=True)
class _Parts:
    """The texts around the messages; ``{content}``, ``{bos}``, ``{eos}``, ``{system}`` and ``{turn}`` are filled in."""

    user: str
    header: str = ""  # opens an assistant's turn: what add_generation_prompt adds
    assistant: str = "{content}{eos}"
    system: str = "{content}"  # goes before the first turn, or where the user's text says {system}
    observation: str | None = None  # what a tool answered; None: written like a user's turn
    prefix: str = ""
    separator: str = ""  # before every user's turn but the first
    closing: str = ""  # after an assistant's turn that ends the conversation
    default_system: str = ""
    eos_tokens: tuple[str, ...] = ()


def _chatml(prompt: str = "{content}", system: str = "") -> _Parts:
    return _Parts(
        user=f"<|im_start|>user\n{prompt}<|im_end|>\n",
        header="<|im_start|>assistant\n",
        assistant="{content}<|im_end|>",
        system="<|im_start|>system\n{content}<|im_end|>\n",
        observation="<|im_start|>tool\n{content}<|im_end|>\n",
        separator="\n",
        default_system=system,
        eos_tokens=("<|im_end|>",),
    )


def _glm(prefix: str, *, system: str = "<|system|>\n{content}", default_system: str = "") -> _Parts:
    return _Parts(
        user="<|user|>\n{content}",
        header="<|assistant|>",
        assistant="\n{content}",
        system=system,
        observation="<|observation|>\n{content}",
        prefix=prefix,
        closing="{eos}",
        default_system=default_system,
        eos_tokens=("<|user|>", "<|observation|>"),
    )


_HELPFUL = "You are a helpful assistant."
_DEEPSEEK2 = _Parts(user="User: {content}\n\n", header="Assistant:", system="{content}\n\n", prefix="{bos}")
_MISTRAL = _Parts(user="[INST] {content} [/INST]", assistant=" {content}{eos}", prefix="{bos}")
_R1 = (  # the two backslashes are those of the original table
    "A conversation between User and Assistant. The user asks a question, and the Assistant solves it. The assistant "
    "first thinks about the reasoning process in the mind and then provides the user with the answer. The reasoning "
    "process and answer are enclosed within <think> </think> and <answer> </answer> tags, respectively, i.e., <think> "
    "reasoning process here </think><answer> answer here </answer>Put your final answer within \\\\boxed{}. {content}"
)
_PARTS: dict[str, _Parts] = {
    "alpaca": _Parts(
        user="### Instruction:\n{content}\n\n",
        header="### Response:\n",
        separator="\n\n",
        default_system="Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.\n\n",
    ),
    "baichuan2": _Parts(
        user="<reserved_106>{content}", header="<reserved_107>", assistant="{content}", closing="{eos}"
    ),
    "chatglm2": _Parts(
        user="[Round {turn}]\n\n问：{content}\n\n",
        header="答：",
        assistant="{content}",
        prefix="[gMASK]sop",
        separator="\n\n",
        closing="{eos}",
    ),
    "chatglm3": _glm("[gMASK]sop"),
    "chatglm3_system": _glm(
        "",
        system="[gMASK]sop<|system|>\n{content}",
        default_system="You are ChatGLM3, a large language model trained by Zhipu.AI. "
        "Follow the user's instructions carefully. Respond using markdown.",
    ),
    "chatml": _chatml(),
    "chatml_de": _chatml(system="Du bist ein freundlicher und hilfsbereiter KI-Assistent."),
    "cpm": _Parts(user="<用户>{content}", header="<AI>", prefix="{bos}"),
    "deepseek2": _DEEPSEEK2,
    "deepseek2-lite": _DEEPSEEK2,
    "deepseek3": _Parts(user="<｜User｜>{content}", header="<｜Assistant｜>", prefix="{bos}"),
    "empty": _Parts(user="{content}", assistant="{content}"),
    "gemma": _Parts(
        user="<start_of_turn>user\n{system}{content}<end_of_turn>\n",
        header="<start_of_turn>model\n",
        assistant="{content}<end_of_turn>",
        system="{content}\n\n",  # it has no system role: the text goes before the first question
        observation="<start_of_turn>tool\n{content}<end_of_turn>\n",
        prefix="{bos}",
        separator="\n",
        eos_tokens=("<end_of_turn>",),
    ),
    "glm4": _glm("[gMASK]<sop>"),
    "hunyuan": _Parts(
        user="{content}<|extra_0|>",
        assistant="{content}<|eos|>",
        system="{content}<|extra_4|>",
        prefix="<|startoftext|>",
        default_system=_HELPFUL,
        eos_tokens=("<|eos|>",),
    ),
    "intern2": replace(_chatml(), prefix="{bos}"),
    "llama2": _Parts(
        user="{bos}[INST] {system}{content} [/INST]",
        assistant=" {content}{eos}",
        system="<<SYS>>\n{content}\n<</SYS>>\n\n",
    ),
    "llama3": _Parts(
        user="<|start_header_id|>user<|end_header_id|>\n\n{content}<|eot_id|>",
        header="<|start_header_id|>assistant<|end_header_id|>\n\n",
        assistant="{content}<|eot_id|>",
        system="<|start_header_id|>system<|end_header_id|>\n\n{content}<|eot_id|>",
        observation="<|start_header_id|>tool<|end_header_id|>\n\n{content}<|eot_id|>",
        prefix="{bos}",
        eos_tokens=("<|eot_id|>",),
    ),
    "minicpm3": _DEEPSEEK2,
    "mistral": _MISTRAL,
    "mixtral": _MISTRAL,
    "qwen": _chatml(system=_HELPFUL),
    "qwen_math_r1": _chatml(system="Please reason step by step, and put your final answer within \\boxed{}."),
    "qwen_r1": _chatml(_R1, system=_HELPFUL),
    "trl": _Parts(user="{content}", assistant="{content}", prefix="{bos}"),
}
TEMPLATE_NAMES = tuple(sorted([*_PARTS, "default"]))

_SLOTS = {
    "content": "message['content']",
    "bos": "bos_token",
    "eos": "eos_token",
    "turn": "loop.index0 // 2",
}
_SLOT = re.compile(r"\{(content|bos|eos|system|turn)\}")


@lru_cache
def _jinja(name: str) -> str:
    parts = _PARTS[name]
    in_user = "{system}" in parts.user
    separator = f"{{% if not loop.first %}}{_text(parts.separator)}{{% endif %}}"
    observation = parts.user if parts.observation is None else parts.observation
    system = f"{{% if system %}}{_text(parts.system, 'system')}{{% endif %}}"
    user = _text(parts.user, system=f"{{% if loop.first %}}{system}{{% endif %}}")
    return (
        "{% set first = 1 if messages[0]['role'] == 'system' else 0 %}"
        f"{{% set system = (messages[0]['content'] if first else '') or {json.dumps(parts.default_system)} %}}"
        f"{_text(parts.prefix)}{'' if in_user else system}"
        "{% for message in messages[first:] %}"
        "{% if message['role'] == 'user' %}"
        f"{separator}{user}"
        "{% elif message['role'] == 'assistant' %}"
        f"{_text(parts.header)}{{% generation %}}{_text(parts.assistant)}{{% endgeneration %}}"
        "{% elif message['role'] in ['tool', 'observation'] %}"
        f"{separator}{_text(observation)}"
        "{% else %}"
        f"{{{{ raise_exception('the chat template {name} has no place for role ' ~ message['role'] ~ ' here') }}}}"
        "{% endif %}{% endfor %}"
        f"{_closing(parts.closing)}"
        f"{{% if add_generation_prompt %}}{_text(parts.header)}{{% endif %}}"
    )


def _closing(text: str) -> str:
    if not text:
        return ""
    ends = "{% if messages[-1]['role'] == 'assistant' and not add_generation_prompt %}"
    return f"{ends}{{% generation %}}{_text(text)}{{% endgeneration %}}{{% endif %}}"


def _text(text: str, content: str | None = None, *, system: str = "") -> str:
    """A text with slots as Jinja. Everything is an expression: Jinja drops line ends that follow a block."""
    slots = _SLOTS if content is None else _SLOTS | {"content": content}
    pieces = []
    for index, piece in enumerate(_SLOT.split(text)):
        if index % 2:
            pieces.append(system if piece == "system" else f"{{{{ {slots[piece]} }}}}")
        elif piece:
            pieces.append(f"{{{{ {json.dumps(piece)} }}}}")
    return "".join(pieces)
