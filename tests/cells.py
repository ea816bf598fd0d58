"""A notebook's cells, run in this process."""

import json
from pathlib import Path

import matplotlib

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"


def run_cells(number: str, **parameters: object) -> dict:
    """Run a notebook's code cells and return its variables."""
    matplotlib.use("Agg")
    [path] = NOTEBOOKS.glob(f"{number}*.ipynb")
    variables: dict = {}
    for cell in json.loads(path.read_text(encoding="utf8"))["cells"]:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"{path.stem} {cell['id']}", "exec"), variables)
            if "parameters" in cell["metadata"].get("tags", []):
                assert parameters.keys() <= variables.keys(), "a parameter that the notebook has"
                variables |= parameters
    matplotlib.pyplot.close("all")
    return variables
