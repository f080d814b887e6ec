"""The multi-goal task beside other people's algorithms: a table for README.md and docs/, three figures for docs/.

python benchmarks/multigoal.py                             # from results/, and the published policies under runs/
python benchmarks/multigoal.py runs/a runs/b               # first puts into results/ what these runs on the task show

Runs are those of dacer.py, dacer_v2.py, baselines.py and official.py; a run is called as its folder. Shown: 4, 5, 6 goals.
"""

import json
import re
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import tyro
from matplotlib.collections import LineCollection

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import report

import multigoal_env

SHORT = 230_000  # environment steps of a run of usual length
OURS = [f"DACERv2, T = 5, eta = {rest}" for rest in ("2, w = 1", "1", "5", "5, w = 1")]
OURS += ["DACER, T = 5", "DACER, T = 20"]
THEIRS = [f"{name} (DACER authors' JAX)" for name in ("QVPO", "DIPO", "QSM", "DSACT")]
THEIRS += ["SAC", "TD3", "DDPG", "PPO", "TRPO"]
COLOURS = {
    label: report.COLOURS[label.replace(", eta = 5", "")] for label in OURS[1:]
} | dict.fromkeys(THEIRS, "0.35")
COLOURS[OURS[0]] = "#E69F00"
MARKERS = dict.fromkeys(OURS, "o") | dict(zip(THEIRS, "PXD*sv^<>"))
CSV, KEPT, FIGURES = (
    report.RESULTS / "multigoal.csv",
    report.RESULTS / "rollouts.npz",
    report.ROOT / "docs" / "figures",
)


def collect(runs: tuple[Path, ...]) -> None:
    """Puts their evaluations into results/multigoal.csv, and rollouts on 4 goals into results/rollouts.npz."""
    parts, paths = [pd.read_csv(CSV)], dict(np.load(KEPT))
    for run in runs:
        rows, args = report.read_run(run), json.loads((run / "args.json").read_text())
        goals = json.loads(args["env_kwargs"]).get("num_goals", 4)
        if rows.task[0] != "MultiGoal-v0" or rows["return"].isna().any():
            print(
                f"multigoal.py: error: {run} holds no evaluations on the multi-goal task",
                file=sys.stderr,
            )
            raise SystemExit(2)
        told = {
            "run": run.name,
            "commit": args["commit"],
            "kwargs": f"num_goals={goals}",
            "lambda": args.get("noise_scale"),
        }
        parts[0] = parts[0][parts[0].run != run.name]
        parts.append(rows.assign(**told).dropna(axis=1, how="all"))
        if goals == 4 and (run / "rollouts.npz").exists():
            paths[run.name] = np.load(run / "rollouts.npz")["arr_0"].astype(np.float32)
    pd.concat(parts)[parts[0].columns].to_csv(CSV, index=False, float_format="%.5g")
    np.savez_compressed(KEPT, **paths)


def read() -> pd.DataFrame:
    """A row for each run and evaluation; `label` names the algorithm and its settings."""
    parts = [
        pd.read_csv(path).fillna({"kwargs": ""})
        for path in (report.RESULTS / "evaluations.csv", CSV)
    ]
    data = report.prepare(pd.concat(parts, ignore_index=True).assign(yours=False))
    data["goals"], own = (
        data.kwargs.str.removeprefix("num_goals="),
        data.algorithm.isin(["DACER", "DACERv2"]),
    )
    data["label"] = data.name.str.replace(r", total_timesteps = \d+", "", regex=True).where(
        own, data.algorithm
    )
    order = {label: i for i, label in enumerate(OURS + THEIRS)}
    data = data.assign(order=data.label.map(order))[
        data.goals.isin(["4", "5", "6"]) & data.label.isin(order)
    ]
    return data.sort_values(["order", "goals", "run", "step"])


def table(runs: pd.DataFrame) -> str:
    """A row for each algorithm and number of updates, a column for each number of goals."""

    def cell(group: pd.DataFrame) -> str:
        worst = f"worst of {len(group)}: {group.coverage.min():.2f}" if len(group) > 1 else "1 seed"
        lost = f", {group.arrived.min():.0%} arrive" if group.arrived.min() < 0.995 else ""
        return f"{group.coverage.mean():.2f} ({worst}), {group['return'].mean():.0f}{lost}"

    rows = []
    for (label, _), group in runs.groupby(["label", "total_timesteps"], sort=False):
        cells = {goals: cell(part) for goals, part in group.groupby("goals")}
        updates = f"{group['update'].max():,}" if label not in ("PPO", "TRPO") else "-"
        minutes = f"{60 * group.hours.min():.0f}"
        if label in THEIRS[:3] or (
            label in OURS and group.total_timesteps.min() > 2 * SHORT
        ):  # of those published
            minutes += " (GPU)"
        rows.append(
            [label, updates, minutes, *(cells.get(goals, "-") for goals in ("4", "5", "6"))]
        )
    return report.table("algorithm | updates | minutes | 4 goals | 5 goals | 6 goals", rows)


def save(figure: plt.Figure, name: str) -> None:
    figure.savefig(
        FIGURES / f"{name}.png", dpi=80, metadata={"Software": None}, pil_kwargs={"optimize": True}
    )
    plt.close(figure)


def trade(runs: pd.DataFrame) -> None:
    """Coverage against return on 6 goals, a point for each seed; larger ones for longer runs."""
    figure, axis = plt.subplots(layout="constrained", figsize=(9, 4.6))
    for label, group in runs[runs.goals == "6"].groupby("label", sort=False):
        sizes, style = (
            np.where(group.total_timesteps > SHORT, 120, 36),
            {"marker": MARKERS[label], "alpha": 0.6},
        )
        axis.scatter(
            group["return"], group.coverage, sizes, color=COLOURS[label], label=label, **style
        )
    axis.set(xlabel="return", ylabel="coverage of 6 goals", xlim=(-230, -100))
    axis.grid(alpha=0.25)
    for handle in axis.legend(
        fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5)
    ).legend_handles:
        handle.set_sizes([36])
    save(figure, "coverage-return")


def long(data: pd.DataFrame) -> None:
    """Coverage and return of the longer runs on 6 goals: means of seeds, and each."""
    figure, axes = plt.subplots(1, 2, layout="constrained", figsize=(11, 4))
    for label, group in data[(data.total_timesteps > 2 * SHORT) & (data["update"] > 0)].groupby(
        "label", sort=False
    ):
        for axis, score in zip(axes, ("coverage", "return")):
            common = {"x": "update", "y": score, "color": COLOURS[label], "ax": axis}
            sns.lineplot(group, units="run", estimator=None, lw=0.5, **common)
            sns.lineplot(
                group, errorbar=None, lw=2, label=label if axis is axes[1] else None, **common
            )
            axis.set(xlabel="updates", ylim=(0, 1) if score == "coverage" else (-240, -100))
            axis.grid(alpha=0.25)
    save(figure, "coverage-long")


def first_angle(path: np.ndarray, goals: np.ndarray) -> float:
    """Between the first steps of a path (t, n, 2) from the origin and the nearest goal's direction: mean, in degrees.

    Of a policy whose modes are the goals it is small; of n goals a direction drawn uniformly has 90 / n.
    """
    directions, steps = (
        x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (goals, path[1] - path[0])
    )
    return np.degrees(np.arccos((steps @ directions.T).max(-1).clip(-1, 1))).mean()


def rollouts(runs: pd.DataFrame) -> None:
    """On 4 goals, from the origin: of each algorithm the median seed by coverage, of all whose rollouts are there."""
    env, paths = multigoal_env.MultiGoalEnv(4), dict(np.load(KEPT))
    for folder in (report.ROOT / "runs").glob("goals4-*"):  # published policies
        run = multigoal_env.Run(folder)
        paths[folder.name], _ = env.rollouts(run.new_act(), np.zeros((200, 2)))
    groups, panels = runs[runs.run.isin(paths)].groupby("label", sort=False), []
    for label, group in groups:
        found = []
        for run, seed in zip(group.run, group.seed):
            distances = env.squared_distances(paths[run][-1])  # a path rests where it arrives
            goals = np.where(distances.min(-1) < multigoal_env.ARRIVAL**2, distances.argmin(-1), -1)
            found.append((multigoal_env.coverage(env.hits(goals)), seed, goals, paths[run]))
        panels.append((label, sorted(found, key=lambda one: one[:2])[(len(found) - 1) // 2]))
    figure, axes = plt.subplots(
        -(-len(panels) // 4), 4, layout="constrained", figsize=(9, 2.6 * -(-len(panels) // 4))
    )
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    for axis, (label, (score, seed, goals, path)) in zip(axes.flat, panels):
        multigoal_env.draw_plane(axis, env)
        colors = [multigoal_env.COLORS[goal] for goal in goals]
        axis.add_collection(
            LineCollection(path.swapaxes(0, 1)[:80], colors=colors, linewidths=0.6, alpha=0.7)
        )
        axis.set(xlabel="", ylabel="", xticks=[], yticks=[])
        told = f"{score:.2f}, {env.hits(goals).tolist()}, {first_angle(path, env.goals):.0f}°"
        axis.set_title(f"{label}\nseed {seed}: {told}", fontsize=7)
    save(figure, "algorithms")


def main(runs: tyro.conf.Positional[tuple[Path, ...]] = ()) -> None:
    """The table and the figures, of these runs too."""
    if runs:
        collect(runs)
    data = read()
    last = report.summarise(data)
    trade(last)
    long(data)
    rollouts(last)
    told = last[
        ~last.label.str.match("DACER, T = 5|.*eta = (1|5, w)") & (last.total_timesteps <= 2 * SHORT)
    ]
    for name, rows in {"README.md": told, "docs/multigoal.md": last}.items():
        page, shown = report.ROOT / name, f"<!-- multigoal -->\n\n{table(rows)}\n\n<!-- end -->"
        text = re.sub(
            "<!-- multigoal -->\n.*?<!-- end -->",
            lambda _, shown=shown: shown,
            page.read_text(),
            flags=re.DOTALL,
        )
        page.write_text(text)


if __name__ == "__main__":
    tyro.cli(main)
