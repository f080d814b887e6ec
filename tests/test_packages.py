"""A copied script installs what it needs: `uv run dacer_v2.py` reads its header (PEP 723)."""

import re
import tomllib
from pathlib import Path

from helpers import ROOT, both_scripts


@both_scripts
def test_the_headers_name_the_packages_of_requirements_txt(algo):
    source = Path(algo.__file__).read_text()
    block = re.search(r"^# /// script\n(.*?)^# ///$", source, re.DOTALL | re.MULTILINE).group(1)
    header = tomllib.loads(re.sub(r"^# ?", "", block, flags=re.MULTILINE))
    required = (ROOT / "requirements.txt").read_text().split()
    only_pictures = [line for line in required if line.startswith("matplotlib")]
    assert sorted(header["dependencies"] + only_pictures) == sorted(required)
    assert header["requires-python"].startswith(">=3.11")
