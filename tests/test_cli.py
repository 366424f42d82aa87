"""The command: exit codes, one line for what is wrong, and nothing slow before it is needed."""

import errno
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from asyncprop.cli import main
from asyncprop.config import NOT_MODELLED
from asyncprop.devices import available_cores


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out, err


def test_what_all_ranks_refuse_is_said_once() -> None:
    command = [sys.executable, "-m", "asyncprop", "train", "digits", "--method", "sgd", "--ranks", "2"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "asyncprop: ranks must be 1 for method sgd (got 2): ddp is its like on several\n"


WRONG = [
    (["train", "digits", "--epochs", "0"], r"--epochs must be >= 1 \(got 0\)"),
    (["train", "digits", "--lr", "fast"], "--lr must be a valid number"),
    (["train", "digits", "--turn", "left"], "--turn must be 'free', 'lockstep' or 'ordered'"),
    (["train", "digits", "--device", "tpu"], "--device must be of the form"),
    (["train", "digits", "--colour", "red"], "Unknown option: --colour"),
    (["train", "digits", "--lr"], "requires an argument"),
    (["train", "digits", "--replacements", "1"], "replacements must be left out: only ranks that gossip"),
    (["train", "--join", "here:1", "--tensorboard"], "join takes no other option"),
    (["train", "--join", "127.0.0.1:99999"], r"join must be HOST:PORT, .* \(got 127.0.0.1:99999\)"),
    (["train"], "task must be given"),
    (["train", "digits", "--method", "sgd", "--turn", "ordered"], "turn must not be ordered for method sgd"),
    (["replay", "nowhere"], r"path must be the folder of a run \(nowhere"),
    (["simulate"], "task must be given"),
    (["simulate", "digits", "--devices", "0"], r"--devices must be >= 1 \(got 0\)"),
    (["simulate", "digits", "--costs", "b200"], r"costs must be a readable file, or one of .* \(got b200\)"),
    (["simulate", "digits", "--speeds", "0"], r"speeds must be > 0 and finite \(got 0.0\)"),
    (["plan", "mnist"], "task must be one of digits"),
    (["plan", "digits", "--passes", "1"], r"--passes.*[Mm]ust be >= 4"),
    (["train", "mnist"], "task must be one of digits"),
    (["train", "digits", "--method", "adam"], "method must be one of sgd"),
    (["train", "digits", "--method", "sgd", "--workers", "2"], "workers must not be given for method sgd"),
    (["train", "digits", "--delay", "slow"], "delay must be like rank=1,seconds=0.5"),
    (["train", "digits", "--delay", ""], "delay must be like rank=1,seconds=0.5"),
    (["train", "digits", "--compensation", "some"], "--compensation must be 'none', 'constant', 'adaptive' or"),
    (["delays"], "comparisons must be given"),
    (["report"], "runs must be given"),
    (["report", "nowhere"], r"runs must be folders of runs or comparisons, or files of comparisons \(got nowhere"),
    (["train", "digits", "--config", "none.toml"], "config must be a readable file"),
    (["train", "--resume", "nowhere"], r"resume must be the folder of a run \(nowhere"),
    (["train", "digits", "--resume", "nowhere"], "resume takes no option but ranks"),
    (["train", "cifar10"], "data-dir must be given for cifar10"),
    (["trian"], 'Did you mean "train"'),
    (["compare", "digits", "--seeds", "0"], r"--seeds must be >= 1 \(got 0\)"),
    (["compare", "digits", "--methods", "sgd,magic"], "method must be one of"),
    (["compare", "digits", "--json", "no/such/folder.json"], "must be in a folder that exists"),
    (["compare", "digits", "--markdown", "."], r"writable \(\.: Is a directory\)"),
    (["plan", "digits", "--costs", "/proc/none.toml"], r"writable \(/proc/none.toml: .+\)"),
    (["train", "digits", "--out", "/dev/null/run"], r"out must be a folder that .* \(/dev/null/run: Not a directory\)"),
    (["simulate", "digits", "--out", "/"], r"out must be a new or empty folder \(/ is not\): choose another$"),
    (["compare", "digits", "--out", "/dev/null"], r"out must be a folder that .* \(/dev/null: Not a directory\)"),
    (["reproduce", "table1", "--out", "/dev/null/here"], r"out must be a folder that .* Not a directory"),
    (["data", "fetch", "mnist"], "name must be one of digits"),
    (["bench", "engine", "--workloads", "vgg"], "workloads must be some of"),
    (["bench", "engine", "--rounds", "0"], r"--rounds.*[Mm]ust be >= 1"),
    (["bench", "fleets", "--plot", "fleets.txt"], r"plot must be a .svg, .png or .pdf file \(got fleets.txt\)"),
    (["bench", "fleets", "--devices", "3,300"], "devices must be at most the batches of an epoch, 256"),
    (["theory", "--seeds", "0"], r"--seeds.*[Mm]ust be >= 1"),
    (["theory", "--markdown", "no/such/folder.md"], "must be in a folder that exists"),
    (["bench", "engine", "--seconds", "0"], r"--seconds.*[Mm]ust be > 0"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG)
def test_wrong_input_is_one_line_and_exit_code_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = call(capsys, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("asyncprop: ")
    assert err.count("\n") == 1
    assert re.search(message, err), err
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_full_is_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "c.json")

    monkeypatch.setattr("asyncprop.listing.print_tasks", full)
    assert call(capsys, "tasks") == (1, "", "asyncprop: [Errno 28] No space left on device: 'c.json'\n")


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ({"RANK": "0", "LOCAL_RANK": "0"}, "asyncprop: task must be one of digits"),
        ({"RANK": "2", "LOCAL_RANK": "0"}, "asyncprop: rank 2: task must be one of digits"),
        ({"LOCAL_RANK": "1"}, "asyncprop: task must be one of digits"),  # one that is to join: it has yet to get a rank
        ({"RANK": "1", "LOCAL_RANK": "1"}, ""),
    ],
)
def test_one_rank_of_each_machine_says_what_it_refuses(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, place: dict[str, str], said: str
) -> None:
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    code, _, err = call(capsys, "train", "mnist")
    assert code == 2
    assert err[: len(said)] == said
    assert bool(err) == bool(said)


def test_who_refuses_when_it_has_joined_says_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(address: str, *, quiet: bool) -> int:
        monkeypatch.setenv("RANK", "3")  # as it has become one of them
        raise ValueError("data-dir must be given")

    monkeypatch.setattr("asyncprop.rank.join_rank", refuse)
    assert call(capsys, "train", "--join", "here:1") == (2, "", "asyncprop: data-dir must be given\n")


@pytest.mark.parametrize("method", ["hogwild", "ddp"])
def test_a_delay_of_a_rank_that_cannot_be_is_refused_before_any_is_started(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    def never(*arguments: object) -> tuple[int, str]:
        raise AssertionError

    monkeypatch.setattr("asyncprop.launch.launch", never)
    slowed = ["--method", method, "--ranks", "2", "--delay", "rank=5,seconds=1"]
    assert call(capsys, "train", "digits", *slowed) == (
        2, "", "asyncprop: delay: rank must be < 2, the number of ranks, which count from 0 (got 5)\n",
    )  # fmt: skip


@pytest.mark.parametrize("quiet", [[], ["--quiet"]])
def test_of_a_delay_of_a_rank_that_may_join_it_is_said_that_it_is_not_there(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, quiet: list[str]
) -> None:
    monkeypatch.setattr("asyncprop.launch.launch_tolerant", lambda *arguments, **options: (0, ""))
    slowed = ["--method", "layup", "--ranks", "2", "--delay", "rank=2,seconds=1;rank=1,seconds=1", *quiet]
    said = "" if quiet else "delay: rank 2 is not there yet, and slowed if it joins\n"
    assert call(capsys, "train", "digits", *slowed) == (0, "", said)


def test_training_and_resuming(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folder = str(tmp_path / "run")
    code, out, err = call(capsys, "train", "digits", "--epochs", "1", "--train-samples", "64", "--out", folder)
    assert code == 0
    assert re.match(r"best accuracy 0\.\d{4} \(epoch 1\), target 0\.95 ", out)
    assert "epoch 1/1" in err
    code, again, err = call(capsys, "train", "--resume", folder, "--quiet")
    assert (code, again, err) == (0, out, "")
    code, again, err = call(capsys, "train", "--resume", folder)
    assert (code, again, err) == (0, out, f"{folder} is finished: nothing is left to train\n")


def test_a_run_can_be_repeated_from_its_configuration(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    options = ["--epochs", "1", "--train-samples", "64", "--turn", "lockstep", "--quiet"]
    call(capsys, "train", "digits", *options, "--out", str(tmp_path / "a"))
    call(capsys, "train", "--config", str(tmp_path / "a" / "config.toml"), "--quiet", "--out", str(tmp_path / "b"))
    ours, theirs = (json.loads((tmp_path / name / "result.json").read_text()) for name in "ab")
    assert ours["best_metric"] == theirs["best_metric"]
    assert (tmp_path / "a" / "config.toml").read_text() == (tmp_path / "b" / "config.toml").read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["tasks"], ["fashion-mnist", "ResNet-18", "imagenet"]),
        (["methods"], ["sgd", "async-lu", "block"]),
        (["data", "list"], ["rotten-tomatoes", "cifar10", "MIT"]),
        (["--version"], ["0.1.0"]),
        (["train", "--help"], ["--backward-threads", "--resume"]),
        (["simulate", "--help"], ["Replicas", "--devices"]),
        (["reproduce", "--help"], ["tiny", "small", "medium", "full"]),
    ],
)
def test_listings(arguments: list[str], words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, *arguments)
    assert code == 0
    assert all(word in out for word in words)


def test_what_a_simulation_refuses_is_not_offered(capsys: pytest.CaptureFixture[str]) -> None:
    refused = [name.replace("_", "-") for name in (*NOT_MODELLED, "device", "turn")]
    for command, are_offered in (("train", True), ("simulate", False)):
        _, out, _ = call(capsys, command, "--help")
        assert [bool(re.search(rf"--{option}\b(?!-)", out)) for option in refused] == [are_offered] * len(refused)


def test_help_promises_no_time(capsys: pytest.CaptureFixture[str]) -> None:
    """How long runs take is told where it was measured."""
    _, out, _ = call(capsys, "reproduce", "--help")
    assert not re.search(r"\d+ (minutes|hours)", out)


def test_comparing_writes_what_is_asked_for(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, out, _ = call(
        capsys, "compare", "digits", "--methods", "sgd", "--seeds", "1", "--epochs", "1", "--train-samples", "64",
        "--out", str(tmp_path / "c"), "--json", str(tmp_path / "c.json"), "--markdown", str(tmp_path / "c.md"),
        "--quiet",
    )  # fmt: skip
    assert code == 0
    assert "time to target" in out
    rows = json.loads((tmp_path / "c.json").read_text())
    assert {"task", "epochs", "seeds", "target", "rows"} <= set(rows)
    assert "| sgd |" in (tmp_path / "c.md").read_text()


def test_help_does_not_import_pytorch() -> None:
    code = "import sys\nfrom asyncprop.cli import main\ntry:\n main(['train', '--help'])\nexcept SystemExit: pass\n"
    done = subprocess.run(
        [sys.executable, "-c", code + "print('torch' in sys.modules)"], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "False"


def test_an_ordered_run_is_replayed(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    first, again = str(tmp_path / "first"), str(tmp_path / "again")
    options = ["--epochs", "1", "--train-samples", "256", "--turn", "ordered", "--quiet"]
    code, _, _ = call(capsys, "train", "digits", *options, "--out", first)
    assert code == 0
    code, out, _ = call(capsys, "replay", first, "--out", again, "--quiet")
    assert code == 0
    assert out.endswith(f"equal to the bit: losses of all batches, and the model ({again}, {first})\n")


def test_a_simulation_and_a_plan_are_told(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    costs = str(tmp_path / "costs.toml")
    code, out, _ = call(capsys, "plan", "digits", "--width", "8", "--passes", "4", "--costs", costs)
    assert code == 0
    assert "Advice: " in out
    assert "2 coupled workers" in out or "1 coupled worker" in out
    assert ("torch DDP" in out) == (available_cores() > 1)
    options = ["--width", "8", "--epochs", "1", "--train-samples", "256", "--devices", "2", "--costs", costs]
    code, out, _ = call(capsys, "simulate", "digits", *options, "--out", str(tmp_path / "run"))
    assert code == 0
    assert out.startswith("best accuracy ")
    for command in (["train", "--resume"], ["replay"]):
        code, _, err = call(capsys, *command, str(tmp_path / "run"))
        assert (code, "run is a simulation, which can be neither resumed nor replayed" in err) == (2, True)
    code, _, err = call(capsys, "simulate", "digits", "--costs", costs, "--out", str(tmp_path / "run"))
    assert (code, err.endswith("is not): choose another\n")) == (2, True)
