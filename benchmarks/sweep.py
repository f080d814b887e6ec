r"""Runs a grid of commands x tasks x seeds, several at a time.

    python benchmarks/sweep.py --commands "dacer.py" "dacer_v2.py --q-grad-weight 0" \
        --env-ids HalfCheetah-v4 Hopper-v4 --seeds 1 2 --processes 2 -- --total-timesteps 1230000

Each job has a folder of its own, runs/sweep/<job>, named after its arguments. Its run lies there
under runs/, and what it printed lies there in log.txt. The same command, given again, goes on: it
skips what is done, resumes what has a checkpoint and starts the rest. It does not notice that a
script was edited: give the edited one a name of its own. Since each job runs in its own folder,
paths among the arguments must be absolute. Ctrl-C and SIGTERM end the running jobs, which keep
their last checkpoint. With --ray (`pip install ray`) jobs are tasks of a Ray cluster,
which runs as many at a time as it can. Its machines share this folder; a job that loses its machine
goes on on another.
"""

import fcntl
import hashlib
import importlib
import itertools
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

import tyro

ROOT = Path(__file__).resolve().parent.parent
STOP = []  # not empty once the jobs of this machine are to end


@dataclass
class Options:
    arguments: tyro.conf.Positional[tuple[str, ...]] = ()  # after `--`: arguments of all jobs
    env_ids: tuple[str, ...] = ("HalfCheetah-v4",)  # tasks
    commands: tuple[str, ...] = ("dacer.py", "dacer_v2.py")  # scripts, each with its own arguments
    seeds: tuple[int, ...] = (1,)  # seeds
    processes: int = 1  # jobs at a time on this machine
    threads: int | None = None  # CPU threads of each job; None: the jobs share this machine's cores
    retries: int = 2  # how often a job that was killed is resumed
    ray: str | None = None  # address of a Ray cluster to run all on; "auto"; "local" to start one
    gpus: float = 0.0  # with --ray: GPUs of each job, also a fraction of one


def fail(message: str) -> None:
    print(f"sweep.py: error: {message}", file=sys.stderr)
    sys.exit(2)


def make_jobs(options: Options) -> dict[Path, list[str]]:
    """The folder and the command of each job.

    Arguments that a script does not take end the program, before anything runs.
    """
    jobs = {}
    grid = itertools.product(options.commands, options.env_ids, options.seeds)
    for command, env_id, seed in grid:
        try:
            script, *own = shlex.split(command)
            path = (ROOT / script).with_suffix(".py")
            sys.path.insert(0, str(path.parent))
            Args = importlib.import_module(path.stem).Args
        except (ImportError, AttributeError, SyntaxError, ValueError) as error:
            fail(f"--commands {command!r}: not a script that trains: {error}")
        arguments = ["--env-id", env_id, "--seed", str(seed), *options.arguments, *own]
        tyro.cli(Args, args=arguments, prog=f"sweep.py, {command}")
        name = re.sub(r"[^\w.-]+", "_", f"{env_id.split(':')[-1]}__{command}__{seed}")[:100]
        digest = hashlib.sha256(shlex.join([path.stem, *arguments]).encode()).hexdigest()[:8]
        folder = Path("runs/sweep").absolute() / f"{name}__{digest}"
        if folder in jobs:
            fail(f"the grid holds a job twice: {name}")
        jobs[folder] = [str(path), *arguments]
    return jobs


def run_job(folder: Path, command: list[str], environment: dict[str, str], retries: int) -> int:
    """Runs a job, or what is missing of it, on this machine of the cluster. Returns its exit
    code."""
    folder.mkdir(parents=True, exist_ok=True)
    env = os.environ | environment
    with (folder / "log.txt").open("a") as log:
        # The script holds the lock too: one that outlived its sweep is waited for.
        fcntl.flock(log, fcntl.LOCK_EX)
        for _ in range(retries + 1):
            if STOP or (folder / "done").exists():
                return 0
            saved = sorted(folder.glob("runs/*/checkpoint.pt"), key=os.path.getmtime)
            arguments = ["--resume", str(saved[-1].parent)] if saved else command[1:]
            full = [sys.executable, command[0], *arguments]
            print("$", shlex.join(full), file=log, flush=True)
            # It has a session of its own: Ctrl-C reaches the sweep alone, which ends each job once.
            process = subprocess.Popen(
                full, cwd=folder, env=env, stdout=log, stderr=log, start_new_session=True
            )
            try:
                while (code := process.poll()) is None and not STOP:
                    time.sleep(0.2)
            finally:  # Ray ends a task by KeyboardInterrupt, which process.wait() would not notice
                process.terminate()
                process.wait()
            if code == 0:
                (folder / "done").touch()
            if code in (0, 1, 2):  # else it was killed
                break
    return code


def last(pattern: str, folder: Path) -> str:
    """What a job's newest process printed last that matches."""
    log = folder / "log.txt"
    text = log.read_text(errors="replace") if log.exists() else ""
    newest = text.rpartition("\n$ ")[2]
    return ["", *re.findall(pattern, newest)][-1]


def main(options: Options) -> int:
    if min(options.processes, options.threads or 1) < 1 or min(options.retries, options.gpus) < 0:
        fail("--processes and --threads must be 1 or more, --retries and --gpus 0 or more")
    jobs = make_jobs(options)
    if not jobs:
        fail("the grid is empty: --commands, --env-ids and --seeds need a value each")
    threads = options.threads or max(1, (os.cpu_count() or 1) // options.processes)
    # "" is this folder, which a job leaves.
    modules = ["", *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    environment = {
        "OMP_NUM_THREADS": str(threads),
        "PYTHONPATH": os.pathsep.join(map(os.path.abspath, modules)),
    }
    tasks = [(folder, command, environment, options.retries) for folder, command in jobs.items()]
    refs = []
    if options.ray is None:
        pool = ThreadPoolExecutor(options.processes)
        futures = [pool.submit(run_job, *task) for task in tasks]
    else:
        import ray

        ray.init(address=options.ray)
        needs = {"num_cpus": threads, "num_gpus": options.gpus, "max_retries": options.retries}
        remote = ray.remote(**needs)(run_job)
        refs = [remote.remote(*task) for task in tasks]
        futures = [ref.future() for ref in refs]
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # after Ray, which sets one too
    folders = dict(zip(futures, jobs))
    pending = set(futures)
    failed = 0
    try:
        while pending:
            finished, pending = wait(pending, timeout=60, return_when=FIRST_COMPLETED)
            for future in finished:
                folder = folders[future]
                code = future.exception() or future.result()
                failed += code != 0
                said = last("[^\r\n]*Error[^\r\n]*", folder) or last("[^\r\n]+", folder)
                print(f"{folder.name}: FAILED ({code}): {said}" if code else f"{folder.name}: done")
            done = len(jobs) - len(pending) - failed
            print(f"{done} done, {failed} failed, {len(pending)} to go", flush=True)
            for folder in map(folders.get, pending):
                if progress := last(r"[\d,]+ of [\d,]+ steps", folder):
                    print(f"  {folder.name}: {progress}", flush=True)
    except KeyboardInterrupt:
        STOP.append(True)
        for ref in refs:
            ray.cancel(ref)
        wait(futures, timeout=60)
        print("stopped; the same command goes on from the checkpoints", flush=True)
        os._exit(130)  # at once, also where a thread waits for a job that outlived its sweep
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options)))
