"""The run that `wandb agent` gave to this process.

An agent names one run for a command, in the environment, and W&B's client then takes every run that
the process opens for that one. A recipe opens a run a stage: one of them is the agent's, and the
client must not know of the agent while it opens the others.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

SWEEP, RUN, VALUES = "WANDB_SWEEP_ID", "WANDB_RUN_ID", "WANDB_SWEEP_PARAM_PATH"


@dataclass(frozen=True)
class Agent:
    """What an agent said.

    Attributes:
        sweep: id of the sweep.
        run: id of the run that is to bring its metric.
    """

    sweep: str
    run: str

    @contextmanager
    def unknown(self) -> Iterator[None]:
        """Within the block W&B's client knows nothing of the agent; it reads this but once."""
        import wandb

        said = {name: os.environ.pop(name) for name in (SWEEP, RUN, VALUES) if name in os.environ}
        wandb.teardown()
        try:
            yield
        finally:
            os.environ |= said
            wandb.teardown()


def agent_of_this_process() -> Agent | None:
    """Return the agent that started this process, if one did."""
    sweep, run = os.environ.get(SWEEP), os.environ.get(RUN)
    return Agent(sweep, run) if sweep and run else None
