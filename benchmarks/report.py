"""Figures and tables of all runs, from what they logged: learning curves, the papers' table, ablations, cost.

    python benchmarks/report.py                       # all runs under runs/, into benchmarks/report/
    python benchmarks/report.py runs/Hopper* --out /tmp/report

Needs `pip install -r benchmarks/requirements.txt`. Runs of a task that differ in nothing but their seed form a group; runs of
different length do not. A run that stopped early, was never evaluated, or whose numbers ceased to be finite, is marked as
such and takes part with what it has; nothing is left out. A run that was logged by other code takes part as well if its
folder has an args.json with at least env_id, seed, label, num_envs, learning_starts and total_timesteps, and its evaluations
are called eval/episodic_return, the mean of 10 episodes or of as many as eval_episodes says.
"""

import itertools
import json
import math
import re
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NoReturn

import matplotlib as mpl
import numpy as np
import tyro
from scipy import stats
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

mpl.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parent.parent
# Okabe and Ito's, with wine for their yellow
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#882255"]
RESAMPLES = 5000

# Published returns, to draw a line at, never as if run here: value, what, at which budget
DACER_PAPER = "DACER, paper (30 M steps, v3 tasks)"
SAC_CLEANRL = "SAC, CleanRL (1 M steps and updates)"  # one update follows each step, not each 20
PUBLISHED = {
    "HalfCheetah-v4": {DACER_PAPER: 17177, SAC_CLEANRL: 9635},
    "Hopper-v4": {DACER_PAPER: 4104, SAC_CLEANRL: 2310},
    "Swimmer-v4": {DACER_PAPER: 152},
    "Walker2d-v4": {DACER_PAPER: 6701, SAC_CLEANRL: 3591},
    "Ant-v4": {DACER_PAPER: 9108},
    "Humanoid-v4": {DACER_PAPER: 11888, SAC_CLEANRL: 4996},
}


@dataclass
class Options:
    runs: tyro.conf.Positional[tuple[Path, ...]] = ()
    """folders of runs; none: all under runs/"""
    out: Path = ROOT / "benchmarks" / "report"
    """folder for report.md and the figures"""
    readme: bool = False
    """put the tables into README.md as well"""


@dataclass
class Run:
    """One run: evaluations at environment steps, in rising order, and what its arguments say."""

    path: Path
    args: dict
    task: str
    label: str  # algorithm, T, and the settings of the papers' ablations
    group: str  # the same, and what else sets it apart from other runs of its task
    seed: int
    steps: np.ndarray  # (n,)
    returns: np.ndarray  # (n,)
    coverage: np.ndarray  # (n,) on the multi-goal task, else (0,)
    final: dict[str, float]  # the last value of every other curve
    trained: int  # environment steps of the last point of any curve
    hours: float
    style: tuple[str, str] = ("black", "-")  # colour and line style, the same for a group in all figures
    shortened: bool = False  # by `until`

    @property
    def scores(self) -> np.ndarray:
        """What its task is judged by, at `steps`: coverage on the multi-goal task, else returns."""
        return self.coverage if len(self.coverage) else self.returns

    def updates(self, steps: np.ndarray | int) -> np.ndarray | int:
        """Updates at these environment steps: one follows each vector step after the warm-up."""
        return steps // self.args["num_envs"] - math.ceil(self.args["learning_starts"] / self.args["num_envs"])

    @property
    def planned(self) -> int:
        """Updates of the whole run, as its arguments ask for."""
        return self.updates(self.args["total_timesteps"])

    @property
    def state(self) -> str:
        total = self.args["total_timesteps"] // self.args["num_envs"] * self.args["num_envs"]
        if not np.isfinite([*self.returns, *self.final.values()]).all():
            return "NaN"
        if not len(self.steps):
            return "not evaluated"
        done = self.shortened or self.steps[-1] >= total
        return "complete" if done else f"stopped at {math.floor(100 * self.trained / total)}%"

    def until(self, updates: int) -> "Run":
        """A copy as if so many updates had been asked for; what was logged later takes no part."""
        total = (math.ceil(self.args["learning_starts"] / self.args["num_envs"]) + updates) * self.args["num_envs"]
        run = replace(self, args={**self.args, "total_timesteps": min(total, self.args["total_timesteps"])})
        if self.trained > total:
            kept = self.steps <= total
            coverage = self.coverage[kept] if len(self.coverage) else self.coverage
            run = replace(run, steps=self.steps[kept], returns=self.returns[kept], coverage=coverage, final={},
                          trained=total, shortened=True)  # fmt: skip
        return run

    def late(self, updates: int) -> np.ndarray:
        """Evaluations in the last tenth of the environment steps up to so many updates."""
        total = (math.ceil(self.args["learning_starts"] / self.args["num_envs"]) + updates) * self.args["num_envs"]
        return self.returns[(self.steps > 0.9 * total) & (self.steps <= total)]

    def best(self, updates: int | None = None) -> float:
        """The papers' score of a run: its highest evaluation in the last 10%; NaN counts as NaN, and so does none."""
        late = self.late(self.planned if updates is None else updates)
        return float(late.max()) if len(late) else math.nan

    def second_half(self) -> float:
        """The mean of its evaluations after more than half of the updates: of less chance than the highest one."""
        late = self.returns[2 * self.updates(self.steps) > self.planned]
        return float(late.mean()) if len(late) else math.nan


def fail(message: str) -> NoReturn:
    """Ends the program with one line on stderr and exit code 2."""
    print(f"report.py: error: {message}", file=sys.stderr)
    raise SystemExit(2)


def base_label(args: dict) -> str:
    """Algorithm, T, and the settings of the papers' ablations."""
    if "label" in args:
        return args["label"]
    v2 = "q_grad_weight" in args
    parts = ["DACERv2" if v2 else "DACER", f"T = {args['diffusion_steps']}"]
    if v2 and args["q_grad_weight"] == 0:
        parts.append("eta = 0")
    elif v2 and args["time_weight_c"] == args["time_weight_d"] == 0:
        parts.append("w = 1")
    return ", ".join(parts)


# What does not make a run another one: where it ran, how it is watched and called, its seed and length
NO_SETTING = {"seed", "exp_name", "device", "compile", "total_timesteps", "eval_interval", "eval_episodes", "evaluate",
              "capture_video", "checkpoint_interval", "save_replay_buffer", "resume", "env_id", "env_kwargs", "tf32",
              "entropy_samples", "label"}  # fmt: skip


SYMBOLS = {"q_grad_weight": "eta", "noise_scale": "lambda", "time_weight_c": "c", "time_weight_d": "d"}


def read_run(path: Path) -> Run | None:
    """The run in a folder; None if the folder has no arguments of one."""
    try:
        args = json.loads((path / "args.json").read_text())
    except (OSError, ValueError):
        return None
    if not {"env_id", "seed", "num_envs", "learning_starts", "total_timesteps"} <= args.keys():
        return None
    if "label" not in args and "diffusion_steps" not in args:
        return None
    events = EventAccumulator(str(path), size_guidance={"scalars": 0}).Reload()
    curves = {tag: events.Scalars(tag) for tag in events.Tags()["scalars"]}
    kwargs = args.get("env_kwargs", {})
    kwargs = json.loads(kwargs) if isinstance(kwargs, str) else kwargs
    task = " ".join([args["env_id"].split(":")[-1], *(f"{name}={value}" for name, value in kwargs.items())])
    evaluations, coverage = (
        {e.step: e.value for e in curves.get(tag, [])} for tag in ("eval/episodic_return", "eval/coverage")
    )
    steps = sorted(evaluations)  # of a step that was logged twice, the newest value
    times = sorted(e.wall_time for points in curves.values() for e in points)
    hours = sum(gap for gap in np.diff(times) if gap < 600) / 3600  # longer ones lie between a run and its resumption
    return Run(
        path, args, task, base_label(args), base_label(args), args["seed"], np.array(steps, int),
        np.array([evaluations[step] for step in steps]), np.array([coverage.get(step, math.nan) for step in steps if coverage]),
        {tag: points[-1].value for tag, points in curves.items()},
        max((points[-1].step for points in curves.values()), default=0), hours,
    )  # fmt: skip


def settings_of(run: Run) -> dict:
    """What makes a run what it is, besides its task, label and seed."""
    settings = {name: value for name, value in run.args.items() if name not in NO_SETTING} | {"updates": run.planned}
    if settings.get("entropy_interval") == max(1, round(run.planned / 150)):  # the default, which follows the length
        del settings["entropy_interval"]
    return settings


def is_v2(run: Run) -> bool:
    """Whether this is a run of dacer_v2.py; what other code calls by its names says nothing."""
    return "q_grad_weight" in run.args and "label" not in run.args


def is_ablation(run: Run) -> bool:
    """Whether this is DACERv2 other than the papers have it: their figure 4 compares such runs."""
    return is_v2(run) and run.label != "DACERv2, T = 5"


def name_groups(runs: list[Run]) -> None:
    """Adds to the names of groups the settings in which runs of one task and one label differ; gives each name a style."""
    for task, label in {(run.task, run.label) for run in runs}:
        same = [run for run in runs if (run.task, run.label) == (task, label)]
        settings = [settings_of(run) for run in same]
        names = {k for one in settings for k in one if any(other.get(k) != one[k] for other in settings)}
        if is_ablation(same[0]) and "eta = 0" not in label:  # its eta and c, where this task's runs vary them
            guided = [run for run in runs if run.task == task and is_v2(run) and "eta = 0" not in run.label]
            if len({run.args["q_grad_weight"] for run in guided}) > 1:
                names.add("q_grad_weight")
            weighted = [run for run in guided if "w = 1" not in run.label]
            if "w = 1" not in label and len({run.args["time_weight_c"] for run in weighted}) > 1:
                names.add("time_weight_c")
        names = sorted(names)
        for run, setting in zip(same, settings):
            values = run.args | setting
            extra = [f"{SYMBOLS.get(name, name)} = {values.get(name, 'default')}" for name in names]
            run.group = ", ".join([label, *extra])
    names = sorted({(is_ablation(run), run.group != run.label, *order(run.group)) for run in runs})  # plain ones first
    styles = {name[-1]: (COLOURS[i % 8], ("-", "--", ":", "-.")[i // 8 % 4]) for i, name in enumerate(names)}
    for run in runs:
        run.style = styles[run.group]


def order(name: str) -> tuple:
    return not name.startswith("DACERv2"), len(name), name


def groups_of(runs: list[Run]) -> dict[str, list[Run]]:
    """Runs by group, in the order of their names, each by seed."""
    names = sorted({run.group for run in runs}, key=order)
    return {name: sorted((run for run in runs if run.group == name), key=lambda run: run.seed) for name in names}


def state_of(group: list[Run]) -> str:
    """The states of a group's runs: `complete` if all are, else how many are what; and whether a seed occurs twice."""
    states = Counter(run.state for run in group)
    said = (
        ["complete"] if set(states) == {"complete"} else [f"{count} {state}" for state, count in sorted(states.items())]
    )
    seeds = Counter(run.seed for run in group)
    return ", ".join(said + [f"seed {seed} occurs {count} times" for seed, count in seeds.items() if count > 1])


def bootstrap(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """95% percentile bootstrap interval of the mean over the first axis: values (n, ...) to two bounds (...)."""
    picks = np.random.default_rng(0).integers(len(values), size=(RESAMPLES, len(values)))
    return tuple(np.percentile(values[picks].mean(1), [2.5, 97.5], axis=0))


def mean_curve(runs: Sequence[Run]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Environment steps at which every run was evaluated, and there the mean and its interval (of one run: itself)."""
    steps = sorted(set.intersection(*(set(run.steps.tolist()) for run in runs)))
    values = np.array([run.scores[np.isin(run.steps, steps)] for run in runs])
    low, high = bootstrap(values) if len(runs) > 1 else (values[0], values[0])
    return np.array(steps, int), values.mean(0), low, high


def draw_curves(axis: plt.Axes, runs: list[Run], by_update: bool = False) -> None:
    """Mean and interval over the seeds of every group, as far as all go; each seed thin, with a cross where one stopped."""
    for name, group in groups_of(runs).items():
        colour, line = group[0].style
        state = state_of(group)
        evaluated = [run for run in group if len(run.steps)]
        note = f"{len(group)} seed{'s' * (len(group) > 1)}{'' if state == 'complete' else ', ' + state}"
        if not evaluated:
            axis.plot([], [], color=colour, ls=line, label=f"{name} ({note})")
            continue
        x = (lambda s, run=group[0]: run.updates(s)) if by_update else (lambda s: s / 1e6)
        steps, mean, low, high = mean_curve(evaluated)
        axis.plot(x(steps), mean, color=colour, ls=line, marker=".", ms=4, label=f"{name} ({note})", lw=1.6)
        axis.fill_between(x(steps), low, high, color=colour, alpha=0.15, lw=0)
        for run in evaluated:
            axis.plot(x(run.steps), run.scores, color=colour, lw=0.5, alpha=0.5)
            if run.state != "complete":
                axis.plot(x(run.steps[-1]), run.scores[-1], "x", color=colour, ms=6)
    axis.set_xlabel("updates" if by_update else "environment steps (millions)")
    axis.grid(alpha=0.25)


def save_figure(figure: plt.Figure, path: Path) -> None:
    figure.savefig(path, dpi=110, bbox_inches="tight", metadata={"Software": None})
    plt.close(figure)


def learning_curves(task: str, runs: list[Run], path: Path) -> None:
    """Returns against environment steps and against updates, with published results as lines where they fit."""
    figure, axes = plt.subplots(1, 2, figsize=(12, 4.2), sharey=True)
    for axis, by_update in zip(axes, (False, True)):
        draw_curves(axis, runs, by_update)
    top = max((value for run in runs for value in run.returns if math.isfinite(value)), default=0)
    for style, (what, value) in zip(("--", ":"), PUBLISHED.get(task, {}).items()):
        if value < 3 * max(top, 0):
            axes[0].axhline(value, color="0.3", ls=style, lw=1, label=what)
    axes[0].set_ylabel("return, no exploration noise")
    axes[0].set_title(f"{task}: mean and 95% bootstrap interval over seeds", loc="left", fontsize=10)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper center", bbox_to_anchor=(0.5, 0.0), ncol=2, fontsize=8, frameon=False)
    save_figure(figure, path)


def decimals(values: Sequence[float]) -> int:
    """Digits after the point that show the largest of the values with three digits, of thousands with all."""
    largest = max((abs(value) for value in values if math.isfinite(value)), default=0.0)
    return int(np.clip(2 - np.floor(np.log10(largest)), 0, 6)) if largest > 0 else 0


def interval(values: Sequence[float]) -> str:
    """Mean and 95% interval; of a single value, itself."""
    values, digits = np.asarray(values, float), decimals(values)
    if len(values) == 1 or not np.isfinite(values).all():
        return f"{values.mean():.{digits}f}"
    low, high = bootstrap(values)
    return f"{values.mean():.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def deviation(values: Sequence[float], digits: int) -> str | None:
    """Standard deviation over seeds, of the sample (n - 1); None for a single one."""
    return f"{np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else None


def returns_table(by_task: dict[str, list[Run]]) -> str:
    rows = []
    for task, runs in by_task.items():
        for name, group in groups_of(runs).items():
            best = [run.best() for run in group]
            last = [(run.returns[-1], run.updates(run.steps[-1])) if len(run.steps) else (math.nan, 0) for run in group]
            ends = interval([value for value, _ in last])
            if len({updates for _, updates in last}) > 1:  # no mean over different lengths
                digits = decimals([value for value, _ in last])
                ends = ", ".join(f"{value:.{digits}f} at {updates:,}" for value, updates in last)
            counts = sorted({len(run.late(run.planned)) for run in group})
            late = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
            rows.append([task, name, ", ".join(str(run.seed) for run in group), f"{group[0].planned:,}",
                         interval(best), late, deviation(best, decimals(best)) or "-", ends, state_of(group)])  # fmt: skip
    header = ["task", "algorithm", "seeds", "updates", "highest evaluation in the last 10%, mean [95% interval]", "evaluations there",
              "std", "last evaluation", "state"]  # fmt: skip
    return table(header, rows)


def difference(first: Sequence[float], second: Sequence[float]) -> str:
    """Difference of two means, with its 95% interval and p by Welch's t-test; of values without spread, itself."""
    mean, digits = np.mean(first) - np.mean(second), decimals([*first, *second])
    if np.ptp(first) == np.ptp(second) == 0:
        return f"{mean:+.{digits}f}"
    test = stats.ttest_ind(first, second, equal_var=False)
    low, high = test.confidence_interval()
    p = f"p = {test.pvalue:.2f}" if test.pvalue >= 0.005 else "p < 0.01"
    return f"{mean:+.{digits}f} [{low:.{digits}f}, {high:.{digits}f}], {p}"


def differences_table(by_task: dict[str, list[Run]]) -> str | None:
    """All pairs of complete groups of a task with two seeds or more and equally many updates; None without any."""
    rows, omitted = [], []
    for task, runs in by_task.items():
        groups = groups_of(runs)
        fit = [name for name, group in groups.items() if len(group) >= 2 and state_of(group) == "complete"]
        omitted += [f"{name} ({task})" for name in groups if name not in fit]
        for pair in itertools.combinations([groups[name] for name in fit], 2):
            if pair[0][0].planned != pair[1][0].planned:
                continue
            # A maximum over more evaluations, or over noisier ones, is higher
            watched = {
                (len(run.late(run.planned)), run.args.get("eval_episodes", 10)) for group in pair for run in group
            }
            best = difference(*([run.best() for run in group] for group in pair)) if len(watched) == 1 else "-"
            halves = difference(*([run.second_half() for run in group] for group in pair))
            rows.append([task, pair[0][0].group, pair[1][0].group, best, halves])
    if not rows:
        return None
    header = ["task", "algorithm", "minus", "highest evaluation in the last 10%", "mean evaluation in the second half"]
    lines = table(header, rows)
    return lines + (f"\n\nOf one seed or not complete: {'; '.join(omitted)}." if omitted else "")


def normalised(run: Run) -> float:
    """Score of a run as a share of the paper's DACER, at 30 million environment steps."""
    return run.best() / PUBLISHED[run.task][DACER_PAPER]


def iqm_table(by_task: dict[str, list[Run]]) -> str | None:
    """Interquartile means over runs and tasks, with stratified bootstrap intervals, by rliable; None without two tasks."""
    from rliable import library, metrics

    by_task = {task: groups_of(runs) for task, runs in by_task.items() if DACER_PAPER in PUBLISHED.get(task, {})}
    names = sorted({name for groups in by_task.values() for name in groups}, key=order)
    covered = {name: tuple(task for task in by_task if len(by_task[task].get(name, [])) >= 2) for name in names}
    omitted = [name for name, tasks in covered.items() if len(tasks) < 2]
    rows = []
    sets = sorted({tasks for tasks in covered.values() if len(tasks) >= 2}, key=lambda tasks: (len(tasks), tasks))
    # Means over different tasks cannot be compared: each set of tasks has a row of every algorithm with runs of all of them
    for tasks, name in [(tasks, name) for tasks in sets for name in names if set(tasks) <= set(covered[name])]:
        groups = {task: by_task[task][name] for task in tasks}
        scores = [[normalised(run) for run in group] for group in groups.values()]
        seeds, most = min(map(len, scores)), max(map(len, scores))
        updates = "/".join(
            f"{count:,}" for count in sorted({run.planned for group in groups.values() for run in group})
        )
        row = [name, ", ".join(groups), updates, f"{seeds}" if seeds == most else f"the first {seeds} of up to {most}"]
        states = sorted({state_of(group) for group in groups.values()} - {"complete"})
        if not np.isfinite(np.concatenate(scores)).all():
            rows.append([*row, f"nan ({', '.join(states)})"])
            continue
        matrix = np.array([score[:seeds] for score in scores]).T  # (seeds, tasks)
        point, bounds = library.get_interval_estimates(
            {name: matrix}, lambda x: np.array([metrics.aggregate_iqm(x)]), reps=RESAMPLES,
            random_state=np.random.RandomState(0),
        )  # fmt: skip
        low, high = bounds[name][:, 0]
        rows.append([*row, f"{point[name][0]:.3f} [{low:.3f}, {high:.3f}]"])
    if not rows:
        return None
    lines = table(["algorithm", "tasks", "updates", "seeds", "interquartile mean [95% interval]"], rows)
    return lines + (f"\n\nOn one task or of one seed alone: {'; '.join(omitted)}." if omitted else "")


def coverage_table(runs: list[Run]) -> str:
    rows = []
    for task in sorted({run.task for run in runs}):
        for name, group in groups_of([run for run in runs if run.task == task]).items():
            coverage, arrived = (np.array([run.final.get(f"eval/{tag}", math.nan) for run in group]) for tag in
                                 ("coverage", "arrived"))  # fmt: skip
            updates = f"{group[0].planned:,}" + ("" if (state := state_of(group)) == "complete" else f" ({state})")
            spread = deviation(coverage, 2)
            rows.append([task.split("num_goals=")[-1], name, ", ".join(str(run.seed) for run in group), updates,
                         f"{coverage.mean():.2f}{f' +- {spread}' if spread else ''}", f"{coverage.min():.2f}",
                         f"{arrived.min():.1%}",
                         f"{np.mean([run.returns[-1] if len(run.returns) else math.nan for run in group]):.0f}"])  # fmt: skip
    header = [
        "goals",
        "algorithm",
        "seeds",
        "updates",
        "coverage, mean +- std",
        "worst seed",
        "arrived, least",
        "return",
    ]
    return table(header, rows)


def shared_length(groups: Sequence[list[Run]]) -> int:
    """The most updates that at least two of the groups were to make."""
    return sorted(max(run.planned for run in group) for group in groups)[-2]


def ablations(runs: list[Run]) -> dict[str, list[Run]]:
    """DACERv2 figure 4, by title: without the Q-gradient, without temporal weighting; and other numbers of steps.

    All after equally many updates, without those that were to make fewer.
    """
    v2 = [run for run in runs if is_v2(run)]
    guidance = [run for run in v2 if run.args["diffusion_steps"] == 5]
    steps = [run for run in v2 if run.label == f"DACERv2, T = {run.args['diffusion_steps']}"]
    panels = {"what guides the chain": guidance, "number of denoising steps": steps}
    panels = {title: chosen for title, chosen in panels.items() if len({run.label for run in chosen}) > 1}
    chosen = {run.path: run for runs in panels.values() for run in runs}
    if not chosen:
        return {}
    labels = {run.label for run in chosen.values()}
    length = shared_length([[run for run in chosen.values() if run.label == label] for label in labels])
    cut = {path: run.until(length) for path, run in chosen.items() if run.planned >= length}
    name_groups(list(cut.values()))
    if len({run.args.get("entropy_interval") for run in cut.values()}) > 1:  # another pace of alpha, of what was cut
        for run in cut.values():
            if "entropy_interval" not in run.group:
                run.group += f", entropy_interval = {run.args.get('entropy_interval')}"
    panels = {title: [cut[run.path] for run in runs if run.path in cut] for title, runs in panels.items()}
    return {title: chosen for title, chosen in panels.items() if len({run.label for run in chosen}) > 1}


def draw_ablations(task: str, panels: dict[str, list[Run]], path: Path) -> None:
    figure, axes = plt.subplots(1, len(panels), figsize=(7 * len(panels), 4), squeeze=False)
    for axis, (title, chosen) in zip(axes[0], panels.items()):
        draw_curves(axis, chosen, by_update=True)
        axis.set_title(f"{task}: {title}", loc="left", fontsize=10)
        axis.set_ylabel("coverage" if any(len(run.coverage) for run in chosen) else "return, no exploration noise")
        axis.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncol=2, frameon=False)
    save_figure(figure, path)


def cost(task: str, runs: list[Run], speed: dict, path: Path) -> tuple[bool, list[str]]:
    """DACERv2 figure 1: time of an update and of a single action, as benchmarks/speed.py measured, against the return.

    All after equally many updates. Returns whether there were two groups to draw, and who could not be shown, and why.
    """
    rows = {
        (row["script"], row["T"]): row for row in speed["rows"] if row["task"] == "Hopper" and row["mode"] == "compiled"
    }
    times, omitted = {}, []
    for name, group in groups_of(runs).items():
        args = group[0].args
        script = "dacer_v2" if args.get("q_grad_weight", 0) > 0 else "dacer"
        if "label" in args or (script, args["diffusion_steps"]) not in rows:
            omitted.append(f"{name} (not timed)")
        else:
            row = rows[script, args["diffusion_steps"]]
            times[name] = group, [row["mean_ms"], row["act_1_ms"]]
    if len(times) < 2:
        return False, omitted
    budget, points = shared_length([group for group, _ in times.values()]), {}
    for name, (group, milliseconds) in times.items():
        best = [run.best(budget) for run in group]
        if any(run.planned < budget for run in group):
            omitted.append(f"{name} ({group[0].planned:,} updates)")
        elif not np.isfinite(best).all():
            omitted.append(f"{name} (no return there: {state_of(group)})")
        else:
            points[name] = group[0].style[0], milliseconds, best
    if len(points) < 2:
        return False, omitted
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.8), sharey=True)
    for name, (colour, milliseconds, best) in points.items():
        for axis, x in zip(axes, milliseconds):
            axis.plot([x] * len(best), best, "o", color=colour, ms=4, alpha=0.6)
            axis.plot(x, np.mean(best), "o", color=colour, ms=9, label=f"{name} (mean of {len(best)})")
    axes[0].set(xlabel="one update, ms", ylabel=f"highest evaluation in the\nlast 10% of {budget:,} updates")
    axes[1].set(xlabel="one action, ms")
    axes[0].margins(y=0.15)
    axes[0].set_ylim(bottom=min(0, axes[0].get_ylim()[0]))
    axes[0].set_title(f"{task}; times: {speed['machine']}, size of Hopper", loc="left", fontsize=9)
    for axis in axes:
        axis.margins(x=0.15)
        axis.set_xlim(left=0)
        axis.grid(alpha=0.25)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper center", bbox_to_anchor=(0.5, 0.0), ncol=2, fontsize=8, frameon=False)
    save_figure(figure, path)
    return True, omitted


def fill(text: str, tables: dict[str, str]) -> str:
    """A README's text with these tables between `<!-- report: NAME -->` and `<!-- end -->`."""
    for name, content in tables.items():
        begin = f"<!-- report: {name} -->"
        if begin in text:
            before, rest = text.split(begin)
            text = f"{before}{begin}\n\n{content}\n\n<!-- end -->{rest.split('<!-- end -->', 1)[1]}"
    return text


def runs_table(runs: list[Run]) -> str:
    rows = []
    for run in runs:
        covered, digits = len(run.coverage) > 0, decimals([run.best()])
        score = f"{run.final.get('eval/coverage', math.nan):.2f}" if covered else f"{run.best():.{digits}f}"
        rows.append([run.task, run.group, run.seed, f"{max(0, run.updates(run.trained)):,}", f"{run.trained:,}", score,
                     "-" if covered else f"{run.second_half():.{digits}f}", f"{run.hours:.1f}", run.state, run.path.name])  # fmt: skip
    header = [
        "task",
        "algorithm",
        "seed",
        "updates",
        "environment steps",
        "score",
        "second half",
        "hours",
        "state",
        "folder",
    ]
    return table(header, rows)


INTRODUCTION = """Written by `python benchmarks/report.py` from the logs of the runs below. All returns are of episodes
without exploration noise. Brackets are 95% bootstrap intervals of the mean over seeds; of two or three seeds that is simply
their range, which for normal values holds the true mean in 50% or 75% of all cases. Standard deviations are those of the
sample. The papers train for 30 million environment steps, 1.5 million updates: compare budgets before returns. In figures
every seed has a thin line, and a cross where a run stopped before its end."""
DIFFERENCES = """Differences of the means over seeds, with 95% intervals and p by Welch's t-test, for complete runs of two
seeds or more and equally many updates; not corrected for their number:"""
ABLATIONS = """Of each task after equally many updates: as many as two of these at least were to make. Shorter runs, and those of
other algorithms, are in the tables above."""
RUNS = "Score: the highest evaluation in the last 10%, or the last coverage. Second half: the mean evaluation there."
IQM = """Share of the return that the paper reports for DACER after 30 million steps, interquartile mean over runs and tasks,
stratified bootstrap (rliable):"""


def main(options: Options) -> Path:
    """Writes report.md and the figures; returns the folder."""
    paths = options.runs or sorted((ROOT / "runs").glob("*"))
    runs = [run for run in map(read_run, paths) if run is not None]
    if not runs:
        fail("none of these folders is that of a run" if options.runs else "there are no runs under runs/")
    name_groups(runs)
    runs.sort(key=lambda run: (run.task, order(run.group), run.seed))
    by_task = {task: [run for run in runs if run.task == task] for task in sorted({run.task for run in runs})}
    returns = {task: group for task, group in by_task.items() if not any(len(run.coverage) for run in group)}
    covered = [run for task, group in by_task.items() if task not in returns for run in group]
    panels = {task: found for task, group in by_task.items() if (found := ablations(group))}
    varied = {task: {run.path: run for chosen in found.values() for run in chosen} for task, found in panels.items()}
    compared = {  # without the ablations, which have a table and figures of their own
        task: [run for run in group if not (is_ablation(run) and run.path in varied.get(task, {}))] or group
        for task, group in returns.items()
    }
    slug = {task: re.sub(r"[^\w.-]+", "-", task) for task in by_task}
    for run in covered:
        if not len(run.coverage):  # logged without it: none of its returns is a coverage
            run.coverage = np.full(len(run.steps), math.nan)
    speed = json.loads((ROOT / "benchmarks" / "speed.json").read_text())
    options.out.mkdir(parents=True, exist_ok=True)
    parts, tables = ["# Report", INTRODUCTION], {}
    if returns:
        tables["returns"] = returns_table(compared)
        parts += ["## Returns", tables["returns"]]
        if differences := differences_table(compared):
            parts += [DIFFERENCES, differences]
        if iqm := iqm_table(compared):
            parts += [IQM, iqm]
        for task, group in compared.items():
            name = f"curves-{slug[task]}.png"
            learning_curves(task, group, options.out / name)
            parts.append(f"![{task}]({name})")
        parts.append("## Time")
        for task, group in compared.items():
            drawn, omitted = cost(task, group, speed, options.out / f"cost-{slug[task]}.png")
            if drawn:
                parts.append(f"![{task}: time against return](cost-{slug[task]}.png)")
            if omitted:
                parts.append(f"{task}, not shown: {'; '.join(omitted)}.")
        if parts[-1] == "## Time":
            parts.pop()
    if covered:
        tables["coverage"] = coverage_table(covered)
        parts += ["## Multi-goal task", "After the last update; 200 rollouts from the origin.", tables["coverage"]]
    if panels:
        parts.append("## Ablations")
        if rows := {task: list(runs.values()) for task, runs in varied.items() if task in returns}:
            tables["ablations"] = returns_table(rows)
            parts += [ABLATIONS, tables["ablations"]]
        for task, found in panels.items():
            draw_ablations(task, found, options.out / f"ablations-{slug[task]}.png")
            parts.append(f"![{task}](ablations-{slug[task]}.png)")
    parts += ["## Runs", RUNS, runs_table(runs)]
    if options.readme:
        (ROOT / "README.md").write_text(fill((ROOT / "README.md").read_text(), tables))
    (options.out / "report.md").write_text("\n\n".join(parts) + "\n")
    print(f"{len(runs)} runs; {options.out / 'report.md'}")
    return options.out


if __name__ == "__main__":
    main(tyro.cli(Options))
