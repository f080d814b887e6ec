"""The sweep makes its own runs, whatever happens to them.

As a program, this file is a fake script that the sweep trains.
"""

import os
import re
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from subprocess import PIPE, STDOUT, Popen

import pytest
import tyro

ROOT = Path(__file__).resolve().parent.parent
FAKE = ["--commands", "tests/test_sweep.py", "--processes", "2", "--threads", "1"]
TINY = ["--total-timesteps=120", "--learning-starts=40", "--num-envs=2", "--batch-size=8"]
TINY += ["--eval-episodes=1", "--diffusion-steps=2", "--entropy-samples=8", "--device=cpu"]
TINY += ["--no-compile", "--hidden-sizes", "16", "16"]


@dataclass
class Args:
    env_id: str = ""
    seed: int = 1
    resume: str | None = None


def train(args):
    signal.signal(signal.SIGTERM, lambda *_: (print("stopped", flush=True), os._exit(143)))
    signal.alarm(100)  # where a test fails
    checkpoint = Path(args.resume or f"runs/{args.env_id}") / "checkpoint.pt"
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    first = int(checkpoint.read_text()) if args.resume else 0
    processes = os.environ.get("RAY_RAYLET_PID"), os.getppid(), os.getpid()
    print(f"from {first} in", *processes, flush=True)
    for step in range(first, 3):
        assert args.env_id != "Bad", "the simulator diverged"
        checkpoint.write_text(str(step + 1))
        print("did", step + 1, flush=True)
        if args.env_id == "Killed":
            os.kill(os.getpid(), signal.SIGKILL)
        while checkpoint.parent.name == "Slow" and not Path("../../../go").exists():
            time.sleep(0.05)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def start(*options):
    command = [sys.executable, ROOT / "benchmarks" / "sweep.py", *options]
    return Popen(command, start_new_session=True, stdout=PIPE, stderr=STDOUT, text=True)


def end(sweep, code=0):
    printed, _ = sweep.communicate(timeout=100)
    assert sweep.returncode == code, printed
    return printed


def logs():
    return [path.read_text() for path in sorted(Path().glob("runs/sweep/*/log.txt"))]


def wait_for(text, jobs=1):
    deadline = time.time() + 60
    while sum(text in log for log in logs()) < jobs and time.time() < deadline:
        time.sleep(0.05)


def test_failed_and_killed_jobs():
    grid = [*FAKE, "--env-ids", "Bad", "Good", "Killed"]
    printed = end(start(*grid), code=1)
    assert re.search(r"Bad\S+: FAILED \(1\): AssertionError: the simulator diverged", printed)
    assert [re.findall("from (.)", log) for log in logs()] == [["0"], ["0"], ["0", "1"]]
    end(start(*grid), code=1)
    # Only what is missing ran again.
    assert [len(re.findall("from .", log)) for log in logs()] == [2, 1, 2]


def test_a_foreign_run_is_left_alone():
    # A task of the caller's folder.
    Path("toy_envs.py").symlink_to(ROOT / "tests" / "toy_envs.py")
    grid = ["--commands", "dacer.py", "--env-ids", "toy_envs:Reach-v0", "--", *TINY]
    end(start(*grid))
    (foreign,) = Path().glob("runs/sweep/Reach-v0__dacer.py__1__*/runs/*")
    foreign.rename(f"runs/{foreign.name}")  # the same arguments, and complete
    Path("runs/sweep").rename("moved")
    end(start(*grid))
    (own,) = Path().glob("runs/sweep/*/runs/*/checkpoint.pt")
    assert own.parent.name != foreign.name


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_sweep_goes_on(signum):
    # Killed, its jobs go on alone, and the next sweep waits for them.
    killed = signum == signal.SIGKILL
    sweep = start(*FAKE, "--env-ids", "Slow", "--seeds", "1", "2", "3")
    wait_for("did 1", jobs=2)
    os.killpg(sweep.pid, signum)
    end(sweep, code=-9 if killed else 130)
    assert killed or all(log.endswith("did 1\nstopped\n") for log in logs() if log)
    sweep = start(*FAKE, "--env-ids", "Slow", "--seeds", "1", "2", "3")
    Path("go").touch()
    end(sweep)
    twice = ["0", "3" if killed else "1"]
    assert [re.findall("from (.)", log) for log in logs()] == [twice, twice, ["0"]]


def test_bad_grid():
    bad = {
        "ppo.py": "not a script that trains",
        f"{FAKE[1]} --tau 1": "--tau",
        f"{FAKE[1]} --seed 1": "a job twice",
    }
    for command, says in bad.items():
        printed = end(start("--commands", f"{FAKE[1]} --seed 1", command), code=2)
        assert says in printed and "Traceback" not in printed and not Path("runs").exists()


def test_a_ray_cluster_loses_a_machine():
    cluster = pytest.importorskip("ray.cluster_utils").Cluster(
        initialize_head=True, head_node_args={"num_cpus": 0}
    )
    node = cluster.add_node(num_cpus=1)
    sweep = start(*FAKE, "--env-ids", "Slow", "--ray", cluster.address)
    wait_for("did 1")
    cluster.add_node(num_cpus=1)
    cluster.remove_node(node, allow_graceful=False)
    *_, worker, script = re.findall(r"\d+", logs()[0].splitlines()[0])
    for pid in (worker, script):  # They would outlive the machine.
        os.kill(int(pid), signal.SIGKILL)
    wait_for("from 1")
    Path("go").touch()
    end(sweep)
    cluster.shutdown()
    assert len(set(re.findall(r"in (\d+)", logs()[0]))) == 2


if __name__ == "__main__":
    train(tyro.cli(Args))
