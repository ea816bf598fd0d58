"""03 on models that are known: what attention adds apart from its matrix, and layers that do not exist."""

import pytest

from sdnb.errors import ParameterError
from sdnb.loading import load
from sdnb.observations import linearity
from tests.tiny import tiny_model

COMMON = {
    "text": ["line one reads a few more words"], "max_lines": 1, "add_special_tokens": True,
    "sample_counts": [],
}  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Loaded tiny models by family."""
    made = {}

    def model(family):
        if family not in made:
            folder = tiny_model(tmp_path_factory.mktemp(family) / family, family)
            made[family] = load(str(folder), device="cpu")
        return made[family]

    return model


@pytest.mark.parametrize("number", [0, 4, 99, -1])
def test_a_layer_to_sample_that_does_not_exist(models, number):
    with pytest.raises(ParameterError, match=rf"sample_layer {number} .* layers 1 to 3"):
        linearity(models("llama"), **COMMON, sample_layer=number)
