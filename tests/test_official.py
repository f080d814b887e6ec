"""benchmarks/official.py and benchmarks/same_update.py on bad input; the rest of them needs JAX and the official code."""

import importlib.util
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import official
import same_update


def test_comparison_with_the_official_code_on_bad_input(tmp_path, capsys, monkeypatch):
    """Training it, and updating it beside dacer.py, need JAX and a clone of the official repository: not tested here."""

    def said(main, args):
        with pytest.raises(SystemExit) as stopped:
            main(args)
        assert stopped.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    clone, run = tmp_path / "clone", tmp_path / "runs/HalfCheetah-v4__official_T20__1"
    train = partial(said, official.main, official.Args(clone, runs=tmp_path / "runs"))
    compare = partial(said, same_update.main, same_update.Args(clone, run))
    assert "is no clone of the official repository" in train()
    assert "is no clone of the official repository" in compare()
    (clone / "relax/algorithm").mkdir(parents=True)
    (clone / "relax/algorithm/dacer.py").touch()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "jax" else "found")
    assert "no module jax: what to install" in train()
    assert "no module jax: what to install" in compare()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: "found")
    for name in ("jax", "jax.numpy", "tensorboardX"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(numpy=None, SummaryWriter=None))
    run.mkdir(parents=True)
    (run / "args.json").write_text('{"learning_starts": 1}')
    assert "no state.pkl to go on from" in train()
    assert "is no folder of a run of benchmarks/official.py" in compare()
    (run / "state.pkl").touch()
    assert "is a run with other arguments" in train()
    assert (run / "args.json").read_text() == '{"learning_starts": 1}'
