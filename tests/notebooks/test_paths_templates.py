"""Templates 06 to 11 through plain papermill, on planted models: each finds the planted answer."""

from pathlib import Path

import papermill
import pytest

from sdnb import records
from tests.tiny import Planted, planted_model, tiny_model

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
SMALL = {
    "06_initial_tokens": {"max_lines": 8, "ablation_items": 64},
    "07_noninitial_tokens": {"max_lines": 8, "top": 6},
    "08_explosion_subspace": {"max_lines": 8},
    "09_interventions": {"max_lines": 8, "window": 64, "max_windows": 2, "new_tokens": 3},
    "10_training_dynamics": {"max_lines": 8, "window": 64, "max_windows": 2},
    "11_fine_tuning": {"max_lines": 8, "window": 64, "max_windows": 2},
}
DOLLAR = "$"
"""A noninitial token that would start a formula in a figure that does not take care."""


@pytest.fixture(scope="module")
def planted(tmp_path_factory) -> Planted:
    root = tmp_path_factory.mktemp("planted")
    tiny_model(root / "model-steps" / "step0", d=64, f=128, layers=6)
    planted_model(root / "model-steps" / "step500", noninitial=DOLLAR)
    return planted_model(root / "model", noninitial=DOLLAR)


def run(template: str, folder: Path, out: Path, **parameters) -> tuple[list, records.Record]:
    """Execute a template; return its executed code cells and the record that it wrote."""
    results = out / "results"
    executed = papermill.execute_notebook(
        NOTEBOOKS / f"{template}.ipynb",
        out / f"{template}.ipynb",
        parameters={"model": str(folder), "results_dir": str(results), "add_special_tokens": True}
        | SMALL[template]
        | parameters,
        progress_bar=False,
        start_timeout=120,
    )
    slug = next(path.parent.name for path in results.glob(f"*/{template}.json"))
    cells = [cell for cell in executed.cells if cell.cell_type == "code"]
    return cells, records.read(results, slug, template)


def said(cells: list) -> str:
    """All Markdown that the cells show."""
    data = [o.get("data", {}) for cell in cells for o in cell.outputs]
    found = [entry["text/markdown"] for entry in data if "text/markdown" in entry]
    return "\n".join("".join(text) for text in found)


def check_page(cells: list, out: Path, template: str) -> None:
    """A page has its figures, saved beside the record too, its table, its provenance, and no stray output."""
    assert any("image/png" in o.get("data", {}) for cell in cells for o in cell.outputs)
    assert list((out / "results").glob(f"*/{template[:2]}_*.png"))
    assert "| provenance |" in said(cells)
    assert not [o for cell in cells for o in cell.outputs if o.output_type in ("stream", "error")]


def test_06_finds_the_module(planted, tmp_path):
    cells, record = run("06_initial_tokens", planted.folder, tmp_path)
    check_page(cells, tmp_path, "06_initial_tokens")
    values = record.values
    assert values["explosion_layer"] == planted.explosion_layer
    assert values["ffn_zeroed_share"][planted.explosion_layer - 1] == 0
    exploded = (record.arrays["norms_tokens"] > values["threshold"]).nonzero().flatten().tolist()
    assert exploded == sorted(planted.trigger_ids)


def test_07_names_the_token(planted, tmp_path):
    cells, record = run("07_noninitial_tokens", planted.folder, tmp_path)
    check_page(cells, tmp_path, "07_noninitial_tokens")
    assert set(record.values["top_tokens"][:2]) == {"<s>", DOLLAR}
    assert record.values["real"][:3] == [True, True, False]
    assert f"`{DOLLAR}`" in said(cells)


def test_08_finds_the_line(planted, tmp_path):
    cells, record = run("08_explosion_subspace", planted.folder, tmp_path)
    check_page(cells, tmp_path, "08_explosion_subspace")
    cosine = record.arrays["right_vector"] @ planted.right_vector
    assert abs(float(cosine)) > 0.99 and record.values["first_to_second"] > 3


def test_09_prevents_the_explosion(planted, tmp_path):
    cells, record = run("09_interventions", planted.folder, tmp_path)
    check_page(cells, tmp_path, "09_interventions")
    groups = record.values["interventions"]
    projected = groups[f"direction out, layer {planted.explosion_layer}"]
    assert projected["first_norm"] < 0.1 * groups["none"]["first_norm"]


def test_10_takes_the_steps_beside_the_model(planted, tmp_path):
    cells, record = run("10_training_dynamics", planted.folder, tmp_path)
    check_page(cells, tmp_path, "10_training_dynamics")
    assert record.values["steps"] == [0, 500]
    assert record.values["explosion_layers"] == [[], [planted.explosion_layer]]
    assert "step 500" in said(cells)


def test_11_compares_models(planted, tmp_path):
    others = [str(planted.folder.parent / "model-steps" / name) for name in ("step500", "step0")]
    cells, record = run("11_fine_tuning", planted.folder, tmp_path, descendants=others)
    check_page(cells, tmp_path, "11_fine_tuning")
    near, none = record.values["angle_deg"][1:]
    assert near < 1 and none is None
