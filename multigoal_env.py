"""The multi-goal task: a point mass in the plane with several equally good goals, and pictures of what was learned on it.

From the origin all goals are equally good, so a policy that reaches every one of them is multimodal. Train on it with

    python dacer_v2.py --env-id multigoal_env:MultiGoal-v0 --env-kwargs '{"num_goals": 4}' --total-timesteps 230000

and draw the policy, the values and the trajectories of one or several such runs with

    python multigoal_env.py runs/<run> [runs/<run> ...]

The task is that of DACER (Wang et al., arXiv:2405.15177) and DACERv2 (Wang et al., arXiv:2505.23426).
"""

import importlib
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, NoReturn

import gymnasium as gym
import numpy as np
import tyro
from gymnasium.utils import seeding

# -------------------------------------------------------------------------------------------------------- environments


class Task:
    """Dynamics and reward, for one point mass (2,) and for many (n, 2) alike.

    Observation: the position, in [-bound, bound]^2. Action: the velocity, in [-1, 1]^2, for one unit of time. Reward:
    -action_cost |a|^2 - distance_cost (distance to the nearest goal)^2, and goal_reward on arrival, which ends the
    episode: at a distance below goal_threshold. Goals lie evenly on a circle, the first on the positive x axis. Starts
    are drawn from N(0, init_std^2 I).
    """

    def __init__(
        self,
        num_goals: int = 4,
        goal_radius: float = 5.0,
        bound: float = 7.0,
        goal_threshold: float = 1.0,
        goal_reward: float = 10.0,
        action_cost: float = 30.0,
        distance_cost: float = 1.0,
        init_std: float = 0.1,
    ):
        if num_goals not in range(2, 13):
            raise ValueError(f"num_goals must be 2 to 12, but it is {num_goals}")
        angle = 2 * np.pi * np.arange(num_goals) / num_goals
        self.goals = goal_radius * np.stack([np.cos(angle), np.sin(angle)], -1)  # (num_goals, 2)
        self.bound, self.goal_threshold, self.goal_reward = bound, goal_threshold, goal_reward
        self.action_cost, self.distance_cost, self.init_std = action_cost, distance_cost, init_std
        self.observation_space = gym.spaces.Box(-bound, bound, (2,), np.float32)
        self.action_space = gym.spaces.Box(-1.0, 1.0, (2,), np.float32)

    def start(self, np_random: np.random.Generator) -> np.ndarray:
        return np.clip(self.init_std * np_random.standard_normal(2), -self.bound, self.bound)

    def squared_distances(self, position: np.ndarray) -> np.ndarray:
        """To every goal, (..., num_goals)."""
        return np.square(position[..., None, :] - self.goals).sum(-1)

    def advance(self, position: np.ndarray, action: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Next positions (..., 2), rewards (...) and arrivals (...)."""
        action = np.clip(action, -1.0, 1.0).astype(np.float64)
        position = np.clip(position + action, -self.bound, self.bound)
        nearest = self.squared_distances(position).min(-1)
        arrived = nearest < self.goal_threshold**2
        reward = -self.action_cost * np.square(action).sum(-1) - self.distance_cost * nearest
        return position, reward + self.goal_reward * arrived, arrived


class MultiGoalEnv(gym.Env):
    """One point mass; the keyword arguments are those of `Task`. reset(options={"position": (x, y)}) starts it there."""

    metadata: ClassVar = {"render_modes": ["rgb_array"], "render_fps": 10}

    def __init__(self, render_mode: str | None = None, **constants: Any):
        self.task, self.render_mode = Task(**constants), render_mode
        self.observation_space, self.action_space = self.task.observation_space, self.task.action_space

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        start = self.task.start(self.np_random)
        self.position = np.array((options or {}).get("position", start), np.float64)
        return self.position.astype(np.float32), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.position, reward, arrived = self.task.advance(self.position, np.asarray(action))
        return self.position.astype(np.float32), float(reward), bool(arrived), False, {}

    def render(self) -> np.ndarray:
        """Picture (280, 280, 3): goals as green discs, the point mass as a black one."""
        centers = np.linspace(-self.task.bound, self.task.bound, 280)
        plane = np.stack(np.meshgrid(centers, -centers), -1)  # (280, 280, 2)
        picture = np.full((280, 280, 3), 255, np.uint8)
        picture[self.task.squared_distances(plane).min(-1) < self.task.goal_threshold**2] = (0, 158, 115)
        picture[np.square(plane - self.position).sum(-1) < 0.2**2] = 0
        return picture

    def policy_report(self, act: Callable[[np.ndarray], np.ndarray]) -> dict[str, float]:
        """What the scripts log at an evaluation: coverage and share of arrivals of 200 rollouts from the origin."""
        goals = rollout(act, self.task, np.zeros((200, 2)))[1]
        hits = count_hits(goals, len(self.task.goals))
        return {"coverage": coverage(hits), "arrived": float(hits.sum() / len(goals))}


class MultiGoalVectorEnv(gym.vector.VectorEnv):
    """`num_envs` point masses, stepped in one expression; done ones reset within the step, their end is in final_obs.

    Step by step the same as gymnasium's SyncVectorEnv of `MultiGoalEnv` in autoreset mode SAME_STEP.
    """

    metadata: ClassVar = {"autoreset_mode": gym.vector.AutoresetMode.SAME_STEP}

    def __init__(self, num_envs: int = 1, max_episode_steps: int = 100, render_mode: None = None, **constants: Any):
        self.task, self.num_envs, self.max_episode_steps = Task(**constants), num_envs, max_episode_steps
        self.single_observation_space, self.single_action_space = self.task.observation_space, self.task.action_space
        self.observation_space = gym.vector.utils.batch_space(self.single_observation_space, num_envs)
        self.action_space = gym.vector.utils.batch_space(self.single_action_space, num_envs)
        self.generators: list[np.random.Generator] = [seeding.np_random()[0] for _ in range(num_envs)]

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict | None = None
    ) -> tuple[np.ndarray, dict]:
        seeds = [seed + i for i in range(self.num_envs)] if isinstance(seed, int) else seed or [None] * self.num_envs
        for i, own in enumerate(seeds):
            if own is not None:
                self.generators[i] = seeding.np_random(own)[0]
        starts = np.stack([self.task.start(generator) for generator in self.generators])
        position = (options or {}).get("position", starts)  # (n, 2), or one for all
        self.position = np.broadcast_to(position, starts.shape).astype(np.float64)
        self.steps = np.zeros(self.num_envs, np.int64)
        return self.position.astype(np.float32), {}

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict]:
        self.position, reward, arrived = self.task.advance(self.position, actions)
        self.steps += 1
        truncated = self.steps >= self.max_episode_steps
        done, infos = arrived | truncated, {}
        if done.any():
            infos = {"final_obs": self.position.astype(np.float32), "_final_obs": done.copy()}
            self.position[done] = [self.task.start(self.generators[i]) for i in np.flatnonzero(done)]
            self.steps[done] = 0
        return self.position.astype(np.float32), reward, arrived, truncated, infos


gym.register("MultiGoal-v0", MultiGoalEnv, vector_entry_point=MultiGoalVectorEnv, max_episode_steps=100)

# ------------------------------------------------------------------------------------------------- measuring a policy


def rollout(
    act: Callable[[np.ndarray], np.ndarray], task: Task, starts: np.ndarray, max_steps: int = 100
) -> tuple[np.ndarray, np.ndarray]:
    """Trajectories (max_steps + 1, n, 2) from starts (n, 2), which rest on arrival, and the goals reached (n,), -1 for none.

    `act` maps observations (n, 2) to actions (n, 2).
    """
    position, goals, path = starts.astype(np.float64), np.full(len(starts), -1), [starts]
    for _ in range(max_steps):
        moved, _, arrived = task.advance(position, act(position.astype(np.float32)))
        under_way = goals < 0
        position = np.where(under_way[:, None], moved, position)
        nearest = task.squared_distances(position).argmin(-1)
        goals = np.where(under_way & arrived, nearest, goals)
        path.append(position)
        if (goals >= 0).all():
            break
    return np.stack(path), goals


def count_hits(goals: np.ndarray, num_goals: int) -> np.ndarray:
    """How many rollouts reached each goal, (num_goals,), from `rollout`'s goals."""
    return np.bincount(goals[goals >= 0], minlength=num_goals)


def coverage(hits: np.ndarray) -> float:
    """Entropy of the goals hit, divided by log(num_goals): 1 if all are hit alike, 0 if one alone or none is."""
    share = hits[hits > 0] / max(hits.sum(), 1)
    return float(-(share * np.log(share)).sum() / np.log(len(hits))) + 0.0


# ------------------------------------------------------------------------------------------------------------ pictures

COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442"]  # Okabe and Ito
NAMES = {"dacer": "DACER", "dacer_v2": "DACERv2"}
STARTS = [(0.0, 0.0), (-0.5, 0.5), (0.5, 0.5), (0.5, -0.5), (-0.5, -0.5)]


class Run:
    """A trained policy of either script on this task, and how it is called in a title."""

    def __init__(self, folder: Path):
        name = next((name for name in NAMES if (folder / f"{name}.py").is_file()), None)
        if name is None:
            fail(f"{folder} is not the folder of a run: it holds neither dacer.py nor dacer_v2.py")
        script = importlib.import_module(name)
        try:
            self.agent = script.load_agent(folder)
        except ValueError as error:
            fail(str(error))
        args = self.agent.args
        if args.env_id.split(":")[-1] != "MultiGoal-v0":
            fail(f"{folder} is a run on {args.env_id}; these pictures are for multigoal_env:MultiGoal-v0")
        self.folder, self.seed, self.task = folder, args.seed, Task(**json.loads(args.env_kwargs))
        self.algorithm = f"{NAMES[name]}, T = {args.diffusion_steps}"
        if name == "dacer_v2":
            unweighted = args.time_weight_c == args.time_weight_d == 0
            self.algorithm += f", eta = {args.q_grad_weight:g}" + (", w = 1" if unweighted else "")
        self.name = f"{self.algorithm}, seed {args.seed}"
        self.order = (-list(NAMES).index(name), args.diffusion_steps, self.algorithm)
        self.act = script.make_actor(self.agent.policy, self.task.action_space)

    def value(self, positions: np.ndarray, num_actions: int = 32) -> np.ndarray:
        """V(s), (n,): mean over actions of min(Q1, Q2), in units of the (unscaled) reward."""
        import torch

        rows = positions.repeat(num_actions, 0).astype(np.float32)
        with torch.no_grad():
            q = self.agent.critic(torch.as_tensor(rows), torch.as_tensor(self.act(rows)))[0].amin(0)
        return q.numpy().reshape(-1, num_actions).mean(-1) / self.agent.args.reward_scale


def new_figure(width: float, height: float):
    """A figure that needs no display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure((width, height), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def plane(axes, task: Task) -> None:
    """Goals with the circle of arrival, and level curves of the reward of standing still."""
    grid = np.linspace(-task.bound, task.bound, 141)
    x, y = np.meshgrid(grid, grid)
    nearest = task.squared_distances(np.stack([x, y], -1)).min(-1)
    axes.contour(x, y, -task.distance_cost * nearest, levels=12, colors="0.8", linewidths=0.6, linestyles="solid")
    axes.plot(*task.goals.T, "o", color="black", markersize=5, zorder=5)
    axes.set(xlim=(-task.bound, task.bound), ylim=(-task.bound, task.bound), aspect="equal")
    axes.tick_params(labelsize=7)


def draw_trajectories(axes, run: Run, start: tuple[float, float], count: int = 100) -> np.ndarray:
    """Rollouts from one start, coloured by the goal they reach (grey: none); returns the hits per goal."""
    path, goals = rollout(run.act, run.task, np.tile(np.array(start), (count, 1)))
    plane(axes, run.task)
    for i in range(count):
        color = COLORS[goals[i] % len(COLORS)] if goals[i] >= 0 else "0.5"
        axes.plot(*path[:, i].T, color=color, linewidth=0.7, alpha=0.6)
    return count_hits(goals, len(run.task.goals))


def policy_picture(run: Run):
    """Five actions at every point of a grid: where they point apart, the policy is multimodal there."""
    figure = new_figure(5, 5.2)
    axes = figure.add_subplot()
    plane(axes, run.task)
    grid = np.linspace(-0.9 * run.task.bound, 0.9 * run.task.bound, 15)
    points = np.stack(np.meshgrid(grid, grid), -1).reshape(-1, 2).repeat(5, 0)
    axes.quiver(
        *points.T,
        *run.act(points).T,
        color=COLORS[0],
        alpha=0.7,
        angles="xy",
        scale_units="xy",
        scale=1.2,
        width=0.0025,
    )
    axes.set_title(f"Policy: {run.name}")
    return figure


def value_picture(run: Run):
    """The value surface V(s) in 3D."""
    figure = new_figure(5, 4.6)
    axes = figure.add_subplot(projection="3d")
    grid = np.linspace(-run.task.bound, run.task.bound, 41)
    x, y = np.meshgrid(grid, grid)
    value = run.value(np.stack([x, y], -1).reshape(-1, 2)).reshape(x.shape)
    axes.plot_surface(x, y, value, cmap="viridis", linewidth=0, antialiased=True, rcount=41, ccount=41)
    axes.set(xlabel="x", ylabel="y", title=f"Value V(s): {run.name}")
    axes.set_box_aspect((1, 1, 0.8), zoom=0.95)
    return figure


def starts_picture(run: Run):
    """100 trajectories from each of five starts around the origin."""
    figure = new_figure(13, 3.5)
    for axes, start in zip(figure.subplots(1, len(STARTS), sharey=True), STARTS, strict=True):
        hits = draw_trajectories(axes, run, start)
        axes.plot(*start, "k+", zorder=6)
        axes.set_title(f"from {start}, hits {hits.tolist()}", fontsize=8)
    figure.suptitle(f"Trajectories: {run.name}", fontsize=10)
    return figure


def comparison_picture(runs: list[Run]):
    """100 trajectories from the origin: a row for each algorithm, DACERv2 on top, and a column for each number of goals."""
    rows = sorted({run.order for run in runs})
    columns = sorted({len(run.task.goals) for run in runs})
    figure = new_figure(3.4 * len(columns), 3.9 * len(rows))
    grid = figure.subplots(len(rows), len(columns), squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for run in sorted(runs, key=lambda run: run.seed, reverse=True):  # of several seeds the lowest is shown
        axes = grid[rows.index(run.order), columns.index(len(run.task.goals))]
        axes.clear()
        axes.set_axis_on()
        hits = draw_trajectories(axes, run, (0.0, 0.0))
        axes.set_title(f"{run.name}\nhits {hits.tolist()}", fontsize=9)
    return figure


def save_picture(figure, path: Path, run_dirs: Sequence[Path]) -> None:
    """Writes a figure as PNG and into the TensorBoard of runs."""
    from torch.utils.tensorboard import SummaryWriter

    figure.savefig(path)
    for run_dir in run_dirs:
        with SummaryWriter(run_dir, filename_suffix=".pictures") as writer:
            writer.add_image(path.stem, np.asarray(figure.canvas.buffer_rgba())[..., :3], dataformats="HWC")


def fail(message: str) -> NoReturn:
    """Ends the program with one line on stderr and exit code 2."""
    print(f"multigoal_env.py: error: {message}", file=sys.stderr)
    raise SystemExit(2)


def main(runs: Annotated[tuple[Path, ...], tyro.conf.Positional]) -> None:
    """Draws the policy, the values and the trajectories of trained runs into their folders and TensorBoard.

    Args:
        runs: folders of runs on the multi-goal task, of dacer.py or dacer_v2.py
    """
    if not runs:
        fail("name the folder of at least one run on multigoal_env:MultiGoal-v0")
    loaded = [Run(folder) for folder in runs]
    for run in loaded:
        goals = rollout(run.act, run.task, np.zeros((200, 2)))[1]
        hits = count_hits(goals, len(run.task.goals))
        print(f"{run.folder}: {run.name}: of 200 rollouts from the origin {hits.tolist()} reached each goal, "
              f"coverage {coverage(hits):.3f}, arrived {hits.sum() / 200:.1%}")  # fmt: skip
        pictures = {"policy": policy_picture(run), "value": value_picture(run), "starts": starts_picture(run)}
        for name, figure in pictures.items():
            save_picture(figure, run.folder / f"{name}.png", [run.folder])
    path = loaded[0].folder.parent / "multigoal.png"
    save_picture(comparison_picture(loaded), path, [run.folder for run in loaded])
    print(f"pictures: policy.png, value.png and starts.png in each folder, and {path}; all of them in TensorBoard")


if __name__ == "__main__":
    tyro.cli(main)
