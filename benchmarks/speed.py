"""How fast the two scripts are on this machine, beside the limit that its matrix products set.

    python benchmarks/speed.py                          # three sizes, both scripts, T = 20 and 5, eager and compiled
    python benchmarks/speed.py --tasks Ant --steps 5    # less of it
    python benchmarks/speed.py --device cuda --json speed.json

For every task one process is started; in it the contestants take turns, and the table gives medians over all turns (of
the entropy estimate, a single one). Peak memory is that of all contestants of a task together. An even update steps
policy and targets too, an odd one the critics alone; their mean is what a run pays. The limit is the time of the update's
matrix products alone, at the rate that this machine reaches on large square ones in the same process; `x limit` is the
mean update's ratio to it.
"""

import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import dacer
import dacer_v2

SCRIPTS = {"dacer": dacer, "dacer_v2": dacer_v2}
TASKS = {  # environment, its keyword arguments
    "Hopper": ("Hopper-v4", {}),
    "Ant": ("Ant-v4", {"use_contact_forces": True}),
    "Humanoid": ("Humanoid-v4", {}),
}
BATCH_SIZE = 256
MATRIX_PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm")


@dataclass
class Options:
    tasks: tuple[Literal["Hopper", "Ant", "Humanoid"], ...] = ("Hopper", "Ant", "Humanoid")
    """sizes to measure: Hopper (11 observations x 3 actions), Ant (111 x 8), Humanoid (376 x 17, hidden layers of 512)"""
    scripts: tuple[Literal["dacer", "dacer_v2"], ...] = ("dacer", "dacer_v2")
    """which of the two"""
    steps: tuple[int, ...] = (20, 5)
    """numbers of diffusion steps T"""
    modes: tuple[Literal["eager", "compiled"], ...] = ("eager", "compiled")
    """without and with --compile"""
    repeats: int = 4
    """turns that every contestant takes; short ones, so that a busy second of the machine meets all of them alike"""
    device: Literal["cpu", "cuda"] = "cpu"
    """where to compute"""
    json: Path | None = None
    """file for the numbers"""
    child: str | None = None
    """(internal) measure this one task and print its rows as JSON"""


def seconds(function: Callable[[], object], calls: int, device: str) -> list[float]:
    """Durations of `calls` calls, after one that does not count."""
    durations = []
    for _ in range(calls + 1):
        synchronize(device)
        start = time.perf_counter()
        function()
        synchronize(device)
        durations.append(time.perf_counter() - start)
    return durations[1:]


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def sgemm_rate(device: str) -> float:
    """FLOP/s of the best of three large square matrix products."""
    rates = []
    for n in (512, 1024, 2048):
        a, b = torch.randn(n, n, device=device), torch.randn(n, n, device=device)
        rates.append(2 * n**3 / np.median(seconds(lambda a=a, b=b: torch.mm(a, b), 2 * 2048 // n, device)))
    return max(rates)


class Contestant:
    """One script with one T in one mode on one task, and what was measured of it."""

    def __init__(self, name: str, task: str, T: int, mode: str, device: str):
        self.name, self.T, self.mode, self.device = name, T, mode, device
        module, (env_id, env_kwargs) = SCRIPTS[name], TASKS[task]
        settings = {"env_id": env_id, "env_kwargs": json.dumps(env_kwargs), "diffusion_steps": T, "device": device}
        self.args = module.resolve(module.Args(**settings, compile=mode == "compiled"))
        torch.manual_seed(0)
        self.envs = module.make_envs(self.args, self.args.num_envs)
        self.space = self.envs.single_action_space
        self.obs = self.envs.reset(seed=0)[0]
        obs_dim, act_dim = self.obs.shape[1], self.space.shape[0]
        self.agent = module.Agent(obs_dim, act_dim, self.args)
        self.buffer = module.ReplayBuffer(10_000, obs_dim, act_dim, device)
        self.module, self.durations = module, {}
        synchronize(device)
        start = time.perf_counter()
        for step in range(200):
            self.step_environments(random=True)
        self.update(0), self.update(1), self.act(1), self.act(20)
        if device == "cuda" and mode == "compiled":
            self.update = module.GraphedUpdates(self.update, 2)
            for step in range(8):
                self.update(step)
        synchronize(device)
        self.start_up = time.perf_counter() - start

    def step_environments(self, random: bool = False) -> None:
        n = self.args.num_envs
        action = 2 * torch.rand(n, self.agent.act_dim) - 1 if random else self.agent.act(self.obs)
        outcome = self.envs.step(self.module.to_env(action, self.space))
        self.buffer.add(self.obs, action, outcome[1], outcome[0], outcome[2])
        self.obs = outcome[0]

    def update(self, step: int) -> dict:
        return self.agent.update(self.buffer.sample(BATCH_SIZE), self.agent.draw(BATCH_SIZE), step)

    def act(self, n: int) -> None:
        self.agent.act(self.obs[:n]).cpu()

    def gflop(self) -> float:
        """Of the matrix products of an even and an odd update, mean."""
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], with_flops=True) as profile:
            self.update(0), self.update(1)
        return sum(event.flops for event in profile.key_averages() if event.key in MATRIX_PRODUCTS) / 2 / 1e9

    def iteration(self) -> None:
        """Two iterations of the training loop."""
        for step in (0, 1):
            self.step_environments()
            self.update(step)

    def take_turn(self) -> None:
        measured = {
            "even": seconds(lambda: self.update(0), 3, self.device),
            "odd": seconds(lambda: self.update(1), 3, self.device),
            "act_1": seconds(lambda: self.act(1), 40, self.device),
            "act_20": seconds(lambda: self.act(20), 20, self.device),
            "loop": seconds(self.iteration, 2, self.device),
        }
        for name, durations in measured.items():
            self.durations.setdefault(name, []).extend(durations)

    def entropy(self) -> float:
        obs = self.buffer.sample(BATCH_SIZE).obs
        self.agent.entropy(obs[:32])  # the agent draws for 32 states at a time: this compiles
        synchronize(self.device)
        start = time.perf_counter()
        self.agent.entropy(obs)
        synchronize(self.device)
        return time.perf_counter() - start

    def row(self, task: str, gflop: float, rate: float, entropy: float, memory: float) -> dict:
        def ms(name: str, q: float = 50) -> float:
            return float(np.percentile(self.durations[name], q) * 1e3)

        mean, limit = (ms("even") + ms("odd")) / 2, gflop * 1e9 / rate * 1e3
        return {
            "task": task, "script": self.name, "T": self.T, "mode": self.mode, "even_ms": ms("even"), "odd_ms": ms("odd"),
            "mean_ms": mean, "limit_ms": limit, "x_limit": mean / limit, "act_1_ms": ms("act_1"),
            "act_1_p99_ms": ms("act_1", 99), "act_20_ms": ms("act_20"), "act_20_p99_ms": ms("act_20", 99),
            "entropy_s": entropy, "env_steps_per_s": 2e3 * self.args.num_envs / ms("loop"), "start_up_s": self.start_up,
            "memory_gib": memory, "sgemm_gflops": rate / 1e9,
        }  # fmt: skip


def measure(task: str, options: Options) -> list[dict]:
    """All contestants of one task, in this process."""
    contestants, gflop, rates = [], {}, []
    for T in options.steps:
        for name in options.scripts:
            eager = Contestant(name, task, T, "eager", options.device)
            gflop[name, T] = eager.gflop()
            made = {
                "eager": lambda e=eager: e,
                "compiled": lambda n=name, T=T: Contestant(n, task, T, "compiled", options.device),
            }
            contestants += [made[mode]() for mode in options.modes]
    for _ in range(options.repeats):
        rates.append(sgemm_rate(options.device))
        for contestant in contestants:
            contestant.take_turn()
    entropies = [contestant.entropy() for contestant in contestants]
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    if options.device == "cuda":
        memory = torch.cuda.max_memory_allocated() / 2**30
    rate = float(np.median(rates))
    return [c.row(task, gflop[c.name, c.T], rate, entropy, memory) for c, entropy in zip(contestants, entropies)]


COLUMNS = {
    "even_ms": "even", "odd_ms": "odd", "mean_ms": "mean", "limit_ms": "limit", "x_limit": "x limit", "act_1_ms": "act 1",
    "act_1_p99_ms": "p99", "act_20_ms": "act 20", "act_20_p99_ms": "p99", "entropy_s": "entropy s",
    "env_steps_per_s": "steps/s", "start_up_s": "start s",
}  # fmt: skip


def table(rows: list[dict]) -> str:
    """The rows as text; times in ms where the heading names no unit."""
    lines = [f"{'task':9}{'script':9}{'T':>3} {'mode':9}" + "".join(f"{title:>10}" for title in COLUMNS.values())]
    for row in rows:
        digits = {"env_steps_per_s": 0, "act_1_ms": 3, "act_1_p99_ms": 3}
        numbers = "".join(f"{row[column]:10.{digits.get(column, 2)}f}" for column in COLUMNS)
        lines.append(f"{row['task']:9}{row['script']:9}{row['T']:3} {row['mode']:9}" + numbers)
    return "\n".join(lines)


def main(options: Options) -> list[dict]:
    dacer.find_device(options.device)
    if options.child is not None:
        torch._dynamo.config.recompile_limit = 64  # many agents in one process
        print(json.dumps(measure(options.child, options)))
        return []
    rows = []
    for task in options.tasks:
        command = [
            sys.executable,
            __file__,
            "--child",
            task,
            "--device",
            options.device,
            "--repeats",
            str(options.repeats),
        ]
        for name in ("scripts", "steps", "modes"):
            command += [f"--{name}", *map(str, getattr(options, name))]
        child = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        if child.returncode != 0:
            raise SystemExit(child.returncode)  # it has said why
        rows += json.loads(child.stdout.splitlines()[-1])
        print(
            f"{task}: sgemm {rows[-1]['sgemm_gflops']:.0f} GFLOP/s, peak memory {rows[-1]['memory_gib']:.1f} GiB",
            flush=True,
        )
    machine = torch.cuda.get_device_name() if options.device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"\n{machine}, PyTorch {torch.__version__}, batch {BATCH_SIZE}; times in ms\n{table(rows)}")
    if options.json is not None:
        options.json.write_text(
            json.dumps({"machine": machine, "options": asdict(options), "rows": rows}, indent=2, default=str)
        )
    return rows


if __name__ == "__main__":
    main(tyro.cli(Options))
