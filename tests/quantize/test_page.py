"""The lines of book/quantizers.md run as they stand, where the tool that they are for is installed."""

import re
from pathlib import Path

import pytest

from tests.tiny import tiny_model

PAGE = Path(__file__).parents[2] / "book" / "quantizers.md"
LISTED, *BLOCKS = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf8"), re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS)
def test_lines_of_the_page_run(tmp_path, monkeypatch, block):
    for tool in re.findall(r"^(?:import|from) (\w+)", block, re.MULTILINE):
        pytest.importorskip(tool)
    monkeypatch.chdir(tmp_path)
    names = {"MODEL": str(tiny_model(tmp_path / "model", d=32, f=64, layers=12))}
    exec(LISTED, names)
    if "scheme" in block:
        exec(BLOCKS[0], names)
    exec(block, names)
