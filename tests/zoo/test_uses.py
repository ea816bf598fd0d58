"""What the trained models are good for: the skip list, what it gives back, and who is related to whom."""

from itertools import combinations
from pathlib import Path

import pytest

from sdnb.loading import load
from sdnb.observations import detect_defects, lineage, quantization

ZOO = Path(__file__).resolve().parents[2] / "zoo"
FAMILY = ("llama", "llama-chat", "llama-code")
STRANGERS = ("llama-seed2", "llama-batch8k", "neox", "gpt2")


@pytest.fixture(scope="module")
def llama():
    return load("zoo/llama")


@pytest.mark.parametrize("special_tokens", [False, True])
def test_the_skip_list_holds_the_down_projections_of_the_explosion_layers(llama, special_tokens):
    found = detect_defects(llama, max_lines=32, add_special_tokens=special_tokens).values
    down = [f"model.layers.{layer - 1}.mlp.down_proj" for layer in found["explosion_layers"]]
    assert down and found["spiking_modules"] == down
    assert found["skip_list"] == [*down, "lm_head"]


def test_quantizing_everything_hurts_and_the_list_gives_most_of_it_back(llama):
    settings = {"text": "heldout", "max_tokens": 4096, "window": 128, "calibration_windows": 8}
    rows = quantization(llama, **settings).values["rows"]
    intact = rows[0]["perplexity"]

    def loss(method: str, skip: str, weights: str = "tensor", number_format: str = "int8") -> float:
        found = [
            row["perplexity"] for row in rows
            if (row["method"], row["skip"], row["weights"], row["number_format"], row["static"])
            == (method, skip, weights, number_format, False)
        ]  # fmt: skip
        return found[0] / intact - 1

    for method in ("rtn", "smoothquant"):
        assert loss(method, "none") > 0.015, "one scale a tensor hurts"
        assert loss(method, "detected") < 0.5 * loss(method, "none")
    assert abs(loss("rtn", "none", weights="channel")) < 0.2 * loss("rtn", "none")
    assert loss("rtn", "none", number_format="float8_e4m3") < 0.5 * loss("rtn", "none")


def test_signatures_group_the_family_and_leave_out_strangers(tmp_path):
    names = [f"zoo/{name}" for name in (*FAMILY, *STRANGERS)]
    late = sorted((ZOO / "llama-steps").glob("*/config.json"))[-2:]
    names += [str(path.parent) for path in late]
    values, _, _ = lineage(names, results_dir=tmp_path, max_lines=60)
    group = dict(zip(values["names"], values["groups"], strict=True))
    strangers = [f"zoo/{name}" for name in STRANGERS]
    related = [name for name in names if name not in strangers]
    assert len({group[name] for name in related}) == 1
    assert all(group[name] != group["zoo/llama"] for name in strangers)
    assert all(group[a] != group[b] for a, b in combinations(strangers, 2))
    for pair in values["pairs"]:
        if {pair["first"], pair["second"]} <= {f"zoo/{name}" for name in FAMILY}:
            assert pair["angle_deg"] + pair["uncertainty_deg"] < 15
