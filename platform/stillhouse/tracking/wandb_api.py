"""The door to W&B's public API: who may enter, and what to say when it stays shut."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from stillhouse.errors import UserError

REJECTED = (401, 403)


def open_api(asked: str) -> Any:
    """Return a `wandb.Api` whose key the server has accepted.

    Args:
        asked: key and value that W&B is needed for, as the user gave them.

    Raises:
        UserError: without an API key, offline, or when the server refuses or does not answer.
    """
    import wandb

    mode = wandb.setup(wandb.Settings(silent=True)).settings.mode
    if mode in ("offline", "disabled"):
        raise UserError(
            f"{asked}: W&B is {mode} here (WANDB_MODE, or `wandb {mode}`), and this asks its "
            "server; set the variable for this command: WANDB_MODE=online python run.py …"
        )
    # Without a key, `wandb.Api` would ask for one on a terminal.
    if not wandb.login(prompt=False, verify=False):
        raise UserError(
            f"{asked}: there is no W&B API key; log in with `wandb login`, or set WANDB_API_KEY"
        )
    with told(asked):
        return wandb.Api()


def runs_of(api: Any, asked: str, project: str, **query: Any) -> Any:
    """Return W&B runs of a project, `<entity>/<project>`, the oldest first, the first page read.

    Raises:
        UserError: when there is no such project, or it is not the key's to read.
    """
    import wandb

    found = api.runs(project, **query)
    try:
        len(found)
    except ValueError as error:
        if "find project" not in str(error):
            raise
        raise UserError(
            f"{asked}: {wandb.setup().settings.base_url} has no project {project} that this API "
            "key may read; its address at W&B begins with entity and project"
        ) from error
    return found


@contextmanager
def told(asked: str) -> Iterator[None]:
    """Tell in one line what W&B's client raises within the block."""
    import wandb
    from wandb.sdk.lib.service.service_connection import WandbApiFailedError

    try:
        yield
    except (wandb.Error, WandbApiFailedError) as error:
        failed = error if isinstance(error, WandbApiFailedError) else error.__cause__
        server = wandb.setup().settings.base_url
        if not isinstance(failed, WandbApiFailedError):
            raise UserError(f"{asked}: W&B's client says: {error}") from error
        if failed.response is None:
            raise UserError(
                f"{asked}: the W&B server {server} does not answer; look at the network, and at "
                "WANDB_BASE_URL if it is a server of your own"
            ) from error
        if failed.response.http_status in REJECTED:
            raise UserError(
                f"{asked}: {server} does not accept the API key; log in anew with "
                "`wandb login --relogin`, or set another WANDB_API_KEY"
            ) from error
        raise UserError(f"{asked}: {server} answers: {failed.response.message}") from error
