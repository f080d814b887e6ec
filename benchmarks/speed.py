"""How fast the scripts are on this machine, beside the limit that their matrix products set.

    python benchmarks/speed.py  # Ant's size; for all add --tasks Hopper Ant Humanoid

    git worktree add /tmp/old HEAD~9  # the scripts of another commit
    python benchmarks/speed.py --against /tmp/old

In the last command, the other commit's scripts take turns with these, and the ratios are printed,
too.

The times are milliseconds, in the form of benchmarks/results/speed.csv, which benchmarks/report.py
shows. They are medians over turns, which all take within seconds, so that a busy machine meets
them alike. The batch is 256. All but the mixture fit is compiled unless "eager" is said. An even
update steps policy and targets too, an odd one the critics alone. The matrix products would take
their time at the rate of large square ones.
"""

import importlib.util
import os
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from types import ModuleType
from typing import Literal

import numpy as np
import pandas as pd
import torch
import tyro

ROOT = Path(__file__).resolve().parent.parent
TASKS = {
    "Hopper": {"env_id": "Hopper-v4"},  # 11 observations x 3 actions
    "Ant": {"env_id": "Ant-v4", "env_kwargs": '{"use_contact_forces": true}'},  # 111 x 8
    "Humanoid": {"env_id": "Humanoid-v4"},  # 376 x 17, hidden layers of 512
}
BATCH_SIZE = 256
MACHINE = f"{torch.get_num_threads()} threads, {platform.machine()}, PyTorch {torch.__version__}"
KEYS = ["measured", "commit", "machine", "task", "script", "T", "what"]


@dataclass
class Args:
    tasks: tuple[Literal["Hopper", "Ant", "Humanoid"], ...] = ("Ant",)  # sizes to measure
    scripts: tuple[Literal["dacer", "dacer_v2"], ...] = ("dacer", "dacer_v2")
    diffusion_steps: tuple[int, ...] = (5, 20)  # T
    turns: int = 7
    device: str = "cpu"  # where to compute
    against: Path | None = None  # folder with other versions of the scripts
    out: Path = Path("report/speed.csv")  # file for the times
    machine: str = MACHINE  # its name


def load(script: str, folder: Path, number: int) -> ModuleType:
    """The script of this folder as a module with a name of its own."""
    spec = importlib.util.spec_from_file_location(f"{script}_{number}", folder / f"{script}.py")
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def milliseconds(device: str, calls: int, function: Callable[[], object], parts: int = 1) -> float:
    """The median duration of a call, or of each part of it.

    If there are several calls, one more comes first and does not count.
    """
    synchronize = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    durations = []
    first = 1 if calls > 1 else 0
    for _ in range(first + calls):
        synchronize()
        start = time.perf_counter()
        function()
        synchronize()
        durations.append(time.perf_counter() - start)
    return float(np.median(durations[first:])) * 1e3 / parts


class Contestant:
    """A script with one T on one task.

    `timed` has what it does, with the further arguments of `milliseconds`.
    """

    def __init__(
        self, module: ModuleType, commit: str, task: str, script: str, T: int, device: str
    ):
        def make_agent(compile: bool):
            args = module.Args(**TASKS[task], diffusion_steps=T, device=device, compile=compile)
            return module.Agent(*dims, module.resolve(args))

        def steps_and_updates():
            self.updates(agent, 1, 2, step=True)

        torch.manual_seed(0)
        self.key = (commit, task, script, T)
        self.module = module
        self.envs = module.make_envs(module.Args(**TASKS[task]), 20)
        self.space = self.envs.single_action_space
        self.obs, _ = self.envs.reset(seed=0)
        dims = self.obs.shape[1], self.space.shape[0]
        eager = make_agent(False)
        agent = make_agent(True)
        actor = module.make_actor(agent.policy, self.space)
        self.buffer = module.ReplayBuffer(10_000, *dims, device)
        self.buffer.add(*(torch.rand(x.shape, device=device) for x in self.buffer.data))
        states = self.buffer.sample(BATCH_SIZE).obs
        with torch.no_grad():
            noise = eager.policy.draw_noise(BATCH_SIZE, 200)
            actions = eager.policy(states[:, None], noise, eager.noise_std())
        self.timed = {
            "update, eager": (2, lambda: self.updates(eager, 1, 2), 2),
            "update": (3, lambda: self.updates(agent, 1, 2), 2),
            "even update": (3, lambda: self.updates(agent, 2)),
            "odd update": (3, lambda: self.updates(agent, 1)),
            "action": (40, lambda: agent.act(self.obs[:1]).cpu()),
            "20 actions": (20, lambda: agent.act(self.obs).cpu()),
            "action of make_actor": (40, lambda: actor(self.obs[:1])),
            "entropy estimate": (1, lambda: agent.entropy(states)),
            "its mixture fit alone": (1, lambda: module.mixture_entropy(actions)),
            "step of 20 environments and update": (3, steps_and_updates, 2),
        }
        for _, function, *_ in self.timed.values():
            function()  # It compiles.
        cpu = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=cpu, with_flops=True) as profile:
            self.updates(eager, 1, 2)
        products = ("aten::mm", "aten::addmm", "aten::bmm")
        events = [event for event in profile.key_averages() if event.key in products]
        self.flop = sum(event.flops for event in events) / 2

    def updates(self, agent, *numbers: int, step: bool = False) -> None:
        for number in numbers:  # from 1: the 0th would estimate the entropy, too
            if step:
                obs = self.obs
                action = agent.act(obs)
                env_action = self.module.to_env(action, self.space)
                self.obs, reward, terminated, *_ = self.envs.step(env_action)
                self.buffer.add(obs, action, reward, self.obs, terminated)
            agent.update(self.buffer.sample(BATCH_SIZE), number)


def main(args: Args) -> None:
    if args.turns < 1:
        raise ValueError("--turns must be 1 or more")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    torch._dynamo.config.recompile_limit = 64  # many agents in one process
    commit = os.popen(f'git -C "{ROOT}" describe --always --dirty 2>&1').read().strip()
    folders = {commit: ROOT}
    if args.against:
        folders[str(args.against)] = args.against
    modules = [
        (name, script, load(script, folder, number))
        for script in args.scripts
        for number, (name, folder) in enumerate(folders.items())
    ]
    rows = []
    for task in args.tasks:
        contestants = [
            Contestant(module, name, task, script, T, args.device)
            for T in args.diffusion_steps
            for name, script, module in modules
        ]
        for turn in range(args.turns):
            squares = [torch.randn(n, n, device=args.device) for n in (512, 1024, 2048)]
            rate = 0  # floating-point operations per millisecond
            for x in squares:
                duration = milliseconds(args.device, 3, lambda x=x: x @ x)
                rate = max(rate, 2 * len(x) ** 3 / duration)
            for one in contestants:
                rows.append((*one.key, "its matrix products alone", turn, one.flop / rate))
            for what in contestants[0].timed:
                for one in contestants[:: (-1) ** turn]:
                    duration = milliseconds(args.device, *one.timed[what])
                    rows.append((*one.key, what, turn, duration))
    data = pd.DataFrame(rows, columns=["commit", *KEYS[3:], "turn", "ms"])
    labelled = data.assign(measured=date.today(), machine=args.machine)
    medians = labelled.groupby(KEYS, sort=False).ms.median()
    medians.reset_index().to_csv(args.out, index=False, float_format="%.6g")
    wide = medians.unstack("what")[data.what.unique()]  # unstack(sort=False) mixes rows up
    print(wide.droplevel(["measured", "machine"]).T.to_string(float_format="%.4g"))
    if args.against:
        by_turn = data.set_index([*KEYS[3:], "turn"])
        new, old = (by_turn[by_turn.commit == name].ms for name in folders)
        ratios = (new / old).groupby(KEYS[3:], sort=False).quantile([0.25, 0.5, 0.75]).unstack()
        shown = ratios.to_string(float_format="%.2f")
        print(f"\n{' / '.join(folders)} by turn, quartiles:\n{shown}")


if __name__ == "__main__":
    try:
        main(tyro.cli(Args))
    except (OSError, ValueError) as error:
        print(f"speed.py: error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
