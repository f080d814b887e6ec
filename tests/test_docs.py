"""What README.md and docs/ say.

Commands run or parse, links lead somewhere, and numbers are those of the data. That this holds for
the tables between `<!-- report: NAME -->` and `<!-- end -->` is in test_report.py.
"""

import json
import re
import runpy
import shlex
from copy import deepcopy
from functools import cache
from pathlib import Path

import gymnasium as gym
import numpy as np
import pandas as pd
import pytest
import torch
import tyro
from helpers import ROOT, TINY, command, evaluate, scalars, shell, the_run, tiny

import dacer
import dacer_v2

PAGES = {
    path.name: path.read_text()
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
}
README = PAGES["README.md"]
ALGORITHMS = {"dacer.py": dacer, "dacer_v2.py": dacer_v2}
PUBLISHED = {
    "goals4-v2-T5-eta2-w1-2": dacer_v2,
    "goals4-dacer-T20-3": dacer,
    "cheetah1-dacer-T5-1": dacer,
    "cheetah1-v2-T5-1": dacer_v2,
    "hopper-v2-T5-eta0.01-1": dacer_v2,
    "humanoid5-v2-T5-1": dacer_v2,
    "walker-v2-T5-1": dacer_v2,
}
PUBLISHED |= {"ant-v2-T5-eta0.01-1": dacer_v2}
DATA = pd.concat(
    [pd.read_csv(ROOT / f"benchmarks/results/{name}.csv") for name in ("evaluations", "multigoal")]
)


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


COMMANDS = python_commands()


def program_of(line: str) -> str:
    return line.split()[0]


@cache
def help_of(script: str) -> str:
    ended = shell(ROOT / script, "--help")
    if "No module named 'seaborn'" in ended.err:
        pytest.skip("seaborn is not installed")
    assert ended.code == 0, ended.err
    return ended.out


@pytest.fixture
def policies(work):
    """The published policies, in the working directory."""
    Path("runs").mkdir()
    for name in PUBLISHED:
        Path("runs", name).symlink_to(ROOT / "runs" / name)


@pytest.mark.parametrize("line", [line for line in COMMANDS if program_of(line) not in ALGORITHMS])
def test_commands_of_other_programs(line, policies):
    """Their options are known, and the runs that they name are there."""
    program, *arguments = shlex.split(line, comments=True)
    own = arguments[: arguments.index("--")] if "--" in arguments else arguments
    for word in own:
        is_option = word.startswith("--")
        assert not is_option or re.search(rf"{re.escape(word)}\b(?!-)", help_of(program)), word
    if "--" in arguments:  # for the script that it starts
        tyro.cli(dacer_v2.Args, args=arguments[len(own) + 1 :])
    for word in arguments:
        assert not word.startswith("runs/") or "<" in word or Path(word).exists()


@pytest.mark.parametrize("line", [line for line in COMMANDS if program_of(line) in ALGORITHMS])
def test_commands_of_the_scripts(line, policies):
    """Each does what it says, in a tiny run."""
    script, *arguments = shlex.split(line, comments=True)
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
        pytest.skip("nothing to resume, or not installed")
    else:
        done = command(algo, *arguments, *tiny(eval_interval=40))
    assert done.code == 0, done.err


def test_the_commands_are_found():
    """By the expressions above. The requirements that README installs are there."""
    assert len(COMMANDS) > 8
    lines = [line for block in code("bash", README) for line in block.splitlines()]
    installs = [line for line in lines if "-m venv" in line]
    for file in re.findall(r"-r (\S+)", " ".join(installs)):
        assert (ROOT / file).is_file()
    assert any(line.endswith(".venv/bin/python -m pytest -n 2 tests") for line in installs)
    # Options that stand alone in a sentence are options of the scripts.
    for arguments in re.findall(r"`(--[^`]+)`", "".join(PAGES.values())):
        flag = arguments.split()[0]
        name = flag[2:].replace("no-", "").replace("-", "_")
        assert flag == "--code" or hasattr(dacer_v2.Args, name), flag


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


@pytest.mark.parametrize("page", ["README.md", "changing.md"])
def test_functions_in_the_table_exist(page):
    (table,) = re.findall(
        r"^\| [^\n]* \| where it is \|.*?\n(.*?)\n\n", PAGES[page], re.MULTILINE | re.DOTALL
    )
    places = " ".join(row.split(" | ")[1] for row in table.splitlines())
    assert places.count("`") > 15
    for name in re.findall(r"`([\w.]+)`", places):
        owner, _, attribute = name.rpartition(".")
        assert hasattr(getattr(dacer_v2, owner) if owner else dacer_v2, attribute), name


def test_places_in_the_tables_of_the_algorithms_exist():
    """And the constants there are those of the code."""
    cells = {}
    for line in PAGES["algorithms.md"].splitlines():
        parts = line.strip("| ").split(" | ") if line.startswith("| ") else []
        if "place" in parts:
            column = parts.index("place")
        elif "source" not in parts and len(parts) in (3, 4) and "`" in parts[column]:
            cells[parts[0]] = parts[1]
            for name in re.findall(r"`([\w.]+)`", parts[column]):
                owner, _, attribute = name.rpartition(".")
                assert hasattr(getattr(dacer_v2, owner) if owner else dacer_v2, attribute), name
    assert len(cells) > 30
    args = dacer_v2.Args
    assert cells["gamma, tau, scale of rewards"] == f"{args.gamma}, {args.tau}, {args.reward_scale}"
    assert cells["batch, replay buffer"] == f"{args.batch_size}, 1 million"
    assert args.buffer_size == 1_000_000
    assert cells["environments per update"] == f"{args.num_envs}"
    samples = cells["actions per state for H, components of the mixture"]
    assert samples == f"{args.entropy_samples}, 3"
    assert cells["learning rates"] == f"1e-4, of alpha {args.alpha_lr}"
    assert args.learning_rate == 1e-4


def test_settings():
    """What README's table says that this code takes is what it takes."""
    section = README.split("## Settings")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("| ")]
    cells = {line.split(" | ")[0].strip("| "): line.strip("| ").split(" | ")[1:] for line in lines}
    default, tasks = dacer_v2.DEFAULTS, dacer_v2.TASKS
    humanoid, goals = tasks["Humanoid"], tasks["MultiGoal"]

    def numbers(name: str, column: int) -> list[float]:
        return [float(x.replace(",", "")) for x in re.findall(r"-?[\d,.]*\d", cells[name][column])]

    noise_scales = [default["noise_scale"], humanoid["noise_scale"]]
    assert numbers("lambda (`--noise-scale`)", 0) == noise_scales
    assert numbers("hidden layers", 0) == [3, 256, 3, 512]
    assert (default["hidden_sizes"], humanoid["hidden_sizes"]) == ((256,) * 3, (512,) * 3)
    warm_ups = [default["learning_starts"], humanoid["learning_starts"]]
    assert numbers("warm-up, environment steps", 0) == warm_ups
    assert tasks["HalfCheetah"] == {name: humanoid[name] for name in tasks["HalfCheetah"]}
    assert numbers("eta of DACERv2", 1) == [default["q_grad_weight"], goals["q_grad_weight"]]
    weights = [2 / dacer_v2.Args.diffusion_steps, default["time_weight_d"]]
    assert numbers("c, d of DACERv2", 0) == weights
    assert numbers("c, d of DACERv2", 1)[-2:] == [goals["time_weight_c"], goals["time_weight_d"]]
    interval = numbers("updates between two steps of alpha", 1)
    assert interval == [150, 100, goals["entropy_interval"]]
    assert numbers("evaluation", 0) == [dacer_v2.Args.eval_interval]
    assert numbers("evaluation", 1) == [dacer_v2.Args.eval_episodes]


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
    assert f"| uniform random actions | {returns.mean():.0f} +- {returns.std():.0f} |" in README


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_policies(name):
    """They are small, say where they come from, and give the return of their evaluation."""
    algo, folder = PUBLISHED[name], ROOT / "runs" / name
    (row,) = re.findall(rf"`{name}`.* \| ([\d,]+) \| (-?[\d,]+) \+- ([\d,]+) \|", README)
    update, mean, std = (float(number.replace(",", "")) for number in row)
    rows = DATA[DATA.run == name]
    (told,) = rows[rows.step / rows.num_envs - rows.learning_starts / rows.num_envs == update].iloc
    assert (folder / "best.pt").stat().st_size < 2_000_000
    saved = json.loads((folder / "args.json").read_text())
    assert saved.pop("commit") == told.commit
    agent = algo.load_agent(folder)
    saved["hidden_sizes"] = tuple(saved["hidden_sizes"])
    assert algo.Args(**saved | {"compile": False}) == agent.args
    target = agent.target_critic.state_dict()  # for those who train it further
    for weights, critic in agent.critic.state_dict().items():
        is_left_out = critic.isnan().all() and target[weights].isnan().all()
        assert is_left_out or torch.equal(critic, target[weights])
    returns, scores = evaluate(algo, agent.policy, agent.args, 1)
    # An ant may fall once in ten episodes.
    likely = max(2 * told["std"], 0.2 * abs(told["return"]))
    assert abs(returns.mean() - told["return"]) <= likely
    # Another machine rounds in another way, which an ant's falls magnify.
    assert abs(returns.mean() - mean) <= likely
    assert 0 < std < abs(mean) / 2
    if name.startswith(("goals", "cheetah")):  # They cannot fall.
        assert returns.std() / 5 < std < 5 * returns.std()
    if "goals" in name:
        assert scores["coverage"] == pytest.approx(told.coverage, abs=0.1)


def test_from_code(work):
    """README's example trains, loads and acts."""
    small = ", ".join(f"{name}={value!r}" for name, value in TINY.items())
    (example,) = code("python", README)
    assert "total_timesteps=1_830_000" in example
    Path("example.py").write_text(example.replace("total_timesteps=1_830_000", small))
    names = runpy.run_path("example.py")
    assert names["action"].shape == (3,)
    assert Path("runs/mine/best.pt").exists()


def test_onnx(policies):
    """The exported policy acts as PyTorch's does."""
    for module in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(module)
    Path("example.py").write_text("\n".join(code("python", PAGES["deploying.md"])))
    names = runpy.run_path("example.py")
    policy, observations = names["policy"], np.random.default_rng(1).standard_normal((50, 11))
    for obs in observations:
        noise = deepcopy(names["rng"]).standard_normal((6, 1, 3), np.float32)
        inputs = torch.as_tensor(obs[None], dtype=torch.float32), torch.as_tensor(noise)
        with torch.no_grad():
            (wanted,) = policy(*inputs)
        assert np.abs(names["act"](obs) - wanted.numpy()).max() <= 1e-5


def test_log_tags(work):
    """Whatever a run logs is explained, and nothing else; of numbered tags the first."""
    done = command(dacer_v2, *tiny(env_id="multigoal_env:MultiGoal-v0"))
    assert done.code == 0, done.err
    tags = scalars(the_run()).keys()
    told = re.findall(r"`(\w+/\w+)`", PAGES["logging.md"])
    assert len(tags) > 15
    assert {re.sub(r"(?<=qf|_t|ga)\d", "1", tag) for tag in tags} == set(told)
