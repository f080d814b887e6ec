r"""The multi-goal task, and pictures of what was learned.

A point mass in the plane has several goals. From the origin they are all equally good, so a policy
that goes straight to each of them is multimodal. Train on the task with

    python dacer_v2.py --env-id multigoal_env:MultiGoal-v0 --env-kwargs '{"num_goals": 4}' \
        --total-timesteps 230000

and draw the policy, the values and the trajectories of one or several such runs with

    python multigoal_env.py runs/<run> [runs/<run> ...]

The task is that of DACER (Wang et al., arXiv:2405.15177) and DACERv2 (Wang et al.,
arXiv:2505.23426).
"""

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, ClassVar, NoReturn

import gymnasium as gym
import numpy as np
import tyro

# ======== The environment ========

GOAL_RADIUS = 5.0  # the goals lie evenly on this circle, the first on the positive x axis
BOUND = 7.0
ARRIVAL = 1.0  # an episode ends at a smaller distance to a goal
GOAL_REWARD = 10.0
ACTION_COST = 30.0
START_STD = 0.1
MAX_STEPS = 100

Act = Callable[[np.ndarray], np.ndarray]  # observations (n, 2) to actions (n, 2)


class MultiGoalEnv(gym.Env):
    """A point mass in the plane and its goals.

    The observation is its position, in [-7, 7]^2. The action is its velocity, in [-1, 1]^2, for
    one unit of time. The reward is -30 |a|^2 - (new distance to the nearest goal)^2, and 10 more
    on arrival. Starts are drawn from N(0, 0.1^2 I).
    """

    metadata: ClassVar = {"render_modes": ["rgb_array"], "render_fps": 10}

    def __init__(self, num_goals: int = 4, render_mode: str | None = None):
        if num_goals not in range(2, 13):
            raise ValueError(f"num_goals must be 2 to 12, but it is {num_goals}")
        angle = 2 * np.pi * np.arange(num_goals) / num_goals
        self.goals = GOAL_RADIUS * np.stack([np.cos(angle), np.sin(angle)], -1)  # (num_goals, 2)
        self.observation_space = gym.spaces.Box(-BOUND, BOUND, (2,), np.float32)
        self.action_space = gym.spaces.Box(-1.0, 1.0, (2,), np.float32)
        self.render_mode = render_mode

    def reset(
        self, *, seed: int | None = None, options: dict | None = None
    ) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.position = START_STD * self.np_random.standard_normal(2)
        return self.position.astype(np.float32), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.position, reward, arrived = self.advance(self.position, np.asarray(action))
        return self.position.astype(np.float32), float(reward), bool(arrived), False, {}

    def advance(
        self, position: np.ndarray, action: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The next positions (..., 2), the rewards (...) and the arrivals (...).

        It takes one point mass and many alike.
        """
        action = np.clip(action, -1.0, 1.0).astype(np.float64)
        position = np.clip(position + action, -BOUND, BOUND)
        nearest = self.squared_distances(position).min(-1)
        arrived = nearest < ARRIVAL**2
        reward = -ACTION_COST * np.square(action).sum(-1) - nearest + GOAL_REWARD * arrived
        return position, reward, arrived

    def squared_distances(self, position: np.ndarray) -> np.ndarray:
        """To every goal, (..., num_goals)."""
        return np.square(position[..., None, :] - self.goals).sum(-1)

    def render(self) -> np.ndarray:
        """Picture (280, 280, 3): goals as green discs, the point mass as a black one."""
        centers = np.linspace(-BOUND, BOUND, 280)
        plane = np.stack(np.meshgrid(centers, -centers), -1)  # (280, 280, 2)
        picture = np.full((280, 280, 3), 255, np.uint8)
        picture[self.squared_distances(plane).min(-1) < ARRIVAL**2] = (0, 158, 115)
        picture[np.square(plane - self.position).sum(-1) < 0.2**2] = 0
        return picture

    def rollouts(self, act: Act, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """From starts (n, 2): their paths (steps + 1, n, 2) and the goals that they reach, (n,).

        A path rests on arrival. The goal is -1 if none is reached.
        """
        position = starts
        path = [starts]
        goals = np.full(len(starts), -1)
        for _ in range(MAX_STEPS):
            moved, _, arrived = self.advance(position, act(position.astype(np.float32)))
            under_way = goals < 0
            position = np.where(under_way[:, None], moved, position)
            nearest = self.squared_distances(position).argmin(-1)
            goals = np.where(under_way & arrived, nearest, goals)
            path.append(position)
            if (goals >= 0).all():
                break
        return np.stack(path), goals

    def hits(self, goals: np.ndarray) -> np.ndarray:
        """How many rollouts reached each goal, (num_goals,)."""
        return np.bincount(goals[goals >= 0], minlength=len(self.goals))

    def policy_report(self, act: Act) -> dict[str, float]:
        """What the scripts log at an evaluation: the coverage and the share of arrivals of 200
        rollouts from the origin."""
        _, goals = self.rollouts(act, np.zeros((200, 2)))
        hits = self.hits(goals)
        return {"coverage": coverage(hits), "arrived": float(hits.sum() / 200)}


def coverage(hits: np.ndarray) -> float:
    """The entropy of the goals hit, divided by log(num_goals).

    It is 1 if all goals are hit alike, and 0 if one alone or none is hit.
    """
    share = hits[hits > 0] / max(hits.sum(), 1)
    entropy = -(share * np.log(share)).sum()
    return float(entropy / np.log(len(hits))) + 0.0  # Without goals hit it would be -0.0.


gym.register("MultiGoal-v0", MultiGoalEnv, max_episode_steps=MAX_STEPS)

# ======== Pictures ========

# Goals have the first twelve, six by Okabe and Ito and six by Tol. No goal, -1, has the grey.
COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]
COLORS += ["#332288", "#882255", "#999933", "#661100", "#44AA99", "#DDCC77", "#808080"]
STARTS = [(0.0, 0.0), (-0.5, 0.5), (0.5, 0.5), (0.5, -0.5), (-0.5, -0.5)]
CAPTION = (
    "coloured by the goal reached (grey: none)\n"
    "[...]: how many reach each goal, counter-clockwise from the right"
)


class Run:
    """A trained policy on this task, and how it is called in a title.

    It is of dacer.py, dacer_v2.py or a changed script beside them, whose name is its ALGORITHM.
    """

    def __init__(self, folder: Path):
        import torch  # which the task alone does not need

        file = folder / ("last.pt" if (folder / "last.pt").exists() else "best.pt")
        try:
            made_by = torch.load(file, "cpu", weights_only=True, mmap=True)["algorithm"]
            self.script = importlib.import_module(made_by)
            self.agent = self.script.load_agent(folder)
        except Exception as error:
            fail(f"cannot load {folder}: {error}")
        args = self.agent.args
        if args.env_id.split(":")[-1] != "MultiGoal-v0":
            wanted = "these pictures are for multigoal_env:MultiGoal-v0"
            fail(f"{folder} is a run on {args.env_id}; {wanted}")
        self.folder = folder
        self.env = gym.make("MultiGoal-v0", **json.loads(args.env_kwargs)).unwrapped
        name = {"dacer": "DACER", "dacer_v2": "DACERv2"}.get(made_by, made_by)
        self.algorithm = f"{name}, T = {args.diffusion_steps}"
        if hasattr(args, "q_grad_weight"):
            c, d = args.time_weight_c, args.time_weight_d
            self.algorithm += f", eta = {args.q_grad_weight:g}"
            self.algorithm += ", w = 1" if c == d == 0 else f", w = exp({c:g} t {d:+g})"
        self.name = f"{self.algorithm}, seed {args.seed}"
        self.report = self.env.policy_report(self.new_act())

    def new_act(self) -> Act:
        """The policy with a fresh generator, so that all pictures show the same rollouts from the
        origin."""
        return self.script.make_actor(self.agent.policy, self.env.action_space, 0)

    def value(self, positions: np.ndarray, num_actions: int = 16) -> np.ndarray:
        """V(s), (n,): mean over actions of min(Q1, Q2), in units of the (unscaled) reward."""
        import torch

        rows = positions.repeat(num_actions, 0).astype(np.float32)
        with torch.no_grad():
            actions = torch.as_tensor(self.new_act()(rows))
            q = self.agent.critic(torch.as_tensor(rows), actions)[0].amin(0)
        return q.numpy().reshape(-1, num_actions).mean(-1) / self.agent.args.reward_scale


def new_figure(width: float, height: float):
    from matplotlib.figure import Figure  # as pyplot is not asked, no display is needed

    return Figure((width, height), dpi=110, layout="constrained")


def draw_plane(axes, env: MultiGoalEnv) -> None:
    """The goals with their circles of arrival."""
    angle = np.linspace(0, 2 * np.pi, 100)
    circle_x, circle_y = ARRIVAL * np.cos(angle), ARRIVAL * np.sin(angle)
    for x, y in env.goals:
        axes.plot(x, y, "o", color="black", markersize=4, zorder=5)
        axes.plot(x + circle_x, y + circle_y, ":", color="black", linewidth=0.8)
    axes.set(xlim=(-BOUND, BOUND), ylim=(-BOUND, BOUND), aspect="equal", xlabel="x", ylabel="y")


def draw_rollouts(axes, run: Run, start: tuple[float, float]) -> list[int]:
    """200 rollouts from one start, coloured by the goal they reach; returns the hits per goal."""
    from matplotlib.collections import LineCollection

    path, goals = run.env.rollouts(run.new_act(), np.tile(start, (200, 1)))
    draw_plane(axes, run.env)
    colors = [COLORS[goal] for goal in goals]
    lines = LineCollection(path.swapaxes(0, 1), colors=colors, linewidths=0.7, alpha=0.6)
    axes.add_collection(lines)
    axes.plot(*start, "k+", zorder=6)
    return run.env.hits(goals).tolist()


def policy_picture(run: Run):
    """The first steps of five rollouts from every point of a grid, and of 20 from the origin.

    Where their colours differ, the policy is multimodal.
    """
    figure = new_figure(6, 6.4)
    axes = figure.add_subplot()
    draw_plane(axes, run.env)
    grid = np.linspace(-6, 6, 9)
    points = np.stack(np.meshgrid(grid, grid), -1).reshape(-1, 2)
    # Nearer to a goal, no episode goes on.
    is_far = run.env.squared_distances(points).min(-1) > ARRIVAL**2
    # The origin is on the grid, and so gets 20 with these 15.
    points = np.concatenate([points[is_far].repeat(5, 0), np.zeros((15, 2))])
    path, goals = run.env.rollouts(run.new_act(), points)
    steps = path[1] - points
    colors = [COLORS[goal] for goal in goals]
    style = {"angles": "xy", "scale_units": "xy", "scale": 1, "width": 0.004}
    axes.quiver(*points.T, *steps.T, color=colors, **style)
    caption = "5 sampled actions at each point (20 at the origin)"
    caption += ", coloured by the goal then reached (grey: none)"
    axes.set_title(f"{run.name}\n{caption}", fontsize=8)
    return figure


def value_picture(run: Run):
    """The value surface V(s) in 3D."""
    figure = new_figure(6, 5.2)
    axes = figure.add_subplot(projection="3d")
    grid = np.linspace(-BOUND, BOUND, 33)
    x, y = np.meshgrid(grid, grid)
    value = run.value(np.stack([x, y], -1).reshape(-1, 2)).reshape(x.shape)
    axes.plot_surface(x, y, value, cmap="viridis", rcount=33, ccount=33, antialiased=False)
    axes.set(xlabel="x", ylabel="y")
    axes.set_title(f"{run.name}\nvalue V(x, y) by the critics", fontsize=10)
    return figure


def starts_picture(run: Run):
    """200 rollouts from each of five starts around the origin."""
    figure = new_figure(10, 2.9)
    for axes, start in zip(figure.subplots(1, len(STARTS), sharey=True), STARTS):
        hits = draw_rollouts(axes, run, start)
        axes.set_title(f"from {start}\n{hits}", fontsize=8)
        axes.label_outer()
    figure.suptitle(f"{run.name}: 200 rollouts from each start (+), {CAPTION}", fontsize=10)
    return figure


def comparison_picture(runs: list[Run]):
    """200 rollouts from the origin: a row for each algorithm, a column for each number of goals.
    With one number of goals the algorithms stand side by side.

    Of several runs it shows the median one by coverage; of two in the middle it shows the worse.
    """
    rows = list(dict.fromkeys(run.algorithm for run in runs))
    columns = sorted({len(run.env.goals) for run in runs})
    shape = (len(rows), len(columns)) if len(columns) > 1 else (1, len(rows))
    figure = new_figure(max(5.6, 3.6 * shape[1]), 4.2 * shape[0] + 0.4)
    grid = figure.subplots(*shape, squeeze=False).reshape(len(rows), len(columns))
    for (row, column), axes in np.ndenumerate(grid):
        wanted = rows[row], columns[column]
        group = [run for run in runs if (run.algorithm, len(run.env.goals)) == wanted]
        if not group:
            axes.set_axis_off()
            continue
        group.sort(key=lambda run: run.report["coverage"])
        run = group[(len(group) - 1) // 2]
        scores = [run.report["coverage"] for run in group]
        title = f"{run.name}\ncoverage {run.report['coverage']:.2f}"
        if len(group) > 1:
            title += f", the median of {len(group)} runs"
            title += f"\nmean {np.mean(scores):.2f}, worst {scores[0]:.2f}"
        hits = draw_rollouts(axes, run, (0.0, 0.0))
        axes.set_title(f"{title}\n{hits}", fontsize=8)
    figure.suptitle(f"200 rollouts from the origin, {CAPTION}", fontsize=9)
    return figure


def fail(message: str) -> NoReturn:
    """Ends the program with one line on stderr and exit code 2."""
    print("multigoal_env.py: error:", " ".join(message.split()), file=sys.stderr)
    raise SystemExit(2)


def main(runs: Annotated[tuple[Path, ...], tyro.conf.Positional]) -> None:
    """Draws the policy, the values and the trajectories of trained runs.

    The pictures go into the folders of the runs and into TensorBoard.

    Args:
        runs: folders of runs on the multi-goal task
    """
    from matplotlib.image import imread
    from torch.utils.tensorboard import SummaryWriter

    if not runs:
        fail("name the folder of at least one run on multigoal_env:MultiGoal-v0")
    pictures = {"policy": policy_picture, "value": value_picture, "starts": starts_picture}
    folders = {folder.resolve(): folder for folder in runs}  # each once
    loaded = [Run(folder) for folder in folders.values()]
    for run in loaded:
        scores = f"coverage {run.report['coverage']:.3f}, arrived {run.report['arrived']:.1%}"
        print(f"{run.folder}: {run.name}: {scores}")
        # In the run's own folder TensorBoard would take it for the newest curves.
        with SummaryWriter(run.folder / "pictures") as writer:
            for name, draw in pictures.items():
                file = run.folder / f"{name}.png"
                draw(run).savefig(file)
                writer.add_image(name, imread(file), dataformats="HWC")
    path = loaded[0].folder.parent / "multigoal.png"
    comparison_picture(loaded).savefig(path)
    each = "policy.png, value.png and starts.png in each folder and in TensorBoard"
    print(f"pictures: {each}, and {path}")


if __name__ == "__main__":
    try:
        tyro.cli(main)
    except OSError as error:  # a folder that may not be written, or a full disk
        fail(str(error))
