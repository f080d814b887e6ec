"""The commands as a user types them: training, evaluating, and every mistake answered by one clear line."""

import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dacer_v2

TINY = {
    "total-timesteps": 120, "learning-starts": 40, "num-envs": 2, "batch-size": 8, "buffer-size": 1000, "device": "cpu",
    "diffusion-steps": 2, "entropy-samples": 8, "eval-episodes": 2,
}  # fmt: skip
TINY = [word for name, value in TINY.items() for word in (f"--{name}", str(value))] + [
    "--hidden-sizes",
    "16",
    "16",
    "16",
    "--no-compile",
]
TESTS = str(Path(__file__).parent)


def run(algo, *arguments, cwd=None):
    environment = {**os.environ, "PYTHONPATH": TESTS, "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, algo.__file__, *arguments]
    return subprocess.run(command, check=False, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.skipif(sys.platform == "win32", reason="there Ctrl-C is no signal to another process")
def test_ctrl_c_ends_an_evaluation(algo, tmp_path, monkeypatch):
    """At once, and without a traceback."""
    (tmp_path / "interrupting.py").write_text(
        "import os, signal\n"
        "from toy_envs import gym\n"
        "def make():\n"
        "    if 'INTERRUPT' in os.environ:\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "    return gym.make('Reach-v0')\n"
        "gym.register('Interrupting-v0', make, max_episode_steps=20)\n"
    )
    monkeypatch.setattr(sys.modules[__name__], "TESTS", os.pathsep.join([TESTS, str(tmp_path)]))
    trained = run(algo, "--env-id", "interrupting:Interrupting-v0", *TINY, cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr
    (run_dir,) = (tmp_path / "runs").iterdir()
    monkeypatch.setenv("INTERRUPT", "1")
    evaluated = run(algo, "--evaluate", str(run_dir), "--no-compile")
    assert (evaluated.returncode, evaluated.stdout) == (-signal.SIGINT, "")
    assert "Traceback" not in evaluated.stderr


def test_train_and_evaluate_a_mujoco_task(algo, tmp_path):
    """Warm-up, updates, progress, evaluation, checkpoint; then the replay of what was trained."""
    trained = run(algo, "--env-id", "Hopper-v4", "--seed", "5", *TINY, cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr
    assert re.search(r"40/40 .*updates/s", trained.stderr)
    assert "env steps" in trained.stderr
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert run_dir.name.startswith(f"Hopper-v4__{algo.__name__}__5__")
    final = re.search(r"final evaluation (-?[\d.]+) \+- ([\d.]+) over 2 episodes", trained.stdout)
    assert final, trained.stdout

    replayed = run(algo, "--evaluate", str(run_dir), "--eval-episodes", "3", cwd=tmp_path)
    assert replayed.returncode == 0, replayed.stderr
    returns = [float(value) for value in re.findall(r"episode \d: return (-?[\d.]+)", replayed.stdout)]
    assert len(returns) == 3
    mean = float(re.search(r"3 episodes: (-?[\d.]+) \+-", replayed.stdout).group(1))
    assert abs(mean - sum(returns) / 3) < 0.1


def test_an_environment_of_ones_own(algo, tmp_path):
    """`module:Name-v0` imports the module, and --env-kwargs reaches the environment."""
    arguments = ["--env-id", "toy_envs:Counter-v0", "--env-kwargs", '{"ending": "terminate"}']
    trained = run(algo, *arguments, *TINY, cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr


@pytest.fixture
def refused(algo, tmp_path, monkeypatch, capsys):
    """Runs the script in this process, expects exit code 2 and one line, and returns that line."""
    monkeypatch.chdir(tmp_path)

    def attempt(*arguments):
        monkeypatch.setattr(sys, "argv", [algo.__file__, *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            runpy.run_path(algo.__file__, run_name="__main__")
        assert exit_.value.code == 2
        message = capsys.readouterr().err
        assert message.count("\n") == 1, message
        assert "Traceback" not in message
        assert not Path("runs").exists()
        return message

    return attempt


BAD_ARGUMENTS = [
    ("discrete actions", "CartPole-v1", [], "Discrete(2)"),
    ("integer actions", "toy_envs:Odd-v0", ["--env-kwargs", '{"kind": "integer"}'], "Box of real numbers"),
    ("unbounded actions", "toy_envs:Odd-v0", ["--env-kwargs", '{"kind": "unbounded"}'], "unbounded"),
    ("observations without a length", "toy_envs:Odd-v0", ["--env-kwargs", '{"kind": "sequence"}'], "flatten"),
    ("unknown environment", "Hoper-v4", [], "Did you mean: `Hopper`"),
    ("unknown module", "nowhere:Hopper-v4", [], "nowhere"),
    ("env-kwargs that are no JSON", "Hopper-v4", ["--env-kwargs", "{a: 1}"], "JSON object"),
    ("env-kwargs that are no object", "Hopper-v4", ["--env-kwargs", "[1]"], "JSON object"),
    ("env-kwargs that the task does not take", "Hopper-v4", ["--env-kwargs", '{"wings": 2}'], "wings"),
    ("no diffusion step", "Hopper-v4", ["--diffusion-steps", 0], "--diffusion-steps must be 1 or more, but it is 0"),
    ("no environment", "Hopper-v4", ["--num-envs", 0], "--num-envs must be 1 or more"),
    ("no batch", "Hopper-v4", ["--batch-size", 0], "--batch-size must be 1 or more"),
    ("no buffer", "Hopper-v4", ["--buffer-size", -5], "--buffer-size must be 1 or more, but it is -5"),
    ("no hidden units", "Hopper-v4", ["--hidden-sizes", 16, 0], "--hidden-sizes must be 1 or more, but it is (16, 0)"),
    ("a buffer smaller than a step", "Hopper-v4", ["--buffer-size", 10], "--num-envs 20"),
    ("a total below the warm-up", "Hopper-v4", ["--total-timesteps", 1000], "warm-up of 30000"),
    ("a negative seed", "Hopper-v4", ["--seed", -1], "--seed must be between 0 and 4294967295"),
    ("a seed too large", "Hopper-v4", ["--seed", 2**32], "--seed must be between"),
    ("tau above 1", "Hopper-v4", ["--tau", 3], "--tau must be between 0.0 and 1.0, but it is 3"),
    ("a step size that is not finite", "Hopper-v4", ["--learning-rate", "inf"], "--learning-rate must be"),
    ("no evaluation folder", "Hopper-v4", ["--evaluate", "missing"], "no checkpoint in missing"),
]


@pytest.mark.parametrize("env_id, arguments, says", [pytest.param(*rest, id=name) for name, *rest in BAD_ARGUMENTS])
def test_bad_input(refused, env_id, arguments, says):
    assert says in refused("--env-id", env_id, *arguments)


@pytest.mark.parametrize("algo", [dacer_v2], indirect=True)
def test_bad_input_of_dacer_v2(refused):
    assert "--q-grad-weight must be 0.0 or more, but it is -1" in refused("--q-grad-weight", -1)
    assert "lower --time-weight-c" in refused("--diffusion-steps", 200)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_no_cuda(refused):
    assert "finds no CUDA device" in refused("--device", "cuda")


@pytest.fixture
def run_dir(algo, tiny_args):
    """The folder of a finished run, outside `runs`."""
    trained = algo.main(tiny_args(env_id="toy_envs:Counter-v0"))
    shutil.move(trained, "trained")
    shutil.rmtree("runs")
    return Path("trained")


class Evil:
    def __reduce__(self):
        return (os.mkdir, ("evil",))


@pytest.mark.parametrize(
    "harm",
    [
        pytest.param(lambda path: path.write_bytes(b""), id="empty"),
        pytest.param(lambda path: path.write_bytes(path.read_bytes()[:5000]), id="truncated"),
        pytest.param(lambda path: path.write_text("weights"), id="no checkpoint at all"),
        pytest.param(lambda path: torch.save({"agent": 1}, path), id="another program's"),
        pytest.param(lambda path: torch.save([1, 2], path), id="a list"),
        pytest.param(lambda path: torch.save(Evil(), path), id="would run code"),
    ],
)
def test_broken_checkpoint(run_dir, refused, harm):
    harm(run_dir / "checkpoint.pt")
    assert "cannot read the checkpoint" in refused("--evaluate", run_dir)
    assert not Path("evil").exists()


def test_checkpoint_of_another_script(run_dir, refused, algo):
    path = run_dir / "checkpoint.pt"
    torch.save({**torch.load(path, weights_only=True), "algorithm": "other"}, path)
    assert f"is of other, not of {algo.__name__}; use other.py" in refused("--evaluate", run_dir)


def test_bad_evaluation(run_dir, refused):
    assert "--eval-episodes must be 1 or more" in refused("--evaluate", run_dir, "--eval-episodes", 0)
    assert "--seed must be" in refused("--evaluate", run_dir, "--seed", -1)


def test_a_copy_under_another_name_reads_its_runs(algo, run_dir, tmp_path):
    copy = tmp_path / "my_algorithm.py"
    shutil.copy(algo.__file__, copy)
    replayed = subprocess.run(
        [sys.executable, copy, "--evaluate", run_dir, "--eval-episodes", "1"],
        env={**os.environ, "PYTHONPATH": TESTS},
        check=False,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert replayed.returncode == 0, replayed.stderr


def test_checkpoint_without_its_environment(run_dir, refused):
    path = run_dir / "checkpoint.pt"
    checkpoint = torch.load(path, weights_only=True)
    torch.save({**checkpoint, "args": {**checkpoint["args"], "env_id": "Gone-v0"}}, path)
    assert "cannot make --env-id Gone-v0" in refused("--evaluate", run_dir)


def test_video(algo, tiny_args, capsys, monkeypatch):
    """--capture-video records the whole of the first episode. (The multi-goal task renders without a display.)"""
    from moviepy import VideoFileClip

    run_dir = algo.main(tiny_args(env_id="multigoal_env:MultiGoal-v0", total_timesteps=44))
    monkeypatch.setattr(
        sys, "argv", [algo.__file__, "--evaluate", str(run_dir), "--capture-video", "--eval-episodes", "2"]
    )
    runpy.run_path(algo.__file__, run_name="__main__")
    assert "2 episodes:" in capsys.readouterr().out
    (video,) = (run_dir / "videos").iterdir()
    with VideoFileClip(str(video)) as clip:
        assert clip.n_frames > 5
        assert clip.size == [280, 280]


def test_no_video_without_a_renderer(run_dir, refused):
    assert "cannot record a video" in refused("--evaluate", run_dir, "--capture-video")
