"""A stand-in for the W&B server that has a sweep too, whose runs W&B's own engine chooses."""

import json
import warnings
from dataclasses import dataclass, field
from typing import Any

import yaml
from tracking.wandb_stub import ENTITY, Json, WandbStub

SWEEP = "sweep0"


@dataclass
class StubSweep:
    """A sweep.

    Attributes:
        config: as the client sent it.
        given: id of a run -> values of its parameters, for those that an agent was told to run.
    """

    config: Json
    given: dict[str, Json] = field(default_factory=dict)


class SweepStub(WandbStub):
    """What `wandb sweep` and `wandb agent` ask of it besides.

    Attributes:
        sweep: the one that there may be.
    """

    sweep: StubSweep | None = None

    def _on_upsert_sweep(self, config: str, projectName: str, **_: Any) -> Json:
        sent = yaml.safe_load(config)
        self.sweep = StubSweep(sent)
        violations = engine().schema_violations_from_proposed_config(sent)
        project = {"id": projectName, "name": projectName, "entity": {"id": ENTITY, "name": ENTITY}}
        answer = {"sweep": {"name": SWEEP, "project": project}}
        return {"upsertSweep": {**answer, "configValidationWarnings": violations}}

    def _on_sweep_with_runs(self, sweep: str, **_: Any) -> Json:
        assert self.sweep is not None
        config = yaml.safe_dump(self.sweep.config)
        return {"project": {"sweep": {"name": sweep, "config": config, "runs": {"edges": []}}}}

    def _on_create_agent(self, **_: Any) -> Json:
        return {"createAgent": {"agent": {"id": "agent"}}}

    def _on_heartbeat(self, runState: str, **_: Any) -> Json:
        """Have W&B's own engine choose the next run, when the one before has ended."""
        assert self.sweep is not None
        commands: list[Json] = []
        if not json.loads(runState):
            ended = [
                engine().SweepRun(
                    config={key: {"value": value} for key, value in values.items()},
                    state="finished",
                    summary_metrics=self.runs[name].summary if name in self.runs else {},
                )
                for name, values in self.sweep.given.items()
            ]
            chosen = engine().next_run(self.sweep.config, ended)
            # As numbers of Python; the engine's are numpy's.
            values = json.loads(json.dumps({k: v["value"] for k, v in chosen.config.items()}))
            name = f"given{len(ended)}"
            self.sweep.given[name] = values
            told = {key: {"value": value} for key, value in values.items()}
            program = self.sweep.config["program"]
            commands = [{"type": "run", "run_id": name, "args": told, "program": program}]
        return {"agentHeartbeat": {"agent": {"id": "agent"}, "commands": json.dumps(commands)}}


def engine() -> Any:
    """Return W&B's own engine of sweeps, with its schema; its words of pydantic 1 warn."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import sweeps
    return sweeps
