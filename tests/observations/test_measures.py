"""How a text is cut for perplexity, and what is refused."""

import pytest
import torch

from sdnb.errors import TextError
from sdnb.loading import load
from sdnb.observations.measures import text_ids, text_perplexity
from tests.tiny import tiny_model

TEXT = [f"line {number} reads a few more words" for number in range(40)]


@pytest.fixture
def loaded(tmp_path):
    return load(str(tiny_model(tmp_path, layers=1)), device="cpu")


@pytest.mark.parametrize("begins", [False, True])
def test_no_more_windows_than_asked_for(loaded, begins):
    ids, begin = text_ids(loaded, TEXT, begins)
    assert len(ids) > 200 and begin == (loaded.tokenizer.bos_token_id if begins else None)
    found = text_perplexity(loaded, ids, begin, 8, 16)
    assert len(found.nll) == 16 and found.window == 8
    more = text_perplexity(loaded, ids, begin, 8, 17)
    torch.testing.assert_close(more.nll[:16], found.nll)


def test_tokens_that_the_embedding_lacks_are_refused(loaded):
    loaded.model.resize_token_embeddings(8)
    with pytest.raises(TextError, match="embedding of 8 rows"):
        text_ids(loaded, TEXT, False)
