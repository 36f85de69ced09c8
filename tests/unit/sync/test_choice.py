"""Which transport a placement gets, and what is said of it."""

from __future__ import annotations

import re

import pytest

from rlxf.config.kinds import TransportName
from rlxf.core.errors import ConfigError
from rlxf.platform import Platform, get_platform
from rlxf.sync.transports import Places, Where, choose
from tests.device_twin import TwinPlatform


def places(actor: str, engines: str) -> Places:
    """``a0 b1``: device 0 of machine a, device 1 of machine b; ``a``: an unknown one of a."""
    ends = [tuple(Where(word[0], word[1:] or None) for word in text.split()) for text in (actor, engines)]
    return Places(actor=ends[0], engines=ends[1])


CPU, DEVICE = get_platform("cpu"), TwinPlatform()


@pytest.mark.parametrize(
    ("platform", "actor", "engines", "expected", "why"),
    [
        (CPU, "a a", "a", "shared_memory", "actor and engines are on one machine"),
        (CPU, "a", "b", "collective", "different devices or machines; not shared_memory: .* several machines"),
        (CPU, "a", "a b", "collective", "several machines"),
        (DEVICE, "a0 a1", "a0 a1", "ipc", "every engine is on a device of the actor"),
        (DEVICE, "a0 a1", "a1", "ipc", "every engine"),
        (DEVICE, "a0 a1", "a2 a3", "collective", "not ipc: an engine is on device 2, where no rank of the actor is"),
        (DEVICE, "a0 a1", "b0 b1", "collective", "not ipc: an engine is on device 0"),
        (DEVICE, "a0 a1", "a1 a2", "collective", "not ipc: an engine is on device 2"),
        (DEVICE, "a0 a1", "a0 a2", "shared_memory", "not collective: an engine is on device 0, where .* rank 0 is"),
        (DEVICE, "a0 a1", "a2 a2", "shared_memory", "two engines share a device"),
        (DEVICE, "a0 a1", "a0 b0", "object_store", "nothing faster works; not ipc.*not collective.*not shared_memory"),
        (DEVICE, "a a", "a", "shared_memory", "not ipc: it is not known which devices"),
        (DEVICE, "a", "b", "object_store", "not collective: it is not known which devices"),
    ],
)
def test_auto_is_the_best_that_works(platform: Platform, actor: str, engines: str, expected: str, why: str) -> None:
    choice = choose("auto", platform, places(actor, engines))
    assert choice.name == expected
    assert re.search(why, choice.why), choice.why


@pytest.mark.parametrize("name", ["shared_memory", "collective", "object_store"])
def test_a_wish_that_can_be_met_is_met(name: TransportName) -> None:
    assert choose(name, CPU, places("a", "a")).name == name


@pytest.mark.parametrize(
    ("name", "platform", "actor", "engines", "message"),
    [
        ("ipc", CPU, "a", "a", "sync.transport = ipc: a cpu has no memory .*auto, which would be shared_memory here"),
        ("ipc", DEVICE, "a0", "a1", "ipc: an engine is on device 1.*auto, which would be collective here"),
        ("collective", DEVICE, "a0", "a0", "collective: an engine is on device 0.*would be ipc here"),
        ("shared_memory", CPU, "a", "b", "shared_memory: actor and engines are on several machines.*collective"),
    ],
)
def test_a_wish_that_cannot_be_met_is_an_error(
    name: TransportName, platform: Platform, actor: str, engines: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        choose(name, platform, places(actor, engines))
