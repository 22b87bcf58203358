"""A W&B server for the tests of tracking."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from tracking.laid_runs import Put, put_on
from tracking.public_stub import PublicStub
from tracking.wandb_stub import KEY, wandb_stub


@pytest.fixture
def server(here: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[PublicStub]:
    """A stub that W&B's client takes for its server; nothing of the login stays behind."""
    import wandb

    with wandb_stub(PublicStub) as stub:
        monkeypatch.delenv("WANDB_MODE")
        monkeypatch.setenv("WANDB_BASE_URL", stub.url)
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        monkeypatch.setenv("NETRC", str(here / "no netrc"))
        wandb.teardown()  # the settings that another test's environment gave
        try:
            yield stub
        finally:
            wandb.teardown()


@pytest.fixture
def put(server: PublicStub) -> Put:
    """A function that lays the W&B run of a stage on the server."""
    return put_on(server)
