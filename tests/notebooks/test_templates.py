"""What the executed templates say: planted answers are found, each page has its figure, table and record."""

import json

import papermill
import pytest

from sdnb import records
from sdnb.cli import plan
from tests.templates import DOLLAR, ROOT, SMALL, code_cells, said, shown

NOTEBOOKS = ROOT / "notebooks"
NUMBERED = [name for name in SMALL if name != "explorer"]
SINGLE = [name for name in NUMBERED if records.SCHEMAS[name].scope == "model"]
SPECTRA = [name for name in NUMBERED if "14" <= name[:2] <= "18"]
pytestmark = pytest.mark.slow


def test_every_template_is_executed_here():
    assert list(SMALL) == [path.stem for path in plan.templates(NOTEBOOKS)]


@pytest.mark.parametrize("template", NUMBERED)
def test_template_writes_its_record_and_shows_it(template, executed):
    cells, record = executed.cells(template), executed.record(template)
    assert shown(cells, "image/png"), "a page needs its figure"
    assert list(executed.results.glob(f"*/{template[:2]}_*.png")), "figures are saved beside the record"
    assert "| provenance |" in said(cells)
    assert record.provenance["wall_s"] > 0


@pytest.mark.parametrize("template", SMALL)
def test_nothing_is_printed(template, executed):
    outputs = [output for cell in executed.cells(template) for output in cell["outputs"]]
    assert [output for output in outputs if output["output_type"] in ("stream", "error")] == []


@pytest.mark.parametrize("template", SINGLE)
def test_provenance_names_seed_and_weights(template, executed):
    provenance = executed.record(template).provenance
    assert provenance["seed"] == 0 and provenance["fingerprint"] in said(executed.cells(template))


@pytest.mark.parametrize("template", SPECTRA)
def test_pages_on_spectra_quote_their_paper(template, executed):
    assert "paper B" in said(executed.cells(template))


def test_01_names_the_planted_layers(executed):
    values, planted = executed.record("01_high_norm_tokens").values, executed.planted
    assert values["explosion_layers"] == [planted.explosion_layer]
    assert values["decay_layers"] == [planted.decay_layer]


def test_04_points_at_the_planted_layer(executed):
    values, planted = executed.record("04_singular_directions").values, executed.planted
    layers = (planted.explosion_layer, planted.decay_layer)
    assert min(values["ffn_angle_deg"]) in [values["ffn_angle_deg"][layer - 1] for layer in layers]
    assert values["angle_deg"][planted.explosion_layer - 1] < 12


def test_05_finds_the_negative_eigenvalue(executed):
    values, layer = executed.record("05_negative_eigenvalues").values, executed.planted.decay_layer
    assert values["eigenvalue"][layer - 1] < 0
    assert values["angle_deg"][layer - 1] < 10


def test_06_finds_the_module(executed):
    record, planted = executed.record("06_initial_tokens"), executed.planted
    assert record.values["explosion_layer"] == planted.explosion_layer
    assert record.values["ffn_zeroed_share"][planted.explosion_layer - 1] == 0
    exploded = (record.arrays["norms_tokens"] > record.values["threshold"]).nonzero().flatten().tolist()
    assert exploded == sorted(planted.trigger_ids)


def test_07_names_the_token(executed):
    values = executed.record("07_noninitial_tokens").values
    assert set(values["top_tokens"][:2]) == {"<s>", DOLLAR}
    assert values["real"][:3] == [True, True, False]
    assert f"`{DOLLAR}`" in said(executed.cells("07_noninitial_tokens"))


def test_08_finds_the_line(executed):
    record = executed.record("08_explosion_subspace")
    cosine = record.arrays["right_vector"] @ executed.planted.right_vector
    assert abs(float(cosine)) > 0.99 and record.values["first_to_second"] > 3


def test_09_prevents_the_explosion(executed):
    groups = executed.record("09_interventions").values["interventions"]
    projected = groups[f"direction out, layer {executed.planted.explosion_layer}"]
    assert projected["first_norm"] < 0.1 * groups["none"]["first_norm"]


def test_10_takes_the_steps_beside_the_model(executed):
    values = executed.record("10_training_dynamics").values
    assert values["steps"] == [0, 500]
    assert values["explosion_layers"] == [[], [executed.planted.explosion_layer]]
    assert "step 500" in said(executed.cells("10_training_dynamics"))


def test_11_compares_models(executed):
    near, none = executed.record("11_fine_tuning").values["angle_deg"][1:]
    assert near < 1 and none is None


def test_12_names_the_spiking_module(executed):
    record, text = executed.record("12_quantization"), said(executed.cells("12_quantization"))
    layer = executed.planted.explosion_layer
    assert record.values["explosion_layers"] == [layer]
    assert "10.18, 59.38" in text and f"`model.layers.{layer - 1}.mlp.down_proj`" in text


def test_13_tells_strangers_apart(executed):
    values, text = executed.record("13_signatures").values, said(executed.cells("13_signatures"))
    _, other, plain = executed.others
    assert values["names"] == [executed.model.name, other] and list(values["left_out"]) == [plain]
    assert values["groups"] == [1, 2] and "no sign of kinship" in text
    assert values["pairs"][0]["angle_deg"] > 60 and "87 to 89" in text
    assert {row["change"] for row in values["robustness"]} == {"noise", "quantization", "fine-tuning"}
    assert len(list(executed.results.glob("*/signature.safetensors"))) == 2


def test_a_model_without_the_phenomenon_is_a_page_too(executed):
    folder = executed.other_kinds_folder("02_empirical_direction")
    assert "No token of this text is high-norm" in said(code_cells(folder / "02_empirical_direction.ipynb"))
    assert list(folder.glob("02_*.svg")) and not list(folder.glob("02_*.png"))


def test_an_encoder_has_a_page_on_its_vectors_too(executed):
    folder = executed.other_kinds_folder("15_singular_vectors")
    values = records.read(folder.parent, folder.name, "15_singular_vectors").values
    assert {entry["kind"] for entry in values["matrices"].values()} == {"q", "k", "v", "o", "up", "down"}


def test_a_wrong_model_is_a_clear_error(tmp_path):
    """With plain papermill."""
    given = {"model": str(tmp_path / "nothing"), "results_dir": str(tmp_path / "results")}
    template, page = NOTEBOOKS / "01_high_norm_tokens.ipynb", tmp_path / "page.ipynb"
    with pytest.raises(papermill.PapermillExecutionError, match="ModelError"):
        papermill.execute_notebook(template, page, given, progress_bar=False, start_timeout=120)
    assert not list(tmp_path.glob("results/*/*.json"))


def test_templates_are_committed_bare():
    for path in sorted(NOTEBOOKS.glob("[0-9]*.ipynb")):
        content = json.loads(path.read_text(encoding="utf-8"))
        assert "widgets" not in content["metadata"] and "papermill" not in content["metadata"], path.name
