"""benchmarks/speed.py on a tiny task, baselines.py end to end, official.py on bad input, eta.py,
film.py.

More of official.py needs JAX.
"""

import shutil
import sys
from pathlib import Path

import baselines
import eta
import numpy as np
import pandas as pd
import pytest
import speed
import torch
from helpers import ROOT, evaluate, program, shell

import dacer
import dacer_v2
from multigoal_env import MultiGoalEnv


@pytest.fixture
def read_run():
    """As the report reads a run."""
    pytest.importorskip("seaborn")
    import report

    return report.read_run


@pytest.fixture
def sb3():
    """The library whose algorithms baselines.py trains."""
    pytest.importorskip("sb3_contrib")
    return pytest.importorskip("stable_baselines3")


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


def test_official_without_its_code(work):
    ended = shell(ROOT / "benchmarks/official.py", "--code", work)
    assert ended.code == 2
    told = " ".join(ended.err.replace("│", "").split())
    assert f"--code {work} is no clone of the official repository" in told


def test_official_goes_on_with_the_code_of_its_run(work):
    """So --code is not looked at, and what is missing is the run."""
    ended = shell(ROOT / "benchmarks/official.py", "--code", work, "--resume", "missing")
    assert (ended.code, ended.err.count("\n")) == (2, 1)
    assert "no official checkpoint missing/checkpoint.pt: " in ended.err


@pytest.mark.parametrize("algorithm", ["TD3", "TRPO"])
def test_baselines(algorithm, sb3, read_run, work):
    """End to end: a run that the report reads, and a saved model."""
    args = baselines.Args(algorithm, total_timesteps=310, eval_interval=100, eval_episodes=2)
    rows = read_run(baselines.main(args))
    # TD3 takes 20 at once.
    assert rows.step.tolist() == [100, 200, 300, 320 if algorithm == "TD3" else 310]
    assert set(rows.algorithm) == {algorithm}
    assert rows[["return", "std", "coverage", "arrived"]].notna().all(axis=None)
    (run,) = Path("runs").iterdir()
    assert run.joinpath("model.zip").exists()
    assert np.load(run / "rollouts.npz")["arr_0"].shape[1:] == (200, 2)


def test_the_evaluation_of_baselines_is_that_of_the_scripts(sb3, read_run, work, monkeypatch):
    """A model that pushes with half the force, in a task with bounds of +-3, has the returns of a
    policy that does."""
    half = lambda model, obs, deterministic: (np.full((len(obs), 1), 1.5, np.float32), None)
    monkeypatch.setattr(sb3.SAC, "predict", half)
    args = baselines.Args("SAC", "InvertedPendulum-v4", total_timesteps=60, eval_episodes=3)
    (row,) = read_run(baselines.main(args)).to_dict("records")

    args = dacer.Args("InvertedPendulum-v4", eval_episodes=3)
    policy, seed = dacer.DiffusionPolicy(4, 1, (8,), 2), dacer.derive_seed(1, 60)
    policy.forward = lambda obs, noise: torch.full((len(obs), 1), 0.5)
    returns, _ = evaluate(dacer, policy, args, seed)
    assert (row["return"], row["std"]) == pytest.approx((returns.mean(), returns.std()))
    policy.forward = lambda obs, noise: torch.zeros(len(obs), 1)
    assert (evaluate(dacer, policy, args, seed)[0] != returns).any()


def test_evaluations_do_not_disturb_the_training_of_baselines(sb3, work):
    models = []
    for interval in (20, 1000):
        args = baselines.Args("SAC", "toy_envs:Global-v0", total_timesteps=200, eval_episodes=2)
        args.eval_interval = interval
        models.append(sb3.SAC.load(baselines.main(args) / "model").policy.state_dict())
    for name, value in models[0].items():
        assert torch.equal(value, models[1][name]), name


BAD = {
    "--env-id CartPole-v1": "CartPole-v1: no vector and bounded Box of real actions",
    "--env-id None-v0": "Environment `None` doesn't exist",
    "--algorithm A2C": "A2C",
    "--eval-episodes 0": "the other numbers 1 or more",
    "--eval-interval 0": "the other numbers 1 or more",
    "--total-timesteps 0": "the other numbers 1 or more",
    "--num-envs -1": "the other numbers 1 or more",
    "--seed -1": "--seed must be 0 or more",
    "--env-kwargs [1]": "--env-kwargs must be a JSON object",
}


@pytest.mark.parametrize("wrong", BAD)
def test_baselines_on_bad_input(wrong, sb3, work):
    ended = program(ROOT / "benchmarks/baselines.py", *wrong.split())
    assert ended.code == 2
    assert BAD[wrong] in ended.err
    assert "Traceback" not in ended.err
    assert not list(work.iterdir())


def test_baselines_without_their_packages(work, monkeypatch):
    monkeypatch.setitem(sys.modules, "sb3_contrib", None)
    ended = program(ROOT / "benchmarks/baselines.py")
    assert (ended.code, ended.err.count("\n")) == (2, 1)
    assert ended.err.startswith("baselines.py: error: import of sb3_contrib halted")
    assert ended.err.endswith("; pip install -r benchmarks/requirements.txt\n")
    assert not list(work.iterdir())


def test_eta(capsys):
    run = ROOT / "runs/goals4-v2-T5-eta2-w1-2"
    agent = dacer_v2.load_agent(run)
    with torch.no_grad():
        policy = agent.policy
        policy.eps_net[-1].weight.zero_()
        policy.eps_net[-1].bias.copy_(torch.tensor([0.3, -0.4]))
    lengths, std = eta.measure(agent, torch.zeros(4, 2))
    assert lengths == pytest.approx([0.5] * 5)
    with torch.no_grad():
        actions = policy(torch.zeros(5000, 2), policy.draw_noise(5000))
    assert std == pytest.approx(actions.std(0).mean().item(), rel=0.1)
    eta.main((run,))
    title, lengths, wanted = capsys.readouterr().out.splitlines()
    assert title.startswith(f"{run}: eta = 2, ")
    # L_g holds the length near w(t), which is 1 for this task.
    assert [float(number) for number in wanted.split()[-5:]] == [1.0] * 5
    assert [float(number) for number in lengths.split()[-4:]] == pytest.approx([1.0] * 4, abs=0.2)


def test_eta_of_dacer_and_of_no_run(work):
    ended = shell(ROOT / "benchmarks/eta.py", ROOT / "runs/goals4-dacer-T20-3")
    assert ended.code == 0, ended.err
    assert "w(t)" not in ended.out
    ended = shell(ROOT / "benchmarks/eta.py", "missing")
    assert (ended.code, ended.err.count("\n")) == (2, 1)
    assert ended.err.startswith("eta.py: error: no dacer checkpoint ")


def test_film(work):
    """Of the multi-goal task, which needs no display."""
    image = pytest.importorskip("PIL.Image")
    film = ROOT / "benchmarks/film.py", ROOT / "runs/goals4-v2-T5-eta2-w1-2", "goals.webp"
    ended = shell(*film, "--first", 0, "--task-kwargs", "{}")
    assert ended.code == 0, ended.err
    with image.open("goals.webp") as picture:
        assert picture.n_frames > 1
    ended = shell(*film, "--first", 100, "--task-kwargs", "{}")
    assert (ended.code, ended.err) == (
        2,
        "film.py: error: the episode ended before step 100: try another --first\n",
    )
    ended = shell(*film, "--first", 9, "--last", 8)
    assert ended.err == "film.py: error: --first must be 0 or more, and --last no smaller\n"
    kwargs = '{"max_episode_steps": 20}'
    policy = film[1] / "best.pt"
    assert shell(film[0], policy, "goals.gif", "--first", 0, "--task-kwargs", kwargs).code == 0
    ended = shell(*film, "--every", 0)
    assert (ended.code, ended.err) == (2, "film.py: error: --every must be 1 or more\n")
    ended = shell(*film[:2], "goals.mp4")
    assert ended.err == "film.py: error: goals.mp4 must end with .webp or .gif\n"


def test_films_that_cannot_be_made(work, monkeypatch):
    """Frames of a .gif take multiples of 10 ms, and pictures may need a display."""
    pytest.importorskip("PIL.Image")
    run = ROOT / "runs/goals4-v2-T5-eta2-w1-2"
    film = ROOT / "benchmarks/film.py", run, "goals.gif", "--first", 0, "--task-kwargs", "{}"
    monkeypatch.setitem(MultiGoalEnv.metadata, "render_fps", 125)
    ended = program(*film)
    assert ended.code == 2
    assert ended.err.startswith("film.py: error: frames of a .gif take multiples of 10 ms")

    def render(env):
        raise RuntimeError("no OpenGL context")

    monkeypatch.setattr(MultiGoalEnv, "render", render)
    ended = program(*film)
    assert (ended.code, ended.err.count("\n")) == (2, 1)
    assert ended.err.endswith(". Without a display, set MUJOCO_GL=egl\n")
    assert not list(work.iterdir())


def test_measuring_nothing_is_refused(work):
    ended = program(ROOT / "benchmarks/speed.py", "--turns", 0)
    assert (ended.code, ended.err) == (2, "speed.py: error: --turns must be 1 or more\n")
    assert program(ROOT / "benchmarks/speed.py", "--tasks", "Walker").code == 2
    assert not list(work.iterdir())
