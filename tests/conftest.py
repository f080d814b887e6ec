"""Every test that takes `algo` runs for each script.

What holds for DACER holds for DACERv2 without its Q-gradient.
"""

import os
import signal
import sys
from pathlib import Path

import pytest
from tensorboard.summary.writer import event_file_writer

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
if "PYTEST_XDIST_WORKER" in os.environ:  # Threads of several workers would wait for each other.
    os.environ["OMP_NUM_THREADS"] = "1"

import dacer
import dacer_v2

# Processes that were started in the background of a script ignore it.
signal.signal(signal.SIGINT, signal.default_int_handler)

# TensorBoard orders a run's files by name: second, process, count. Within a second, 10 would come
# before 9.
event_file_writer._global_uid._value = 10_000

SCRIPTS = [dacer, dacer_v2]


@pytest.fixture(params=SCRIPTS, ids=lambda module: module.__name__)
def algo(request):
    return request.param


@pytest.fixture
def tiny_args(algo, tmp_path, monkeypatch):
    """Makes arguments of a run that takes a second or two, in a temporary directory."""
    monkeypatch.chdir(tmp_path)
    small = {
        "hidden_sizes": (16, 16, 16),
        "diffusion_steps": 3,
        "num_envs": 2,
        "batch_size": 8,
        "buffer_size": 1000,
    }
    short = {
        "total_timesteps": 120,
        "learning_starts": 40,
        "entropy_samples": 8,
        "entropy_interval": 10,
    }
    rest = {"eval_interval": 20, "eval_episodes": 3, "device": "cpu", "compile": False}

    def make(**changes):
        return algo.Args(**{**small, **short, **rest, **changes})

    return make
