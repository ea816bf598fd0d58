"""Templates 14 to 18 through papermill, small: the record is there, the page shows it, nothing is printed."""

import itertools
from pathlib import Path

import papermill
import pytest
import torch
from transformers import AutoConfig, AutoModel

from sdnb import records
from tests.tiny import tiny_model, tiny_tokenizer

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
SMALL = {
    "14_weight_spectra": {"layers": [1, 3]},
    "15_singular_vectors": {"max_lines": 12, "layers": [1, 2]},
    "16_removing_singular_values": {"max_lines": 12, "window": 64, "kinds": ["q", "down", "all"]},
    "17_fine_tuned_spectra": {"kinds": ["up"], "deciles": [1, 10], "seeds": [0], "unpruned": 2, "steps": 2},
    "18_random_matrix_model": {"rows": 40, "columns": 160, "draws": 4},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("model") / "tiny", layers=3)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert")
    config = AutoConfig.for_model(
        "bert",
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=384,
    )
    torch.manual_seed(0)
    AutoModel.from_config(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def run(template, folder, out, **parameters):
    """Executed code cells and the record of a template."""
    given = {"results_dir": str(out), **SMALL[template], **parameters}
    if template != "18_random_matrix_model":
        given["model"] = str(folder)
    executed = papermill.execute_notebook(
        NOTEBOOKS / f"{template}.ipynb",
        out / "out.ipynb",
        parameters=given,
        progress_bar=False,
        start_timeout=120,
    )
    cells = [cell for cell in executed.cells if cell.cell_type == "code"]
    assert not [o for cell in cells for o in cell.outputs if o.output_type in ("stream", "error")]
    slug = next(path.parent.name for path in out.glob(f"*/{template}.json"))
    return cells, records.read(out, slug, template)


def shown(cells, kind):
    return list(
        itertools.chain(
            *(["".join(o["data"][kind]) for o in c.outputs if kind in o.get("data", {})] for c in cells)
        )
    )


@pytest.mark.parametrize("template", SMALL)
def test_template_runs_writes_its_record_and_shows_it(template, model, tmp_path):
    cells, record = run(template, model, tmp_path)
    assert shown(cells, "image/png") and list(tmp_path.glob(f"*/{template[:2]}_*.png"))
    said = "".join(shown(cells, "text/markdown"))
    assert "| provenance |" in said and "paper B" in said
    assert record.provenance["wall_s"] > 0


def test_an_encoder_has_this_page_too(encoder, tmp_path):
    _, record = run("15_singular_vectors", encoder, tmp_path, layers=None)
    kinds = {entry["kind"] for entry in record.values["matrices"].values()}
    assert kinds == {"q", "k", "v", "o", "up", "down"}
