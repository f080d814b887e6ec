"""benchmarks/report.py: the published tables are those of the data, and of made-up runs the results
are as known."""

import itertools
import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

pytest.importorskip("seaborn")
import multigoal
import report
from helpers import ROOT, program
from torch.utils.tensorboard import SummaryWriter

ARGS = {
    "env_id": "Hopper-v4",
    "env_kwargs": "{}",
    "seed": 1,
    "num_envs": 20,
    "learning_starts": 30_000,
}
ARGS |= {"diffusion_steps": 20, "total_timesteps": 230_000}
V2 = {"diffusion_steps": 5, "q_grad_weight": 0.01, "time_weight_c": 0.4, "time_weight_d": -1.8}
PAGES = "README.md", "docs/multigoal.md"
BEST = "highest evaluation in the last 10%"


def make_run(folder, returns, *, first=1, coverage=None, **changes):
    """Writes the logs of a run that is evaluated every 1,000 updates."""
    with SummaryWriter(folder, filename_suffix=str(first)) as writer:
        for i, value in enumerate(returns, start=first):
            writer.add_scalar("eval/episodic_return", value, 30_000 + 20_000 * i)
            if coverage is not None:
                writer.add_scalar("eval/coverage", coverage, 30_000 + 20_000 * i)
                writer.add_scalar("eval/arrived", 1.0, 30_000 + 20_000 * i)
    (folder / "args.json").write_text(json.dumps({**ARGS, **changes}))
    return folder


def rows_of(text):
    """The cells of the first table, by its header."""
    lines = re.search(r"(^\|.*\n?)+", text, re.MULTILINE)[0].splitlines()
    header, _, *rows = [line.strip("| ").split(" | ") for line in lines]
    return [dict(zip(header, row)) for row in rows]


def numbers(cell):
    return [float(number) for number in re.findall(r"-?\d[\d.]*", cell)]


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A copy of the repository in which the report was made anew."""
    root = tmp_path_factory.mktemp("copy")
    shutil.copytree(
        ROOT / "benchmarks", root / "benchmarks", ignore=shutil.ignore_patterns("__pycache__")
    )
    shutil.copytree(ROOT / "docs", root / "docs")
    shutil.copy(ROOT / "README.md", root)
    for name in ("dacer.py", "dacer_v2.py", "multigoal_env.py", "runs"):
        (root / name).symlink_to(ROOT / name)
    for script in ("report.py", "multigoal.py"):
        subprocess.run([sys.executable, root / "benchmarks" / script], check=True)
    return root


@pytest.fixture
def tables(tmp_path):
    """Reports on the runs under tmp_path/runs; its tables by name."""

    def make():
        report.main(tuple(sorted((tmp_path / "runs").iterdir())), tmp_path / "out")
        text = (tmp_path / "out/report.md").read_text()
        assert all((tmp_path / "out" / name).exists() for name in re.findall(r"\]\((.*)\)", text))
        return {part.split("\n")[0]: rows_of(part) for part in text.split("## ")[1:]}

    (tmp_path / "runs").mkdir()
    return make


def test_the_pages_say_what_the_data_say(copy):
    for path in [*(ROOT / "docs").glob("*.md"), ROOT / "README.md"]:
        text = path.read_text()
        assert (copy / path.relative_to(ROOT)).read_text() == text
        for figure in re.findall(r"\((?:docs/)?(figures/[^)]+)\)", text):
            most = 1_500_000 if figure.endswith(".webp") else 120_000
            assert (ROOT / "docs" / figure).stat().st_size < most


def test_the_numbers_recompute(copy):
    data = pd.read_csv(ROOT / "benchmarks/results/evaluations.csv")
    assert not data.duplicated(["run", "step"]).any()
    runs = data.groupby("run", as_index=False).agg("last")
    runs["task"] += (runs.num_envs == 1).map({True: ", 1 environment", False: ""})
    runs.loc[runs.task == "Humanoid-v5", "task"] = "Humanoid-v5 without contact forces"
    runs["name"] = runs.algorithm + ", T = " + runs["T"].map("{:g}".format)
    glance = rows_of((copy / "README.md").read_text().split("<!-- report: glance")[1])
    long = runs[runs["update"] >= 100_000].sort_values("update")
    long = long.drop_duplicates(["task", "name", "seed"], keep="last")  # of a seed that ran twice
    assert len(glance) == len(long)
    speed = pd.read_csv(ROOT / "benchmarks/results/speed.csv")
    speed = speed[(speed.what == report.TRAINING) & ~speed.machine.str.contains("NVIDIA")]
    for row in glance:
        group = long[(long.task + long.name == row["task"] + row["algorithm, T"])]
        (run,) = group[group.seed == int(row["seed"])].to_dict("records")
        told = [row["updates"], row["last return"], row["return after 300,000 updates"]]
        then = data[(data.run == run["run"]) & (data["update"] == 300_000)]["return"]
        wanted = [f"{run['update']:,}", f"{run['return']:,.0f}"]
        assert told == [*wanted, f"{then.item():,.0f}" if len(then) else "-"]
        ms = speed[(speed.task + "-v4" == run["task"]) & (speed["T"] == run["T"])]
        ms = ms[ms.script == {"DACERv2": "dacer_v2", "DACER": "dacer"}[run["algorithm"]]].ms
        assert row["hours"] == (f"{run['update'] * ms.item() / 3.6e6:.1f}" if len(ms) else "-")
    for row in rows_of((copy / "docs/multigoal.md").read_text().split("<!-- report: ")[1]):
        group = runs[(runs.kwargs == f"num_goals={row['goals']}") & (runs["T"] == int(row["T"]))]
        group = group[group.eta.isna() if row["eta"] == "-" else group.eta == float(row["eta"])]
        group = group[(group.c == 0) == (row["w(t)"] == "1")]
        assert sorted(group.seed) == numbers(row["seed"])
        wanted = [group.coverage.mean(), *([group.coverage.std()] if len(group) > 1 else [])]
        assert numbers(row["coverage"]) == pytest.approx(wanted, abs=0.0051)
        assert float(row["worst seed"]) == pytest.approx(group.coverage.min(), abs=0.0051)
        assert float(row["return"]) == pytest.approx(group["return"].mean(), abs=0.51)
    data = pd.read_csv(ROOT / "benchmarks/results/speed.csv")
    speed_page = (copy / "docs/speed.md").read_text()
    parts = [speed_page.split(f"report: {name} ")[1] for name in ("speed", "gpu")]
    in_any_order = data.sample(frac=1, random_state=0)
    parts.append(report.speed(in_any_order.query("task != 'Ant'")))
    for part, where in zip(parts, (False, True, False), strict=True):
        times = (
            data[data.machine.str.contains("NVIDIA") == where]
            .set_index(["script", "T", "what", "task"])
            .ms
        )
        for row in rows_of(part):
            told = {
                what: row[what]
                for what in row.keys() & set(times.index.unique("what"))
                if row[what] != "-"
            }
            assert len(told) > 1
            for what, cell in told.items():
                assert float(cell) == pytest.approx(
                    times[row["script"], int(row["T"]), what, row.get("task", "Ant")], rel=0.006
                )
    times = times.reorder_levels(["task", "script", "T", "what"])
    for row in rows_of(
        (copy / "docs/speed.md").read_text().split("report: cost")[1]
    ):  # hours of 1.5 million updates
        wanted = [
            times[row["task"], *key, report.TRAINING] / 2.4
            for key in (("dacer", 20), ("dacer_v2", 5))
        ]
        told = [row[f"{name}, 1,500,000 updates"] for name in ("DACER, T = 20", "DACERv2, T = 5")]
        assert [float(cell) for cell in told] == pytest.approx(wanted, abs=0.51)


def test_the_table_of_algorithms_recomputes(copy):
    data = pd.concat(
        [
            pd.read_csv(ROOT / f"benchmarks/results/{name}.csv")
            for name in ("evaluations", "multigoal")
        ]
    )
    runs = data.sort_values("step").groupby("run").agg("last")
    short, rows = (
        rows_of((copy / page).read_text().split("<!-- multigoal -->")[1]) for page in PAGES
    )
    assert all(row in rows for row in short)
    assert {row["algorithm"] for row in rows} > {"SAC", "TD3", "DDPG", "PPO", "TRPO"}
    for row, goals in itertools.product(rows, (4, 5, 6)):
        name, *settings = row["algorithm"].split(", ")
        settings = dict(setting.split(" = ") for setting in settings)
        group = runs[(runs.algorithm == name) & (runs.kwargs == f"num_goals={goals}")]
        length = {"20,000": 430_000, "35,000": 1_030_000, "50,000": 1_030_000}.get(
            row["updates"], 230_000
        )
        group = group[group.total_timesteps == length]
        for key, value in settings.items():
            group = group[group.c == 0 if key == "w" else group[key] == float(value)]
        if "eta" in settings and "w" not in settings:
            group = group[group.c == 0.4]
        if row[f"{goals} goals"] == "-":
            assert group.empty
            continue
        wanted = [group.coverage.mean(), len(group), group.coverage.min()][: 2 + (len(group) > 1)]
        *found, score = numbers(row[f"{goals} goals"])[: len(wanted) + 1]
        assert (found, score) == (
            pytest.approx(wanted, abs=0.0051),
            pytest.approx(group["return"].mean(), abs=0.51),
        )


def test_first_angle():
    # 0, 0, 45 and 45 degrees from a goal of 4.
    steps = np.array([(1, 0), (0, -0.5), (0.3, 0.3), (-0.2, 0.2)])
    path = np.stack([np.zeros((4, 2)), steps, 3 * steps[::-1]])
    angles = [
        multigoal.first_angle(path, multigoal.multigoal_env.MultiGoalEnv(n).goals) for n in (4, 8)
    ]
    assert angles == pytest.approx([22.5, 0], abs=1e-3)


def test_statistics(tmp_path, tables):
    # Of two normal samples of two: 1 +- 4.303 sqrt(2/2 + 2/2); t(2) = 0.707 has p = 0.55.
    for seed in (1, 2):
        make_run(tmp_path / f"runs/a{seed}", [99, 0] * 4 + [2 * seed, 0], seed=seed, **V2)
        make_run(
            tmp_path / f"runs/b{seed}",
            [99, 0] * 4 + [2 * seed - 1, 0],
            seed=seed,
            diffusion_steps=5,
        )
    (row,) = [row for row in tables()["differences"] if "yours" in row["algorithm"]]
    assert row[BEST] == "+1.00 (-5.08 to 7.08)"
    assert "| +1.00 (-5.08 to 7.08) | 0.55 |" in (tmp_path / "out/report.md").read_text()
    # 1 in 27 means is 1, or 3.
    assert report.interval([pd.Series([1.0, 2.0, 3.0])], np.mean, ".2f") == "1.00 to 3.00"
    for values, digits in (([0.5], 2), ([12.3, np.nan], 1), ([-4000.0], 0)):
        assert report.digits(pd.Series(values)) == digits


def test_runs_that_did_not_end_well_are_marked(tmp_path, tables):
    make_run(tmp_path / "runs/short", [5, 6])
    make_run(tmp_path / "runs/nan", [5] * 9 + [float("nan")])
    again = make_run(tmp_path / "runs/again", [5] * 6, seed=2)
    make_run(again, [7] * 6, first=5, seed=2)  # went on from an earlier point: the newest counts
    (row,) = [row for row in tables()["returns"] if "yours" in row["algorithm, T"]]
    assert row["updates"] == "10,000 (1 NaN; 1 complete; 1 stopped at 30%; seed 1 repeated)"
    assert row["each seed"] == "nan, nan, 7.00"
    assert report.read_run(again)["return"].tolist() == [5] * 4 + [7] * 6


def test_runs_of_unequal_length_have_no_mean(tmp_path, tables):
    """Two runs of one seed are one seed. Where hours of one are unknown, so is their mean."""
    make_run(tmp_path / "runs/first", [5, 6], **V2)
    make_run(tmp_path / "runs/second", [7], **V2)
    of_eta, of_returns = (
        [row for row in tables()[name] if "yours" in row["algorithm, T"]]
        for name in ("eta", "returns")
    )
    assert [(row["seeds"], row["return"]) for row in of_eta] == [("1", "6.00, 7.00")]
    assert [row["last evaluation"] for row in of_returns] == ["6.00, 7.00"]

    for unknown, shown in ((2.5, "2.0"), (np.nan, "nan")):  # nan becomes "-" in the table.
        first, second = report.read_runs([tmp_path / "runs"])
        parts = first.assign(hours=1.5), second.assign(hours=unknown)
        data = pd.concat(parts, ignore_index=True)
        runs = report.summarise(report.prepare(data.assign(yours=True)))
        assert report.cells(runs)["hours"] == shown


def test_a_nan_is_not_left_out_of_a_mean(tmp_path, tables):
    for seed, last in ((1, 6.0), (2, float("nan"))):
        make_run(tmp_path / f"runs/seed-{seed}", [5, last], seed=seed, **V2)
    (row,) = [row for row in tables()["eta"] if "yours" in row["algorithm, T"]]
    assert (row["seeds"], row["return"]) == ("2", "-")


def test_a_run_under_way(tmp_path, tables):
    make_run(tmp_path / "runs/begun", [5, 6])
    (row,) = [row for row in tables()["returns"] if "yours" in row["algorithm, T"]]
    assert (row["updates"], row[BEST], row["last evaluation"]) == (
        "2,000 (1 stopped at 30%)",
        "-",
        "6.00",
    )


def test_runs_with_nothing_beside_them(tmp_path, tables):
    make_run(
        tmp_path / "runs/goals",
        [1, 2],
        coverage=0.5,
        env_id="a:MultiGoal-v0",
        env_kwargs='{"num_goals": 7}',
    )
    assert [row["goals"] for row in tables()["coverage"]] == ["7"]  # without a picture
    make_run(
        tmp_path / "runs/three-steps", [1, 2], env_id="Pendulum-v1", **V2 | {"diffusion_steps": 3}
    )
    assert [row["algorithm, T"] for row in tables()["ablations"]] == [
        "DACERv2, T = 3, c = 0.4, d = -1.8 (yours)"
    ]


def test_named_runs_stand_beside_the_published_ones(tmp_path, tables):
    before = {
        path: path.read_bytes() for path in [*(ROOT / "docs").rglob("*.*"), ROOT / "README.md"]
    }
    published = rows_of((ROOT / "docs/multigoal.md").read_text().split("report: ")[1])
    goals = {"env_id": "multigoal_env:MultiGoal-v0", "env_kwargs": '{"num_goals": 6}'}
    for seed in (1, 2, 3):
        make_run(
            tmp_path / f"runs/{seed}",
            [-100] * 10,
            coverage=0.5,
            seed=seed,
            batch_size=256 * (1 + seed // 3),
            **goals,
        )
    made = tables()["coverage"]
    assert all(row in made for row in published if row["goals"] == "6")
    defaults = [(row["T"], row["eta"], row["w(t)"], row["seed"]) for row in made]
    assert ("5", "2", "1", "1, 2, 3, 4, 5") in defaults
    two_batch_sizes = ["1, 2", "3"]
    assert [row["seed"] for row in made if "yours" in row["algorithm"]] == two_batch_sizes
    assert before == {path: path.read_bytes() for path in before}


@pytest.mark.parametrize("content", [None, "{", "[]", '{"env_id": "Hopper-v4"}', '{"env_id": 3}'])
def test_what_is_no_run_is_named_and_left_out(tmp_path, tables, capsys, content):
    wrong = tmp_path / "wrong"
    wrong.mkdir()
    if content is not None:
        (wrong / "args.json").write_text(content)
        (wrong / "events.out.tfevents.1").touch()
    with pytest.raises(SystemExit) as stopped:
        report.main((wrong,), tmp_path / "out")
    assert stopped.value.code == 2
    wrong.rename(tmp_path / "runs/wrong")
    make_run(tmp_path / "runs/good", [5, 6])
    assert [row for row in tables()["returns"] if "yours" in row["algorithm, T"]]
    first, second = capsys.readouterr().err.splitlines()
    assert f"{wrong} is left out" in first
    assert f"{tmp_path / 'runs/wrong'} is left out" in second


def test_runs_are_found_below_a_folder(tmp_path, tables, capsys):
    """Those of a sweep, too; pictures and published policies are none."""
    make_run(tmp_path / "runs/sweep/job/runs/one", [5, 6])
    make_run(tmp_path / "runs/sweep/two", [7, 8], seed=2)
    (tmp_path / "runs/multigoal.png").touch()
    make_run(tmp_path / "runs/begun", [])
    shutil.copytree(ROOT / "runs/hopper-v2-T5-eta0.01-1", tmp_path / "runs/published")
    (row,) = [row for row in tables()["returns"] if "yours" in row["algorithm, T"]]
    assert (row["seed"], row["last evaluation"]) == ("1, 2", "7.00 (6.00 to 8.00)")
    assert capsys.readouterr().err.count("is left out") == 3
    report.main((tmp_path / "runs",), tmp_path / "out")
    (said,) = capsys.readouterr().err.splitlines()
    assert f"{tmp_path / 'runs/begun'} is left out" in said


def test_a_report_that_cannot_be_written(tmp_path):
    make_run(tmp_path / "runs/one", [5, 6])
    (tmp_path / "file").touch()
    ended = program(ROOT / "benchmarks/report.py", tmp_path / "runs", "--out", tmp_path / "file")
    assert (ended.code, ended.err.count("\n")) == (2, 1)
    assert ended.err.startswith("report.py: error: ")


def test_runs_behind_a_link_are_found(tmp_path):
    make_run(tmp_path / "disk/one", [5, 6])
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/one").symlink_to(tmp_path / "disk/one")
    assert len(report.read_runs([tmp_path / "runs"])) == 1


@pytest.mark.parametrize(
    "name", ["exp_name", "buffer_size", "entropy_samples", "checkpoint_interval", "my_argument"]
)
def test_runs_with_other_arguments_are_no_seeds_of_one_group(tmp_path, tables, name):
    """An argument that a reader added to his script, too."""
    make_run(tmp_path / "runs/one", [5], **{name: 1})
    make_run(tmp_path / "runs/two", [6], seed=2, **{name: 2})
    rows = [row for row in tables()["returns"] if "yours" in row["algorithm, T"]]
    names = [f"DACER, T = 20 (yours), {name} = {value}" for value in (1, 2)]
    assert [row["algorithm, T"] for row in rows] == names


def test_a_single_evaluation_is_drawn_as_a_point(tmp_path, tables, monkeypatch):
    drawn, save = [], report.save

    def keep(figure, path):
        lines = figure.axes[0].lines
        drawn.extend(line.get_ydata().tolist() for line in lines if line.get_marker() == "o")
        save(figure, path)

    monkeypatch.setattr(report, "save", keep)
    make_run(tmp_path / "runs/one", [5], env_id="Pusher-v5", total_timesteps=50_000)
    tables()
    assert drawn == [[5]]


def test_a_task_with_many_arguments(tmp_path, tables):
    """Its figure has a name that the system takes, and the text is no formula."""
    for costs in ({"a $x^$": 1}, {"a $x^$": 2}):
        kwargs = json.dumps({f"weight_of_the_cost_{i}": 0.5 for i in range(20)} | costs)
        seed = costs["a $x^$"]
        make_run(tmp_path / f"runs/{seed}", [5, 6], env_id="Ant-v5", env_kwargs=kwargs, seed=seed)
    tables()
    assert len(list((tmp_path / "out").glob("Ant-v5-weight*.png"))) == 2


def test_runs_of_one_seed_are_drawn(tmp_path, tables, monkeypatch):
    """Each of them, and no mean, which would look like one of several seeds."""
    drawn, save = {}, report.save

    def keep(figure, path):
        lines = [line.get_ydata().tolist() for line in figure.axes[0].lines]
        drawn[path.name] = [line for line in lines if len(line) == 2]
        save(figure, path)

    monkeypatch.setattr(report, "save", keep)
    for run in (5, 7, 9):
        make_run(
            tmp_path / f"runs/{run}", [run, run + 1], env_id="Pusher-v5", total_timesteps=50_000
        )
    (row,) = tables()["returns"]
    assert "stopped" not in row["updates"]
    assert sorted(drawn["Pusher-v5.png"]) == [[5, 6], [7, 8], [9, 10]]


def test_our_hours_are_not_those_of_other_runs(tmp_path, tables):
    make_run(tmp_path / "runs/ant", [5] * 60, env_id="Ant-v4")
    rows = {row["algorithm, T"]: row["after 60,000 updates"] for row in tables()["milestones"]}
    assert rows["DACER, T = 20 (yours)"] == "5.00"
    assert rows["DACER, T = 20"].endswith(" h")


def test_the_multi_goal_task_has_four_goals_if_none_are_named(tmp_path):
    run = make_run(tmp_path / "goals", [1, 2], env_id="multigoal_env:MultiGoal-v0")
    assert set(report.read_run(run).kwargs) == {"num_goals=4"}


def test_the_best_return_can_be_played():
    """From the origin, straight towards a goal, in steps of the best lengths."""
    env = multigoal.multigoal_env.MultiGoalEnv(4)
    distance, value, length = multigoal.best_values(gamma=1)
    position, total, arrived = np.zeros(2), 0.0, False
    while not arrived:
        after = np.abs(np.linalg.norm(position - env.goals[0]) - length)
        later = np.where(after < 1, 0, np.interp(after, distance, value))
        cost = 30 * length**2 + after**2 - 10 * (after < 1)
        step = length[(later - cost).argmax()]
        position, reward, arrived = env.advance(position, np.array([step, 0]))
        total += reward
    assert total == pytest.approx(multigoal.best_return(), abs=0.05)
    assert total == pytest.approx(-110.0, abs=0.05)


def test_the_hours_of_a_run_leave_out_its_pauses(tmp_path):
    """Of a day, in the middle. An hour between two points is none."""
    run = make_run(tmp_path / "run", [])
    (empty,) = run.glob("events*")
    empty.unlink()
    steps = itertools.count(50_000, 20_000)
    for start, *evaluated in ((0, 6, 66), (1500, 1506, 1512)):
        with SummaryWriter(run, filename_suffix=".new") as writer:
            for minutes in evaluated:
                time = 1e9 + 60 * minutes
                writer.add_scalar("eval/episodic_return", 5.0, next(steps), walltime=time)
        (file,) = run.glob("events*.new")
        file.rename(run / f"events.out.tfevents.{1_000_000_000 + 60 * start}.a.host.1")
    assert report.read_run(run).hours.tolist() == pytest.approx([0.1, 1.1, 1.2, 1.3])


def test_a_run_that_is_named_twice_counts_once(tmp_path):
    run = make_run(tmp_path / "runs/one", [5, 6])
    assert len(report.read_runs([tmp_path / "runs", run])) == 1


def test_groups_are_compared_after_as_many_updates():
    """Of three lengths the shortest is left out, and the longest is cut."""
    planned = {"short": 10, "long": 20, "longer": 30}
    rows = [("Ant-v4", name, n, at) for name, n in planned.items() for at in (5, n)]
    data = pd.DataFrame(rows, columns=["task", "name", "planned", "update"])
    kept = report.equally_long(data)[["name", "update"]].to_numpy().tolist()
    assert kept == [["long", 5], ["long", 20], ["longer", 5]]


def test_differences_are_between_complete_groups_with_as_many_late_evaluations():
    groups = {"a": (2, "complete"), "b": (2, "complete"), "c": (1, "complete"), "d": (2, "NaN")}
    rows = []
    for name, (late, second) in groups.items():
        same = {"task": "Ant-v4", "name": name, "planned": 10, "late": late}
        rows += [same | {"state": "complete", "best": 1, "half": 1}]
        rows += [same | {"state": second, "best": 2, "half": 2}]
    (row,) = rows_of(report.differences(pd.DataFrame(rows)))
    assert (row["algorithm"], row["minus"]) == ("a", "b")


def test_a_mean_goes_as_far_as_all_seeds(tmp_path, tables, monkeypatch):
    """And the axis above counts the warm-up of 1,500 steps."""
    figures, save = {}, report.save
    keep = lambda figure, path: save(figure, path) or figures.update({path.name: figure})
    monkeypatch.setattr(report, "save", keep)
    for seed in (1, 2, 3):
        make_run(tmp_path / f"runs/{seed}", [seed] * (seed + 1), env_id="Pusher-v5", seed=seed)
    tables()
    (axis,) = figures["Pusher-v5.png"].axes
    (mean,) = [line for line in axis.lines if line.get_linewidth() == 2.5]
    assert np.transpose(mean.get_data()).tolist() == [[1000, 2], [2000, 2]]
    steps = [(updates + 1500) * 20 / 1e6 for updates in axis.get_xlim()]
    assert axis.child_axes[0].get_xlim() == pytest.approx(steps)


def test_the_least_share_of_arrivals_is_shown(tmp_path, tables):
    goals = {"env_id": "multigoal_env:MultiGoal-v0", "env_kwargs": '{"num_goals": 7}'}
    for seed in (1, 2):
        make_run(tmp_path / f"runs/{seed}", [1], coverage=1, seed=seed, **goals)
    with SummaryWriter(tmp_path / "runs/1", filename_suffix="2") as writer:
        writer.add_scalar("eval/arrived", 0.5, 50_000)
    (row,) = tables()["coverage"]
    assert row["arrived, least"] == "50.0%"
