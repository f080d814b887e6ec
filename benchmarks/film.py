"""Films a trained policy as a looping picture, as at the top of README.

    python benchmarks/film.py runs/ant-v2-T5-eta0.01-1 docs/figures/ant.webp

Without a display, set MUJOCO_GL=egl or MUJOCO_GL=osmesa. It takes Pillow, which matplotlib brings.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import gymnasium as gym
import tyro
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import dacer
import dacer_v2


@dataclass
class Args:
    run: tyro.conf.Positional[Path]  # folder of a run of dacer.py or dacer_v2.py
    out: tyro.conf.Positional[Path]  # picture to write: .webp or .gif
    first: int = 30  # step of the first frame
    last: int = 140  # step of the last frame
    every: int = 2  # steps between two frames
    seed: int = 3  # of the episode
    camera: str | None = "track"  # the task's camera


def main(args: Args) -> None:
    """Plays one episode and writes its frames. They are shown as fast as they were simulated."""
    try:
        agent = dacer_v2.load_agent(args.run)
    except ValueError:
        agent = dacer.load_agent(args.run)
    kwargs = json.loads(agent.args.env_kwargs)
    kwargs |= {"width": 400, "height": 300, "camera_name": args.camera}
    env = gym.make(agent.args.env_id, render_mode="rgb_array", **kwargs)
    act = dacer.make_actor(agent.policy, env.action_space)
    obs, _ = env.reset(seed=args.seed)
    frames = []
    for step in range(args.last):
        obs, *_ = env.step(act(obs))
        if step >= args.first and (step - args.first) % args.every == 0:
            frames.append(Image.fromarray(env.render()))
    milliseconds = 1000 * args.every * env.unwrapped.dt
    how = {"save_all": True, "append_images": frames[1:], "loop": 0, "duration": milliseconds}
    frames[0].save(args.out, quality=60, method=6, **how)
    print(f"{args.out}: {len(frames)} frames, {args.out.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main(tyro.cli(Args))
