"""benchmarks/sweep.py makes its own runs, whatever happens to them."""

import os
import re
import signal
import sys
import time
from pathlib import Path
from subprocess import PIPE, STDOUT, Popen

import pytest
from helpers import ROOT, TESTS, tiny

FAKE = ["--commands", "tests/tools/fake_script.py", "--processes", "2", "--threads", "1"]


pytestmark = pytest.mark.usefixtures("work")


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
    while sum(text in log for log in logs()) < jobs:
        assert time.time() < deadline, logs()
        time.sleep(0.05)


def test_failed_and_killed_jobs():
    grid = [*FAKE, "--env-ids", "Bad", "Good", "Killed"]
    printed = end(start(*grid), code=1)
    assert re.search(r"Bad\S+: FAILED \(1\): AssertionError: the simulator diverged", printed)
    assert [re.findall("from (.)", log) for log in logs()] == [["0"], ["0"], ["0", "1"]]
    end(start(*grid), code=1)
    # Only what is missing ran again.
    assert [len(re.findall("from .", log)) for log in logs()] == [2, 1, 2]


def test_a_real_script_on_a_task_of_the_callers_folder():
    Path("toy_envs.py").symlink_to(TESTS / "toy_envs.py")
    words = ["--commands", "dacer.py", "--env-ids", "toy_envs:Reach-v0", "--threads", "1"]
    assert "1 done, 0 failed" in end(start(*words, "--", *tiny(eval_episodes=0)))
    assert len(list(Path().glob("runs/sweep/Reach-v0__dacer.py__1__*/runs/*/last.pt"))) == 1


def test_a_foreign_run_is_left_alone():
    """A complete run with the same arguments, but not in the sweep's folder."""
    grid = [*FAKE, "--env-ids", "Good"]
    end(start(*grid))
    Path("runs/sweep").rename("moved")
    (foreign,) = Path().glob("moved/*/runs/*")
    foreign.rename("runs/Good")
    end(start(*grid))
    assert [re.findall("from (.)", log) for log in logs()] == [["0"]]
    assert len(list(Path().glob("runs/sweep/*/runs/Good/checkpoint.pt"))) == 1


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


def test_what_is_said_of_a_job_is_of_its_newest_process():
    assert "diverged" in end(start(*FAKE, "--env-ids", "Bad"), code=1)
    Path("kill").touch()
    printed = end(start(*FAKE, "--env-ids", "Bad"), code=1)
    assert "FAILED (-9)" in printed
    assert "diverged" not in printed


def test_an_empty_grid():
    printed = end(start(*FAKE, "--seeds"), code=2)
    assert printed.startswith("sweep.py: error: the grid is empty")
    assert not Path("runs").exists()


def test_bad_grid():
    Path("broken.py").write_text("def")
    bad = {
        str(Path("broken.py").absolute()): "not a script that trains",
        "ppo.py": "not a script that trains",
        "dacer.py --exp-name 'a": "No closing quotation",
        "": "not a script that trains",
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
    *_, worker, script = re.findall(r"\d+", logs()[0].splitlines()[1])
    for pid in (worker, script):  # They would outlive the machine.
        os.kill(int(pid), signal.SIGKILL)
    wait_for("from 1")
    Path("go").touch()
    end(sweep)
    cluster.shutdown()
    assert len(set(re.findall(r"in (\d+)", logs()[0]))) == 2
