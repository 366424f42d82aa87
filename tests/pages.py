"""Run folders written by hand, and a headless Chromium to look at pages with."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

from asyncprop.report.rows import comparison

ENVIRONMENT = {
    "asyncprop": "0.1.0", "torch": "2.13", "python": "3.11", "system": "Linux", "processor": "one & only", "cores": 2,
    "commit": "abc", "command": "asyncprop train digits", "started": "2026-01-01T00:00:00+0000",
}  # fmt: skip


def write_run(
    folder: Path, method: str = "async-lu", seed: int = 0, metrics: tuple[float, ...] = (0.5, 0.75), *,
    staleness: float = 0.5, finished: bool = True, **options: Any,
) -> Path:  # fmt: skip
    """Write a run folder that has run for as many epochs as there are metrics, of ten steps each."""
    folder.mkdir(parents=True)
    config = {"task": "digits", "method": method, "seed": seed, **options}
    (folder / "config.toml").write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in config.items()))
    (folder / "environment.json").write_text(json.dumps(ENVIRONMENT))
    epochs = [
        {
            "epoch": n, "train_loss": 1.0 / n, "test_loss": 1.5 / n, "test_metric": metric, "train_s": 2.0 * n,
            "samples": 320 * n, "samples_per_s": 160.0, "mean_staleness": staleness,
            "updates": {"first": 10, "last": 10}, "staleness_by_layer": {"first": staleness * n, "last": None},
            "threads": [{"rank": 0, "name": "thread-0", "worked_s": 1.5, "waited_s": 0.5}],
            "peak_memory_bytes": n * 2**20,
        }
        for n, metric in enumerate(metrics, start=1)
    ]  # fmt: skip
    (folder / "epochs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in epochs))
    steps = [{"step": n, "epoch": n // 10, "loss": 1.0, "staleness": staleness * (n % 2), "train_s": 0.2 * n}
             for n in range(10 * len(metrics))]  # fmt: skip
    (folder / "steps.jsonl").write_text("".join(json.dumps(row) + "\n" for row in steps))
    if finished:
        hit = next((row for row in epochs if row["test_metric"] >= 0.7), None)
        (folder / "result.json").write_text(json.dumps({
            "task": "digits", "method": method, "seed": seed, "metric": "accuracy", "epochs": len(metrics),
            "best_metric": max(metrics), "best_epoch": 1, "final_metric": metrics[-1], "target": 0.7,
            "epochs_to_target": hit and hit["epoch"], "time_to_target_s": hit and hit["train_s"],
            "train_s": 2.0 * len(metrics), "samples": 320 * len(metrics), "samples_per_s": 160.0,
            "mean_staleness": staleness, "ranks": 1, "peak_memory_bytes": 2**21, "history": epochs,
        }))  # fmt: skip
    return folder


def write_comparison(folder: Path, methods: dict[str, tuple[float, ...]], target: float | None = 0.7) -> Path:
    """Write a comparison's folder, two seeds of each method."""
    runs: dict[str, list[str]] = {}
    for method, metrics in methods.items():
        for seed in (0, 1):
            name = f"{method}_seed-{seed}"
            write_run(folder / name, method, seed, metrics, staleness=0.0 if method == "sgd" else 0.5)
            runs.setdefault(method, []).append(name)
    results = {
        method: [json.loads((folder / name / "result.json").read_text()) for name in names]
        for method, names in runs.items()
    }
    made = {"config": {"task": "digits", "delay": None}, "runs": runs, "environment": ENVIRONMENT}
    (folder / "comparison.json").write_text(json.dumps({**comparison(results, target), **made}))
    return folder


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

_QUIET = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
          "--disable-background-networking", "--disable-component-update", "--disable-sync"]  # fmt: skip


def ask_page(html: str, script: str, folder: Path, *, width: int = 1200, flags: tuple[str, ...] = ()) -> Any:
    """Show a page in a frame of so many pixels, run `script` in it, and return the value that it returns.

    Errors of the page are under `errors`. The frame has the page's own origin, so that the script may look into it.
    """
    inside = (
        "<script>window.problems = []; addEventListener('error', e => problems.push(String(e.message)), true)</script>"
    )
    page = html.replace("<head>", f"<head>{inside}", 1)
    quoted = json.dumps(page).replace("</", r"<\/")  # or the page's scripts would end this one
    outside = f"""<!DOCTYPE html><body><pre id="answer"></pre><script>
      const frame = document.createElement("iframe");
      frame.width = {width}; frame.height = 900; frame.srcdoc = {quoted};
      frame.onload = () => {{
        const value = (function () {{ {script} }}).call(frame.contentWindow);
        const answer = {{value, errors: frame.contentWindow.problems}};
        document.getElementById("answer").textContent = JSON.stringify(answer);
      }};
      document.body.append(frame);
    </script></body>"""
    file = folder / "asked.html"
    file.write_text(outside, encoding="utf-8")
    assert CHROMIUM
    command = [CHROMIUM, *_QUIET, f"--user-data-dir={folder / 'profile'}", "--window-size=1400,1000", *flags,
               "--virtual-time-budget=5000", "--dump-dom", file.as_uri()]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=50)
    found = re.search(r'<pre id="answer">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found, done.stderr
    return json.loads(found.group(1).replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
