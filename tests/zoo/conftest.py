import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:  # `zoo` is a folder of scripts, not an installed package
    sys.path.insert(0, str(ROOT))

import argparse  # noqa: E402
import textwrap  # noqa: E402
import typing  # noqa: E402
import unittest.mock  # noqa: E402

import pytest  # noqa: E402

from zoo.recipe import Recipe  # noqa: E402
from zoo.text import Corpus, docstrings_of, text_hash  # noqa: E402


@pytest.fixture(scope="session")
def small_corpus() -> Corpus:
    modules = (argparse, textwrap, typing, unittest.mock)
    texts = [text for module in modules for text in docstrings_of(Path(module.__file__).read_text("utf-8"))]
    return Corpus(texts, {"python": {"version": "3", "licence": "PSF-2.0"}}, text_hash(texts))


@pytest.fixture(scope="session")
def small_recipe() -> Recipe:
    model = {
        "type": "llama", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64,
        "tie_word_embeddings": False,
    }  # fmt: skip
    return Recipe(
        name="small", description="A model of a few seconds.", seed=3, model=model, steps=12,
        lengths=[{"from": 0, "shares": {16: 0.5, 8: 0.5}}], vocabulary=300, batch_tokens=64, warmup_steps=3,
        decay_from=6, context=64, keep_steps=[0, 6],
    )  # fmt: skip
