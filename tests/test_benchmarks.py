"""benchmarks/speed.py on a tiny task; benchmarks/baselines.py on bad input, for the rest of it needs JAX."""

import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import speed


def test_speed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)  # which would take a minute
    monkeypatch.setitem(speed.TASKS, "tiny", {"env_id": "toy_envs:Reach-v0", "hidden_sizes": (16, 16)})
    monkeypatch.setattr(speed, "BATCH_SIZE", 32)
    shutil.copy(ROOT / "dacer_v2.py", tmp_path)
    out, tiny = tmp_path / "new/speed.csv", {"tasks": ("tiny",), "scripts": ("dacer_v2",), "diffusion_steps": (2,)}
    speed.main(speed.Args(**tiny, turns=2, against=tmp_path, out=out))
    times, published = pd.read_csv(out), pd.read_csv(ROOT / "benchmarks/results/speed.csv")
    assert list(times) == list(published)
    assert set(times.what) >= set(published.what)
    assert len(times) == 2 * times.what.nunique()
    assert (times.ms > 0).all()
    table, ratios = capsys.readouterr().out.split("by turn, quartiles:")
    assert "update, eager" in ratios
    for what, rows in times.groupby("what"):
        (line,) = (line for line in table.splitlines() if line.startswith(f"{what}  "))
        assert sorted(map(float, line.removeprefix(what).split())) == pytest.approx(sorted(rows.ms), rel=1e-3)


def test_baselines_without_the_official_code(tmp_path):
    command = [sys.executable, ROOT / "benchmarks/baselines.py", "--code", tmp_path]
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert "is no clone of the official repository" in " ".join(done.stderr.replace("│", "").split())
