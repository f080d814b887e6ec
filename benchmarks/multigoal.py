"""The multi-goal task, side by side with other people's algorithms: one table and three figures.

python benchmarks/multigoal.py                             # from results/ into docs/ and README, at `<!-- multigoal -->`
python benchmarks/multigoal.py runs/a runs/b ...           # collects into results/ what such runs show, before

Runs are those of dacer.py, dacer_v2.py, baselines.py and official.py; their folder's name becomes the run's.
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

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import report

import multigoal_env

RESULTS, FIGURES = report.RESULTS, report.ROOT / "docs" / "figures"
SHORT = 230_000  # environment steps of a run of usual length
OURS = [f"DACERv2, T = 5, eta = {rest}" for rest in ("1", "5", "5, w = 1")] + ["DACER, T = 5", "DACER, T = 20"]
ORDER = [*OURS, *(f"official {name} (JAX)" for name in ("QVPO", "DIPO", "QSM", "DSACT"))]
ORDER += ["SAC", "TD3", "DDPG", "PPO", "TRPO"]
COLOURS = dict(zip(ORDER, sns.color_palette("tab20", len(ORDER))))


def collect(runs: tuple[Path, ...]) -> None:
    """Their evaluations into results/multigoal.csv; of runs on 4 goals the rollouts, too, into rollouts.npz beside it."""
    path, new, paths = RESULTS / "multigoal.csv", [], kept()
    for run in runs:
        args = json.loads((run / "args.json").read_text())
        new.append(report.read_run(run).assign(run=run.name, commit=args["commit"]))
        if "4" in args["env_kwargs"] and (run / "rollouts.npz").exists():
            paths[run.name] = np.load(run / "rollouts.npz")["arr_0"].astype(np.float16)
    np.savez_compressed(RESULTS / "rollouts", **paths)
    columns = pd.read_csv(RESULTS / "evaluations.csv", nrows=0).columns
    old = pd.read_csv(path) if path.exists() else pd.DataFrame(columns=columns)
    rows = pd.concat([old[~old.run.isin([run.name for run in runs])], *new])
    rows.reindex(columns=columns).drop(columns=["update"]).to_csv(path, index=False, float_format="%.5g")


def kept() -> dict[str, np.ndarray]:
    """Paths (steps + 1, 200, 2) of rollouts from the origin, by their run."""
    return dict(np.load(RESULTS / "rollouts.npz")) if (RESULTS / "rollouts.npz").exists() else {}


def read() -> pd.DataFrame:
    """One row per run and evaluation on 4, 5 and 6 goals; `label` names the algorithm and its settings."""
    parts = [pd.read_csv(RESULTS / name).fillna({"kwargs": ""}) for name in ("evaluations.csv", "multigoal.csv")]
    data = report.prepare(pd.concat(parts, ignore_index=True).assign(yours=False))
    data["goals"] = data.kwargs.str.removeprefix("num_goals=")
    own = data.algorithm.isin(["DACER", "DACERv2"])
    data["label"] = data.name.str.replace(r", total_timesteps = \d+", "", regex=True).where(own, data.algorithm)
    data = data[data.goals.isin(["4", "5", "6"]) & (~own | data.label.isin(OURS))]
    return data.assign(order=data.label.map(ORDER.index)).sort_values(["order", "goals", "run", "step"])


def table(runs: pd.DataFrame) -> str:
    """A row for each algorithm and number of updates, a column for each number of goals."""

    def cell(group: pd.DataFrame) -> str:
        lost = f", {group.arrived.min():.0%} arrive" if group.arrived.min() < 1 else ""
        worst = f" ({group.coverage.min():.2f} of {len(group)})" if len(group) > 1 else " (1 seed)"
        return f"{group.coverage.mean():.2f}{worst}, {group['return'].mean():.0f}{lost}"

    rows = []
    for (label, _), group in runs.groupby(["label", "total_timesteps"], sort=False):
        cells = {goals: cell(part) for goals, part in group.groupby("goals")}
        updates = f"{group['update'].max() if group.num_envs.iloc[0] > 1 else 0:,}"
        rows.append([label, updates, *(cells.get(goals, "-") for goals in ("4", "5", "6"))])
    return report.table("algorithm | updates | 4 goals | 5 goals | 6 goals", rows)


def new_figure(width: float, height: float, *shape: int) -> tuple:
    figure = plt.figure(layout="constrained", figsize=(width, height))
    return figure, figure.subplots(*shape)


def save(figure: plt.Figure, name: str) -> None:
    figure.savefig(FIGURES / f"{name}.png", dpi=80, metadata={"Software": None}, pil_kwargs={"optimize": True})
    plt.close(figure)


def trade(runs: pd.DataFrame) -> None:
    """Coverage against return on 6 goals, a point for each seed; larger ones after 50,000 updates."""
    figure, axis = new_figure(8, 4.6)
    runs, least = runs[runs.goals == "6"], -230
    for label, group in runs.groupby("label", sort=False):
        sizes = np.where(group.total_timesteps > SHORT, 110, 30)
        axis.scatter(group["return"].clip(lower=least), group.coverage, sizes, COLOURS[label], alpha=0.75, label=label)
    axis.axvline(least, color="0.6", ls=":", lw=1)
    axis.set(xlabel=f"return (dotted: {least} or less)", ylabel="coverage of 6 goals")
    axis.grid(alpha=0.25)
    legend = axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    for handle in legend.legend_handles:
        handle.set_sizes([30])
    save(figure, "coverage-return")


def long(data: pd.DataFrame) -> None:
    """Coverage and return over 50,000 updates on 6 goals: means of seeds, and each."""
    figure, axes = new_figure(11, 4, 1, 2)
    data = data[(data.total_timesteps > SHORT) & (data["update"] > 0)]
    for axis, score in zip(axes, ("coverage", "return")):
        for label, group in data.groupby("label", sort=False):
            common = {"x": "update", "y": score, "color": COLOURS[label], "ax": axis}
            sns.lineplot(group, units="run", estimator=None, lw=0.6, **common)
            sns.lineplot(group, errorbar=None, lw=2, label=label if score == "return" else None, **common)
        axis.set(xlabel="updates", ylabel=score, ylim=(0, 1) if score == "coverage" else (-240, -100))
        axis.grid(alpha=0.25)
    axes[1].legend(fontsize=8)
    save(figure, "coverage-long")


def rollouts(runs: pd.DataFrame) -> None:
    """200 rollouts from the origin on 4 goals: of each algorithm the median seed of those that are kept."""
    env, paths = multigoal_env.MultiGoalEnv(4), kept()
    runs = runs[(runs.goals == "4") & (runs.total_timesteps <= SHORT)]
    for name in [name for name in runs.run if (report.ROOT / "runs" / name).exists()]:  # published policies
        run = multigoal_env.Run(report.ROOT / "runs" / name)
        paths[name], _ = env.rollouts(run.new_act(), np.zeros((200, 2)))
    groups = list(runs[runs.run.isin(paths)].groupby("label", sort=False))
    rows = -(-len(groups) // 4)
    figure, axes = new_figure(10.5, 2.9 * rows, rows, 4)
    for axis in axes.flat[len(groups) :]:
        axis.set_axis_off()
    for axis, (label, group) in zip(axes.flat, groups):
        run = group.sort_values("coverage").iloc[(len(group) - 1) // 2]
        path, distances = paths[run.run], env.squared_distances(paths[run.run][-1])
        goals = np.where(distances.min(-1) < multigoal_env.ARRIVAL**2, distances.argmin(-1), -1)
        multigoal_env.draw_plane(axis, env)
        for one, goal in zip(path.swapaxes(0, 1), goals):
            axis.plot(*one.T, color=multigoal_env.COLORS[goal], lw=0.7, alpha=0.6)
        axis.set(xlabel="", ylabel="", xticks=[], yticks=[])
        hits = env.hits(goals)
        axis.set_title(
            f"{label}, seed {run.seed}\ncoverage {multigoal_env.coverage(hits):.2f} {hits.tolist()}", fontsize=8
        )
    save(figure, "algorithms")


def main(runs: tyro.conf.Positional[tuple[Path, ...]] = ()) -> None:
    """The table and the figures, after collecting these runs."""
    if runs:
        collect(runs)
    data = read()
    last = report.summarise(data)
    trade(last)
    long(data)
    rollouts(last)
    pattern = re.compile(r"(<!-- multigoal -->\n).*?(<!-- end -->)", re.DOTALL)
    for path in report.ROOT / "README.md", report.ROOT / "docs" / "multigoal.md":
        path.write_text(pattern.sub(lambda mark: f"{mark[1]}\n{table(last)}\n\n{mark[2]}", path.read_text()))


if __name__ == "__main__":
    tyro.cli(main)
