"""Runs a grid of commands x tasks x seeds, several at a time, and shows the progress of all of them.

    python benchmarks/sweep.py --commands "dacer.py" "dacer_v2.py --diffusion-steps 5" --env-ids HalfCheetah-v4 Hopper-v4 \\
        --seeds 1 2 --processes 2 -- --total-timesteps 1230000

The runs lie under runs/, as if their commands had been typed there one by one, and what each printed in runs/logs/. A run
that is there and complete is not made again; an incomplete one is resumed from its checkpoint: so the same command, given
again, completes what is missing. A run that fails is reported and does not stop the others. Ctrl-C and SIGTERM let all
runs save a checkpoint first. With --ray they are tasks of a Ray cluster (`pip install ray`) whose machines share this
folder; there Ctrl-C ends them as they are, with the checkpoints that they have.
"""

import atexit
import dataclasses
import importlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NoReturn

import tyro
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


@dataclass
class Options:
    arguments: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """after `--`: further arguments of all runs"""
    env_ids: tuple[str, ...] = ("HalfCheetah-v4",)
    """tasks"""
    commands: tuple[str, ...] = ("dacer.py", "dacer_v2.py")
    """scripts, each with the arguments that set it apart, such as "dacer_v2.py --diffusion-steps 5" """
    seeds: tuple[int, ...] = (1,)
    """seeds"""
    processes: int = 1
    """runs at a time on this machine"""
    threads: int | None = None
    """threads of each run; None: this machine's cores, shared out among the processes"""
    retries: int = 2
    """how often a run that was killed is resumed; one that ended with an error of its own (exit code 2) is not"""
    ray: str | None = None
    """address of a Ray cluster ("auto", or "local" to start one here) that runs as many at a time as it can"""
    gpus: float = 0.0
    """with --ray: GPUs of each run, also a fraction of one"""


@dataclass
class Job:
    """One run of the grid."""

    script: str  # "dacer_v2"
    arguments: list[str]  # of the command line
    args: Any  # the same, as the script's Args
    updates: int  # of the whole run
    name: str  # for the progress, and of its log

    def settings(self) -> dict[str, Any]:
        """What args.json of its run says, but for its length and whether the machine could compile."""
        args = importlib.import_module(self.script).resolve(self.args)
        settings = json.loads(json.dumps(dataclasses.asdict(args)))
        del settings["total_timesteps"], settings["compile"]
        return settings


def fail(message: str) -> NoReturn:
    """Ends the program with one line on stderr and exit code 2."""
    print(f"sweep.py: error: {message}", file=sys.stderr)
    raise SystemExit(2)


def make_jobs(options: Options) -> list[Job]:
    """The grid; arguments that a script does not take end the program here, before anything runs."""
    jobs = []
    for command in options.commands:
        script, *own = shlex.split(command)
        stem = Path(script).stem
        if not re.fullmatch(r"dacer(_v2)?(\.py)?", script):
            fail(f"--commands must begin with dacer.py or dacer_v2.py, but one is {command!r}")
        module = importlib.import_module(stem)
        for env_id in options.env_ids:
            for seed in options.seeds:
                arguments = ["--env-id", env_id, "--seed", str(seed), *options.arguments, *own]
                args = tyro.cli(module.Args, args=arguments, prog=f"sweep.py, {command}")
                name = " ".join([env_id.split(":")[-1], stem, *own, f"seed {seed}"])
                updates = module.num_iterations(module.resolve(args))[1]
                jobs.append(Job(stem, arguments, args, updates, name))
    runs = [(job.script, job.settings()) for job in jobs]
    if doubled := [job.name for i, job in enumerate(jobs) if runs[i] in runs[:i]]:
        fail(f"the grid holds a run twice: {doubled[0]}")
    return jobs


def find_run(job: Job) -> tuple[Path | None, int]:
    """Folder of this job's run, None if there is none with a checkpoint, and the updates that it has done.

    A shorter run can become this one if nothing in it depended on its length, as the default --entropy-interval does.
    """
    import torch

    found, most, settings = None, -1, job.settings()
    for path in Path("runs").glob("*/args.json"):
        if not (path.parent / f"{job.script}.py").is_file():
            continue
        try:
            saved = json.loads(path.read_text())
            if any(saved.get(name) != value for name, value in settings.items()):
                continue
            if saved["total_timesteps"] > job.args.total_timesteps:
                continue
            update = torch.load(path.parent / "checkpoint.pt", weights_only=True, mmap=True)["update"]
        except Exception:  # noqa: BLE001, S112 - broken
            continue
        if found is None or update > most:
            found, most = path.parent, update
    return found, max(most, 0)


def log_path(job: Job) -> Path:
    return Path("runs") / "logs" / (re.sub(r"[^\w.-]+", "_", job.name) + ".log")


RUNNING, STOPPING, LOCK = set(), [], threading.Lock()  # processes; a signal, once it came; for both


def run_job(job: Job, threads: int, retries: int) -> int:
    """Makes a run, or completes it, and returns its exit code; resumes one that was killed up to `retries` times."""
    log_path(job).parent.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    log_path(job).unlink(missing_ok=True)
    for _ in range(retries + 1):
        run_dir, update = find_run(job)
        if run_dir is not None and update >= job.updates:
            return 0
        arguments = job.arguments
        if run_dir is not None:
            arguments = ["--resume", str(run_dir), "--total-timesteps", str(job.args.total_timesteps)]
        with log_path(job).open("a") as log:
            with LOCK:
                if STOPPING:
                    return 128 + STOPPING[0]
                command = [sys.executable, ROOT / f"{job.script}.py", *arguments]
                # A session of its own: Ctrl-C reaches the sweep alone, which asks each run to stop, once
                process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
                RUNNING.add(process)
            code = process.wait()
            RUNNING.discard(process)
        if code in (0, 1, 2, 130, 143):  # done, wrong, or asked to stop; else killed from outside
            return code
    return code


def progress(job: Job) -> tuple[int, str]:
    """Updates done, and the newest evaluation, by the log of a run."""
    try:
        with log_path(job).open("rb") as log:
            log.seek(max(0, os.path.getsize(log_path(job)) - 2000))
            tail = log.read().decode(errors="replace")
    except OSError:
        return 0, ""
    done = re.findall(rf"(\d+)/{job.updates} \[", tail)
    evaluation = re.findall(r"evaluation (-?[\d.]+ \+- [\d.]+|nan)", tail)
    return int(done[-1]) if done else 0, evaluation[-1] if evaluation else ""


def start_local(jobs: list[Job], options: Options, threads: int) -> list[Future]:
    pool = ThreadPoolExecutor(options.processes)
    return [pool.submit(run_job, job, threads, options.retries) for job in jobs]


def start_ray(jobs: list[Job], options: Options, threads: int) -> list[Future]:
    try:
        import ray
    except ImportError:
        fail("--ray needs the package ray: pip install ray")
    path = os.pathsep.join([str(ROOT), str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")])
    ray.init(address=options.ray, log_to_driver=False, runtime_env={"env_vars": {"PYTHONPATH": path}})
    folder = os.getcwd()

    @ray.remote(num_cpus=threads, num_gpus=options.gpus, max_retries=options.retries)
    def remote(job: Job) -> int:
        os.chdir(folder)
        import sweep  # Ray would send the functions of the main program as copies, which its lock forbids

        return sweep.run_job(job, threads, options.retries)

    atexit.register(ray.shutdown)
    return [remote.remote(job).future() for job in jobs]


def stop(signum: int, frame: Any) -> NoReturn:
    """Lets all runs of this machine save a checkpoint, and starts no more."""
    with LOCK:
        STOPPING.append(signum)
        for process in RUNNING:
            process.send_signal(signal.SIGTERM)
    for process in list(RUNNING):
        process.wait()
    print(f"\nstopped by {signal.Signals(signum).name}; the same command goes on from the checkpoints", flush=True)
    os._exit(128 + signum)


def main(options: Options) -> int:
    """Makes all runs of the grid; returns how many failed."""
    threads = options.threads or max(1, (os.cpu_count() or 1) // options.processes)
    jobs = make_jobs(options)
    signal.signal(signal.SIGINT, stop), signal.signal(signal.SIGTERM, stop)
    futures = (start_ray if options.ray else start_local)(jobs, options, threads)
    bars = [
        tqdm(desc=job.name, total=job.updates, unit=" updates", mininterval=1 if sys.stderr.isatty() else 60)
        for job in jobs
    ]
    while True:
        finished = [future.done() for future in futures]
        for bar, job in zip(bars, jobs):
            bar.n, evaluation = progress(job)
            bar.set_postfix_str(evaluation, refresh=False)
            bar.update(0)
        if all(finished):
            break
        time.sleep(1)
    for bar in bars:
        bar.close()
    failed = 0
    for job, future in zip(jobs, futures):
        error = future.exception()
        code = future.result() if error is None else repr(error)
        failed += code != 0
        run_dir, update = find_run(job)
        state = "complete"
        if code != 0:
            said = log_path(job).read_text().strip().split("error: ")[-1][-300:] if log_path(job).is_file() else code
            state = f"FAILED: {said} (more in {log_path(job)})"
        print(f"{job.name}: {update:,} of {job.updates:,} updates, {state}; {run_dir or 'no run'}")
    return failed


if __name__ == "__main__":
    sys.exit(bool(main(tyro.cli(Options))))
