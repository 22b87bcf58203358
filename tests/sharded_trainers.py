"""What ranks share besides the batch, and the strategies of Lightning for it."""

from enum import Enum
from typing import Any

from stillhouse.families.strategies import FullyShardedStrategy


class Sharing(Enum):
    """Whose weights ranks have parts of."""

    NOTHING = "nothing"
    STUDENT = "student"
    TEACHER_TOO = "teacher too"


def strategy_of(devices: int, sharing: Sharing, ddp: str = "ddp") -> Any:
    """Return the strategy of so many ranks; `auto` for one process that shares nothing."""
    if sharing is Sharing.NOTHING:
        return ddp if devices > 1 else "auto"
    return FullyShardedStrategy(
        data_parallel_size=devices, shard_teacher=sharing is Sharing.TEACHER_TOO
    )
