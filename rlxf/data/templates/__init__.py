"""Chat templates by name (`--prompt-type`): Jinja for `tokenizer.apply_chat_template`, and the tokens that end a turn.

Each `.jinja` file of this folder is a template; its name is the template's. A saved tokenizer holds the whole text, so
a file includes no other one.

The names and texts are those of MindSpeed-LLM's table, so that its commands keep their meaning. Three entries follow
the model's own public template where that table does not: gemma ends every turn with ``<end_of_turn>``, hunyuan has
its separators, and the answers of llama2, mistral and mixtral begin with the space that their tokenizers put there.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rlxf.core.errors import ConfigError
from rlxf.core.words import nearest

_FOLDER = Path(__file__).parent
TEMPLATE_NAMES = tuple(sorted([*(file.stem for file in _FOLDER.glob("*.jinja")), "default"]))

# The tokens that end a turn besides the tokenizer's EOS; a template that is not here writes none.
EOS_TOKENS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("chatml", "chatml_de", "intern2", "qwen", "qwen_math_r1", "qwen_r1"), ("<|im_end|>",)),
    **dict.fromkeys(("chatglm3", "chatglm3_system", "glm4"), ("<|user|>", "<|observation|>")),
    "gemma": ("<end_of_turn>",),
    "hunyuan": ("<|eos|>",),
    "llama3": ("<|eot_id|>",),
}


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
    return Template(name, (_FOLDER / f"{name}.jinja").read_text(encoding="utf-8"), EOS_TOKENS.get(name, ()))
