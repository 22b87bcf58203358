"""What the tests of files of one's own need."""

from pathlib import Path

import pytest


@pytest.fixture
def own_folder(here: Path) -> None:
    """The present folder, with a file for the parts of a corpus that are of no matter."""
    Path("held.txt").write_text("held out")
