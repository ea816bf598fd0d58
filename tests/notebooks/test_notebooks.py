"""What the executed notebooks find: planted layers, directions, tokens and modules, whose truth is known."""

import pytest

import sdnb
from sdnb import run
from tests.cells import run_cells
from tests.templates import DOLLAR, ROOT, SMALL, code_cells

NUMBERED = [name for name in SMALL if name != "explorer"]
pytestmark = pytest.mark.slow


def test_every_notebook_is_executed_here():
    assert {*SMALL} == {path.stem for path in run.templates_in(ROOT / "notebooks")}


@pytest.mark.parametrize("template", NUMBERED)
def test_a_notebook_shows_its_figure_numbers_and_provenance(template, executed):
    cells = code_cells(executed.notebook(template))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert not [out for out in outputs if out["output_type"] == "error" or out.get("name") == "stderr"]
    shown = [kind for output in outputs for kind in output.get("data", {})]
    assert "image/png" in shown, "a page needs its figure"
    assert "text/html" in shown, "and a table of its numbers"
    record = executed.record(template)
    assert list(record.path.parent.glob(f"{template}.png")), 'the figure "" is the gallery\'s thumbnail'
    assert record.provenance["wall_s"] > 0 and record.provenance["versions"]["torch"]


@pytest.fixture
def values(executed):
    return lambda template: executed.record(template).values


def test_01_names_the_planted_layers_and_token(values, executed):
    found = values("01_high_norm_tokens")
    assert found["explosion_layers"] == [executed.planted.explosion_layer]
    assert found["decay_layers"] == [executed.planted.decay_layer]
    assert found["high_norm_positions"] == [0] and found["tokens"][0] == "<s>"
    assert found["peak_norm"] == pytest.approx(executed.planted.peak_norm, rel=0.1)


def test_02_finds_the_planted_direction(executed):
    record = executed.record("02_empirical_direction")
    assert float(sdnb.angle_deg(record.arrays["direction"], executed.planted.direction)) < 2
    assert record["mean_pairwise_angle_deg"] < 2 and record["initial_count"] > 0


def test_03_finds_attention_linear_and_the_sampled_fit_on_its_way(values):
    found = values("03_linear_layers")
    assert all(value > 0.99 for value in found["attention_cosine"])
    assert found["sampled_error"][0] > found["sampled_error"][-1]


def test_04_points_at_the_planted_layers(values, executed):
    found, planted = values("04_singular_directions"), executed.planted
    layers = [planted.explosion_layer - 1, planted.decay_layer - 1]
    for key in ("ffn_angle_deg", "gain_angle_deg"):
        assert all(found[key][layer] < 5 for layer in layers)
        assert all(value > 20 for layer, value in enumerate(found[key]) if layer not in layers)
    assert found["angle_deg"][layers[0]] < 12
    assert found["ffn_singular_value"][layers[0]] == pytest.approx(planted.singular_value, rel=0.1)


def test_05_finds_the_negative_eigenvalue(values, executed):
    found, planted = values("05_negative_eigenvalues"), executed.planted
    layer = planted.decay_layer - 1
    assert found["ffn_eigenvalue"][layer] == pytest.approx(planted.decay_eigenvalue, rel=0.1)
    assert found["eigenvalue"][layer] < 0 and found["angle_deg"][layer] < 10
    ledger = found["ledger_ffn"]
    assert ledger.index(max(ledger)) == planted.explosion_layer - 1 and ledger.index(min(ledger)) == layer


def test_06_finds_items_and_module(executed):
    record, planted = executed.record("06_initial_tokens"), executed.planted
    assert record["explosion_layer"] == planted.explosion_layer
    assert record["ffn_zeroed_share"][planted.explosion_layer - 1] == 0
    exploded = record.arrays["items"][record.arrays["norms_tokens"] > record["threshold"]]
    assert sorted(exploded.tolist()) == sorted(planted.trigger_ids)


def test_07_names_the_tokens(values):
    found = values("07_noninitial_tokens")
    assert {*found["top_tokens"][:2]} == {"<s>", DOLLAR} and found["real"][:3] == [True, True, False]


def test_08_finds_the_line(executed):
    record = executed.record("08_explosion_subspace")
    assert float(sdnb.angle_deg(record.arrays["right_vector"], executed.planted.right_vector)) < 5
    assert record["first_to_second"] > 3 and record["output_angle_deg"] < 5


def test_09_prevents_the_explosion(values, executed):
    found = values("09_interventions")["interventions"]
    without = found[f"direction out, layer {executed.planted.explosion_layer}"]
    assert without["first_norm"] < 0.1 * found["none"]["first_norm"]


def test_10_takes_the_steps_beside_the_model(executed, tmp_path):
    found, layer = executed.record("10_training_dynamics"), executed.planted.explosion_layer
    assert found["steps"] == [0, 500] and found["explosion_layers"] == [[], [layer]]
    assert found["angle_to_final_deg"] == [None, 0] and found["first_state_angle_deg"][0] > 20
    assert found["high_norm_count"][0] == 0 and found["peak_ratio"][1] > 5 > found["peak_ratio"][0]
    assert found["state_layer"] == layer and len(found["loss"]) == 2
    assert found.arrays["first_norms"].shape == (2, 5)
    with pytest.raises(sdnb.ParameterError, match="checkpoints"):
        run_cells("10", model=executed.plain, results_dir=tmp_path)


def test_11_compares_models(executed):
    found = executed.record("11_fine_tuning")
    others = [executed.step, executed.other, executed.plain, executed.wide]
    assert found["names"] == [executed.model.name, *others]
    assert found["angle_deg"][0] == 0 and found["angle_deg"][1] < 1 and found["angle_deg"][2] > 60
    assert found["angle_deg"][3] is found["angle_deg"][4] is None, "no direction, and another width"
    assert found["pair_angle_deg"][1][2] == found["pair_angle_deg"][2][1] > 60
    assert found["high_norm_count"][3] == 0
    assert found.arrays["first_norms"].shape == (4, 5), "those of the base's shape"
    assert found.arrays["directions"].shape == (5, 64) and not found.arrays["directions"][3:].any()


def test_12_and_22_name_the_spiking_module(values, executed):
    found, layer = values("12_quantization"), executed.planted.explosion_layer
    assert found["explosion_layers"] == [layer]
    assert f"model.layers.{layer - 1}.mlp.down_proj" in found["spiking_modules"]
    lists = {name for row in found["rows"] for name in row["skipped"]}
    assert {row["module"] for row in found["recovered"]} == lists
    assert values("22_number_formats")["explosion_layers"] == [layer]


def test_13_tells_unrelated_models_apart(executed):
    """The model without the phenomenon has no direction, but the planted one's embeddings, both of seed 0."""
    found = executed.record("13_signatures")
    assert found["names"] == [executed.model.name, executed.other, executed.plain, executed.wide]
    assert [*found["left_out"]] == [executed.plain]
    assert found["groups"] == [1, 2, 1, 3] and found["pairs"][0]["angle_deg"] > 60
    assert found.arrays["angle_deg"].shape == found.arrays["alignment"].shape == (4, 4)
    changes = [(row["change"], row["verdict"]) for row in found["robustness"]]
    counts = {"noise": 4, "quantization": 3, "fine-tuning": 3, "renumbering": 1}
    assert changes == [(change, "related") for change, n in counts.items() for _ in range(n)]
    moved = found["robustness"][-1]
    assert moved["alignment"] > 0.999 and moved["angle_deg"] > 60
    assert moved["carried_angle_deg"] is None, "no embedding was planted along the direction"


def test_19_reads_the_others_records(values, executed):
    [row] = values("19_across_models")["rows"]
    assert row["model"] == executed.model.name and row["explosion_layers"] == [
        executed.planted.explosion_layer
    ]


def test_21_finds_an_entry_of_the_planted_unit(executed):
    """The unit of the down-projection that writes the direction is the first one."""
    first = executed.record("21_single_weights")["largest"][0]
    assert first["column"] == 0 and first["layer"] == executed.planted.explosion_layer


def test_a_model_without_the_phenomenon_has_gaps_and_an_encoder_its_page(executed):
    found = executed.record("04_singular_directions", executed.plain).values
    assert found["explosion_layers"] == [] and {*found["angle_deg"]} == {None}
    assert all(value > 0 for value in found["singular_value"])
    matrices = executed.record("15_singular_vectors", executed.encoder)["matrices"].values()
    assert {entry["kind"] for entry in matrices} == {"q", "k", "v", "o", "up", "down"}


def test_a_wrong_model_is_a_clear_error_and_leaves_no_record(tmp_path):
    with pytest.raises(sdnb.ModelError, match="no folder"):
        run_cells("01", model=str(tmp_path / "nothing"), results_dir=str(tmp_path / "results"))
    assert not (tmp_path / "results").exists()
