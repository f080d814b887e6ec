"""What README.md and docs/ say: commands run or parse, links lead somewhere, numbers are those of the data.

That the tables between `<!-- report: NAME -->` and `<!-- end -->` are those of the data is in test_report.py.
"""

import json
import re
import runpy
import shlex
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import gymnasium as gym
import numpy as np
import pandas as pd
import pytest
import torch
import tyro
from helpers import TINY, command
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import dacer
import dacer_v2

ROOT = Path(__file__).resolve().parent.parent
PAGES = {
    path.name: path.read_text()
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
}
README = PAGES["README.md"]
ALGORITHMS = {"dacer.py": dacer, "dacer_v2.py": dacer_v2}
PUBLISHED = {
    "goals4-v2-T5-eta2-w1-2": dacer_v2,
    "goals4-dacer-T20-3": dacer,
    "hopper-v2-T5-eta0.01-1": dacer_v2,
}
PUBLISHED |= {"ant-v2-T5-eta0.01-1": dacer_v2}
DATA = pd.concat(
    [pd.read_csv(ROOT / f"benchmarks/results/{name}.csv") for name in ("evaluations", "multigoal")]
)
LAST = DATA.sort_values("step").groupby("run").last()


def code(language: str, text: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def python_commands() -> list[str]:
    """Every call of a script on any page, with its arguments."""
    found = []
    for text in PAGES.values():
        lines = [line for block in code("bash", text) for line in block.splitlines()]
        lines += re.findall(
            r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
        )
        parts = [part for line in lines for part in line.split(" && ")]
        found += [
            part.split("python ", 1)[1] for part in parts if re.search(r"^\S*python (?!-m)", part)
        ]
    return list(dict.fromkeys(found))


@pytest.fixture
def work(tmp_path, monkeypatch):
    """An empty folder in which the published policies lie."""
    (tmp_path / "runs").mkdir()
    for name in PUBLISHED:
        (tmp_path / "runs" / name).symlink_to(ROOT / "runs" / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("line", python_commands())
def test_commands(line, work):
    script, *arguments = shlex.split(line, comments=True)
    if script not in ALGORITHMS:  # its options are known, its runs are there
        said = subprocess.run(
            [sys.executable, ROOT / script, "--help"], check=True, capture_output=True, text=True
        )
        assert all(
            word in said.stdout
            for word in " ".join(arguments).split(" -- ")[0].split()
            if word.startswith("--")
        )
        assert all(
            Path(word).exists()
            for word in arguments
            if word.startswith("runs/") and "<" not in word
        )
        return
    algo = ALGORITHMS[script]
    published = next(f"runs/{name}" for name, module in PUBLISHED.items() if module is algo)
    arguments = [word.replace("runs/<run>", published) for word in arguments]
    if arguments == ["--help"]:
        assert command(algo, "--help").code == 0
        return
    args = tyro.cli(algo.Args, args=arguments)
    json.loads(args.env_kwargs)
    if args.evaluate:
        done = command(algo, *arguments, "--eval-episodes", 1, "--no-compile")
    elif args.resume or args.env_id.split(":")[0] in ("my_module", "shimmy", "gymnasium_robotics"):
        return  # nothing to resume; not installed
    else:
        done = command(algo, *arguments, *TINY)
    assert done.code == 0, done.err


def test_the_commands_are_found():
    """By the expressions above; and the first two need no file that is not there."""
    assert len(python_commands()) > 8
    train, tests = (
        line for block in code("bash", README) for line in block.splitlines() if "-m venv" in line
    )
    for file in re.findall(r"-r (\S+)", train + tests):
        assert (ROOT / file).is_file()
    assert tests.endswith(".venv/bin/python -m pytest -n 2 tests")
    for arguments in re.findall(
        r"`(--[^`]+)`", "".join(PAGES.values())
    ):  # options that stand alone
        flag = arguments.split()[0]
        assert flag in ("--code",) or hasattr(
            dacer_v2.Args, flag[2:].replace("no-", "").replace("-", "_")
        ), flag


@pytest.mark.parametrize("page", PAGES)
def test_links(page):
    folder = (ROOT / page).parent if page == "README.md" else ROOT / "docs"
    for target in re.findall(r"\]\(([^)\s]+)\)|src=\"([^\"]+)\"", PAGES[page]):
        path, _, anchor = "".join(target).partition("#")
        if not path.startswith("http"):
            assert (folder / path).exists() or not path, path
            headings = (
                re.findall(r"^#+ (.*)$", PAGES[Path(path).name or page], re.MULTILINE)
                if anchor
                else []
            )
            assert not anchor or anchor in [
                re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings
            ]


def test_readme_is_short():
    assert len(README.splitlines()) <= 200


def test_functions_in_the_table_exist():
    (table,) = re.findall(r"^\| what \| where \|\n(.*?)\n\n", README, re.MULTILINE | re.DOTALL)
    for name in re.findall(r"`([\w.]+)`", table):
        owner, _, attribute = name.rpartition(".")
        assert hasattr(getattr(dacer_v2, owner) if owner else dacer_v2, attribute), name


def test_settings():
    """The table's are the script's."""
    default, tasks = dacer_v2.DEFAULTS, dacer_v2.TASKS
    humanoid, cheetah, goals = tasks["Humanoid"], tasks["HalfCheetah"], tasks["MultiGoal"]
    rows = dict(
        line.strip("| ").split(" | ", 1) for line in README.splitlines() if line.startswith("| ")
    )
    assert rows["lambda"].startswith(
        f"{default['noise_scale']}; Humanoid, HalfCheetah: {humanoid['noise_scale']} "
    )
    assert rows["hidden layers"].startswith("3 x 256; Humanoid: 3 x 512 ")
    assert (default["hidden_sizes"], humanoid["hidden_sizes"]) == ((256,) * 3, (512,) * 3)
    warm_up = (
        f"{default['learning_starts']:,}; Humanoid, HalfCheetah: {humanoid['learning_starts']:,} "
    )
    assert rows["warm-up, environment steps"].startswith(warm_up)
    assert cheetah == {key: humanoid[key] for key in ("noise_scale", "learning_starts")}
    assert rows["eta of DACERv2"].endswith(
        f"{default['q_grad_weight']}; multi-goal: {goals['q_grad_weight']:g}"
    )
    weight = f"DACERv2: 5, c = {default['time_weight_c']}, d = {default['time_weight_d']}, but on multi-goal c = d = 0)"
    assert weight in README and goals["time_weight_c"] == goals["time_weight_d"] == 0
    assert rows["updates between two steps of alpha"].endswith(
        f"multi-goal: {goals['entropy_interval']:,}"
    )
    assert rows["evaluation"].startswith(
        f"every {dacer_v2.Args.eval_interval:,} updates | the same, 10 "
    )


def test_numbers_in_sentences():
    """Those of the published policies and of the multi-goal task."""
    updates = re.search(
        r"in ten other episodes when it was published, after\s+([\d,]+) updates", README
    )[1]
    ant = DATA[
        (DATA.run == "ant-v2-T5-eta0.01-1") & (DATA["update"] == int(updates.replace(",", "")))
    ].iloc[0]
    said = f"that policy had {ant['return']:.0f} +- {ant['std']:.0f} in ten other episodes when it was published, after "
    assert said + f"{ant['update']:,.0f} updates" in " ".join(README.split())
    names = "v2-T5-eta2-w1", "dacer-T20"
    v2, plain = (LAST.coverage[LAST.index.str.match(rf"goals4-{name}-\d$")] for name in names)
    assert (len(v2), len(plain)) == (5, 5)
    means = f"{v2.mean():.2f} on average and {v2.min():.2f} at worst"
    assert (
        f"cover {means}; of DACER (T = 20, 10,000) {plain.mean():.2f} and {plain.min():.2f}"
        in " ".join(README.split())
    )
    told = " ".join(PAGES["multigoal.md"].split())
    assert f"covers {means}, DACER {plain.mean():.2f} and {plain.min():.2f}" in told
    assert plain.idxmin() == "goals4-dacer-T20-3"


def test_random_policy():
    """What README says of uniform random actions: ten episodes."""
    env, returns = gym.make("multigoal_env:MultiGoal-v0"), np.zeros(10)
    env.action_space.seed(1)
    for episode in range(10):
        env.reset(seed=episode)
        done = False
        while not done:
            _, reward, terminated, truncated, _ = env.step(env.action_space.sample())
            returns[episode] += reward
            done = terminated or truncated
    assert f"niform random actions get {returns.mean():.0f} +- {returns.std():.0f}" in README


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_policies(name):
    """They are small, say where they come from, and give the return of their last evaluation."""
    algo, folder, told = PUBLISHED[name], ROOT / "runs" / name, LAST.loc[name]
    assert (folder / "best.pt").stat().st_size < 1_000_000
    saved = json.loads((folder / "args.json").read_text())
    assert saved.pop("commit") == told.commit
    agent = algo.load_agent(folder)
    assert algo.Args(**saved | {"compile": False, "hidden_sizes": (256,) * 3}) == agent.args
    returns, scores = algo.evaluate(agent.policy, agent.args, 1)
    likely = max(2 * told["std"], 0.2 * abs(told["return"]))  # an ant may fall once in ten episodes
    assert abs(returns.mean() - told["return"]) <= likely
    if (
        f"--evaluate runs/{name} " in README
    ):  # another machine rounds in another way, which Hopper's falls magnify
        mean, std = map(
            float, re.search(r"a published policy: ([\d.]+) \+- ([\d.]+)", README).groups()
        )
        assert (abs(returns.mean() - mean) <= likely) and 0 < std < likely
    if "goals" in name:
        assert scores["coverage"] == pytest.approx(told.coverage, abs=0.1)


def test_from_code(work):
    """README's example trains, loads and acts."""
    small = 'total_timesteps=80, learning_starts=40, num_envs=2, batch_size=8, hidden_sizes=(16, 16), device="cpu"'
    small += ", compile=False, entropy_samples=8, eval_episodes=1"
    (example,) = code("python", README)
    assert "total_timesteps=1_830_000" in example
    Path("example.py").write_text(example.replace("total_timesteps=1_830_000", small))
    names = runpy.run_path("example.py")
    assert names["action"].shape == (3,)
    assert Path("runs/mine/best.pt").exists()


def test_onnx(work):
    """The exported policy acts as PyTorch's does."""
    for module in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(module)
    Path("example.py").write_text("\n".join(code("python", PAGES["deploying.md"])))
    names = runpy.run_path("example.py")
    policy, observations = names["policy"], np.random.default_rng(1).standard_normal((50, 11))
    for obs in observations:
        noise = deepcopy(names["rng"]).standard_normal((6, 1, 3), np.float32)
        with torch.no_grad():
            wanted = policy(
                torch.as_tensor(obs[None], dtype=torch.float32), torch.as_tensor(noise)
            )[0]
        assert np.abs(names["act"](obs) - wanted.numpy()).max() <= 1e-5


def test_log_tags(work):
    """Whatever a run logs is explained; of numbered tags the first."""
    done = command(dacer_v2, "--env-id", "multigoal_env:MultiGoal-v0", *TINY)
    assert done.code == 0, done.err
    (folder,) = (path for path in Path("runs").iterdir() if path.name not in PUBLISHED)
    tags = EventAccumulator(str(folder)).Reload().Tags()["scalars"]
    told = re.findall(r"`(\w+/\w+)`", PAGES["logging.md"])
    assert len(tags) > 15
    assert {re.sub(r"(?<=qf|_t|ga)\d", "1", tag) for tag in tags} <= set(told)
