"""Kills a run again and again, and compares its end with that of a run that nobody disturbed.

    python tests/tools/kill_and_resume.py --script dacer_v2.py --kills 20 --how saving

It resumes the run after each kill and prints what it does. The exit code is 0 if weights,
optimizer, replay buffer, last.pt, best.pt and curves are the same bit for bit.
"""

import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT / "tests")]

from helpers import ENVIRONMENT, differences, outcome, words


@dataclass
class Args:
    arguments: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """arguments for the script, after `--`; they replace those of a short run on Hopper-v4"""
    script: Literal["dacer.py", "dacer_v2.py"] = "dacer.py"
    """which script to run"""
    kills: int = 20
    """how often the run is interrupted"""
    how: tuple[Literal["kill", "saving", "term", "int"], ...] = ("kill",)
    """SIGKILL at random moments; SIGKILL while a checkpoint is being written; SIGTERM; SIGINT; of
    several each in its turn"""
    max_seconds: float | None = None
    """a random moment lies this long after the start of the process at most; None: as long as all
    kills fit into the run"""
    seed: int = 0
    """of the random moments"""


HOPPER = {
    "env_id": "Hopper-v4",
    "total_timesteps": 60_000,
    "learning_starts": 20_000,
    "entropy_interval": 100,
    "checkpoint_interval": 100,
    "eval_interval": 300,
    "eval_episodes": 2,
    "device": "cpu",
}
SIGNALS = {
    "kill": signal.SIGKILL,
    "saving": signal.SIGKILL,
    "term": signal.SIGTERM,
    "int": signal.SIGINT,
}


def interrupt(process: subprocess.Popen, run_dir: Path, how: str, seconds: float) -> None:
    """Waits for the moment and sends the signal, unless the process ends before."""
    end = time.time() + seconds
    while process.poll() is None and time.time() < end:
        time.sleep(0.02)
    while how == "saving" and process.poll() is None and not any(run_dir.glob("*.tmp")):
        time.sleep(0.001)
    if process.poll() is None:
        process.send_signal(SIGNALS[how])


def main(args: Args) -> None:
    """Runs both, compares them, and exits with 0 if they are the same."""
    moments = random.Random(args.seed)
    arguments = args.arguments or words(**HOPPER)
    with tempfile.TemporaryDirectory() as folder:
        interrupted, within_save = 0, 0

        def start(work: str, *typed: str) -> subprocess.Popen:
            Path(folder, work).mkdir(exist_ok=True)
            return subprocess.Popen(
                [sys.executable, ROOT / args.script, *typed],
                cwd=Path(folder, work),
                env=ENVIRONMENT,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )

        def end(process: subprocess.Popen, *codes: int) -> None:
            printed, _ = process.communicate()
            if process.returncode not in codes:
                said = printed[-3000:]
                sys.exit(f"a run ended with code {process.returncode}, not {codes}:\n{said}")

        def find(work: str) -> Path | None:
            found = Path(folder, work).glob("runs/*/checkpoint.pt")
            return next((path.parent for path in found), None)

        started = time.time()
        end(start("whole", *arguments), 0)
        undisturbed = time.time() - started
        print(f"undisturbed: {undisturbed:.0f} s", flush=True)
        # A start takes about 5 seconds.
        most = args.max_seconds or min(undisturbed / 2, 5 + 1.5 * undisturbed / args.kills)
        while interrupted < args.kills:
            run_dir = find("killed")
            if run_dir is not None:  # The last kill left it; the script itself does not mind.
                for file in run_dir.glob("*.tmp"):
                    file.unlink()
            process = start("killed", *(["--resume", str(run_dir)] if run_dir else arguments))
            while run_dir is None and process.poll() is None:
                time.sleep(0.01)
                run_dir = find("killed")
            how = args.how[interrupted % len(args.how)]
            if run_dir is not None:
                interrupt(process, run_dir, how, moments.uniform(0, most))
                within_save += any(run_dir.glob("*.tmp"))
            end(process, 130, 0, *(-number for number in SIGNALS.values()))
            if process.returncode == 0:
                print("  the run was complete before the signal: not counted", flush=True)
                break
            interrupted += 1
            step = torch.load(run_dir / "checkpoint.pt", weights_only=True, mmap=True)["step"]
            print(f"  {how} {interrupted}: the checkpoint is of step {step}", flush=True)
        end(start("killed", "--resume", str(find("killed"))), 0)
        whole = outcome(find("whole"))
        wrong = differences(whole, outcome(find("killed")))
    print(
        f"{args.script}, {interrupted} x {' '.join(args.how)} ({within_save} within a save), ",
        end="",
    )
    print(f"{len(whole['curves'])} curves: ", end="")
    print("the same, bit for bit" if not wrong else f"DIFFERENT in {', '.join(sorted(wrong)[:10])}")
    sys.exit(bool(wrong) or interrupted == 0)


if __name__ == "__main__":
    main(tyro.cli(Args))
