"""Tables and figures of what was measured (needs benchmarks/requirements.txt).

    python benchmarks/report.py
    python benchmarks/report.py runs --out /tmp/x

The first command writes the figures into docs/figures/, and the tables into README.md and the pages
of docs/, each from `<!-- report: NAME -->` to its end. The second one shows all runs that lie in
these folders or below them, as "yours", beside the published ones.
"""

import itertools
import json
import math
import os
import re
import sys
from collections.abc import Iterable
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import tyro
from scipy import stats
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
# A row with `updates` is a point of a curve. Another one is the return that its source reports for
# the whole training.
PUBLISHED = pd.read_csv(RESULTS / "published.csv")
PAPERS_UPDATES = 1_500_000
# A task with these arguments has a name of its own.
CALLED = {
    "Humanoid-v5 include_cfrc_ext_in_observation=False contact_cost_weight=0": (
        "Humanoid-v5 without contact forces"
    )
}
TRAINING = "step of 20 environments and update"
MAIN = ["DACERv2, T = 5", "DACER, T = 20", "DACER, T = 5"]
MAIN += [f"official DACER (JAX), T = {T}" for T in (20, 5)]
VARIANTS = [f"DACERv2, T = 5, eta = {eta}" for eta in (0, 1, 3, 10)]
VARIANTS += ["DACERv2, T = 5, w = 1"]
VARIANTS += [f"DACERv2, T = {T}" for T in (2, 10, 20)]
PALETTE = ["#0072B2", "#D55E00", "#009E73", "#000000", "#999999"]  # of MAIN
PALETTE += ["#E69F00", "#56B4E9", "#CC79A7", "#332288"]  # of VARIANTS
PALETTE += ["#AA4499", "#882255", "#44AA99", "#6E4B1E"]
COLOURS = dict(zip(MAIN + VARIANTS, PALETTE))
plt.rcParams["text.parse_math"] = False  # A task's arguments may hold dollar signs.
ARGUMENTS = {
    "T": "diffusion_steps",
    "eta": "q_grad_weight",
    "c": "time_weight_c",
    "d": "time_weight_d",
}
# Runs that differ in a setting are no seeds of one group. Settings are these columns, and each
# argument of a run that has no other column and is not named here.
SETTINGS = ["num_envs", "learning_starts", "entropy_interval", "total_timesteps"]
NO_SETTINGS = {"env_id", "env_kwargs", "seed", "device", "compile", "async_envs", "eval_interval"}
NO_SETTINGS |= {"resume", "evaluate", "label", "commit", "library", *ARGUMENTS.values(), *SETTINGS}
BEST = "highest evaluation in the last 10%"
HALF = "mean evaluation in the second half"
LAST = "last evaluation"
COSTS = [(100_000, "dacer_v2"), (100_000, "dacer")]
COSTS += [(PAPERS_UPDATES, "dacer_v2"), (PAPERS_UPDATES, "dacer")]
NAMES = {"dacer_v2": "DACERv2, T = 5", "dacer": "DACER, T = 20"}
MILESTONES = (60_000, 150_000, 300_000)  # updates
GLANCE = f"task | algorithm, T | seed | return after {MILESTONES[-1]:,} updates"
GLANCE += " | last return | updates | hours | the paper's DACER, 1.5 million updates"
TABLES = {
    "returns": (
        f"task | algorithm, T | seed | updates | {BEST} | each seed | 95% interval"
        f" | {HALF} | {LAST} | hours"
    ),
    "coverage": (
        "goals | algorithm | T | eta | w(t) | seed | updates | coverage | worst seed"
        " | arrived, least | return"
    ),
    "eta": "task | algorithm, T | eta | seeds | updates | q_grad_norm | coverage | return",
}


def read_runs(paths: Iterable[Path]) -> list[pd.DataFrame]:
    """The runs in these folders or below them. What holds none is named and left out."""
    found = {}
    for path in paths:
        walked = os.walk(path, followlinks=True)
        folders = sorted(Path(folder) for folder, _, files in walked if "args.json" in files)
        # A published policy below the path has no curves, and is passed over.
        folders = [folder for folder in folders if any(folder.glob("events.out.tfevents.*"))]
        if not folders:
            leave_out(path, "no run lies there")
        for folder in folders:
            try:
                found[folder.resolve()] = read_run(folder)
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                leave_out(folder, f"it is no run with evaluations: {error!r}")
    return list(found.values())


def leave_out(path: Path, why: str) -> None:
    print(f"report.py: {path} is left out: {why}", file=sys.stderr)


def read_run(path: Path) -> pd.DataFrame:
    """A run's evaluations, in the columns of evaluations.csv; ValueError if there is none."""
    args = json.loads((path / "args.json").read_text())
    task = args["env_id"].split(":")[-1]
    known = {"run": str(path), "task": task}
    kwargs = json.loads(args.get("env_kwargs", "{}"))
    if task == "MultiGoal-v0":
        kwargs = {"num_goals": 4} | kwargs  # its default
    known["kwargs"] = " ".join(f"{key}={value}" for key, value in kwargs.items())
    ours = "DACERv2" if "q_grad_weight" in args else "DACER"
    known["algorithm"] = args.get("label", ours).split(", T =")[0]
    known |= {column: float(args.get(name, "nan")) for column, name in ARGUMENTS.items()}
    for name in ("seed", "num_envs", "learning_starts", "total_timesteps"):
        known[name] = int(args[name])
    known["entropy_interval"] = str(args.get("entropy_interval"))
    known |= {f"args.{name}": str(args[name]) for name in args.keys() - NO_SETTINGS}
    events = EventAccumulator(str(path), size_guidance={"scalars": 0}).Reload()
    points = {tag: events.Scalars(tag) for tag in events.Tags()["scalars"]}

    def curve(tag: str, field: str = "value") -> pd.Series:
        """Of a step that was logged twice, it has the newest."""
        values = {p.step: getattr(p, field) for p in points.get(tag, [])}
        return pd.Series(values, dtype=float).sort_index()

    tags = {
        "return": "episodic_return",
        "std": "episodic_return_std",
        "coverage": "coverage",
        "arrived": "arrived",
    }
    rows = pd.DataFrame({column: curve(f"eval/{tag}") for column, tag in tags.items()})
    if rows.empty:
        raise ValueError("there is no evaluation yet")
    # The run and each resumption made a file, whose name tells when. Nobody worked just before.
    files = path.glob("events.out.tfevents.*")
    starts = [float(file.name.split(".")[3]) for file in files]
    times = np.sort([*starts, *(p.wall_time for tag in points.values() for p in tag)])
    worked = np.diff(times, prepend=times[0])
    worked[np.isin(times, starts)] = 0
    evaluated = curve("eval/episodic_return", "wall_time")
    rows["hours"] = np.interp(evaluated, times, worked.cumsum() / 3600)
    norm = curve("losses/q_grad_norm").reindex(rows.index, method="nearest")
    return rows.assign(q_grad_norm=norm, **known).rename_axis("step").reset_index()


def name_of(row: pd.Series) -> str:
    """Algorithm, T, and what sets a run apart from the papers' settings, where c is 2 / T."""
    name = row.algorithm + f", T = {row['T']:g}" * (row["T"] > 0)
    if row.algorithm == "DACERv2":
        name += f", eta = {row.eta:g}" if row.eta != 0.01 else ""
        if row.c == row.d == 0:
            name += ", w = 1"
        elif not (np.isclose(row.c, 2 / row["T"]) and row.d == -1.8):
            name += f", c = {row.c:g}, d = {row.d:g}"
    return name + (" (yours)" if row.yours else "")


def prepare(data: pd.DataFrame) -> pd.DataFrame:
    """Adds updates, names and colours, and sorts.

    If runs of one name differ in a setting, it becomes a part of their names.
    """
    environments = np.where(data.num_envs == 1, ", 1 environment ", " ")
    data["task"] = (data.task + environments + data.kwargs).str.strip().replace(CALLED)
    data["warm_up"] = -(-data.learning_starts // data.num_envs)
    data["update"] = (data.step // data.num_envs - data.warm_up).clip(lower=0)
    data["planned"] = data.total_timesteps // data.num_envs - data.warm_up
    data["name"] = data.apply(name_of, axis=1)
    arguments = sorted(column for column in data if column.startswith("args."))
    for setting in SETTINGS + arguments:
        varied = data.groupby(["task", "name"])[setting].transform("nunique", dropna=False) > 1
        told = f", {setting.removeprefix('args.')} = "
        data.loc[varied, "name"] += told + data[setting].astype(str)
    data["constant"] = (data.c == 0) & (data.d == 0)
    # The eta that most runs of a task have
    v2 = data[data.algorithm == "DACERv2"].drop_duplicates("run")
    usual_eta = v2.groupby("task").eta.agg(lambda etas: etas.mode()[0])
    data["usual"] = (data.algorithm == "DACERv2") & (data.eta == data.task.map(usual_eta))
    without_eta = data.name.str.replace(r", eta = [\d.]+", "", regex=True)
    data["style"] = without_eta.where(data.usual, data.name)
    further = sorted(set(data["style"]) - set(COLOURS))
    COLOURS.update(zip(further, sns.husl_palette(len(further), l=0.4)))
    data["rank"] = data.algorithm.map({"DACERv2": 0, "DACER": 1}).fillna(2)
    return data.sort_values(["task", "rank", "T", "eta", "constant", "name", "seed", "run", "step"])


def equally_long(data: pd.DataFrame) -> pd.DataFrame:
    """Every task's groups after as many updates as two of them or more were to make.

    Shorter ones are left out.
    """

    def second_longest(planned: pd.Series) -> float:
        return planned.groupby(data.name).max().nlargest(2).iloc[-1]

    length = data.groupby("task").planned.transform(second_longest)
    return data[(data.planned >= length) & (data["update"] <= length)].assign(planned=length)


def summarise(data: pd.DataFrame) -> pd.DataFrame:
    """One row per run: its last evaluation, the papers' score, the mean of the second half, and its
    state."""
    rows = []
    for _, run in data.groupby("run", sort=False):
        last = run.iloc[-1]
        end = (last.planned + last.warm_up) * last.num_envs
        late = run["return"][run.step > 0.9 * end]
        half = run["return"][2 * run["update"] > last.planned]
        state = "complete" if last.step >= end else f"stopped at {100 * last.step // end:.0f}%"
        if run["return"].isna().any():
            state = "NaN"
        found = {
            "best": late.max(skipna=False),
            "late": len(late),
            "half": half.mean(skipna=False),
            "state": state,
        }
        rows.append({**last, **found, "q_grad_norm": run.q_grad_norm.quantile()})
    return pd.DataFrame(rows, columns=None if rows else [*data, "best", "late", "half", "state"])


def digits(values: pd.Series) -> int:
    """The decimals that show the largest value with three digits; of thousands all digits show."""
    largest = np.nanmax([1, *np.abs(values)])
    return int(np.clip(2 - np.floor(np.log10(largest)), 0, 2))


def ranged(values: pd.Series, each: bool = False) -> str:
    """The mean and the range of the seeds, or each of them."""
    form = f".{digits(values)}f"
    if each:
        return ", ".join(f"{value:{form}}" for value in values)
    mean = f"{values.mean(skipna=False):{form}}"
    if len(values) == 1 or values.isna().any():
        return mean
    return f"{mean} ({values.min():{form}} to {values.max():{form}})"


def interval(samples: list, statistic, form: str) -> str:
    """The 95% percentile bootstrap interval, stratified if there are several samples."""
    if not np.isfinite(np.concatenate(samples)).all():
        return "-"
    settings = {"n_resamples": 5000, "method": "percentile", "rng": 0}
    bounds = stats.bootstrap(samples, statistic, **settings).confidence_interval
    return f"{bounds.low:{form}} to {bounds.high:{form}}"


def cells(runs: pd.DataFrame) -> dict[str, object]:
    """What the tables say of one group of runs."""
    first = runs.iloc[0]
    form = f".{digits(runs.best)}f"
    states = runs.state.value_counts().sort_index()
    notes = []
    if set(states.index) != {"complete"}:
        notes += [f"{count} {state}" for state, count in states.items()]
    notes += [f"seed {seed} repeated" for seed in runs.seed[runs.seed.duplicated()].unique()]
    weight = "-"
    if first.eta > 0:
        sign = "-" if first.d < 0 else "+"
        weight = "1" if first.constant else f"exp({first.c:g} t {sign} {abs(first.d):g})"
    each = ", ".join(f"{value:{form}}" for value in runs.best) if runs.best.count() else "-"
    differ = runs["update"].nunique() > 1  # in length: a mean of their returns says nothing
    mean = f"{runs['return'].mean(skipna=False):.0f}"
    coverage = "-"
    if runs.coverage.notna().any():
        coverage = f"{runs.coverage.mean(skipna=False):.2f}"
        coverage += f" +- {runs.coverage.std():.2f}" if runs.coverage.count() > 1 else ""
    return {
        "task": first.task,
        "goals": first.kwargs.removeprefix("num_goals="),
        "algorithm, T": first["name"],
        "algorithm": first.algorithm + (" (yours)" if first.yours else ""),
        "T": f"{first['T']:g}",
        "eta": f"{first.eta:g}",
        "w(t)": weight,
        "seeds": runs.seed.nunique(),
        "seed": ", ".join(str(seed) for seed in runs.seed),
        "updates": f"{runs['update'].max():,.0f}" + (f" ({'; '.join(notes)})" if notes else ""),
        BEST: ranged(runs.best),
        "each seed": each,
        "95% interval": interval([runs.best], np.mean, form) if len(runs) > 2 else "-",
        HALF: ranged(runs.half),
        LAST: ranged(runs["return"], differ),
        "hours": f"{runs.hours.mean(skipna=False):.1f}",
        "coverage": coverage,
        "worst seed": f"{runs.coverage.min(skipna=False):.2f}",
        "arrived, least": f"{runs.arrived.min(skipna=False):.1%}",
        "return": ranged(runs["return"], True) if differ else mean,
        "q_grad_norm": f"{runs.q_grad_norm.quantile():.2g}",
    }


def hours_of(run: pd.Series, updates: float, times: pd.DataFrame) -> str:
    """What so many updates of this run take on two idle cores, by speed.csv; "-" if unknown.

    The times hold for the settings of the published runs.
    """
    script = {"DACERv2": "dacer_v2", "DACER": "dacer"}.get(run.algorithm)
    if run.yours or script is None:
        return "-"
    alike = times[(times.what == TRAINING) & (times.script == script) & (times["T"] == run["T"])]
    ms = alike.ms[(alike.task + "-v4" == run.task) & ~alike.machine.str.contains("NVIDIA")].median()
    return "-" if np.isnan(ms) else f"{updates * ms / 3.6e6:.1f}"


def longest_of_each_seed(data: pd.DataFrame) -> pd.DataFrame:
    """Leaves out the shorter runs of a seed that ran twice."""
    groups = ["task", "name", "seed"]
    ends = data.groupby([*groups, "run"])["update"].max().sort_values()
    longest = ends.groupby(groups).tail(1).index.get_level_values("run")
    return data[data.run.isin(longest)]


def glance(data: pd.DataFrame, times: pd.DataFrame) -> str:
    """A row for each seed's longest run, if it has 100,000 updates or more."""
    data = longest_of_each_seed(data)
    runs = summarise(data)
    on_the_way = data[data["update"] == MILESTONES[-1]].set_index("run")["return"]
    paper = PUBLISHED[PUBLISHED.what.str.startswith("DACER, paper")].set_index("task")["return"]
    rows = []
    for _, run in runs[runs["update"] >= 100_000].iterrows():
        reached = f"{run['return']:,.0f}", f"{run['update']:,}"
        then = f"{on_the_way[run.run]:,.0f}" if run.run in on_the_way else "-"
        known = f"{paper[run.task]:,}" if run.task in paper else "-"
        hours = hours_of(run, run["update"], times)
        rows.append([run.task, run["name"], run.seed, then, *reached, hours, known])
    return table(GLANCE, rows)


def milestones(data: pd.DataFrame, times: pd.DataFrame) -> str:
    """Returns after as many updates, and how long these take, on tasks with a run that long."""
    data = longest_of_each_seed(data)
    longest = data.groupby("task")["update"].transform("max")
    rows = []
    for (task, name), group in data[longest >= MILESTONES[2]].groupby(["task", "name"], sort=False):
        row = [task, name, group.seed.nunique()]
        for updates in MILESTONES:
            reached = group[group["update"] == updates]["return"]
            hours = hours_of(group.iloc[0], updates, times)
            time = f" in {hours} h" if hours != "-" else ""
            row.append(ranged(reached) + time if len(reached) else "-")
        rows.append(row)
    heads = [f"after {updates:,} updates" for updates in MILESTONES]
    return table(" | ".join(["task", "algorithm, T", "seeds", *heads]), rows)


def table(header: str, rows: list) -> str:
    lines = [header.split(" | "), ["---"] * (header.count(" | ") + 1), *rows]
    shown = [["-" if cell == "nan" else str(cell) for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in shown)


def differences(runs: pd.DataFrame) -> str:
    """Differences between algorithms, by Welch's t-test.

    It compares complete groups of two seeds or more, with equally many updates and late
    evaluations.
    """

    def is_fit(state: pd.Series) -> bool:
        return len(state) > 1 and (state == "complete").all()

    rows = []
    fit = runs.groupby(["task", "name"]).state.transform(is_fit).astype(bool)
    for (task, _, _), alike in runs[fit].groupby(["task", "planned", "late"], sort=False):
        groups = alike.groupby("name", sort=False)
        for (first, one), (second, two) in itertools.combinations(groups, 2):
            row = [task, first, second]
            for score in ("best", "half"):
                form = f".{digits(alike[score])}f"
                mean = one[score].mean() - two[score].mean()
                test = stats.ttest_ind(one[score], two[score], equal_var=False)
                low, high = test.confidence_interval()
                row.append(f"{mean:+{form}} ({low:{form}} to {high:{form}})")
                row.append(f"{test.pvalue:.2g}")
            rows.append(row)
    return table(f"task | algorithm | minus | {BEST} | p | {HALF} | p", rows)


def speed(rows: pd.DataFrame) -> str:
    """A column for each thing that was timed. What all rows share stands above the table."""
    shared = [column for column in rows if rows[column].nunique() == 1]
    keys = [column for column in rows if column not in ("ms", *shared)]
    medians = rows.groupby(keys).ms.median().unstack("what")
    wide = medians[rows.what.unique()].reset_index().fillna("-")
    wide = wide.map(lambda cell: f"{float(f'{cell:.3g}'):g}" if isinstance(cell, float) else cell)
    said = "; ".join(f"{column}: {rows[column].iloc[0]}" for column in shared)
    return f"Milliseconds. {said}.\n\n{table(' | '.join(wide), wide.to_numpy().tolist())}"


def save(figure: plt.Figure, path: Path) -> None:
    figure.savefig(path, dpi=80, metadata={"Software": None}, pil_kwargs={"optimize": True})
    plt.close(figure)


def draw(path: Path, panels: dict[str, pd.DataFrame]) -> None:
    """Each run is a thin line, and the mean of several seeds a thick one, as far as all go.

    From three seeds on a band is the mean's 95% interval; if all are complete, it stands instead of
    the runs. What others published is a grey line, or points where it is known after how many
    updates.
    """
    handles = {}
    figure = plt.figure(layout="constrained", figsize=(max(7.5, 3.6 * len(panels)), 4.5))
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)
    for axis, (title, data) in zip(axes[0], panels.items()):
        score = "coverage" if data.coverage.notna().any() else "return"
        for name, group in data.groupby("name", sort=False):
            runs = summarise(group)
            stopped = runs[runs.state != "complete"]
            key = group["style"].iloc[0]
            style = {"x": "update", "y": score, "color": COLOURS[key], "ax": axis}
            style["ls"] = "-" if key in MAIN else "--"
            style["marker"] = "o" if group["update"].nunique() == 1 else None  # no line
            seeds = runs.seed.nunique()
            if (seeds < 3 or len(stopped)) and group[score].notna().any():
                width = 1.5 if seeds == 1 else 0.6
                sns.lineplot(group, units="run", estimator=None, lw=width, **style)
            if seeds > 1:
                shared = group[group.groupby("update").run.transform("size") == len(runs)]
                band = {"seed": 0, "err_kws": {"alpha": 0.12, "lw": 0}}
                band = band if len(runs) > 2 else {"errorbar": None}
                sns.lineplot(shared, lw=2.5, **band, **style)
            axis.plot(stopped["update"], stopped[score], "x", color=COLOURS[key])
            what = "run" if seeds < len(runs) else "seed"
            count = f"{len(runs)} {what}" + "s" * (len(runs) > 1)
            states = ", ".join([count, *stopped.state])
            label = f"{name} ({states})".replace("%, stopped at", "%,")
            handles[label] = plt.Line2D([], [], color=COLOURS[key], ls=style["ls"], lw=2)
        published = PUBLISHED[PUBLISHED.task == title]
        known = published[published.updates <= data["update"].max()]
        for marker, (what, points) in zip("osDv", known.groupby("what", sort=False)):
            style = {"color": "0.4", "marker": marker, "ls": ":", "ms": 5}
            [handles[what]] = axis.plot(points.updates, points["return"], **style)
        ends = published[published.updates.isna()].to_dict("records")
        for line, dashes in zip(ends, itertools.cycle((":", "-.", "--"))):
            label = f"{line['what']}: {line['return']:,}"
            # A line far above would press the curves together.
            if line["return"] <= 1.3 * data["return"].max():
                handles[label] = axis.axhline(line["return"], color="0.4", ls=dashes)
            else:
                handles[f"above the picture: {label}"] = plt.Line2D([], [], ls="")
        axis.set(title=title, xlabel="updates", ylabel=f"{score}, no exploration noise")
        axis.grid(alpha=0.25)
        n, w = data[["num_envs", "warm_up"]].iloc[0]
        # Only then have updates and steps one ratio.
        if (data.num_envs == n).all() and (data.warm_up == w).all():
            functions = (
                lambda u, n=n, w=w: (u + w) * n / 1e6,
                lambda s, n=n, w=w: s * 1e6 / n - w,
            )
            above = axis.secondary_xaxis("top", functions=functions)
            above.set_xlabel("environment steps (millions)")
    columns = 1 if max(map(len, handles)) > 62 else 2 + len(panels) // 3
    lines = math.ceil(len(handles) / columns)
    figure.set_figheight(max(4.5, 3 + 0.2 * lines))
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=columns, fontsize=8)
    save(figure, path)


def main(runs: tyro.conf.Positional[tuple[Path, ...]] = (), out: Path = Path("report")) -> None:
    """Tables and figures of the published results, or of the runs in these folders beside them.

    The latter go into the folder `out`.
    """
    data = pd.read_csv(RESULTS / "evaluations.csv")
    if runs:
        goals = pd.read_csv(RESULTS / "multigoal.csv")
        data = pd.concat([data, goals[goals.algorithm.isin(["DACER", "DACERv2"])]])
    data = data.fillna({"kwargs": ""}).assign(yours=False)
    if runs:
        read = read_runs(runs)
        if not read:
            raise SystemExit(2)
        named = pd.concat(read).assign(yours=True)
        out.mkdir(parents=True, exist_ok=True)
        beside = data[(data.task + data.kwargs).isin(named.task + named.kwargs)]
        data = pd.concat([beside, named], ignore_index=True)
    data = prepare(data)
    v2 = data.algorithm == "DACERv2"
    five = data["T"] == 5
    plain = data.usual & ~data.constant
    weighted = v2 & five & ~data.constant
    data["variant"] = v2 & ~(five & plain)
    goals = data.groupby("task").coverage.transform("count") > 0
    # On a task with long runs, a variant stands in the same tables and the same figure as they.
    long = data.groupby("task")["update"].transform("max") >= MILESTONES[2]
    ablations = equally_long(data[v2 & ~goals & ~long])
    ablations = ablations[ablations.groupby("task").variant.transform("any").astype(bool)]
    compared = data[~goals & ~(data.variant & data.run.isin(ablations.run))]
    shown = {
        "returns": compared,
        "ablations": ablations,
        "coverage": data[goals],
        "eta": equally_long(data[weighted]),
    }
    tables = {"differences": differences(summarise(compared))}
    for name, rows in shown.items():
        groups = summarise(rows).groupby(["task", "name"], sort=False)
        told = [cells(group) for _, group in groups]
        header = TABLES[name.replace("ablations", "returns")]
        columns = header.split(" | ")
        tables[name] = table(header, [[words[column] for column in columns] for words in told])
    times = pd.read_csv(RESULTS / "speed.csv")
    tables["glance"] = glance(compared, times)
    tables["milestones"] = milestones(compared, times)
    gpu = times.machine.str.contains("NVIDIA")
    tables |= {"speed": speed(times[~gpu]), "gpu": speed(times[gpu])}
    usual = (times.script == "dacer") == (times["T"] == 20)
    cost = times[~gpu & (times.what == TRAINING) & usual]
    cost = cost.pivot(index="task", columns="script", values="ms")
    lines = []
    for task, ms in cost.T.items():
        hours = [ms[script] * updates / 3.6e6 for updates, script in COSTS]
        lines.append([task, *(f"{value:.1f}" for value in hours[:2])])
        lines[-1] += [f"{value:.0f}" for value in hours[2:]]
    heads = [f"{NAMES[script]}, {updates:,} updates" for updates, script in COSTS]
    tables["cost"] = table(" | ".join(["task", *heads]), lines)
    figures = {task: {task: rows} for task, rows in compared.groupby("task", sort=False)}
    for task, rows in ablations.groupby("task", sort=False):
        panels = {
            "what guides the chain": rows[rows["T"] == 5],
            "number of steps": rows[rows.usual & ~rows.constant],
        }
        figures[f"{task}-ablations"] = {
            f"{task}: {title}": part for title, part in panels.items() if len(part)
        }
    default = (data.eta == 2) & data.constant  # on the multi-goal task
    selections = {
        "": data.yours | ~v2 | data.usual & five | default,
        "-eta": weighted,
        "-steps": plain,
    }
    for end, on in selections.items():
        parts = data[goals & on].groupby("task")
        figures[f"coverage{end}"] = {task: part for task, part in parts if part.name.nunique() > 1}
    folder = out if runs else ROOT / "docs" / "figures"
    files = []
    for number, (name, panels) in enumerate(figures.items()):
        if not panels:
            continue
        file = re.sub(r"[^\w.-]+", "-", name)
        if len(file) > 100:  # A task's arguments may be longer than a file's name.
            file = f"{file[:100]}-{number}"
        draw(folder / f"{file}.png", panels)
        files.append(file)
    if runs:
        left_out = ("glance", "speed", "gpu", "cost")
        told = [t for t in tables if t not in left_out and tables[t].count("\n") > 1]
        parts = [f"## {name}\n\n{tables[name]}" for name in told]
        parts += [f"![{file}]({file}.png)" for file in files]
        (out / "report.md").write_text("\n\n".join(parts) + "\n")
        return
    pattern = re.compile(r"(<!-- report: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        text = page.read_text()
        page.write_text(pattern.sub(lambda m: f"{m[1]}\n{tables[m[2]]}\n\n{m[3]}", text))


if __name__ == "__main__":
    try:
        tyro.cli(main)
    except OSError as error:  # a folder that may not be written, or a full disk
        print(f"report.py: error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
