"""What is computed once and shared: by notebooks, by runs with another text, by a run after a killed one."""

import weakref
from dataclasses import replace
from importlib import import_module

import pytest
import torch

from sdnb.activations import hidden_norms
from sdnb.errors import LayerRefused
from sdnb.loading import load
from sdnb.observations import common, explosion
from sdnb.observations.singular_directions import singular_directions
from tests.tiny import planted_model

MODULE = import_module("sdnb.observations.singular_directions")

TEXT = ["line one reads a few more words", "line two reads a few more words", "a third line of words"]
COMMON = {"max_lines": 3, "add_special_tokens": True, "starts": 4}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    folder = planted_model(tmp_path_factory.mktemp("planted") / "planted", layers=3, decay_layer=3).folder
    return load(str(folder), device="cpu")


@pytest.fixture
def looked(monkeypatch):
    """Numbers of the layers that were looked at."""
    seen, real = [], MODULE.layer_view

    def layer_view(model, number):
        seen.append(number)
        return real(model, number)

    monkeypatch.setattr(MODULE, "layer_view", layer_view)
    return seen


def test_another_text_needs_no_layer_again(loaded, looked, tmp_path):
    first = singular_directions(loaded, text=TEXT, **COMMON, results_dir=tmp_path)
    second = singular_directions(loaded, text=TEXT[:2], **COMMON, results_dir=tmp_path)
    assert looked == [1, 2, 3]
    assert all(torch.equal(array, second.arrays[name]) for name, array in first.arrays.items())
    assert first.values["gain"] == second.values["gain"] and first.text_hash != second.text_hash
    singular_directions(loaded, text=TEXT, **COMMON, seed=1, results_dir=tmp_path)
    assert looked == [1, 2, 3] * 2


def test_a_run_that_stopped_goes_on_with_its_layer(loaded, looked, monkeypatch, tmp_path):
    def stops(model, number):
        if number == 3:
            raise KeyboardInterrupt
        return real(model, number)

    with monkeypatch.context() as patch:
        real = MODULE.layer_view
        patch.setattr(MODULE, "layer_view", stops)
        with pytest.raises(KeyboardInterrupt):
            singular_directions(loaded, text=TEXT, **COMMON, results_dir=tmp_path)
    again = singular_directions(loaded, text=TEXT, **COMMON, results_dir=tmp_path)
    assert looked == [1, 2, 3]
    whole = singular_directions(loaded, text=TEXT, **COMMON, results_dir=tmp_path / "new")
    assert again.values == whole.values
    assert all(torch.equal(array, whole.arrays[name]) for name, array in again.arrays.items())


def test_a_refused_layer_is_a_gap_and_is_looked_at_again(loaded, monkeypatch, tmp_path):
    real = MODULE.layer_view

    def refuses(model, number):
        if number == 2:
            raise LayerRefused(2, "mlp", "made up")
        return real(model, number)

    monkeypatch.setattr(MODULE, "layer_view", refuses)
    values = singular_directions(loaded, text=TEXT, **COMMON, results_dir=tmp_path).values
    assert values["angle_deg"][1] is None and values["status"][1] is None and list(values["refused"]) == ["2"]
    monkeypatch.undo()
    values = singular_directions(loaded, text=TEXT, **COMMON, results_dir=tmp_path).values
    assert values["status"] == ["exact"] * 3 and values["refused"] == {}


def test_notebooks_share_the_norms_that_layers_are_found_on(loaded, monkeypatch, tmp_path):
    calls, real = [], common.text_norms

    def text_norms(loaded, lines):
        calls.append(len(lines))
        return real(loaded, lines)

    monkeypatch.setattr(common, "text_norms", text_norms)
    encoded = common.encode_text(loaded, TEXT, 3, True)
    fresh = explosion.find_explosion(loaded, encoded)
    assert explosion.find_explosion(loaded, encoded, results_dir=tmp_path) == fresh
    common.empirical_direction(loaded, encoded, threshold=None, results_dir=tmp_path)
    assert explosion.find_explosion(loaded, encoded, explosion_layer=3, results_dir=tmp_path).layer == 3
    assert calls == [3, 3], "once without a cache, once with it"
    other = common.encode_text(loaded, TEXT, 3, False)
    explosion.find_explosion(loaded, other, results_dir=tmp_path)
    assert calls == [3, 3, 3], "other tokens, other norms"


def test_other_tokens_of_the_same_text_have_their_own_direction(loaded, monkeypatch, tmp_path):
    counts, real = [], common.collect_high_norm_states

    def collect(model, lines, threshold):
        counts.append([len(line) for line in lines])
        return real(model, lines, threshold)

    monkeypatch.setattr(common, "collect_high_norm_states", collect)
    encoded = common.encode_text(loaded, TEXT, 3, True)
    ends = torch.tensor([loaded.tokenizer.eos_token_id])
    ended = replace(encoded, lines=[torch.cat([line, ends]) for line in encoded.lines])
    for asked in (encoded, ended, encoded):
        common.empirical_direction(loaded, asked, threshold=None, results_dir=tmp_path)
    lengths = [len(line) for line in encoded.lines]
    assert counts == [lengths, [n + 1 for n in lengths]]


def test_first_positions_follow_the_order_of_the_norms(loaded):
    lines = [torch.tensor(ids) for ids in ([5, 6, 7], [8], [9, 10], [11, 12, 13])]
    norms = common.text_norms(loaded, lines)[:, common.first_positions(lines)]
    expected = torch.cat([hidden_norms(loaded.model, line[None, :1])[:, 0] for line in lines], dim=1)
    torch.testing.assert_close(norms, expected[:, [1, 2, 0, 3]])


def test_a_layer_before_the_explosion_takes_five_medians(loaded):
    encoded = common.encode_text(loaded, TEXT, 3, True)
    norms = common.text_norms(loaded, encoded.lines)
    found = explosion.find_explosion(loaded, encoded, explosion_layer=1)
    assert found.high_norm < norms[1].max(), "an ordinary token is longer there"
    assert found.threshold == pytest.approx(5 * norms[1].median().item())
    high = norms[2] > 5 * norms[2].median()
    found = explosion.find_explosion(loaded, encoded, explosion_layer=2)
    assert norms[2][~high].max() < found.threshold < norms[2][high].min()


def test_a_layer_is_let_go_before_the_next_is_watched(loaded):
    watched = []
    for _, view in common.layer_views(loaded, {}):
        assert not any(earlier() for earlier in watched)
        watched.append(weakref.ref(view))
        view = None  # as callers do
    assert len(watched) == loaded.model.config.num_hidden_layers
