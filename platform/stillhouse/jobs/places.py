"""Where a job writes: the folder that its key `to` names, looked at before the work begins."""

from pathlib import Path

from stillhouse.errors import UserError


def output_folder(given: str) -> Path:
    """Return the folder that `to` names, which need not be there yet.

    Raises:
        UserError: when a file lies in its way.
    """
    to = Path(given).expanduser()
    nearest = next(place for place in (to, *to.parents) if place.exists())
    if not nearest.is_dir():
        raise UserError(f"to={given}: {nearest} is a file; choose another folder with to=<folder>")
    return to


def new_folder(given: str) -> Path:
    """Return the folder that `to` names, for what is moved there as a whole.

    Raises:
        UserError: when it holds something, or is the present folder, which a move would replace.
    """
    to = output_folder(given)
    if to.is_symlink() or (to.exists() and (any(to.iterdir()) or to.samefile(Path.cwd()))):
        raise UserError(
            f"to={given}: there is something already; expected a folder that is new or empty; "
            "choose another with to=<folder>"
        )
    return to
