"""What looks like a secret never reaches the page. Texts of the data are not searched: they are what the page shows."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

MASKED = "*****"
# Words of a key's name. Numbers under the first ones are counts, such as `max_tokens`.
_MAYBE = {"key", "keys", "token", "tokens", "auth", "cookie", "apikey"}
_ALWAYS = {"password", "passwords", "passwd", "passphrase", "secret", "secrets", "credential", "credentials"}
_ALWAYS |= {"authorization", "bearer"}
# Keys of the recipe that name columns of the data or words of the tokenizer.
_PLAIN = {"prompt_key", "chosen_key", "rejected_key", "margin_key", "map_keys", "eos_tokens"}
_WORD = re.compile(r"[A-Z]?[a-z0-9]+|[A-Z]+(?![a-z])")
_USER = re.compile(r"(?<=://)[^/\s@\"']+(?=@)")
_QUERY = re.compile(r"([a-zA-Z][\w+.-]*://[^\s?#\"']*[?#])[^\s\"']+")
_BEARER = re.compile(r"(?i)\b(bearer|basic) +[\w.~+/=-]{6,}")
_OPTION = re.compile(r"""(?<![\w.-])(--[\w-]+(?:=| +)|[\w.+~\[\]-]+=)("[^"]*"|'[^']*'|[^\s,}\]]+)""")
_LONG_ENOUGH = 8  # characters of a secret that is also searched in other texts: shorter ones may be usual words


def is_secret(name: str, value: object = "") -> bool:
    """Whether the value under a key of this name is masked."""
    if name in _PLAIN or name.lower().endswith("_env") or value is None or isinstance(value, bool):
        return False
    words = {word.lower() for word in _WORD.findall(name)}
    if words & _ALWAYS:
        return True
    return bool(words & _MAYBE) and not isinstance(value, int | float)


class Mask:
    """Masks what looks like a secret in the texts of a run, and wherever a masked value of its recipe occurs again."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        found = {text for text in _secrets(config) if len(text) >= _LONG_ENOUGH}
        self._known = sorted(found, key=len, reverse=True)

    def text(self, text: str) -> str:
        """A text without secrets of the recipe, users and passwords of addresses, and their queries."""
        for secret in self._known:
            text = text.replace(secret, MASKED)
        text = _BEARER.sub(rf"\1 {MASKED}", text)
        return _QUERY.sub(rf"\1{MASKED}", _USER.sub(MASKED, text))

    def command(self, text: str) -> str:
        """A command line; values of options and overrides with the name of a secret are masked as well."""
        return self.text(_OPTION.sub(_masked_option, text))

    def data(self, value: Any) -> Any:
        """The same data without secrets, at any depth."""
        if isinstance(value, Mapping):
            return {
                self.text(str(key)): _masked(item) if is_secret(str(key), item) else self.data(item)
                for key, item in value.items()
            }
        if isinstance(value, list | tuple):
            return [self.data(item) for item in value]
        return self.text(value) if isinstance(value, str) else value


def _masked(value: Any) -> Any:
    """The shape of a masked value: a list stays a list, nothing stays nothing."""
    if isinstance(value, Mapping):
        return {key: _masked(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_masked(item) for item in value]
    return MASKED if value not in (None, "") and not isinstance(value, bool) else value


def _masked_option(match: re.Match[str]) -> str:
    given, value = match.groups()
    name = given.rstrip("= ").rpartition(".")[2].strip("+~-").replace("-", "_")
    return f"{given}{MASKED}" if is_secret(name, _as_number(value)) else match[0]


def _as_number(text: str) -> object:
    try:
        return float(text)
    except ValueError:
        return None if text in ("null", "true", "false") else text


def _secrets(value: Any, *, secret: bool = False) -> Iterator[str]:
    """Every text under a key that is masked, and the passwords in addresses."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _secrets(item, secret=secret or is_secret(str(key), item))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _secrets(item, secret=secret)
    elif secret and value is not None and not isinstance(value, bool):
        yield str(value)
    elif isinstance(value, str):
        yield from (user.rpartition(":")[2] for user in _USER.findall(value) if ":" in user)
