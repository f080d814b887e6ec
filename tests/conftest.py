"""Every test that takes `algo` runs for each script: what holds for DACER holds for DACERv2 without its Q-gradient."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import dacer  # noqa: E402

SCRIPTS = [dacer]


@pytest.fixture(params=SCRIPTS, ids=lambda module: module.__name__)
def algo(request):
    return request.param
