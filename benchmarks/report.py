"""Figures and tables of all runs, from what they logged: learning curves, the papers' table, ablations, cost.

    python benchmarks/report.py                       # all runs under runs/, into benchmarks/report/
    python benchmarks/report.py runs/Hopper* --out /tmp/report

Needs `pip install -r benchmarks/requirements.txt`. Runs of a task that differ in nothing but their seed form a group. A run
that stopped early, or whose numbers ceased to be finite, is marked as such and takes part with what it has; nothing is left
out. A run that was logged by other code takes part as well if its folder has an args.json with at least env_id, seed, label,
num_envs, learning_starts and total_timesteps.
"""

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import matplotlib as mpl
import numpy as np
import tyro
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

mpl.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parent.parent
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999"]  # Okabe and Ito
RESAMPLES = 5000

# Published returns, to draw a line at, never as if run here: value, what, at which budget
DACER_PAPER = "DACER, paper (30 M steps, v3 tasks)"
SAC_CLEANRL = "SAC, CleanRL (1 M steps)"
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
    group: str
    seed: int
    steps: np.ndarray  # (n,)
    returns: np.ndarray  # (n,)
    coverage: np.ndarray  # (n,) on the multi-goal task, else (0,)
    final: dict[str, float]  # the last value of every other curve
    trained: int  # environment steps of the last point of any curve

    @property
    def scores(self) -> np.ndarray:
        """What its task is judged by, at `steps`: coverage on the multi-goal task, else returns."""
        return self.coverage if len(self.coverage) else self.returns

    def updates(self, steps: np.ndarray | int) -> np.ndarray | int:
        """Updates at these environment steps: one follows each vector step after the warm-up."""
        return steps // self.args["num_envs"] - math.ceil(self.args["learning_starts"] / self.args["num_envs"])

    @property
    def state(self) -> str:
        total = self.args["total_timesteps"] // self.args["num_envs"] * self.args["num_envs"]
        if not np.isfinite([*self.returns, *self.final.values()]).all():
            return "NaN"
        evaluated = len(self.steps) and self.steps[-1] >= total
        return "complete" if evaluated else f"stopped at {self.trained / total:.0%}"

    @property
    def best(self) -> float:
        """The papers' score of a run: its highest evaluation in the last 10% of its steps; NaN counts as NaN."""
        total = self.args["total_timesteps"]
        late = self.returns[self.steps > 0.9 * total]
        return float(late.max()) if len(late) else math.nan


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
              "entropy_samples", "label", "hours"}  # fmt: skip


SYMBOLS = {"q_grad_weight": "eta", "noise_scale": "lambda", "time_weight_c": "c", "time_weight_d": "d"}


def read_run(path: Path) -> Run | None:
    """The run in a folder; None if the folder holds none or it has not been evaluated yet."""
    try:
        args = json.loads((path / "args.json").read_text())
    except (OSError, ValueError):
        return None
    events = EventAccumulator(str(path), size_guidance={"scalars": 0}).Reload()
    curves = {tag: events.Scalars(tag) for tag in events.Tags()["scalars"]}
    if not curves or not {"env_id", "seed", "num_envs", "learning_starts", "total_timesteps"} <= args.keys():
        return None
    evaluations = curves.get("eval/episodic_return", [])
    kwargs = json.loads(args.get("env_kwargs", "{}"))
    task = " ".join([args["env_id"].split(":")[-1], *(f"{name}={value}" for name, value in kwargs.items())])
    final = {tag: points[-1].value for tag, points in curves.items()}
    first, last = (pick(e.wall_time for points in curves.values() for e in points) for pick in (min, max))
    final["hours"] = (last - first) / 3600
    steps, returns = np.array([[e.step, e.value] for e in evaluations]).reshape(-1, 2).T
    coverage = np.array([e.value for e in curves.get("eval/coverage", [])])
    trained = max(points[-1].step for points in curves.values())
    return Run(path, args, task, base_label(args), args["seed"], steps.astype(int), returns, coverage, final, trained)


def name_groups(runs: list[Run]) -> None:
    """Adds to the names of groups the settings in which runs of one task and one label differ."""
    for task, label in {(run.task, run.group) for run in runs}:
        same = [run for run in runs if (run.task, run.group) == (task, label)]
        settings = [{k: v for k, v in run.args.items() if k not in NO_SETTING} for run in same]
        names = sorted({k for one in settings for k in one if any(other.get(k) != one[k] for other in settings)})
        for run, setting in zip(same, settings):
            run.group = ", ".join([run.group, *(f"{SYMBOLS.get(name, name)} = {setting.get(name)}" for name in names)])


def groups_of(runs: list[Run]) -> dict[str, list[Run]]:
    """Runs by group, in the order of their names, each by seed."""
    names = sorted({run.group for run in runs}, key=lambda name: (not name.startswith("DACERv2"), len(name), name))
    return {name: sorted((run for run in runs if run.group == name), key=lambda run: run.seed) for name in names}


def bootstrap(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """95% percentile bootstrap interval of the mean over the first axis: values (n, ...) to two bounds (...)."""
    picks = np.random.default_rng(0).integers(len(values), size=(RESAMPLES, len(values)))
    return tuple(np.percentile(values[picks].mean(1), [2.5, 97.5], axis=0))


def mean_curve(runs: Sequence[Run]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Environment steps at which every run was evaluated, and there the mean and its interval (of one run: itself)."""
    steps = sorted(set.intersection(*(set(run.steps.tolist()) for run in runs)))
    values = np.array([[run.scores[run.steps.tolist().index(step)] for step in steps] for run in runs])
    low, high = bootstrap(values) if len(runs) > 1 else (values[0], values[0])
    return np.array(steps, int), values.mean(0), low, high


def draw_curves(axis: plt.Axes, runs: list[Run], by_update: bool = False) -> None:
    """Mean and interval over the seeds of every group; thin lines go on where fewer seeds have come."""
    for colour, (name, group) in zip(COLOURS * 4, groups_of(runs).items()):
        steps, mean, low, high = mean_curve(group)
        x = (lambda s, run=group[0]: run.updates(s)) if by_update else (lambda s: s)
        broken = [run for run in group if run.state != "complete"]
        note = f" ({len(group)} seed{'s' * (len(group) > 1)}{', ' + broken[0].state if broken else ''})"
        axis.plot(x(steps), mean, color=colour, label=name + note, lw=1.6)
        axis.fill_between(x(steps), low, high, color=colour, alpha=0.15, lw=0)
        for run in group:
            axis.plot(x(run.steps), run.scores, color=colour, lw=0.5, alpha=0.5)
    axis.set_xlabel("updates" if by_update else "environment steps")
    axis.grid(alpha=0.25)


def save_figure(figure: plt.Figure, path: Path) -> None:
    figure.savefig(path, dpi=110, bbox_inches="tight", metadata={"Software": None})
    plt.close(figure)


def learning_curves(task: str, runs: list[Run], path: Path) -> None:
    """Returns against environment steps and against updates, with published results as lines where they fit."""
    figure, axes = plt.subplots(1, 2, figsize=(12, 4.2), sharey=True)
    for axis, by_update in zip(axes, (False, True)):
        draw_curves(axis, runs, by_update)
    top = max(np.nanmax(run.returns) for run in runs if len(run.returns))
    for style, (what, value) in zip(("--", ":"), PUBLISHED.get(task, {}).items()):
        if value < 3 * max(top, 0):
            axes[0].axhline(value, color="0.3", ls=style, lw=1, label=what)
    axes[0].set_ylabel("return, no exploration noise")
    axes[0].set_title(f"{task}: mean and 95% bootstrap interval over seeds", loc="left", fontsize=10)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper center", bbox_to_anchor=(0.5, 0.0), ncol=2, fontsize=8, frameon=False)
    save_figure(figure, path)


def interval(values: Sequence[float], digits: int = 0) -> str:
    """Mean and 95% interval; of a single value, itself."""
    values = np.asarray(values, float)
    if len(values) == 1 or not np.isfinite(values).all():
        return f"{values.mean():.{digits}f}"
    low, high = bootstrap(values)
    return f"{values.mean():.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def returns_table(by_task: dict[str, list[Run]]) -> str:
    rows = []
    for task, runs in by_task.items():
        for name, group in groups_of(runs).items():
            best = [run.best for run in group]
            updates = sorted({int(run.updates(run.trained)) for run in group})
            rows.append([task, name, ", ".join(str(run.seed) for run in group), "/".join(f"{u:,}" for u in updates),
                         interval(best), f"{np.std(best):.0f}", interval([run.returns[-1] for run in group]),
                         ", ".join(sorted({run.state for run in group}))])  # fmt: skip
    header = ["task", "algorithm", "seeds", "updates", "highest evaluation in the last 10%, mean [95% interval]", "std",
              "last evaluation", "state"]  # fmt: skip
    return table(header, rows)


def normalised(run: Run) -> float:
    """Score of a run as a share of the paper's DACER, at 30 million environment steps."""
    return run.best / PUBLISHED[run.task][DACER_PAPER]


def iqm_table(by_task: dict[str, list[Run]]) -> str | None:
    """Interquartile means over runs and tasks, with stratified bootstrap intervals, by rliable; None without two tasks."""
    from rliable import library, metrics

    by_task = {task: groups_of(runs) for task, runs in by_task.items() if DACER_PAPER in PUBLISHED.get(task, {})}
    names = {name for groups in by_task.values() for name in groups}
    rows = []
    for name in sorted(names):
        tasks = [task for task, groups in by_task.items() if name in groups]
        if len(tasks) < 2:
            continue
        scores = [[normalised(run) for run in by_task[task][name] if math.isfinite(run.best)] for task in tasks]
        seeds = min(map(len, scores))
        if seeds < 2:
            continue
        matrix = np.array([score[:seeds] for score in scores]).T  # (seeds, tasks)
        state = np.random.RandomState(0)
        point, bounds = library.get_interval_estimates(
            {name: matrix}, lambda x: np.array([metrics.aggregate_iqm(x)]), reps=RESAMPLES, random_state=state
        )
        low, high = bounds[name][:, 0]
        rows.append([name, ", ".join(tasks), seeds, f"{point[name][0]:.3f} [{low:.3f}, {high:.3f}]"])
    return table(["algorithm", "tasks", "seeds", "interquartile mean [95% interval]"], rows) if rows else None


def coverage_table(runs: list[Run]) -> str:
    rows = []
    for task in sorted({run.task for run in runs}):
        for name, group in groups_of([run for run in runs if run.task == task]).items():
            coverage = np.array([run.final["eval/coverage"] for run in group])
            spread = f" +- {coverage.std():.2f}" if len(group) > 1 else ""
            arrived = min(run.final["eval/arrived"] for run in group)
            rows.append([task.split("num_goals=")[-1], name, ", ".join(str(run.seed) for run in group),
                         f"{coverage.mean():.2f}{spread}", f"{coverage.min():.2f}", f"{arrived:.1%}",
                         f"{np.mean([run.returns[-1] for run in group]):.0f}"])  # fmt: skip
    header = ["goals", "algorithm", "seeds", "coverage, mean +- std", "worst seed", "arrived, least", "return"]
    return table(header, rows)


def label_of(run: Run) -> str:
    return base_label(run.args)


def is_ablation(run: Run) -> bool:
    """Whether this is DACERv2 other than the papers have it: their figure 4 compares such runs."""
    return "q_grad_weight" in run.args and "label" not in run.args and label_of(run) != "DACERv2, T = 5"


def ablations(task: str, runs: list[Run], path: Path) -> bool:
    """DACERv2 figure 4: without the Q-gradient, without temporal weighting; and other numbers of steps. False if none."""
    v2 = [run for run in runs if "q_grad_weight" in run.args]
    guidance = [run for run in v2 if run.args["diffusion_steps"] == 5]
    steps = [run for run in v2 if run.args["q_grad_weight"] > 0 and label_of(run).count(",") == 1]
    panels = [("what guides the chain", guidance), ("number of denoising steps", steps)]
    panels = [(title, chosen) for title, chosen in panels if len({label_of(run) for run in chosen}) > 1]
    if not panels:
        return False
    figure, axes = plt.subplots(1, len(panels), figsize=(6 * len(panels), 4), squeeze=False)
    for axis, (title, chosen) in zip(axes[0], panels):
        draw_curves(axis, chosen, by_update=True)
        axis.set_title(f"{task}: {title}", loc="left", fontsize=10)
        axis.set_ylabel("coverage" if len(chosen[0].coverage) else "return, no exploration noise")
        axis.legend(fontsize=7)
    save_figure(figure, path)
    return True


def cost(by_task: dict[str, list[Run]], speed: dict, path: Path) -> bool:
    """DACERv2 figure 1: time of an update and of a single action, as benchmarks/speed.py measured, against the return."""
    times = {
        (row["script"], row["T"]): row for row in speed["rows"] if row["task"] == "Hopper" and row["mode"] == "compiled"
    }
    points = {}  # label -> time of an update and of an action, share of the best group's return in each task
    for runs in by_task.values():
        groups = {name: np.mean([run.best for run in group]) for name, group in groups_of(runs).items()}
        most = max((value for value in groups.values() if math.isfinite(value)), default=0)
        for name, value in groups.items():
            args = next(run.args for run in runs if run.group == name)
            script = "dacer_v2" if "q_grad_weight" in args else "dacer"
            if most > 0 and math.isfinite(value) and name == label_of(next(r for r in runs if r.group == name)):
                row = times.get((script, args.get("diffusion_steps")))
                if row and "label" not in args:
                    points.setdefault(name, ([row["mean_ms"], row["act_1_ms"]], []))[1].append(value / most)
    if len(points) < 2:
        return False
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.8), sharey=True)
    for colour, (name, (milliseconds, shares)) in zip(COLOURS * 4, points.items()):
        for axis, x in zip(axes, milliseconds):
            axis.plot(x, np.mean(shares), "o", color=colour, ms=9, label=f"{name} ({len(shares)} tasks)")
    axes[0].set(xlabel="one update, ms", ylabel="share of the best return, mean over tasks")
    axes[1].set(xlabel="one action, ms")
    axes[0].set_title(f"{speed['machine']}; size of Hopper", loc="left", fontsize=9)
    for axis in axes:
        axis.set_xlim(left=0)
        axis.grid(alpha=0.25)
    axes[1].legend(fontsize=8)
    save_figure(figure, path)
    return True


def fill(text: str, tables: dict[str, str]) -> str:
    """A README's text with these tables between `<!-- report: NAME -->` and `<!-- end -->`."""
    for name, content in tables.items():
        begin = f"<!-- report: {name} -->"
        if begin in text:
            before, rest = text.split(begin)
            text = f"{before}{begin}\n\n{content}\n\n<!-- end -->{rest.split('<!-- end -->', 1)[1]}"
    return text


def runs_table(runs: list[Run]) -> str:
    rows = [[run.task, run.group, run.seed, f"{run.updates(run.trained):,}", f"{run.trained:,}", f"{run.final['hours']:.1f}",
             run.state, run.path.name] for run in runs]  # fmt: skip
    return table(["task", "algorithm", "seed", "updates", "environment steps", "hours", "state", "folder"], rows)


INTRODUCTION = """Written by `python benchmarks/report.py` from the logs of the runs below. All returns are of episodes
without exploration noise; brackets are 95% bootstrap intervals of the mean over seeds. The papers train for 30 million
environment steps: compare budgets before returns."""
IQM = """Share of the return that the paper reports for DACER after 30 million steps, interquartile mean over runs and tasks,
stratified bootstrap (rliable):"""


def main(options: Options) -> Path:
    """Writes report.md and the figures; returns the folder."""
    paths = options.runs or sorted((ROOT / "runs").glob("*"))
    runs = [run for run in map(read_run, paths) if run is not None]
    if not runs:
        fail("there are no runs with curves among these folders" if options.runs else "there are no runs under runs/")
    name_groups(runs)
    runs.sort(key=lambda run: (run.task, run.group, run.seed))
    by_task = {
        task: [run for run in runs if run.task == task and len(run.returns)] for task in {run.task for run in runs}
    }
    by_task = {task: by_task[task] for task in sorted(by_task) if by_task[task]}
    returns = {task: group for task, group in by_task.items() if not len(group[0].coverage)}
    covered = [run for task, group in by_task.items() if task not in returns for run in group]
    options.out.mkdir(parents=True, exist_ok=True)
    parts = ["# Report", INTRODUCTION]
    if returns:
        parts += ["## Returns", returns_table(returns)]
        if iqm := iqm_table(returns):
            parts += [IQM, iqm]
        for task, group in returns.items():
            name = f"curves-{task.split()[0]}.png"
            learning_curves(task, [run for run in group if not is_ablation(run)] or group, options.out / name)
            parts.append(f"![{task}]({name})")
        if cost(returns, json.loads((ROOT / "benchmarks" / "speed.json").read_text()), options.out / "cost.png"):
            parts += ["## Time", "![Time of an update and of an action against the return](cost.png)"]
    if covered:
        parts += ["## Multi-goal task", "After the last update; 200 rollouts from the origin.", coverage_table(covered)]
    tables = {"returns": returns and returns_table(returns), "coverage": covered and coverage_table(covered)}
    if options.readme:
        text = (ROOT / "README.md").read_text()
        (ROOT / "README.md").write_text(fill(text, {name: content for name, content in tables.items() if content}))
    figures = []
    for task, group in by_task.items():
        name = f"ablations-{task.replace(' ', '-').replace('=', '')}.png"
        if ablations(task, group, options.out / name):
            figures.append(f"![{task}]({name})")
    if figures:
        parts += ["## Ablations", *figures]
    parts += ["## Runs", runs_table(runs)]
    (options.out / "report.md").write_text("\n\n".join(parts) + "\n")
    print(f"{len(runs)} runs; {options.out / 'report.md'}")
    return options.out


if __name__ == "__main__":
    main(tyro.cli(Options))
