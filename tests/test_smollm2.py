"""zoo/smollm2, the real model in a package's GGUF file, and what is known of it."""

import json
from importlib.metadata import PackageNotFoundError, distribution

import pytest
import torch

from sdnb import encode, load, token_labels
from sdnb.checkpoint import zoo_folder

POINTER = json.loads((zoo_folder() / "smollm2" / "pointer.json").read_text(encoding="utf-8"))


def installed() -> bool:
    try:
        return distribution(POINTER["package"]).locate_file(POINTER["file"]).is_file()
    except PackageNotFoundError:
        return False


pytestmark = pytest.mark.skipif(not installed(), reason=f"{POINTER['package']} is not installed (make setup)")


@pytest.fixture(scope="module")
def loaded():
    """Loaded through the user's own cache, where it is converted once."""
    return load("zoo/smollm2", device="cpu")


def test_it_is_the_model_of_its_card(loaded, tmp_path, monkeypatch):
    config = loaded.model.config
    assert (loaded.hidden_size, loaded.layer_count, config.vocab_size) == (576, 30, 49152)
    assert (config.num_attention_heads, config.num_key_value_heads, config.intermediate_size) == (9, 3, 1536)
    assert config.tie_word_embeddings and not hasattr(config, "quantization_config")
    assert (loaded.format, loaded.file_hash) == ("gguf Q4_1", POINTER["sha256"])
    assert (loaded.name, loaded.title, loaded.slug) == ("zoo/smollm2", "zoo/smollm2", "zoo__smollm2")
    card = (zoo_folder() / "smollm2" / "README.md").read_text(encoding="utf-8")
    assert all(str(value) in card for value in POINTER.values())


def test_it_speaks(loaded):
    text = encode(loaded, ["The capital of France is"])
    assert (text.begin_token, text.unusual) == (False, None)  # its tokenizer adds none
    assert token_labels(loaded, text.lines[0]) == ["The", "␣capital", "␣of", "␣France", "␣is"]
    with torch.inference_mode():
        best = loaded.model(text.lines[0][None]).logits[0, -1].argmax()
    assert token_labels(loaded, [best]) == ["␣Paris"]


def test_a_prompt_is_one_sequence_with_its_special_tokens(loaded):
    prompt = "<|im_start|>user\nHi!<|im_end|>\n<|im_start|>assistant\n"
    text = encode(loaded, [prompt], whole=True)
    assert text.begin_token and text.lines[0].tolist().count(loaded.tokenizer.bos_token_id) == 2
    assert loaded.tokenizer.decode(text.lines[0]) == prompt


def test_its_rounding_noise_is_the_measured_one(loaded):
    matrices = {name: weight for name, weight in loaded.model.named_parameters() if weight.ndim > 1}
    assert set(loaded.rounding_noise) == set(matrices)
    down = "model.layers.11.mlp.down_proj.weight"
    share = loaded.rounding_noise[down] / matrices[down].square().mean().sqrt()
    assert float(share) == pytest.approx(0.083, abs=0.002)
    for name, edge, smallest, inside in (
        (down, 1.05, 1.66, 0),
        ("model.layers.11.self_attn.q_proj.weight", 0.88, 0.0, 0.17),
        ("model.layers.11.self_attn.o_proj.weight", 0.64, 0.0, 0.18),
    ):
        values = torch.linalg.svdvals(matrices[name])
        band = loaded.rounding_noise[name] * sum(side**0.5 for side in matrices[name].shape)
        assert band == pytest.approx(edge, abs=0.01)
        assert float(values.min()) == pytest.approx(smallest, abs=0.01)
        assert float((values < band).float().mean()) == pytest.approx(inside, abs=0.01)
