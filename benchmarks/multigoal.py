"""The multi-goal task beside other people's algorithms.

It writes a table into README.md and docs/multigoal.md, and three figures into docs/figures/:

    python benchmarks/multigoal.py

It takes the evaluations and rollouts in results/, and the published policies under runs/. Shown are
the tasks of 4, 5 and 6 goals. `report.py runs/<run>` shows other runs on the task.
"""

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
# report.py has no colour of its own for eta = 5, the usual one of the short runs.
COLOURS = {label: report.COLOURS[label.replace(", eta = 5", "")] for label in OURS[1:]}
COLOURS |= dict.fromkeys(THEIRS, "0.35")
COLOURS[OURS[0]] = "#E69F00"
MARKERS = dict.fromkeys(OURS, "o") | dict(zip(THEIRS, "PXD*sv^<>"))
ROLLOUTS = report.RESULTS / "rollouts.npz"  # of 200 points on 4 goals, by run
FIGURES = report.ROOT / "docs" / "figures"
# README has a row for each of these, docs/multigoal.md for all.
IN_README = [OURS[0], "DACER, T = 20", THEIRS[0], THEIRS[3], "SAC", "DDPG"]


def read() -> pd.DataFrame:
    """A row for each run and evaluation; `label` names the algorithm and its settings."""
    files = ("evaluations.csv", "multigoal.csv")
    parts = [pd.read_csv(report.RESULTS / file).fillna({"kwargs": ""}) for file in files]
    data = report.prepare(pd.concat(parts, ignore_index=True).assign(yours=False))
    data["goals"] = data.kwargs.str.removeprefix("num_goals=")
    is_ours = data.algorithm.isin(["DACER", "DACERv2"])
    name = data.name.str.replace(r", total_timesteps = \d+", "", regex=True)
    data["label"] = name.where(is_ours, data.algorithm)
    order = {label: i for i, label in enumerate(OURS + THEIRS)}
    data = data.assign(order=data.label.map(order))
    data = data[data.goals.isin(["4", "5", "6"]) & data.label.isin(order)]
    return data.sort_values(["order", "goals", "run", "step"])


def table(runs: pd.DataFrame) -> str:
    """A row for each algorithm and number of updates, a column for each number of goals."""

    def cell(group: pd.DataFrame) -> str:
        worst = f"worst of {len(group)}: {group.coverage.min():.2f}" if len(group) > 1 else "1 seed"
        lost = f", {group.arrived.min():.0%} arrive" if group.arrived.min() < 0.995 else ""
        return f"{group.coverage.mean():.2f} ({worst}), {group['return'].mean():.0f}{lost}"

    rows, best = [], best_return()
    for (label, _), group in runs.groupby(["label", "total_timesteps"], sort=False):
        cells = {goals: cell(part) for goals, part in group.groupby("goals")}
        mean_return = group.groupby("goals")["return"].mean().mean()
        below = f"{round(100 * (mean_return / best - 1))}%"
        updates = f"{group['update'].max():,}" if label not in ("PPO", "TRPO") else "-"
        minutes = f"{60 * group.hours.min():.0f}"
        # Of the published runs these were on a GPU.
        is_our_long = label in OURS and group.total_timesteps.min() > 2 * SHORT
        if label in THEIRS[:3] or is_our_long:
            minutes += " (GPU)"
        shown = [cells.get(goals, "-") for goals in ("4", "5", "6")]
        rows.append([label, updates, minutes, *shown, below])
    header = "algorithm | updates | minutes | 4 goals | 5 goals | 6 goals | below the best return"
    return report.table(header, rows)


def best_values(gamma: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The best values, (2001,), at distances of 0 to 8 from the only goal; both, and the lengths of
    a step, (1001,). Value iteration over the distance, as straight ways are the best."""
    distance = np.linspace(0, 8, 2001)
    length = np.linspace(0, 1, 1001)
    after = np.abs(distance[:, None] - length)  # (2001, 1001)
    arrived = after < multigoal_env.ARRIVAL
    reward = -multigoal_env.ACTION_COST * length**2 - after**2 + multigoal_env.GOAL_REWARD * arrived
    value = np.zeros(len(distance))
    for _ in range(multigoal_env.MAX_STEPS):
        later = np.where(arrived, 0, np.interp(after, distance, value))
        value = (reward + gamma * later).max(1)
    return distance, value, length


def best_return() -> float:
    """The best return from the origin: -110.0."""
    distance, value, _ = best_values(gamma=1)
    return np.interp(multigoal_env.GOAL_RADIUS, distance, value)


def limit() -> str:
    """What the best first step is worth towards a goal, and between two."""
    distance, value, length = best_values(gamma=0.99)
    rows = []
    for goals in (4, 5, 6, 8, 12):
        radius, found = multigoal_env.GOAL_RADIUS, []
        for angle in (0, np.pi / goals):  # from the direction of the nearest goal
            after = np.sqrt(radius**2 + length**2 - 2 * radius * length * np.cos(angle))
            later = np.interp(after, distance, value)
            cost = multigoal_env.ACTION_COST * length**2
            found.append((-cost - after**2 + 0.99 * later).max())
        towards, between = found
        row = [goals, f"{towards:.1f}", f"{between:.1f}", f"{towards - between:.1f}"]
        rows.append([*row, f"{between / towards - 1:.0%}"])
    header = "goals | towards a goal | between two goals | depth of the valley"
    header += " | its share of the value"
    told = f"The best return from the origin is {best_return():.1f}. With a discount of 0.99, the"
    return f"{told} first step is worth\n\n{report.table(header, rows)}"


def trade(runs: pd.DataFrame) -> None:
    """Coverage against return on 6 goals, a point for each seed; larger ones for longer runs."""
    figure, axis = plt.subplots(layout="constrained", figsize=(9, 4.6))
    for label, group in runs[runs.goals == "6"].groupby("label", sort=False):
        sizes = np.where(group.total_timesteps > SHORT, 120, 36)
        style = {"color": COLOURS[label], "marker": MARKERS[label], "alpha": 0.6}
        axis.scatter(group["return"], group.coverage, sizes, label=label, **style)
    axis.set(xlabel="return", ylabel="coverage of 6 goals", xlim=(-280, -100))
    axis.grid(alpha=0.25)
    legend = axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    for handle in legend.legend_handles:
        handle.set_sizes([36])
    report.save(figure, FIGURES / "coverage-return.png")


def long(data: pd.DataFrame) -> None:
    """Coverage and return of the longer runs on 6 goals: means of seeds, and each."""
    figure, axes = plt.subplots(1, 2, layout="constrained", figsize=(11, 4))
    is_long = (data.total_timesteps > 2 * SHORT) & (data["update"] > 0)
    shown = data[is_long & (data.goals == "6")]
    for label, group in shown.groupby("label", sort=False):
        for axis, score in zip(axes, ("coverage", "return")):
            common = {"x": "update", "y": score, "color": COLOURS[label], "ax": axis}
            sns.lineplot(group, units="run", estimator=None, lw=0.5, **common)
            named = label if axis is axes[1] else None
            sns.lineplot(group, errorbar=None, lw=2, label=named, **common)
            axis.set(xlabel="updates", ylim=(0, 1) if score == "coverage" else (-240, -100))
            axis.grid(alpha=0.25)
    report.save(figure, FIGURES / "coverage-long.png")


def first_angle(path: np.ndarray, goals: np.ndarray) -> float:
    """The mean angle, in degrees, between the first steps of a path (t, n, 2) from the origin and
    the direction of the nearest goal.

    It is small for a policy whose modes are the goals. Of n goals, a direction drawn uniformly has
    90 / n.
    """

    def unit(vectors: np.ndarray) -> np.ndarray:
        return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)

    cosine = (unit(path[1] - path[0]) @ unit(goals).T).max(-1)
    return np.degrees(np.arccos(cosine.clip(-1, 1))).mean()


def rollouts(runs: pd.DataFrame) -> None:
    """Rollouts on 4 goals, from the origin.

    Of each algorithm it shows the median seed by coverage, of all seeds whose rollouts are there.
    """
    env = multigoal_env.MultiGoalEnv(4)
    paths = dict(np.load(ROLLOUTS))
    for folder in (report.ROOT / "runs").glob("goals4-*"):  # published policies
        run = multigoal_env.Run(folder)
        paths[folder.name], _ = env.rollouts(run.new_act(), np.zeros((200, 2)))
    panels = []
    for label, group in runs[runs.run.isin(paths)].groupby("label", sort=False):
        found = []
        for run, seed in zip(group.run, group.seed):
            distances = env.squared_distances(paths[run][-1])  # a path rests where it arrives
            goals = np.where(distances.min(-1) < multigoal_env.ARRIVAL**2, distances.argmin(-1), -1)
            found.append((multigoal_env.coverage(env.hits(goals)), seed, goals, paths[run]))
        found.sort(key=lambda one: one[:2])
        panels.append((label, found[(len(found) - 1) // 2]))
    rows = -(-len(panels) // 4)
    figure, axes = plt.subplots(rows, 4, layout="constrained", figsize=(9, 2.6 * rows))
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    for axis, (label, (score, seed, goals, path)) in zip(axes.flat, panels):
        multigoal_env.draw_plane(axis, env)
        colors = [multigoal_env.COLORS[goal] for goal in goals]
        shown = path.swapaxes(0, 1)[:80]
        axis.add_collection(LineCollection(shown, colors=colors, linewidths=0.6, alpha=0.7))
        axis.set(xlabel="", ylabel="", xticks=[], yticks=[])
        told = f"{score:.2f}, {env.hits(goals).tolist()}, {first_angle(path, env.goals):.0f}°"
        axis.set_title(f"{label}\nseed {seed}: {told}", fontsize=7)
    report.save(figure, FIGURES / "algorithms.png")


def write(page: Path, parts: dict[str, str]) -> None:
    """Puts each part between its mark and the next end."""
    text = page.read_text()
    for name, part in parts.items():
        pattern = re.compile(f"<!-- {name} -->\n.*?<!-- end -->", re.DOTALL)
        shown = f"<!-- {name} -->\n\n{part}\n\n<!-- end -->"
        text = pattern.sub(lambda _, shown=shown: shown, text)
    page.write_text(text)


def main() -> None:
    """The table and the figures."""
    data = read()
    last = report.summarise(data)
    trade(last)
    long(data)
    rollouts(last)
    told = last[last.label.isin(IN_README) & (last.total_timesteps <= 2 * SHORT)]
    write(report.ROOT / "README.md", {"multigoal": table(told)})
    write(report.ROOT / "docs" / "multigoal.md", {"multigoal": table(last), "limit": limit()})


if __name__ == "__main__":
    tyro.cli(main)
