"""What a step trains on, by stage: online DPO samples and scores it, the file stages read it."""

from __future__ import annotations

from rlxf.algorithms.algorithm import Algorithm, with_beta
from rlxf.algorithms.from_file import FromFile, PairsFromFile
from rlxf.algorithms.online_dpo import OnlineDpo
from rlxf.config.kinds import Stage

__all__ = ["ALGORITHMS", "Algorithm", "with_beta"]

ALGORITHMS: dict[Stage, Algorithm] = {
    "ray_online_dpo": OnlineDpo(),
    "dpo": PairsFromFile(),
    "rm": FromFile(),
    "sft": FromFile(),
}
