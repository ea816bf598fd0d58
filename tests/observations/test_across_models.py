"""19: numbers come from the records as they are; what is missing stays empty, what differs is said."""

import pytest
import torch

from sdnb.errors import ParameterError, RecordError
from sdnb.observations import across_models
from sdnb.observations.key_figures import NEGLIGIBLE, key_figures
from sdnb.records import SCHEMAS, Record, stored, write
from sdnb.records.declared_across import KEY_FIGURES
from sdnb.report.uses import NEAR
from tests import shelf


@pytest.fixture
def results(tmp_path):
    return shelf.full_shelf(tmp_path)


def rows_of(results, **more) -> dict[str, dict]:
    return {row["model"]: row for row in across_models(results, **more).values["rows"]}


def test_every_number_is_that_of_its_record_at_the_layer_of_the_largest_step(results):
    row = rows_of(results)["org/one"]
    assert row["peak_ratio"] == 40 and row["explosion_layers"] == [2] and row["decay_layers"] == [3]
    assert row["pairwise_angle_deg"] == 3.5
    assert (row["angle_deg"], row["ffn_angle_deg"], row["gain_angle_deg"]) == (30, 10, 5)
    assert (row["eigen_angle_deg"], row["eigenvalue"]) == (9, 0.6)
    assert (row["decay_angle_deg"], row["decay_eigenvalue"], row["norm_aware_eigenvalue"]) == (4, -7.5, -0.9)
    assert (row["outliers_above"], row["outliers_below"]) == (15, 3)
    assert row["outlier_share"] == pytest.approx(18 / 54)
    assert (row["hidden_size"], row["layers"], row["folder"]) == (16, 3, "org__one")
    assert row["fingerprint"] == shelf.provenance("org/one")["fingerprint"][:16]
    assert [name[:2] for name in row["records"]] == ["01", "02", "04", "05", "14"]


def test_what_was_not_run_is_empty_and_so_is_what_is_not_there(results):
    rows = rows_of(results)
    run = {field.key for name in rows["org/two"]["records"] for field in KEY_FIGURES[name]}
    empty = {key for key, value in rows["org/two"].items() if value is None}
    assert empty == {field.key for fields in KEY_FIGURES.values() for field in fields} - run
    assert rows["org/plain"]["explosion_layers"] == [] and rows["org/plain"]["pairwise_angle_deg"] is None
    shelf.singular(results, "org__plain", shelf.provenance("org/plain", width=8), explosion=())
    assert rows_of(results)["org/plain"]["angle_deg"] is None


def test_curves_follow_the_token_with_the_largest_norm(results):
    curves = across_models(results).values["curves"]
    assert curves["org__one"]["token"] == "<s>"
    assert curves["org__one"]["largest_norm"] == [1, 2, 80, 3]
    assert curves["org__one"]["median_norm"] == [1, 2, 2, 2]
    assert curves["org__one"]["gain_angle_deg"] == [None, 5, None]
    assert curves["org__plain"]["angle_deg"] is None


def test_directions_of_one_width_make_angles_and_small_ones_make_groups(results):
    shelf.direction(results, "org__wide", shelf.provenance("org/wide", width=64), 0.0)
    shelf.direction(results, "org__far", shelf.provenance("org/far"), 85.0)
    found = across_models(results)
    names = found.values["signature_names"]
    assert names == ["org/far", "org/one", "org/two", "org/wide"], "org/plain has no direction"
    expected = torch.tensor([[0.0, 85, 83, -1], [85, 0, 2, -1], [83, 2, 0, -1], [-1, -1, -1, 0]])
    assert torch.allclose(found.arrays["signature_angle_deg"], expected, atol=1e-4)
    assert found.values["signature_groups"] == [1, 2, 2, 3]
    assert sorted(found.values["signature_order"]) == [0, 1, 2, 3]


def test_a_shelf_without_a_direction_has_an_empty_matrix(tmp_path):
    shelf.norms(tmp_path, "org__one", shelf.provenance("org/one"))
    found = across_models(tmp_path)
    assert found.arrays["signature_angle_deg"].shape == (0, 0)
    write(tmp_path, "here", "19_across_models", found.values, found.arrays, {"model": None})


@pytest.mark.parametrize(
    ("change", "method", "words"),
    [
        ({"text": shelf.OTHER_TEXT}, "closed_form", "04: another text"),
        ({"begin": False}, "closed_form", "04: no begin token at position 0"),
        ({}, "sampled", "04: linear view sampled"),
        ({"fingerprint": "f" * 64}, "closed_form", "the weights changed between its records"),
        ({}, "closed_form", ""),
    ],
)
def test_what_makes_a_row_hard_to_compare_is_noted_there_and_only_there(results, change, method, words):
    shelf.singular(results, "org__three", shelf.provenance("org/three", **change), method=method)
    shelf.norms(results, "org__three", shelf.provenance("org/three"))
    rows = rows_of(results)
    assert rows["org/three"]["note"] == words
    assert rows["org/one"]["note"] == rows["org/two"]["note"] == ""
    assert rows["org/plain"]["note"] == "01, 02: another text"


def test_spectra_of_a_part_of_the_model_are_noted(results):
    shelf.spectra(results, "org__two", shelf.provenance("org/two"), layers=(2,))
    assert rows_of(results)["org/two"]["note"] == "14: matrices of 1 of 3 layers"
    part = {"refused": {"3": "why"}, "left_out": {"2.experts": "fused"}}
    shelf.spectra(results, "org__two", shelf.provenance("org/two"), **part)
    assert rows_of(results)["org/two"]["note"] == "14: refused layers: 1; 14: without 2.experts"


@pytest.mark.parametrize(
    ("intact", "plain", "kept", "loss", "regained"),
    [
        (10, 15, 11, 0.5, 0.8),
        (10, 10.01, 10, 0.001, None),
        (10, None, 11, None, None),
        (10, 20, None, 1, None),
    ],
)
def test_quantization_compares_rounding_with_and_without_the_list(intact, plain, kept, loss, regained):
    record = Record("12_quantization", {"rows": shelf.quantized_rows(intact, plain, kept)})
    found = key_figures(record)
    assert found["intact_perplexity"] == intact
    assert found["quantization_loss"] == (None if loss is None else pytest.approx(loss))
    assert found["regained_share"] == (None if regained is None else pytest.approx(regained))


def test_the_rest_of_the_observations():
    def figures(template, **values):
        return key_figures(Record(template, values))

    assert figures("03_linear_layers", layer_error=[0.1, None, 0.3]) == {"layer_error": pytest.approx(0.2)}
    assert figures("06_initial_tokens", exploding_share=0.9) == {"exploding_share": 0.9}
    assert figures("07_noninitial_tokens", exploding_share=0.1) == {"noninitial_share": 0.1}
    assert figures("08_explosion_subspace", first_to_second=7.0) == {"first_to_second": 7.0}
    named = {"none": {"sink_rate": 0.5, "perplexity": 9.0}, "other": {"sink_rate": 0.0, "perplexity": 99.0}}
    assert figures("09_interventions", interventions=named) == {"sink_rate": 0.5, "perplexity": 9.0}
    overlaps = {"a": {"overlap_above": 0.2}, "b": {"overlap_above": None}, "c": {"overlap_above": 0.4}}
    assert figures("15_singular_vectors", matrices=overlaps) == {"overlap_above": pytest.approx(0.3)}
    types = {"q": {"loss_added": [0.1, 0.0]}, "up": {"loss_added": [0.4, 9.0]}, "all": {"loss_added": [5.0]}}
    expected = {"unpruned_perplexity": 8.0, "smallest_block_loss": 0.4}
    assert figures("16_removing_singular_values", types=types, perplexity_intact=8.0) == expected


def test_every_template_of_one_model_has_key_figures_and_they_are_declared():
    assert list(KEY_FIGURES) == [name for name, schema in SCHEMAS.items() if schema.scope == "model"]
    assert NEGLIGIBLE == NEAR, "the page of 12 and the comparison call the same loss none"


def test_models_are_taken_in_the_order_asked_for(results):
    assert list(rows_of(results)) == ["org/one", "org/plain", "org/two"]
    assert list(rows_of(results, models=["org/two", "org__one"])) == ["org/two", "org/one"]
    assert list(rows_of(results, models="org/two")) == ["org/two"]
    with pytest.raises(RecordError, match=r"no record of org/none.*there are: org__one, org__plain"):
        across_models(results, models=["org/one", "org/none"])
    with pytest.raises(ParameterError, match=r"empty list"):
        across_models(results, models=[])


def test_revisions_of_a_model_keep_their_names(tmp_path):
    for revision in ("step1", "step2"):
        shelf.norms(tmp_path, f"org__one@{revision}", shelf.provenance("org/one"))
    assert list(rows_of(tmp_path)) == ["org/one@step1", "org/one@step2"]
    assert list(rows_of(tmp_path, models=["org/one@step2"])) == ["org/one@step2"]


def test_a_folder_without_records_is_refused(tmp_path):
    for folder in (tmp_path / "none", tmp_path):
        with pytest.raises(RecordError, match=r"no record of any model.*sdnb run"):
            across_models(folder)


def test_only_records_of_models_count(results):
    (results / "org__one" / "notes.json").write_text("{}")
    (results / ".hidden").mkdir()
    (results / ".hidden" / "01_high_norm_tokens.json").write_text("{}")
    (results / "random_matrix").mkdir()
    (results / "random_matrix" / "18_random_matrix_model.json").write_text("{}")
    assert list(stored(results)) == ["org__one", "org__plain", "org__two"]


@pytest.mark.parametrize("ending", ["json", "safetensors"])
def test_a_damaged_record_is_named(results, ending):
    path = results / "org__two" / f"04_singular_directions.{ending}"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(RecordError, match=r"org__two/04_singular_directions.json"):
        across_models(results)


def test_a_record_of_an_older_schema_is_named(results):
    path = results / "org__two" / "01_high_norm_tokens.json"
    path.write_text(path.read_text().replace('"peak_ratio"', '"ratio"'))
    with pytest.raises(RecordError, match=r"org__two/01_high_norm_tokens.json.*ratio is not declared"):
        across_models(results)
