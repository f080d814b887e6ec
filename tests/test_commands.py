"""benchmarks/commands.sh: its programs take its commands, and each result of ours has one."""

import json
import subprocess

import pandas as pd
import pytest
import tyro

import dacer
import dacer_v2

pytest.importorskip("stable_baselines3", reason="benchmarks/requirements.txt is not installed")

import baselines
import official
import speed
from helpers import ROOT

BENCHMARKS = ROOT / "benchmarks"

PROGRAMS = {
    "dacer.py": dacer,
    "dacer_v2.py": dacer_v2,
    "benchmarks/baselines.py": baselines,
    "benchmarks/official.py": official,
    "benchmarks/speed.py": speed,
}


@pytest.fixture(scope="module")
def commands():
    """The words of each command, by a shell in which `python` prints them."""
    _, blocks = (BENCHMARKS / "commands.sh").read_text().split("exit 2\n")
    shell = "python() { printf '%s\\x1f' \"$@\"; echo; }\n" + blocks
    printed = subprocess.run(["bash", "-ec", shell], capture_output=True, text=True, check=True)
    return [line.split("\x1f")[:-1] for line in printed.stdout.splitlines()]


def test_each_command_is_taken(commands, monkeypatch):
    # It asks for a clone of the official repository.
    monkeypatch.setattr(official.Args, "__post_init__", lambda self: None)
    assert len(commands) > 150
    for program, *words in commands:
        if words:
            tyro.cli(PROGRAMS[program].Args, args=words)
        assert (BENCHMARKS.parent / program).exists()


def test_every_run_of_ours_has_its_command(commands):
    """By task, T, eta and c of DACER and DACERv2."""
    made = set()
    for program, *words in commands:
        if program in ("dacer.py", "dacer_v2.py"):
            module = PROGRAMS[program]
            args = module.resolve(tyro.cli(module.Args, args=words))
            eta = getattr(args, "q_grad_weight", None)
            c = round(args.time_weight_c, 3) if eta else None
            kwargs = " ".join(f"{k}={v}" for k, v in json.loads(args.env_kwargs).items())
            task = args.env_id.split(":")[-1], kwargs, args.seed
            made.add((*task, args.total_timesteps, args.diffusion_steps, eta or 0, c))
    data = pd.concat([pd.read_csv(BENCHMARKS / f"results/{name}.csv") for name in FILES])
    data = data[data.algorithm.isin(["DACER", "DACERv2"])].fillna({"kwargs": "", "eta": 0})
    for run in data.drop_duplicates("run").to_dict("records"):
        c = round(run["c"], 3) if run["eta"] else None
        task = run["task"], run["kwargs"], run["seed"]
        assert (*task, run["total_timesteps"], run["T"], run["eta"], c) in made, run["run"]


FILES = ("evaluations", "multigoal")


def test_running_the_file_runs_nothing():
    ended = subprocess.run(
        ["bash", BENCHMARKS / "commands.sh"], capture_output=True, text=True, check=False
    )
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith("commands.sh: ")
