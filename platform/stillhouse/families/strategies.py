"""How ranks share the weights of networks: what `trainer=fsdp` builds."""

from typing import Any

from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict


class FullyShardedStrategy(ModelParallelStrategy):
    """Lightning's FSDP2 strategy, of data parallelism alone.

    A checkpoint is one file with whole tensors of what learns: a run of the same number of
    processes goes on from it.

    Args:
        data_parallel_size: processes that share the weights, all of them.
        shard_teacher: whether they share the teacher's as well, or each has all of them.
        process_group_backend: of torch; None for gloo on CPUs and nccl on GPUs.
    """

    def __init__(
        self,
        *,
        data_parallel_size: int,
        shard_teacher: bool = False,
        process_group_backend: str | None = None,
    ) -> None:
        super().__init__(
            data_parallel_size=data_parallel_size,
            tensor_parallel_size=1,
            save_distributed_checkpoint=False,
            process_group_backend=process_group_backend,
        )
        self.shard_teacher = shard_teacher

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Gather what learns: a teacher that ranks share would fill the memory of the first."""
        assert self.model is not None
        options = StateDictOptions(
            full_state_dict=True, cpu_offload=True, ignore_frozen_params=True
        )
        return get_model_state_dict(self.model, options=options)
