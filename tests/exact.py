"""One script, with all threads: a run gives the same bits twice, and interrupted and resumed.

OMP_NUM_THREADS=2 python tests/exact.py dacer_v2 --compile
"""

import sys
import tempfile
from pathlib import Path

import torch
from helpers import load, train
from kill_and_resume import differences, outcome
from tensorboard.summary.writer import event_file_writer

# TensorBoard orders a run's files by name: second, process, count. Here seconds and processes are
# the same, and 10 would come before 9.
event_file_writer._global_uid._value = 10_000


def main(name: str, compile: bool, threads: int) -> None:
    algo = load(name)
    assert torch.get_num_threads() == threads, torch.get_num_threads()
    large = {
        "num_envs": 4,
        "diffusion_steps": 2,
        "entropy_samples": 50,
        "entropy_interval": 50,
        "device": "cpu",
    }
    short = {
        "learning_starts": 80,
        "total_timesteps": 4 * 150,
        "eval_interval": 40,
        "eval_episodes": 2,
    }
    args = algo.Args("Hopper-v4", **large, **short, checkpoint_interval=30, compile=compile)
    whole = outcome(train(algo, args, "whole"))
    assert len(whole["curves"]["losses/qf1_loss"]) == 2  # after 100 updates and at the end
    wrong = []
    # Compiling takes a minute each time, and a resumed run that is the same says as much.
    if not compile:
        print("twice:", wrong := differences(whole, outcome(train(algo, args, "again"))))
    update = algo.Agent.update
    for stop in (77,) if compile else (12, 77):

        def interrupted(self, batch, number, stop=stop):
            if number == stop:
                raise KeyboardInterrupt
            return update(self, batch, number)

        algo.Agent.update = interrupted
        try:
            train(algo, args, "stopped")
            raise AssertionError("it was not interrupted")
        except KeyboardInterrupt:
            algo.Agent.update = update
    print("resumed:", more := differences(whole, outcome(train(algo, args, "stopped"))))
    sys.exit(bool(wrong or more))


if __name__ == "__main__":
    import os

    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        Path("runs").mkdir()
        main(sys.argv[1], "--compile" in sys.argv, int(os.environ["OMP_NUM_THREADS"]))
