"""Random faults in one run: python tests/chaos.py OUT --ranks 8 --faults 20 --seed 0 -- TRAIN-OPTIONS

Kills, freezes (for longer or shorter than the time-out) and joins, drawn at random, one after some seconds of training;
then it waits for the end, and prints what the run found. The exit code is that of the run.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--faults", type=int, default=20)
    parser.add_argument("--every", type=float, default=5.0, help="seconds between two faults")
    parser.add_argument("--timeout", type=float, default=5.0, help="of silence, in seconds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("train", nargs="*", help="options of asyncprop train, after --")
    given = parser.parse_args()
    drawn = random.Random(given.seed)
    process = subprocess.Popen(
        [sys.executable, "-m", "asyncprop", "train", *given.train, "--method", "layup", "--ranks", str(given.ranks),
         "--replacements", str(given.faults), "--timeout", str(given.timeout), "--out", str(given.out)],
        stderr=(log := given.out.with_suffix(".log").open("w+")), text=True,
    )  # fmt: skip
    while not (given.out / "epochs.jsonl").exists() or not (given.out / "epochs.jsonl").read_text():
        time.sleep(0.1)
        assert process.poll() is None, "the run ended before its first epoch"
    address = next(line.split()[-1] for line in Path(log.name).read_text().splitlines() if "--join" in line)
    joined: list[subprocess.Popen[bytes]] = []
    for number in range(given.faults):
        time.sleep(given.every)
        if process.poll() is not None:
            print(f"the run ended before fault {number}")
            break
        kind = drawn.choice(["kill", "freeze", "hang", "join"])
        if kind == "join":
            joined.append(subprocess.Popen([sys.executable, "-m", "asyncprop", "train", "--join", address]))
            print(f"fault {number}: one more rank joins", flush=True)
            continue
        pid = drawn.choice(living(process.pid))
        print(f"fault {number}: {kind} process {pid}", flush=True)
        if kind == "kill":
            os.kill(pid, signal.SIGKILL)
            continue
        os.kill(pid, signal.SIGSTOP)
        time.sleep(given.timeout * (0.5 if kind == "hang" else 2.5))
        os.kill(pid, signal.SIGCONT)
    code = process.wait()
    for rank_process in joined:
        rank_process.wait()
    result = json.loads((given.out / "result.json").read_text())
    names = ("ranks", "ranks_lost", "ranks_joined", "samples", "epochs", "best_metric", "final_metric", "train_s")
    print(json.dumps({name: result[name] for name in names}))
    return code


def living(launcher: int) -> list[int]:
    """Return the processes of all ranks that the launcher has started and that run."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                state, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
            except OSError:
                continue
            if int(parent) == launcher and state != "Z":
                found.append(int(folder.name))
    return sorted(found)


if __name__ == "__main__":
    sys.exit(main())
