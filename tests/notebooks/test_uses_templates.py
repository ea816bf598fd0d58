"""Templates 12 and 13 through plain papermill, on planted models and beside one without the phenomenon."""

from pathlib import Path

import papermill
import pytest

from sdnb import records
from tests.tiny import planted_model, tiny_model

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
TEXT = "\n".join(f"the module number {n} provides a class for {n * n} objects" for n in range(60))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three GPT-2 shapes in which every first token explodes, one without, and a text."""
    root = tmp_path_factory.mktemp("models")
    for name, seed in (("one", 0), ("other", 7)):
        planted_model(root / name, "gpt2", seed=seed, d=64, f=64, layers=4, decay_layer=4)
    tiny_model(root / "plain", "gpt2", d=64, layers=2)
    (root / "text.txt").write_text(TEXT, encoding="utf-8")
    return root


def run(template: str, folder: Path, out: Path, model: str, **parameters) -> tuple[records.Record, str]:
    """Execute a template; return its record and everything it says in Markdown."""
    executed = papermill.execute_notebook(
        NOTEBOOKS / f"{template}.ipynb",
        out / f"{template}.ipynb",
        parameters={"model": str(folder / model), "text": str(folder / "text.txt")}
        | {"results_dir": str(out / "results")}
        | parameters,
        progress_bar=False,
        start_timeout=120,
    )
    outputs = [o for cell in executed.cells if cell.cell_type == "code" for o in cell.outputs]
    assert not [o for o in outputs if o.output_type in ("stream", "error")]
    assert [o for o in outputs if "image/png" in o.get("data", {})], "a page needs its figure"
    assert list((out / "results").glob(f"*/{template[:2]}_*.png")), "figures are saved beside the record"
    said = "".join(
        "".join(o["data"]["text/markdown"]) for o in outputs if "text/markdown" in o.get("data", {})
    )
    assert "| provenance |" in said
    [path] = (out / "results").glob(f"*/{template}.json")
    return records.read(out / "results", path.parent.name, template), said


def test_quantization_page(folder, tmp_path):
    options = {"max_tokens": 256, "window": 64, "calibration_windows": 3}
    record, said = run("12_quantization", folder, tmp_path, "one", **options)
    assert record.values["explosion_layers"] == [2] and record.provenance["fingerprint"] in said
    assert "10.18, 59.38" in said and "`transformer.h.1.mlp.c_proj`" in said


def test_signatures_page(folder, tmp_path):
    names = [str(folder / name) for name in ("one", "other", "plain")]
    options = {"models": names, "max_lines": 16, "noise_levels": [0.01], "tuning_steps": [1]}
    record, said = run("13_signatures", folder, tmp_path, "one", **options)
    assert record.values["names"] == names[:2] and list(record.values["left_out"]) == names[2:]
    assert record.values["groups"] == [1, 2] and "no sign of kinship" in said
    assert record.values["pairs"][0]["angle_deg"] > 60 and "87 to 89" in said
    assert {row["change"] for row in record.values["robustness"]} == {"noise", "quantization", "fine-tuning"}
    assert len(list((tmp_path / "results").glob("*/signature.safetensors"))) == 2
