"""Which stage of which step runs when: sampling may run ahead of training by a fixed number of steps."""

from rlxf.schedule.lanes import InThreads, Lanes, OneAfterTheOther
from rlxf.schedule.lookahead import Lookahead, Stage
from rlxf.schedule.parts import Parts

__all__ = ["InThreads", "Lanes", "Lookahead", "OneAfterTheOther", "Parts", "Stage"]
