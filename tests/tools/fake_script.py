"""A script for the sweep to train. Its tasks tell it what is to happen to it.

"Bad" fails, "Killed" kills itself at each step, "Slow" waits for a file "go" beside runs/. If a
file "kill" lies there, each kills itself at once.
"""

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import tyro


@dataclass
class Args:
    env_id: str = ""
    seed: int = 1
    resume: str | None = None


def train(args):
    signal.signal(signal.SIGTERM, lambda *_: (print("stopped", flush=True), os._exit(143)))
    signal.alarm(100)  # where a test fails
    if Path("../../../kill").exists():
        os.kill(os.getpid(), signal.SIGKILL)
    checkpoint = Path(args.resume or f"runs/{args.env_id}") / "checkpoint.pt"
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    first = int(checkpoint.read_text()) if args.resume else 0
    processes = os.environ.get("RAY_RAYLET_PID"), os.getppid(), os.getpid()
    print(f"from {first} in", *processes, flush=True)
    for step in range(first, 3):
        assert args.env_id != "Bad", "the simulator diverged"
        checkpoint.write_text(str(step + 1))
        print("did", step + 1, flush=True)
        if args.env_id == "Killed":
            os.kill(os.getpid(), signal.SIGKILL)
        while checkpoint.parent.name == "Slow" and not Path("../../../go").exists():
            time.sleep(0.05)


if __name__ == "__main__":
    train(tyro.cli(Args))
