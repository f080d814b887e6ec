"""What all tests start from.

The two scripts are the same text but for what test_dacer_v2.py lists. So `algo` is dacer_v2 where
nothing else is said, and tests of what differs are for both, by `helpers.both_scripts`.
"""

import importlib
import json
import os
import signal
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmarks")]
if "PYTEST_XDIST_WORKER" in os.environ:  # Threads of several workers would wait for each other.
    os.environ["OMP_NUM_THREADS"] = "1"

from helpers import TINY, command, tiny

# Processes that were started in the background of a script ignore it.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def algo(request):
    """The script under test."""
    return importlib.import_module(getattr(request, "param", "dacer_v2"))


@pytest.fixture
def work(tmp_path, monkeypatch):
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def tiny_args(algo, work):
    """Makes the arguments of a tiny run."""
    return lambda **changes: algo.Args(**TINY | changes)


@pytest.fixture
def run(algo, work):
    """Makes a tiny run on a task of user_envs.py, by the command line."""

    def run(name, kwargs=None, **changes):
        task = {"env_id": f"user_envs:{name}-v0", "env_kwargs": json.dumps(kwargs or {})}
        return command(algo, *tiny(**task | changes))

    return run


def pytest_collection_modifyitems(items):
    """The longest first, so that no process waits for it at the end."""
    items.sort(key=lambda item: "two_threads" not in item.name)
