"""Secrets do not reach the page."""

from __future__ import annotations

import pytest

from rlxf.report.mask import MASKED, Mask, is_secret
from tests.unit.config.recipes import compose


@pytest.mark.parametrize(
    "name",
    [
        *("api_key", "apiKey", "openai_api_key", "API_KEY", "ssh-key", "token", "hf_token", "password", "db_password"),
        *("secret", "client_secret", "credentials", "Authorization", "passphrase"),
    ],
)
def test_names_of_secrets_are_known(name: str) -> None:
    assert is_secret(name, "abc")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens_per_micro_batch", 4096),
        ("overlong_tokens", 0),
        ("token_env", "OPENAI_API_KEY"),
        ("tokenizer_name_or_path", "models/x"),
        ("prompt_key", "prompt"),
        ("eos_tokens", ["</s>"]),
        ("monkey", "business"),
        ("keypoints", "x"),
        ("api_key", None),
        ("has_token", False),
    ],
)
def test_other_names_are_not_masked(name: str, value: object) -> None:
    assert not is_secret(name, value)


def test_data_is_masked_at_any_depth() -> None:
    config = {
        "judge": {"base_url": "https://user:hunter2hunter2@host/v1?sig=abcdef#x", "headers": {"api_key": "sk-123"}},
        "list": [{"password": 12345}, {"keys": ["one-secret", "two-secret"]}],
        "max_tokens": 5,
        "secrets": {"a": "inner-secret"},
    }
    masked = Mask(config).data(config)
    assert masked["judge"] == {"base_url": f"https://{MASKED}@host/v1?{MASKED}", "headers": {"api_key": MASKED}}
    assert masked["list"] == [{"password": MASKED}, {"keys": [MASKED, MASKED]}]
    assert masked["max_tokens"] == 5
    assert "inner-secret" not in str(masked)


def test_a_masked_value_is_masked_wherever_it_occurs_again() -> None:
    mask = Mask({"judge": {"api_key": "sk-0123456789"}, "url": "http://me:longpassword@host/"})
    assert mask.text("401: sk-0123456789 is not known") == f"401: {MASKED} is not known"
    assert mask.text("longpassword was refused") == f"{MASKED} was refused"
    assert mask.text("Authorization: Bearer abcdef123456") == f"Authorization: Bearer {MASKED}"


def test_commands_are_masked() -> None:
    mask = Mask({})
    assert mask.command("run judge.api_key=abc lr=1 +x.password='a b' actor.max_tokens=7") == (
        f"run judge.api_key={MASKED} lr=1 +x.password={MASKED} actor.max_tokens=7"
    )
    assert mask.command("tool --hf-token abc --tokens 5 file") == f"tool --hf-token {MASKED} --tokens 5 file"
    assert mask.command("judge.token_env=OPENAI_API_KEY") == "judge.token_env=OPENAI_API_KEY"


def test_nothing_of_a_usual_recipe_is_masked() -> None:
    for name in ("online_dpo_trainer_tiny_rewards", "online_dpo_trainer_tiny_judge", "offline_dpo_trainer_llama3_8b"):
        config = compose(name)
        assert MASKED not in str(Mask(config).data(config))
