"""A page of a comparison as a browser runs it."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from fake_runs import make_fractions, make_word_kd
from report_pages import Element, compare, parse, section

PRESS = """
const heads = [...document.querySelectorAll("table.numbers thead th")];
const rows = () => [...document.querySelectorAll("table.numbers tbody tr")];
const column = heads.findIndex((head) => head.textContent.startsWith("test_nll"));
const values = () => rows().map((row) => row.cells[column].dataset.value);
const button = heads[column].querySelector("button");
button.click();
const up = values();
button.click();
const field = document.querySelector("input[type=search]");
field.value = "student";
field.dispatchEvent(new Event("input"));
document.querySelector("#curves .legend button").click();
document.title = JSON.stringify({
  up, down: values(), order: heads[column].getAttribute("aria-sort"),
  shown: rows().filter((row) => !row.hidden).map((row) => row.cells[1].textContent),
  lit: document.body.classList.contains("lit"),
  on: [...document.querySelectorAll("#curves svg .on")].length,
});
"""


def browse(path: Path, profile: Path) -> Element:
    """Open a page in a browser without a window; return what it then is."""
    command = ["chromium", "--headless=new", "--no-sandbox", "--disable-gpu"]
    command += [f"--user-data-dir={profile}", "--enable-logging=stderr", "--v=0"]
    done = subprocess.run(
        [*command, "--virtual-time-budget=2000", "--dump-dom", path.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert ":CONSOLE" not in done.stderr, done.stderr
    dom = path.with_name("dom.html")
    dom.write_text(done.stdout, encoding="utf-8")
    return parse(dom)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not on the PATH")
def test_a_browser_runs_the_page_without_an_error(tmp_path: Path) -> None:
    sweep = make_fractions(tmp_path / "sweep")
    path = compare(tmp_path, make_word_kd(tmp_path / "other"), sweep, baseline="teacher")
    page = browse(path, tmp_path / "profile")
    assert page.children[0].attributes["data-scripts"] == "ready"
    (table,) = section(page, "numbers").all("table")
    assert all(len(head.all("button")) == 1 for head in table.all("thead")[0].all("th"))
    assert section(page, "curves").all("ul", "legend")[0].all("button")

    content = path.read_text(encoding="utf-8")
    pressed = path.with_name("pressed.html")
    pressed.write_text(content.replace("</body>", f"<script>{PRESS}</script></body>"))
    (title,) = (t for t in browse(pressed, tmp_path / "profile").all("title") if "order" in t.text)
    found = json.loads(title.text)
    numbers = [float(value) for value in found["up"]]
    assert numbers == sorted(numbers)
    assert [float(value) for value in found["down"]] == numbers[::-1]
    assert found["order"] == "descending"
    assert set(found["shown"]) == {"student", "student_alone"}
    assert found["lit"]
    assert found["on"] == 2, "its curves of val_nll and of train_loss"
