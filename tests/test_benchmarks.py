"""benchmarks/speed.py on a tiny task, baselines.py end to end, official.py on bad input.

More of official.py needs JAX.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import evaluate

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import baselines
import report
import speed

import dacer


def test_speed(tmp_path, monkeypatch, capsys):
    # To compile would take a minute.
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    task = {"env_id": "toy_envs:Reach-v0", "hidden_sizes": (16, 16)}
    monkeypatch.setitem(speed.TASKS, "tiny", task)
    monkeypatch.setattr(speed, "BATCH_SIZE", 32)
    shutil.copy(ROOT / "dacer_v2.py", tmp_path)
    out = tmp_path / "new/speed.csv"
    tiny = {"tasks": ("tiny",), "scripts": ("dacer_v2",), "diffusion_steps": (2,)}
    speed.main(speed.Args(**tiny, turns=2, against=tmp_path, out=out))
    times, published = pd.read_csv(out), pd.read_csv(ROOT / "benchmarks/results/speed.csv")
    assert list(times) == list(published)
    assert set(times.what) == set(published[~published.machine.str.contains("NVIDIA")].what)
    assert len(times) == 2 * times.what.nunique()
    assert (times.ms > 0).all()
    table, ratios = capsys.readouterr().out.split("by turn, quartiles:")
    assert "update, eager" in ratios
    for what, rows in times.groupby("what"):
        (line,) = (line for line in table.splitlines() if line.startswith(f"{what}  "))
        found = sorted(map(float, line.removeprefix(what).split()))
        assert found == pytest.approx(sorted(rows.ms), rel=1e-3)


@pytest.mark.parametrize("resumed", [False, True])
def test_official_without_its_code(resumed, tmp_path):
    command = [sys.executable, ROOT / "benchmarks/official.py", "--code", tmp_path]
    command += ["--resume", "missing"] * resumed  # whose own --code counts
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    told = "missing" if resumed else "is no clone of the official repository"
    assert told in " ".join(done.stderr.replace("│", "").split())
    assert resumed != ("clone" in done.stderr)


@pytest.mark.parametrize("algorithm", ["TD3", "TRPO"])
def test_baselines(algorithm, tmp_path, monkeypatch):
    """End to end: a run that the report reads, and a saved model."""
    monkeypatch.chdir(tmp_path)
    args = baselines.Args(algorithm, total_timesteps=310, eval_interval=100, eval_episodes=2)
    rows = report.read_run(baselines.main(args))
    # TD3 takes 20 at once.
    assert rows.step.tolist() == [100, 200, 300, 320 if algorithm == "TD3" else 310]
    assert set(rows.algorithm) == {algorithm}
    assert rows[["return", "std", "coverage", "arrived"]].notna().all(axis=None)
    (run,) = Path("runs").iterdir()
    assert run.joinpath("model.zip").exists()
    assert np.load(run / "rollouts.npz")["arr_0"].shape[1:] == (200, 2)


def test_the_evaluation_of_baselines_is_that_of_the_scripts(tmp_path, monkeypatch):
    """A model that pushes with half the force, in a task with bounds of +-3, has the returns of a
    policy that does."""
    monkeypatch.chdir(tmp_path)
    model = pytest.importorskip("stable_baselines3").SAC
    half = lambda model, obs, deterministic: (np.full((len(obs), 1), 1.5, np.float32), None)
    monkeypatch.setattr(model, "predict", half)
    args = baselines.Args("SAC", "InvertedPendulum-v4", total_timesteps=60, eval_episodes=3)
    (row,) = report.read_run(baselines.main(args)).to_dict("records")

    args = dacer.Args("InvertedPendulum-v4", eval_episodes=3)
    policy, seed = dacer.DiffusionPolicy(4, 1, (8,), 2), dacer.derive_seed(1, 60)
    policy.forward = lambda obs, noise: torch.full((len(obs), 1), 0.5)
    returns, _ = evaluate(dacer, policy, args, seed)
    assert (row["return"], row["std"]) == pytest.approx((returns.mean(), returns.std()))
    policy.forward = lambda obs, noise: torch.zeros(len(obs), 1)
    assert (evaluate(dacer, policy, args, seed)[0] != returns).any()


def test_evaluations_do_not_disturb_the_training_of_baselines(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sb3, models = pytest.importorskip("stable_baselines3"), []
    for interval in (20, 1000):
        args = baselines.Args("SAC", "toy_envs:Global-v0", total_timesteps=200, eval_episodes=2)
        args.eval_interval = interval
        models.append(sb3.SAC.load(baselines.main(args) / "model").policy.state_dict())
    for name, value in models[0].items():
        assert torch.equal(value, models[1][name]), name


@pytest.mark.parametrize(
    "wrong", ["--env-id CartPole-v1", "--env-id None-v0", "--algorithm A2C", "--eval-episodes 0"]
)
def test_baselines_on_bad_input(wrong, tmp_path):
    command = [sys.executable, ROOT / "benchmarks/baselines.py", *wrong.split()]
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_baselines_without_their_packages(tmp_path):
    (tmp_path / "sb3_contrib.py").write_text("raise ImportError('No module named sb3_contrib')")
    command = [sys.executable, ROOT / "benchmarks/baselines.py"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].endswith(
        "sb3_contrib; pip install -r benchmarks/requirements.txt"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["sb3_contrib.py"]
