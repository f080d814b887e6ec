"""Films a trained policy as a looping picture, as at the top of README.

    python benchmarks/film.py runs/ant-v2-T5-eta0.01-1 docs/figures/ant.webp
    python benchmarks/film.py runs/goals4-v2-T5-eta2-w1-2 goals.webp --first 0 --task-kwargs '{}'

The Humanoid's picture has a width and height of 240, --every 3 and --last 130.

It needs Pillow, which matplotlib brings, and a task that draws pictures. Without a display, MuJoCo
needs MUJOCO_GL=egl or MUJOCO_GL=osmesa in the environment.
"""

import importlib
import json
import sys
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import tyro
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


@dataclass
class Args:
    run: tyro.conf.Positional[Path]  # folder of a run, or a policy in it: best.pt
    out: tyro.conf.Positional[Path]  # picture to write: .webp or .gif
    first: int = 30  # step of the first frame
    last: int = 140  # step of the last frame
    every: int = 2  # steps between two frames
    seed: int = 3  # of the episode
    # further arguments of the task, in JSON; '{}' for tasks that are not MuJoCo's
    task_kwargs: str = '{"width": 400, "height": 300, "camera_name": "track"}'


def main(args: Args) -> None:
    """Plays one episode and writes its frames. They are shown as fast as they were simulated."""
    if args.every < 1:
        raise ValueError("--every must be 1 or more")
    if not 0 <= args.first <= args.last:
        raise ValueError("--first must be 0 or more, and --last no smaller")
    if args.out.suffix.lower() not in (".webp", ".gif"):
        raise ValueError(f"{args.out} must end with .webp or .gif")
    file = args.run
    if file.is_dir():
        file /= "last.pt" if (file / "last.pt").exists() else "best.pt"
    # The script that made the run: dacer, dacer_v2, or a changed one beside them
    made_by = torch.load(file, "cpu", weights_only=True, mmap=True)["algorithm"]
    script = importlib.import_module(made_by)
    agent = script.load_agent(args.run)
    kwargs = json.loads(agent.args.env_kwargs) | json.loads(args.task_kwargs)
    kwargs["render_mode"] = "rgb_array"
    task = replace(agent.args, env_kwargs=json.dumps(kwargs))
    frames = []
    with closing(script.make_envs(task, 1)) as envs:
        act = script.make_actor(agent.policy, envs.single_action_space)
        obs, _ = envs.reset(seed=args.seed)
        for step in range(args.last + 1):
            obs, _, terminated, truncated, _ = envs.step(act(obs))
            if terminated[0] or truncated[0]:
                break
            if step >= args.first and (step - args.first) % args.every == 0:
                frames.append(Image.fromarray(envs.envs[0].render()))
        milliseconds = 1000 * args.every / envs.metadata.get("render_fps", 30)
    if args.out.suffix.lower() == ".gif" and milliseconds % 10:
        raise ValueError("frames of a .gif take multiples of 10 ms: try .webp or another --every")
    if not frames:
        raise ValueError(f"the episode ended before step {args.first}: try another --first")
    how = {"save_all": True, "append_images": frames[1:], "loop": 0, "duration": milliseconds}
    frames[0].save(args.out, quality=60, method=6, **how)
    print(f"{args.out}: {len(frames)} frames, {args.out.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    try:
        main(tyro.cli(Args))
    except Exception as error:
        advice = ". Without a display, set MUJOCO_GL=egl" if "OpenGL" in str(error) else ""
        print(f"film.py: error: {error}{advice}", file=sys.stderr)
        raise SystemExit(2) from error
