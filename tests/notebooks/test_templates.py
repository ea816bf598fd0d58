"""Every template through plain papermill: on a planted model and on one without the phenomenon."""

import json
from pathlib import Path

import papermill
import pytest

from sdnb import records
from tests.tiny import Planted, planted_model, tiny_model

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
SMALL = {
    "01_high_norm_tokens": {},
    "02_empirical_direction": {"max_lines": 12},
    "03_linear_layers": {"max_lines": 8, "sample_counts": [500, 2000]},
    "04_singular_directions": {"max_lines": 12},
    "05_negative_eigenvalues": {"max_lines": 12},
}


def finds_layers(values: dict, planted: Planted) -> None:
    """01 names the planted layers."""
    assert values["explosion_layers"] == [planted.explosion_layer]
    assert values["decay_layers"] == [planted.decay_layer]


def finds_directions(values: dict, planted: Planted) -> None:
    """04 points at the planted layer."""
    assert min(values["ffn_angle_deg"]) in (
        values["ffn_angle_deg"][planted.explosion_layer - 1],
        values["ffn_angle_deg"][planted.decay_layer - 1],
    )
    assert values["angle_deg"][planted.explosion_layer - 1] < 12


def finds_sign(values: dict, planted: Planted) -> None:
    """05 finds the negative eigenvalue."""
    assert values["eigenvalue"][planted.decay_layer - 1] < 0
    assert values["angle_deg"][planted.decay_layer - 1] < 10


FINDS = {
    "01_high_norm_tokens": finds_layers,
    "04_singular_directions": finds_directions,
    "05_negative_eigenvalues": finds_sign,
}


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    return planted_model(tmp_path_factory.mktemp("planted") / "planted")


def run(template: str, folder: Path, out: Path, **parameters) -> tuple[list, Path]:
    """Execute a template with papermill; return its executed code cells and the results folder."""
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
    return [cell for cell in executed.cells if cell.cell_type == "code"], results


def outputs(cells: list, kind: str) -> list[str]:
    """All outputs of a mime type."""
    return [o["data"][kind] for cell in cells for o in cell.outputs if kind in o.get("data", {})]


def the_record(results: Path, template: str) -> records.Record:
    """The only record in a results folder."""
    slug = next(path.parent.name for path in results.glob(f"*/{template}.json"))
    return records.read(results, slug, template)


@pytest.mark.parametrize("template", SMALL)
def test_template_runs_writes_its_record_and_shows_it(template, planted, tmp_path):
    cells, results = run(template, planted.folder, tmp_path)
    record = the_record(results, template)
    assert record.provenance["seed"] == 0 and record.provenance["wall_s"] > 0
    assert outputs(cells, "image/png"), "a page needs its figure"
    assert list(results.glob(f"*/{template[:2]}_*.png")), "figures are saved beside the record"
    said = "".join("".join(text) for text in outputs(cells, "text/markdown"))
    assert "| provenance |" in said and record.provenance["fingerprint"] in said
    assert not [o for cell in cells for o in cell.outputs if o.output_type in ("stream", "error")]
    if template in FINDS:
        FINDS[template](record.values, planted)


def test_a_model_without_the_phenomenon_is_a_page_too(tmp_path):
    cells, results = run(
        "02_empirical_direction", tiny_model(tmp_path / "plain"), tmp_path, figure_format="svg"
    )
    said = "".join("".join(text) for text in outputs(cells, "text/markdown"))
    assert "No token of this text is high-norm" in said
    assert list(results.glob("*/02_*.svg")) and not list(results.glob("*/02_*.png"))


def test_a_wrong_model_is_a_clear_error(tmp_path):
    with pytest.raises(papermill.PapermillExecutionError, match="ModelError"):
        run("01_high_norm_tokens", tmp_path / "nothing", tmp_path)
    assert not list(tmp_path.glob("results/*/*.json"))


def test_templates_are_committed_bare():
    for path in sorted(NOTEBOOKS.glob("[0-9]*.ipynb")):
        content = json.loads(path.read_text(encoding="utf-8"))
        assert "widgets" not in content["metadata"] and "papermill" not in content["metadata"], path.name
