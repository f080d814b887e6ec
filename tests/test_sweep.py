"""The sweep makes every run of its grid, survives one that crashes, and completes on rerun."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
TINY = {
    "total-timesteps": 400, "learning-starts": 40, "num-envs": 2, "batch-size": 8, "diffusion-steps": 2, "entropy-samples": 8,
    "entropy-interval": 50, "eval-interval": 100, "eval-episodes": 2, "device": "cpu",
}  # fmt: skip
TINY = [word for name, value in TINY.items() for word in (f"--{name}", str(value))]
TINY += ["--hidden-sizes", "16", "16", "16", "--no-compile"]


@pytest.fixture
def sweep(tmp_path):
    def run(*options, arguments=()):
        command = [sys.executable, ROOT / "benchmarks" / "sweep.py", *options, "--", *TINY, *arguments]
        environment = {**os.environ, "PYTHONPATH": str(ROOT / "tests"), "PYTHONWARNINGS": "ignore"}
        return subprocess.run(
            command, check=False, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600
        )

    return run


def updates(run_dir):
    return torch.load(run_dir / "checkpoint.pt", weights_only=True)["update"]


def test_a_run_that_crashes_and_a_rerun(sweep, tmp_path):
    grid = ["--commands", "dacer.py", "--env-ids", "toy_envs:Reach-v0", "toy_envs:Failing-v0", "--processes", "2"]
    first = sweep(*grid, "--threads", "1")
    assert first.returncode == 1, first.stderr
    good, bad = first.stdout.strip().splitlines()
    assert good.startswith("Reach-v0 dacer seed 1: 180 of 180 updates, complete; runs/Reach-v0__dacer__1__")
    assert bad.startswith(
        "Failing-v0 dacer seed 1: 0 of 180 updates, FAILED: toy_envs:Failing-v0 failed at environment"
    )
    assert "the simulator diverged" in bad
    assert "180/180" in first.stderr  # the progress

    complete, crashed = sorted((tmp_path / "runs").glob("*__1__*"), reverse=True)
    before = (complete / "checkpoint.pt").read_bytes()
    args = json.loads((crashed / "args.json").read_text())
    assert (args["env_id"], args["seed"], args["diffusion_steps"]) == ("toy_envs:Failing-v0", 1, 2)

    # A shorter run than the one that is there is another run
    assert sweep(*grid[:4], "--threads", "1", arguments=["--total-timesteps", "200"]).returncode == 0
    assert before == (complete / "checkpoint.pt").read_bytes()
    (shorter,) = set((tmp_path / "runs").glob("Reach*")) - {complete}
    assert updates(shorter) == 80
    shutil.rmtree(shorter)

    # Given again, with a second seed and longer: what is there goes on, and what is missing is made
    second = sweep(*grid[:4], "--seeds", "1", "2", "--threads", "1", arguments=["--total-timesteps", "440"])
    assert second.returncode == 0, second.stdout + second.stderr
    assert second.stdout.count("200 of 200 updates, complete") == 2
    assert updates(complete) == 200
    assert before != (complete / "checkpoint.pt").read_bytes()
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").glob("*/checkpoint.pt")}
    assert len(times) == 3
    assert sweep(*grid[:4], "--seeds", "1", "2", arguments=["--total-timesteps", "440"]).returncode == 0
    assert times == {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").glob("*/checkpoint.pt")}


def test_a_run_that_is_killed_is_resumed(tmp_path, monkeypatch):
    """It goes on in its folder, from its checkpoint."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests"))
    import sweep

    (job,) = sweep.make_jobs(sweep.Options(tuple(TINY), ("toy_envs:Reach-v0",), ("dacer_v2.py --q-grad-weight 0",)))
    started, Popen = [], subprocess.Popen

    class Watched(Popen):
        def __init__(self, command, **options):
            started.append(command)
            super().__init__(command, **options)

        def wait(self):
            while len(started) == 1 and self.poll() is None:  # the first is killed once it has been evaluated
                _, update = sweep.find_run(job)
                if update > 0:
                    self.kill()
            return super().wait()

    monkeypatch.setattr(subprocess, "Popen", Watched)
    assert sweep.run_job(job, threads=1, retries=1) == 0
    run_dir, update = sweep.find_run(job)
    assert update == 180
    assert len(started) == 2
    assert started[1][2:] == ["--resume", str(run_dir), "--total-timesteps", "400"]
    assert sweep.progress(job)[0] == 180


def test_ctrl_c_saves_the_runs(tmp_path):
    """In a terminal it reaches the whole process group; a run that got two signals would end without a checkpoint."""
    command = [
        sys.executable,
        ROOT / "benchmarks" / "sweep.py",
        "--commands",
        "dacer.py",
        "--env-ids",
        "toy_envs:Reach-v0",
    ]
    arguments = [
        *TINY,
        "--total-timesteps",
        "1000000",
        "--eval-interval",
        "1000000",
        "--checkpoint-interval",
        "1000000",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "tests"), "PYTHONWARNINGS": "ignore"}
    process = subprocess.Popen(
        [*command, "--", *arguments], cwd=tmp_path, env=environment, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    started = time.time()
    while time.time() < started + 120 and not any(
        re.search(r"[1-9]\d*/499980 ", log.read_text()) for log in tmp_path.glob("runs/logs/*.log")
    ):
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 130, printed
    assert "stopped by SIGINT; the same command goes on from the checkpoints" in printed
    (run_dir,) = (path.parent for path in tmp_path.glob("runs/*/checkpoint.pt"))
    assert updates(run_dir) > 0


@pytest.mark.parametrize(
    "options, says",
    [
        (["--commands", "ppo.py"], "must begin with dacer.py or dacer_v2.py, but one is 'ppo.py'"),
        (["--commands", "dacer.py --q-grad-weight 1"], "q-grad-weight"),
        (["--commands", "dacer.py --tau 3"], "--tau must be between"),
        (["--seeds", "1", "1"], "the grid holds a run twice"),
    ],
)
def test_bad_input(sweep, tmp_path, options, says):
    """A mistake shows before anything runs."""
    done = sweep(*options)
    assert done.returncode == 2
    assert says in done.stderr + done.stdout
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists()


def test_ray(sweep):
    pytest.importorskip("ray")
    done = sweep(
        "--commands",
        "dacer.py",
        "--env-ids",
        "toy_envs:Reach-v0",
        "--seeds",
        "1",
        "2",
        "--threads",
        "1",
        "--ray",
        "local",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("180 of 180 updates, complete") == 2
