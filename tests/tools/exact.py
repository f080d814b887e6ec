"""With all threads, a killed and resumed run gives the bits of one that nobody disturbed.

    OMP_NUM_THREADS=2 python tests/tools/exact.py dacer_v2 --compile

The resumed run has its environments in processes of their own, which changes no bit. Compiled, the
undisturbed run compiles nothing more once it has done all that a run does.
"""

import importlib
import os
import shutil
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import torch

TESTS = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TESTS.parent), str(TESTS)]

from helpers import before_update, differences, outcome, train

SHORT = {
    "num_envs": 4,
    "learning_starts": 80,
    "total_timesteps": 320,  # 60 updates
    "diffusion_steps": 2,
    "entropy_samples": 50,
    "entropy_interval": 25,
    "eval_interval": 30,
    "hidden_sizes": (256, 256),
    "checkpoint_interval": 20,
    "device": "cpu",
}


def main(algo: ModuleType, compile: bool) -> None:
    assert torch.get_num_threads() == int(os.environ["OMP_NUM_THREADS"])
    args = algo.Args("Hopper-v4", **SHORT, compile=compile, eval_episodes=0 if compile else 2)
    stops = (47,) if compile else (12, 47)  # Compiling takes a while.

    def leave_copies(number: int) -> None:
        if number in stops:  # as if the run had been killed now
            shutil.copytree("whole", f"stopped at {number}")
        if compile and number == 31:
            torch.compiler.set_stance("fail_on_recompile")

    with before_update(algo, leave_copies):
        whole = outcome(train(algo, args, "whole"))
    torch.compiler.set_stance("default")
    assert whole["checkpoint.pt"]["args"]["compile"] == compile  # Compiling has not failed.
    wrong = set()
    for stop in stops:
        resumed = outcome(train(algo, replace(args, async_envs=True), f"stopped at {stop}"))
        wrong |= set(differences(whole, resumed))
    wrong = {name for name in wrong if not name.endswith("args/async_envs")}
    print("different:", wrong or "nothing")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        main(importlib.import_module(sys.argv[1]), "--compile" in sys.argv)
