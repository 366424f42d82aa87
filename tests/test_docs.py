"""Documentation and examples: every block of Python runs, every link leads somewhere, every example does its work."""

import importlib.util
import re
import socket
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.distributed as dist

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])
EXAMPLES = ROOT / "examples"


def blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: page.name)
def test_every_block_of_python_runs(page: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A page's blocks run one after the other; the reader's own model, optimizer, loss and loader are given."""
    one_rank = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    for name, value in one_rank.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    model = torch.nn.Linear(4, 2)
    names = {
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "loss_fn": lambda model, batch: model(batch).square().mean(),
        "loader": [torch.randn(8, 4) for _ in range(4)],
    }
    try:
        for number, block in enumerate(blocks(page)):
            exec(compile(block, f"{page.name}, block {number}", "exec"), names)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def test_every_passage_of_an_example_is_in_it() -> None:
    """Blocks marked `py` are passages of examples, which have tests of their own below."""
    examples = "".join(path.read_text(encoding="utf-8") for path in EXAMPLES.glob("*.py"))
    passages = [
        block for page in PAGES for block in re.findall(r"^```py\n(.*?)^```", page.read_text(), re.DOTALL | re.M)
    ]
    assert passages
    for passage in passages:
        assert passage in examples


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8")):
        if not target.startswith(("http:", "https:", "mailto:")):
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_result_that_is_cited_is_there(page: Path) -> None:
    """A `*` stands for anything; blocks of commands may write what is not there yet."""
    prose = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    for cited in re.findall(r"results/[\w.*-]*[\w*]", prose):
        assert list(ROOT.glob(cited)), cited


def test_the_site_has_every_page() -> None:
    listed = re.findall(r": ([a-z0-9/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert set(listed) == {str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")}


def test_the_reference_names_what_there_is() -> None:
    import asyncprop

    named = re.findall(r"^::: ([\w.]+)$", (ROOT / "docs" / "reference.md").read_text(), re.MULTILINE)
    for path in named:
        module, _, name = path.rpartition(".")
        assert getattr(__import__(module, fromlist=[name]), name).__doc__
    missing = set(asyncprop.__all__) - {path.rpartition(".")[2] for path in named}
    assert not missing


def load(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_loop_learns_as_the_plain_one_does(monkeypatch: pytest.MonkeyPatch) -> None:
    example = load("own_loop", monkeypatch)
    plain, ours = example.plain(), example.asynchronous()
    assert plain < 0.5
    assert ours < 0.6


def test_the_lstm_learns(monkeypatch: pytest.MonkeyPatch) -> None:
    losses = load("lstm", monkeypatch).main()
    assert losses[-1] < losses[0]


def test_a_resumed_training_is_the_whole_one(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, resumed = load("resume", monkeypatch).main()
    assert whole == resumed


def test_ranks_agree() -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", f"--master-port={free_port()}",
               str(EXAMPLES / "many_ranks.py")]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=55)
    assert done.returncode == 0, done.stderr
    assert "2 ranks agree" in done.stdout


def test_a_transformer_learns(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers", reason="make ecosystem installs it")
    first, last = load("transformer", monkeypatch).main()
    assert last < first / 2


@pytest.mark.filterwarnings("ignore")  # of transformers and accelerate
def test_a_trainer_of_transformers_learns(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for library in ("transformers", "accelerate"):
        pytest.importorskip(library, reason="make ecosystem installs it")
    trainer = load("trainer", monkeypatch).make(str(tmp_path))
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    logged = [row for row in trainer.state.log_history if "loss" in row]
    scored = [row for row in trainer.state.log_history if "eval_loss" in row]
    assert trainer.state.global_step == 3 * 25
    assert [row["step"] for row in logged] == [10, 20, 30, 40, 50, 60, 70]
    assert [row["step"] for row in scored] == [0, 25, 50, 75]
    assert scored[-1]["eval_loss"] < before / 2
    assert logged[-1]["learning_rate"] < logged[0]["learning_rate"]
