"""Runs: the folder of a run."""

import json
import re
from pathlib import Path

import pytest

from asyncprop.config import SimulateConfig, TrainConfig
from asyncprop.runs import (
    Run,
    as_one,
    create_run,
    environment,
    machines,
    open_run,
    read_config,
    read_environment,
    read_result,
    take_over,
    write_json,
)

CONFIG = TrainConfig(task="digits", epochs=2)


def test_a_new_run_has_configuration_and_environment(tmp_path: Path) -> None:
    with create_run(tmp_path / "run", CONFIG) as run:
        run.add_step({"step": 0})
        run.add_epoch({"epoch": 1})
        assert read_result(run.path) is None
        run.finish({"best_metric": 0.5})
    assert read_config(tmp_path / "run") == CONFIG
    assert read_result(tmp_path / "run") == {"best_metric": 0.5}
    assert json.loads((tmp_path / "run" / "environment.json").read_text())["torch"].startswith("2.")
    assert (tmp_path / "run" / "steps.jsonl").read_text() == '{"step": 0}\n'


def test_folders_are_named_by_what_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with create_run(None, CONFIG) as first, create_run(None, CONFIG) as second:
        assert first.path != second.path
        assert first.path.parent == Path("runs")
        assert "digits-async-lu-0" in first.path.name


def test_a_folder_with_something_in_it_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(ValueError, match=r"out must be a new or empty folder \(.* is not\): choose another$"):
        create_run(tmp_path, CONFIG)


@pytest.mark.parametrize(
    ("config", "way_out"),
    [
        (CONFIG, "choose another, or asyncprop train --resume {}"),
        (SimulateConfig(task="digits"), "choose another"),
    ],
)
def test_a_folder_of_a_run_is_refused_with_how_to_resume_it_if_it_can_be(
    tmp_path: Path, config: TrainConfig, way_out: str
) -> None:
    with create_run(tmp_path / "run", config) as run:
        run.checkpoint.mkdir()
    with pytest.raises(ValueError, match=f"is not\\): {re.escape(way_out.format(run.path))}$"):
        create_run(run.path, config)


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "home").write_text("")
    with pytest.raises(ValueError, match=r"out must be a folder that can be made and written \(.*: Not a directory\)"):
        create_run(tmp_path / "home" / "run", CONFIG)


def test_lines_after_the_checkpoint_are_cut_off(tmp_path: Path) -> None:
    (tmp_path / "steps.jsonl").write_text('{"step": 0}\n{"step": 1}\n{"st')
    with Run(tmp_path, CONFIG, steps=1) as run:
        run.add_step({"step": 9})
    assert (tmp_path / "steps.jsonl").read_text() == '{"step": 0}\n{"step": 9}\n'


def test_who_hung_while_it_wrote_lines_adds_none_to_those_of_the_next(tmp_path: Path) -> None:
    with Run(tmp_path, CONFIG) as hung:
        hung.add_step({"step": 0})
        hung.flush()
        hung.add_step({"step": 1})  # it is in a buffer
        with Run(tmp_path, CONFIG, steps=1) as run:
            run.add_step({"step": 1})
            run.flush()
            hung.flush()
            run.add_step({"step": 2})
    assert (tmp_path / "steps.jsonl").read_text() == '{"step": 0}\n{"step": 1}\n{"step": 2}\n'
    assert sorted(path.name for path in tmp_path.iterdir()) == ["epochs.jsonl", "steps.jsonl"]


def test_a_run_that_lost_lines_is_told(tmp_path: Path) -> None:
    (tmp_path / "steps.jsonl").write_text('{"step": 0}\n')
    with pytest.raises(ValueError, match="must have 5 whole lines"):
        Run(tmp_path, CONFIG, steps=5)
    assert [path.name for path in tmp_path.iterdir()] == ["steps.jsonl"]


def test_who_takes_over_where_the_folder_cannot_be_made_goes_on_in_a_new_one_and_says_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "home").write_text("")  # no folder, as on a machine without that user
    with take_over(tmp_path / "home" / "run", CONFIG) as run:
        assert run.path.parent == Path("runs")
        run.add_step({"step": 7})
    assert read_config(run.path) == CONFIG
    (said,) = caplog.messages
    assert said == f"{tmp_path / 'home' / 'run'} cannot be written here (Not a directory): going on in {run.path}"


def test_what_cannot_be_resumed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no config\.toml"):
        read_config(tmp_path)
    with create_run(tmp_path / "run", CONFIG):
        pass
    with pytest.raises(ValueError, match="has none yet"):
        open_run(tmp_path / "run")


def test_json_is_written_whole(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    write_json(file, {"old": 1})
    with pytest.raises(TypeError):
        write_json(file, {"new": object()})
    assert json.loads(file.read_text()) == {"old": 1}


def test_the_environment_says_where_numbers_come_from() -> None:
    assert {"asyncprop", "torch", "python", "cores", "processor", "commit", "command", "started"} <= set(environment())


def test_runs_of_several_machines_have_one_environment_that_lists_them() -> None:
    def made(commit: str | None, cores: int, started: str) -> dict[str, object]:
        return {"torch": "2.13", "cores": cores, "commit": commit, "command": f"train {started}", "started": started}

    different = machines([made("a", 2, "x"), made("b", 2, "y"), made("a", 2, "z"), made("a", 4, "x")])
    assert [(machine["commit"], machine["cores"]) for machine in different] == [("a", 2), ("b", 2), ("a", 4)]
    assert as_one(different) == {"torch": "2.13", "cores": "2, 4", "commit": "a, b"}
    assert as_one(different[:1]) == different[0] == {"torch": "2.13", "cores": 2, "commit": "a"}
    assert as_one(machines([made(None, 2, "x"), made("a", 2, "x")]))["commit"] == "None, a"


def test_the_environment_of_a_run_is_that_of_its_beginning(tmp_path: Path) -> None:
    with create_run(tmp_path / "run", CONFIG):
        pass
    assert machines([read_environment(tmp_path / "run")]) == machines([environment()])
    (tmp_path / "run" / "environment.json").write_text("{")
    with pytest.raises(ValueError, match="must be a run whose files are whole"):
        read_environment(tmp_path / "run")
