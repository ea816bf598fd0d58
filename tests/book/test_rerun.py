"""The page `book/rerun.md`: every command on it runs as it stands there."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "book" / "rerun.md").read_text(encoding="utf8")
EXAMPLES = re.findall(r"^```(bash|python)\n(.*?)^```$", TEXT, re.M | re.S)
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A folder that looks like the root of the checkout, but where results may be written."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("notebooks", "zoo"):
        (folder / name).symlink_to(ROOT / name)
    return folder


def run(language: str, code: str, folder: Path) -> str:
    """Run an example in a shell, or by Python, and return what it prints; it must succeed."""
    words = ["bash", "-euc", code] if language == "bash" else [sys.executable, "-c", code]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(words, check=False, capture_output=True, text=True, cwd=folder, env=environment)
    assert done.returncode == 0, f"{code}\n{done.stdout}{done.stderr}"
    return done.stdout


def test_every_example_runs_in_the_order_of_the_page(checkout):
    assert len(EXAMPLES) >= 6
    said = {code: run(language, code, checkout) for language, code in EXAMPLES}
    found = {path.name for path in (checkout / "results" / "zoo__llama").iterdir()}
    assert found >= {f"04_singular_directions.{end}" for end in ("json", "safetensors", "png")}
    assert found >= {f"{name}.ipynb" for name in ("01_high_norm_tokens", "05_negative_eigenvalues")}
    assert any("threshold: float" in text for text in said.values()), "the help of the parameters"
    assert any(re.match(r"model,folder,.*\nzoo/llama,", text) for text in said.values()), "the summary"
    assert any(re.match(r"tensor\(\[", text) for text in said.values()), "two singular values"
