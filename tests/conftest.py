"""Every test that takes `algo` runs for each script: what holds for DACER holds for DACERv2 without its Q-gradient."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import dacer
import dacer_v2

SCRIPTS = [dacer, dacer_v2]


@pytest.fixture(params=SCRIPTS, ids=lambda module: module.__name__)
def algo(request):
    return request.param
