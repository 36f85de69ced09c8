"""The tests here import the megatron package at their top; on a CPU its bridge must be there first."""

from __future__ import annotations

from rlxf.platform import get_platform

get_platform("cpu").prepare_megatron()
