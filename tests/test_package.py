"""The package: what a wheel has in it beyond code, and what the command offers a shell."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from asyncprop.cli import app

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Build a wheel by the setuptools that are there, from a copy, so that nothing is left in the sources."""
    folder = tmp_path_factory.mktemp("wheel")
    copy = folder / "copy"
    copy.mkdir()
    files = subprocess.run(["git", "-C", str(ROOT), "ls-files"], capture_output=True, text=True, check=True).stdout
    for name in files.splitlines():
        if (ROOT / name).is_file() and name.startswith(("src/", "pyproject", "README", "LICENSE")):
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).write_bytes((ROOT / name).read_bytes())
    code = f"from setuptools.build_meta import build_wheel; print(build_wheel({str(folder)!r}))"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=copy, capture_output=True, text=True,
                          check=True)  # fmt: skip
    with zipfile.ZipFile(folder / done.stdout.splitlines()[-1]) as archive:
        return archive.namelist()


def test_a_wheel_has_types_templates_and_data(wheel: list[str]) -> None:
    source = ROOT / "src" / "asyncprop"
    wanted = [path for path in source.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert {f"asyncprop/{path.relative_to(source)}" for path in wanted} <= set(wheel)
    assert "asyncprop/py.typed" in wheel
    assert "asyncprop/report/templates/page.html.j2" in wheel
    assert not [name for name in wheel if name.startswith(("tests/", "docs/", "examples/"))]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_can_complete_commands_and_options(shell) -> None:
    script = app.generate_completion(shell=shell)
    assert all(word in script for word in ("train", "reproduce", "report"))
    assert "backward-threads" in script
