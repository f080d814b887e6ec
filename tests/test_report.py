"""The report, on made-up logs whose results are known."""

import importlib.util
import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("rliable")
from torch.utils.tensorboard import SummaryWriter

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import official
import report
import same_update

ARGS = {"env_id": "Hopper-v4", "env_kwargs": "{}", "seed": 1, "num_envs": 20, "learning_starts": 30_000, "diffusion_steps": 20,
        "total_timesteps": 230_000, "noise_scale": 0.1}  # fmt: skip
V2 = {"diffusion_steps": 5, "q_grad_weight": 0.01, "time_weight_c": 0.4, "time_weight_d": -1.8}


def make_run(folder, returns, *, every=1000, curves=None, **changes):
    """Writes the logs of a run that is evaluated every so many updates."""
    args = {**ARGS, **changes}
    path = folder / f"run{len(list(folder.iterdir()))}"
    writer = SummaryWriter(path)
    for i, value in enumerate(returns, start=1):
        step = args["learning_starts"] + i * every * args["num_envs"]
        writer.add_scalar("eval/episodic_return", value, step)
        for tag, point in (curves or {}).items():
            writer.add_scalar(tag, point, step)
    writer.close()
    (path / "args.json").write_text(json.dumps(args))
    return path


@pytest.fixture
def runs(tmp_path):
    (tmp_path / "runs").mkdir()
    return tmp_path / "runs"


def test_bootstrap_against_a_closed_form():
    """The mean of two resampled values is a, (a + b) / 2 or b with probabilities 1/4, 1/2, 1/4: the interval is [a, b]."""
    low, high = report.bootstrap(np.array([[1.0, 10.0], [5.0, 10.0]]))
    assert low.tolist() == [1, 10]
    assert high.tolist() == [5, 10]
    # Of many normal values it approaches mean +- 1.96 std / sqrt(n)
    values = np.random.default_rng(1).normal(3.0, 2.0, 400)
    low, high = report.bootstrap(values)
    assert low == pytest.approx(values.mean() - 1.96 * values.std() / 20, abs=0.02)
    assert high == pytest.approx(values.mean() + 1.96 * values.std() / 20, abs=0.02)
    assert report.interval([4.0]) == "4.00"
    assert report.interval([1.0, 5.0]) == "3.00 [1.00, 5.00]"


def test_the_highest_evaluation_in_the_last_tenth(runs):
    run = report.read_run(make_run(runs, [900, 1, 2, 3, 4, 5, 6, 7, 80, 9]))
    assert run.steps.tolist() == list(range(50_000, 250_000, 20_000))
    assert run.updates(run.steps).tolist() == list(range(1000, 11000, 1000))
    assert run.best() == 80  # of those after 207,000 steps: 210,000 and 230,000
    assert run.late(run.planned).tolist() == [80, 9]
    assert run.best(5000) == 4  # as if it had ended there: 110,000 and 130,000 are below and above 0.9 x 130,000
    assert run.state == "complete"


def test_differences_of_means(runs):
    """Two normal samples of two: 1 +- 4.303 sqrt(2/2 + 2/2), t(2) = 0.707 has p = 0.553. Single, dead and other runs: none."""
    assert report.difference([1, 3], [0, 2]) == "+1.00 [-5.08, 7.08], p = 0.55"
    assert report.difference([1, 1], [3, 3]) == "-2.00"
    assert report.difference([1000, 1001], [0, 1]) == "+1000 [997, 1003], p < 0.01"
    for seed in (1, 2):
        make_run(runs, [0, 1] * 4 + [2 * seed, 2 * seed - 1], seed=seed, **V2)  # second halves: 0.2 + 0.8 seed
        make_run(runs, [0] * 8 + [0, 2 * seed - 2], seed=seed)
        make_run(runs, [0] * (10 if seed == 1 else 5), seed=seed, diffusion_steps=5)
        make_run(runs, [0] * 20, seed=seed, diffusion_steps=10, total_timesteps=430_000)
    make_run(runs, [0] * 10, diffusion_steps=3)
    text = (report.main(report.Options(tuple(runs.iterdir()), runs.parent / "out")) / "report.md").read_text()
    (row,) = [line for line in text.splitlines() if "p = " in line and line.startswith("|")]
    seconds = report.difference([1.0, 1.8], [0.0, 0.4])
    assert row == f"| Hopper-v4 | DACERv2, T = 5 | DACER, T = 20 | +2.00 [-4.08, 8.08], p = 0.29 | {seconds} |"
    scores = [line.split(" | ")[1:7] for line in text.split("## Runs")[1].splitlines() if "| DACERv2" in line]
    assert scores == [["DACERv2, T = 5", seed, "10,000", "230,000", best, half] for seed, best, half in
                      (("1", "2.00", "1.00"), ("2", "4.00", "1.80"))]  # fmt: skip


def test_nearly_done(runs):
    """A run that lacks its last evaluation is not complete, however little is missing."""
    path = make_run(runs, [1, 2], total_timesteps=70_020, curves={"charts/SPS": 1.0})
    with SummaryWriter(path, filename_suffix=".later") as writer:
        writer.add_scalar("charts/SPS", 1.0, 70_000)
    assert report.read_run(path).state == "stopped at 99%"


def test_dead_and_nan_runs_are_shown(runs):
    dead = report.read_run(make_run(runs, [1, 2, 3]))
    assert dead.state == "stopped at 39%"
    assert np.isnan(dead.best())
    sick = report.read_run(make_run(runs, [1] * 8 + [float("nan")] * 2))
    assert sick.state == "NaN"
    assert np.isnan(sick.best())
    out = report.main(report.Options(tuple(runs.iterdir()), runs.parent / "out"))
    text = (out / "report.md").read_text()
    assert "| nan |" in text
    assert "| 3.00 at 3,000, nan at 10,000 | 1 NaN, 1 stopped at 39%, seed 1 occurs 2 times |" in text


def test_runs_without_an_evaluation_are_shown(runs):
    """Also one that died in its warm-up and logged nothing."""
    make_run(runs, [5] * 10)
    make_run(runs, [], seed=2)
    make_run(runs, [], seed=3, **V2)
    text = (report.main(report.Options(tuple(runs.iterdir()), runs.parent / "out")) / "report.md").read_text()
    assert "| Hopper-v4 | DACER, T = 20 | 1, 2 | 10,000 | nan | 0 to 2 | nan | 5.00 at 10,000, nan at 0 | " in text
    assert "| 1 complete, 1 not evaluated |" in text
    assert "| Hopper-v4 | DACERv2, T = 5 | 3 | 10,000 | nan | 0 | - | nan | 1 not evaluated |" in text
    assert text.count("| not evaluated |") == 2  # in the list of all runs


def test_lengths_are_not_mixed(runs):
    """Runs of different length are different groups; the default entropy interval, which follows it, is no difference."""
    for updates in (10_000, 20_000):
        for seed in (1, 2):
            make_run(runs, [updates / 100] * (updates // 1000), seed=seed, entropy_interval=round(updates / 150), **V2,
                     total_timesteps=30_000 + 20 * updates)  # fmt: skip
    make_run(runs, [7] * 20, total_timesteps=430_000)
    text = (report.main(report.Options(tuple(runs.iterdir()), runs.parent / "out")) / "report.md").read_text()
    assert "| Hopper-v4 | DACERv2, T = 5, updates = 10000 | 1, 2 | 10,000 | 100 [100, 100] | 2 | 0 | 100" in text
    assert "| Hopper-v4 | DACERv2, T = 5, updates = 20000 | 1, 2 | 20,000 | 200 [200, 200] | 3 | 0 | 200" in text
    assert "| Hopper-v4 | DACER, T = 20 | 1 | 20,000 | 7.00 |" in text


def test_a_step_that_was_logged_twice(runs):
    """As a resumed run of other code may do: the newer value counts, and the steps rise."""
    path = make_run(runs, [1, 2, 3, 4])
    with SummaryWriter(path, filename_suffix=".resumed") as writer:
        for step, value in ((90_000, 30), (110_000, 40), (130_000, 50)):
            writer.add_scalar("eval/episodic_return", value, step)
    run = report.read_run(path)
    assert run.steps.tolist() == [50_000, 70_000, 90_000, 110_000, 130_000]
    assert run.returns.tolist() == [1, 2, 30, 40, 50]


def test_groups(runs):
    """Runs are grouped by what their arguments say; what they differ in besides their seed is named."""
    for changes in ({}, {"seed": 2}, V2, {**V2, "q_grad_weight": 0.0}, {**V2, "time_weight_c": 0, "time_weight_d": 0},
                    {"diffusion_steps": 5}, {"label": "official DACER (JAX), T = 20"}):  # fmt: skip
        make_run(runs, [1, 2], **changes)
    found = [report.read_run(path) for path in sorted(runs.iterdir())]
    report.name_groups(found)
    groups = report.groups_of(found)
    assert {name: [run.seed for run in group] for name, group in groups.items()} == {
        "DACERv2, T = 5": [1], "DACERv2, T = 5, w = 1": [1], "DACERv2, T = 5, eta = 0": [1], "DACER, T = 5": [1],
        "DACER, T = 20": [1, 2], "official DACER (JAX), T = 20": [1],
    }  # fmt: skip
    make_run(runs, [1, 2], seed=3, noise_scale=0.2)
    found = [report.read_run(path) for path in sorted(runs.iterdir())]
    report.name_groups(found)
    assert "DACER, T = 20, lambda = 0.2" in report.groups_of(found)
    assert [run.seed for run in report.groups_of(found)["DACER, T = 20, lambda = 0.1"]] == [1, 2]
    make_run(runs, [1, 2], **{**V2, "q_grad_weight": 1.0})  # two etas: which of them has no temporal weighting?
    found = [report.read_run(path) for path in sorted(runs.iterdir())]
    report.name_groups(found)
    assert {"DACERv2, T = 5, eta = 1.0", "DACERv2, T = 5, w = 1, eta = 0.01"} <= report.groups_of(found).keys()
    make_run(runs, [1, 2], **{**V2, "diffusion_steps": 20, "time_weight_c": 0.1})  # one that varies two settings
    found = [report.read_run(path) for path in sorted(runs.iterdir())]
    report.name_groups(found)
    names = set(report.groups_of(found))
    assert {"DACERv2, T = 20, eta = 0.01, c = 0.1", "DACERv2, T = 5, w = 1, eta = 0.01"} <= names
    assert {"DACERv2, T = 5, eta = 0", "DACERv2, T = 5, eta = 0.01"} <= names


def ablation_rows(runs):
    text = (report.main(report.Options(tuple(runs.iterdir()), runs.parent / "out")) / "report.md").read_text()
    main, rest = text.split("## Ablations")
    rows = sorted(line for line in rest.split("## Runs")[0].splitlines() if line.startswith("| Hopper"))
    return main, [row.removeprefix("| Hopper-v4 | ") for row in rows]


def test_ablations_are_compared_after_equally_many_updates(runs):
    """They have a table of their own, up to where two were to go; one that stopped or failed is shown there, too."""
    for seed in (1, 2):
        make_run(runs, [i * 100 for i in range(1, 11)], seed=seed, **V2)
    make_run(runs, [700] * 5, **{**V2, "q_grad_weight": 0.0}, total_timesteps=130_000)
    make_run(runs, [300] * 2, **{**V2, "diffusion_steps": 2}, total_timesteps=130_000)
    make_run(runs, [800] * 4 + [float("nan")] * 3, **{**V2, "diffusion_steps": 10})
    make_run(runs, [600] * 5 + [float("nan")] * 3, **{**V2, "diffusion_steps": 10}, seed=2, total_timesteps=190_000)
    make_run(
        runs, [100] * 2, **{**V2, "diffusion_steps": 20, "q_grad_weight": 0.0}, total_timesteps=70_000
    )  # in no panel
    make_run(runs, [900] * 10)
    main, rows = ablation_rows(runs)
    assert (
        "| Hopper-v4 | DACERv2, T = 5 | 1, 2 | 10,000 | 1000 [1000, 1000] | 2 | 0 | 1000 [1000, 1000] | complete |"
        in main
    )
    assert "| Hopper-v4 | DACER, T = 20 | 1 | 10,000 | 900 |" in main
    assert "| Hopper-v4 | DACERv2, T = 20, eta = 0 | 1 | 2,000 | 100 |" in main
    assert "| Hopper-v4 | DACERv2, T = 5, eta = 0 | 1 | 5,000 | 700 |" in main
    assert "| DACERv2, T = 10, updates = 8000 |" in main
    assert "DACERv2, T = 10, updates = 10000" not in main  # it is among the ablations
    assert rows == [
        "DACERv2, T = 10 | 1 | 10,000 | nan | 0 | - | nan | 1 NaN |",
        "DACERv2, T = 5 | 1, 2 | 10,000 | 1000 [1000, 1000] | 2 | 0 | 1000 [1000, 1000] | complete |",
    ]


def test_a_short_trial_does_not_shorten_the_ablations(runs):
    """It stays in the table of returns; nor does it shorten the figure of times against returns, whose groups are longer."""
    for changes in (V2, {**V2, "q_grad_weight": 0.0}):
        for seed in (1, 2):
            make_run(runs, [500] * 10, seed=seed, **changes)
    make_run(runs, [50] * 3, **V2, total_timesteps=90_000)
    make_run(runs, [700] * 10)
    make_run(runs, [60] * 3, diffusion_steps=5, total_timesteps=90_000)
    main, rows = ablation_rows(runs)
    assert rows == [
        "DACERv2, T = 5 | 1, 2 | 10,000 | 500 [500, 500] | 2 | 0 | 500 [500, 500] | complete |",
        "DACERv2, T = 5, eta = 0 | 1, 2 | 10,000 | 500 [500, 500] | 2 | 0 | 500 [500, 500] | complete |",
    ]
    assert "| Hopper-v4 | DACERv2, T = 5, updates = 3000 | 1 | 3,000 | 50.0 | 1 | - | 50.0 | complete |" in main
    assert "![Hopper-v4: time against return](cost-Hopper-v4.png)" in main
    assert "Hopper-v4, not shown: DACERv2, T = 5, updates = 3000 (3,000 updates); DACER, T = 5 (3,000 updates)." in main


def test_a_shortened_run(runs):
    """Its name, its state and its numbers are those of a run of that length; another pace of alpha is named."""
    make_run(runs, [500] * 10, seed=1, **V2, entropy_interval=67)
    make_run(runs, [510] * 20, seed=2, **V2, entropy_interval=67, total_timesteps=430_000)
    make_run(runs, [520] * 12 + [float("nan")] * 3, seed=3, **V2, entropy_interval=67, total_timesteps=430_000)
    make_run(runs, [600] * 10, **{**V2, "q_grad_weight": 0.0}, entropy_interval=400)
    _, rows = ablation_rows(runs)
    assert rows == [
        "DACERv2, T = 5, entropy_interval = 67 | 1, 2, 3 | 10,000 | 510 [500, 520] | 2 | 10 | 510 [500, 520] | complete |",
        "DACERv2, T = 5, eta = 0, entropy_interval = 400 | 1 | 10,000 | 600 | 2 | - | 600 | complete |",
    ]


def test_highest_of_unequally_many_evaluations(runs):
    """It is not compared: the highest of more, or of noisier, evaluations is higher."""
    for seed in (1, 2):
        make_run(runs, [100] * 10, seed=seed)
        make_run(runs, [100] * 20, seed=seed, every=500, diffusion_steps=5)
        make_run(runs, [100] * 10, seed=seed, eval_episodes=1, diffusion_steps=10)
        make_run(runs, [100] * 10, seed=seed, eval_episodes=10, diffusion_steps=2)
    text = (report.main(report.Options(tuple(runs.iterdir()), runs.parent / "out")) / "report.md").read_text()
    rows = [line.split(" | ")[1:] for line in text.splitlines() if line.endswith(("| +0.00 |", "| +0 |"))]
    assert {(*sorted(row[:2]), row[2]) for row in rows} == {
        ("DACER, T = 2", "DACER, T = 5", "-"), ("DACER, T = 10", "DACER, T = 2", "-"), ("DACER, T = 2", "DACER, T = 20", "+0"),
        ("DACER, T = 10", "DACER, T = 5", "-"), ("DACER, T = 20", "DACER, T = 5", "-"), ("DACER, T = 10", "DACER, T = 20", "-"),
    }  # fmt: skip


def test_logs_of_other_code(runs):
    """With a label they take part, whatever else their arguments call by our names; with neither label nor T they do not."""
    make_run(runs, [1, 2], **{**V2, "diffusion_steps": 20})
    other = make_run(runs, [1, 2], label="DACERv2, theirs", q_grad_weight=0.3)
    args = json.loads((other / "args.json").read_text())
    del args["diffusion_steps"]
    (other / "args.json").write_text(json.dumps({**args, "env_kwargs": {}}))
    found = [report.read_run(path) for path in sorted(runs.iterdir())]
    report.name_groups(found)
    assert set(report.groups_of(found)) == {"DACERv2, T = 20", "DACERv2, theirs"}
    del args["label"]
    (other / "args.json").write_text(json.dumps(args))
    assert report.read_run(other) is None


def test_seeds_of_unequal_length(runs):
    """The mean goes as far as all seeds do."""
    make_run(runs, [1, 2, 3, 4])
    make_run(runs, [3, 6], seed=2)
    found = [report.read_run(path) for path in sorted(runs.iterdir())]
    steps, mean, low, high = report.mean_curve(found)
    assert steps.tolist() == [50_000, 70_000]
    assert mean.tolist() == [2, 4]
    assert low.tolist() == [1, 2]
    assert high.tolist() == [3, 6]


def test_interquartile_mean(runs):
    """Of 2 seeds x 2 tasks: the mean of the middle two of four normalised scores."""
    for task, scores in {"Hopper-v4": (410.4, 820.8), "HalfCheetah-v4": (5153.1, 6870.8)}.items():  # 0.1 0.2, 0.3 0.4
        for seed, score in enumerate(scores, start=1):
            make_run(runs, [0] * 9 + [score], seed=seed, env_id=task)
    make_run(runs, [0] * 9 + [1], **V2)  # one task alone: no mean over tasks
    found = [report.read_run(path) for path in sorted(runs.iterdir())]
    by_task = {task: [run for run in found if run.task == task] for task in ("Hopper-v4", "HalfCheetah-v4")}
    lines = report.iqm_table(by_task).splitlines()
    assert lines[3:] == ["", "On one task or of one seed alone: DACERv2, T = 5."]
    assert lines[2].startswith("| DACER, T = 20 | Hopper-v4, HalfCheetah-v4 | 10,000 | 2 | 0.250 [0.2")
    by_task["Hopper-v4"].append(report.read_run(make_run(runs, [float("nan")] * 10, seed=3)))
    lines = report.iqm_table(by_task).splitlines()
    assert (
        lines[2]
        == "| DACER, T = 20 | Hopper-v4, HalfCheetah-v4 | 10,000 | the first 2 of up to 3 | nan (1 NaN, 2 complete) |"
    )


def test_interquartile_means_over_the_same_tasks(runs):
    """Algorithms are compared on the tasks that they share; a task with one seed takes no part."""
    tasks = ("Hopper-v4", "Swimmer-v4", "HalfCheetah-v4")
    for seed in (1, 2):
        for task in tasks:
            make_run(runs, [0] * 9 + [1], seed=seed, env_id=task, **V2)
        for task in tasks[:2]:
            make_run(runs, [0] * 9 + [1], seed=seed, env_id=task)
    make_run(runs, [0] * 9 + [1], env_id=tasks[2])
    found = [report.read_run(path) for path in sorted(runs.iterdir())]
    lines = report.iqm_table({task: [run for run in found if run.task == task] for task in tasks}).splitlines()
    assert [line.split(" | ")[:2] for line in lines[2:]] == [
        ["| DACERv2, T = 5", "Hopper-v4, Swimmer-v4"],
        ["| DACER, T = 20", "Hopper-v4, Swimmer-v4"],
        ["| DACERv2, T = 5", "Hopper-v4, Swimmer-v4, HalfCheetah-v4"],
    ]


def test_the_whole_report(runs):
    """Every table and figure that the runs allow; missing seeds and tasks do not stop it."""
    for seed in (1, 2):
        make_run(runs, [10 * i for i in range(10)], seed=seed)
        make_run(runs, [20 * i for i in range(10)], seed=seed, **V2)
        make_run(runs, [15 * i for i in range(10)], seed=seed, **{**V2, "q_grad_weight": 0.0})
    make_run(runs, [15 * i for i in range(10)], **{**V2, "diffusion_steps": 2})
    goals = {"env_id": "multigoal_env:MultiGoal-v0", "env_kwargs": '{"num_goals": 6}'}
    for coverage, changes in ((0.5, {}), (0.9, V2), (0.7, {**V2, "seed": 2})):
        make_run(runs, [-100] * 10, curves={"eval/coverage": coverage, "eval/arrived": 1.0}, **goals, **changes)
    dead = {"eval/coverage": 0.4, "eval/arrived": 1.0}
    make_run(runs, [-100] * 2, curves=dead, diffusion_steps=5, **goals)
    make_run(runs, [-90] * 10, diffusion_steps=2, **goals)  # logged without coverage
    make_run(runs, [1] * 10, env_kwargs='{"x": 1}')  # other tasks, and other pictures
    make_run(runs, [1] * 10, env_kwargs='{"x": -1}')
    (runs / "logs").mkdir()  # what is no run is passed over
    out = report.main(report.Options(tuple(runs.iterdir()), runs.parent / "out"))
    text = (out / "report.md").read_text()
    assert "| Hopper-v4 | DACERv2, T = 5 | 1, 2 | 10,000 | 180 [180, 180] | 2 | 0 | 180 [180, 180] | complete |" in text
    assert "| 6 | DACERv2, T = 5 | 1, 2 | 10,000 | 0.80 +- 0.14 | 0.70 | 100.0% | -100 |" in text
    assert "| 6 | DACER, T = 5 | 1 | 10,000 (1 stopped at 30%) | 0.40 | 0.40 | 100.0% | -100 |" in text
    assert "| 6 | DACER, T = 2 | 1 | 10,000 | nan | nan | nan% | -90 |" in text
    assert "| DACER, T = 2 | 1 | 10,000 | 230,000 | nan | - |" in text.split("## Runs")[1]
    pictures = {"curves-Hopper-v4.png", "cost-Hopper-v4.png", "ablations-Hopper-v4.png", "curves-Hopper-v4-x-1.png",
                "curves-Hopper-v4-x--1.png"}  # fmt: skip
    assert pictures <= {path.name for path in out.iterdir()}
    for path in out.glob("*.png"):
        assert f"({path.name})" in text
        assert len(np.unique(report.plt.imread(path)[..., :3].reshape(-1, 3), axis=0)) > 20


def test_the_readme_says_what_the_report_says(tmp_path):
    """Its tables between the report's marks are those of the runs in this repository."""
    text = (ROOT / "README.md").read_text()
    # Of a clone whose user has trained, only the runs that came with it
    listed = subprocess.run(
        ["git", "-C", ROOT, "ls-files", "runs/*/args.json"], capture_output=True, text=True, check=False
    ).stdout.split()
    written = (
        report.main(report.Options(tuple((ROOT / name).parent for name in listed), tmp_path)) / "report.md"
    ).read_text()
    assert text.count("<!-- report: ") == text.count("<!-- end -->") > 0
    for part in text.split("<!-- report: ")[1:]:
        content = part.split("-->", 1)[1].split("<!-- end -->")[0].strip()
        assert content.startswith("| ")
        assert content in written


def test_bad_input(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        report.main(report.Options((tmp_path,), tmp_path / "out"))
    assert stopped.value.code == 2
    assert "none of these folders is that of a run" in capsys.readouterr().err


def test_comparison_with_the_official_code_on_bad_input(tmp_path, capsys, monkeypatch):
    """Training it, and updating it beside dacer.py, need JAX and a clone of the official repository: not tested here."""

    def said(main, args):
        with pytest.raises(SystemExit) as stopped:
            main(args)
        assert stopped.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    clone, run = tmp_path / "clone", tmp_path / "runs/HalfCheetah-v4__official_T20__1"
    train = partial(said, official.main, official.Args(clone, runs=tmp_path / "runs"))
    compare = partial(said, same_update.main, same_update.Args(clone, run))
    assert "is no clone of the official repository" in train()
    assert "is no clone of the official repository" in compare()
    (clone / "relax/algorithm").mkdir(parents=True)
    (clone / "relax/algorithm/dacer.py").touch()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "jax" else "found")
    assert "no module jax: what to install" in train()
    assert "no module jax: what to install" in compare()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: "found")
    for name in ("jax", "jax.numpy", "tensorboardX"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(numpy=None, SummaryWriter=None))
    run.mkdir(parents=True)
    (run / "args.json").write_text('{"learning_starts": 1}')
    assert "no state.pkl to go on from" in train()
    assert "is no folder of a run of benchmarks/official.py" in compare()
    (run / "state.pkl").touch()
    assert "is a run with other arguments" in train()
    assert (run / "args.json").read_text() == '{"learning_starts": 1}'
