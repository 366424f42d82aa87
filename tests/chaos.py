"""Random faults in one run: python tests/chaos.py OUT --ranks 8 --faults 20 --seed 0 -- TRAIN-OPTIONS

As many of each kind, in random order, some seconds of training after one another; then it waits for the end, checks the
sum of weights at every meeting, and prints what the run found. The exit code is 0 if it, and all that joined, ended so.

    kill    a rank is killed, and another started in its place
    freeze  a rank is stopped for longer than the time-out: the others go on without it, and it joins again
    hang    a rank is stopped for less than the time-out
    join    one rank more
    cut     all connections between two ranks end, and whatever they open again, for as long as the time-out
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from asyncprop.runs import environment
from connections import interrupt
from processes import TRAIN, Command, children, command, rows

KINDS = ("kill", "freeze", "hang", "join", "cut")
TAKES_WEIGHT = ("kill", "freeze")
"""What a rank that is killed, or left out, holds goes with it."""

ROUNDING = 1e-9
"""Of sums of weights, which joins have halved."""


@dataclass(frozen=True)
class Fault:
    """What was done, in which epoch, and to which processes; of a cut link, how often it was cut."""

    kind: str
    epoch: int
    pids: tuple[int, ...]
    cut: int = 0


class Chaos:
    """Strikes a run.

    Args:
        train: the launcher of the run, which has told where others may join.
        out: its folder.
        address: where others join it.
        timeout_s: after which the ranks go on without a silent one.
        seed: of what is drawn.
    """

    def __init__(self, train: Command, out: Path, address: str, timeout_s: float, seed: int) -> None:
        self._train, self._out, self._address, self._timeout_s = train, out, address, timeout_s
        self._drawn = random.Random(seed)
        self._joined: list[subprocess.Popen[bytes]] = []
        self.faults: list[Fault] = []

    def strike(self, number: int, every_s: float) -> None:
        """Do so many faults, unless the run ends first."""
        kinds = [KINDS[place % len(KINDS)] for place in range(number)]
        self._drawn.shuffle(kinds)
        for kind in kinds:
            time.sleep(every_s)
            if self._train.process.poll() is not None:
                print(f"the run ended before fault {len(self.faults)}")
                return
            self.faults.append(self._do(kind))
            print(f"fault {len(self.faults)}: {self.faults[-1]}", flush=True)

    def wait(self) -> int:
        """Wait for all processes, and return the first exit code that is not 0: the run's, or of one that joined."""
        processes = (self._train.process, *self._joined)
        return next((code for code in [process.wait() for process in processes] if code), 0)

    def _do(self, kind: str) -> Fault:
        epoch = len(rows(self._out, "epochs")) + 1
        ranks = children(self._train.process.pid)
        if kind == "join":
            self._joined.append(subprocess.Popen([*TRAIN, "--join", self._address, "--quiet"]))
            return Fault(kind, epoch, (self._joined[-1].pid,))
        if kind == "cut":
            one, other = self._drawn.sample(ranks, 2)
            return Fault(kind, epoch, (one, other), interrupt(one, other, self._timeout_s))
        pid = self._drawn.choice(ranks)
        if kind == "kill":
            os.kill(pid, signal.SIGKILL)
        else:
            os.kill(pid, signal.SIGSTOP)
            time.sleep(self._timeout_s * (0.5 if kind == "hang" else 2.5))
            os.kill(pid, signal.SIGCONT)
        return Fault(kind, epoch, (pid,))


def check_weights(epochs: list[dict[str, Any]], faults: list[Fault]) -> list[float]:
    """Return the total weight at every epoch's meeting, as a share of what it was after the one before, and check it.

    It is never more than 1; and less only where a rank was killed, or frozen for so long that it was left out: in that
    epoch, or in those that ended before the others knew.
    """
    weights = [float(row["exchange"]["weight"]) for row in epochs]
    struck = [fault.epoch for fault in faults if fault.kind in TAKES_WEIGHT]
    for row, weight in zip(epochs, weights, strict=True):
        assert weight <= 1 + ROUNDING, f"epoch {row['epoch']}: weight was doubled ({weight})"
        assert weight >= 1 - ROUNDING or any(0 <= row["epoch"] - epoch <= 2 for epoch in struck), (
            f"epoch {row['epoch']}: weight was lost, and no rank ({weight})"
        )
    return weights


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--faults", type=int, default=20)
    parser.add_argument("--every", type=float, default=5.0, help="seconds between two faults")
    parser.add_argument("--timeout-s", type=float, default=5.0, help="of silence, in seconds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--patience-s", type=float, default=900.0, help="after which the run hangs, and is killed")
    parser.add_argument("--json", type=Path, help="file for what was done and found")
    middle = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    given = parser.parse_args(sys.argv[1:middle])
    options = (
        *sys.argv[middle + 1 :], "--method", "layup", "--ranks", str(given.ranks), "--timeout-s", str(given.timeout_s),
        "--replacements", str(given.faults), "--out", str(given.out),
    )  # fmt: skip
    with command(*options, patience_s=given.patience_s) as train:
        address = train.read_until(lambda line: "--join" in line).split()[-1]
        train.read_epochs(1)
        log = threading.Thread(target=train.read_to_the_end, daemon=True)
        log.start()
        chaos = Chaos(train, given.out, address, given.timeout_s, given.seed)
        chaos.strike(given.faults, given.every)
        code = chaos.wait()
        log.join()
    given.out.with_suffix(".log").write_text("".join(train.lines), encoding="utf-8")
    if code:
        return code
    result = json.loads((given.out / "result.json").read_text())
    weights = check_weights(result["history"], chaos.faults)
    names = ("ranks", "ranks_lost", "ranks_joined", "samples", "epochs", "best_metric", "final_metric", "train_s")
    found = {name: result[name] for name in names} | {"weights": weights, "exit_code": code}
    print(json.dumps(found))
    if given.json:
        told = {"command": sys.argv, "faults": [asdict(fault) for fault in chaos.faults], **found}
        told |= {"history": result["history"], "environment": environment()}
        given.json.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    return code


if __name__ == "__main__":
    sys.exit(main())
