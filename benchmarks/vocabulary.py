"""Cost of a vocabulary sweep: it grows with the layer that is read, not with the model's depth.

    python benchmarks/vocabulary.py                        # a 1B shape, 2,048 items a row
    python benchmarks/vocabulary.py --all                  # and all 128,256 items once: ten minutes more
    python benchmarks/vocabulary.py --device cuda --all

Every item is a sequence of its own. Rows read layer 1, 2 and 4 of models of two depths; the last reads what a
plain forward pass computes, the output of the last layer. The model is random: what a sweep costs does not
depend on the weights. Memory is the peak of the whole process, weights included.
"""

import argparse
from collections.abc import Iterator

import torch
from common import GIB, SHAPES, Row, Shape, Watch, limits, parse, store, timed
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from sdnb.activations.sweep import batch_size, item_norms

VOCABULARY, LAYERS, ITEMS, ALLOWED_GIB = {"small": 8192}, (1, 2, 4), 2048, 8
"""Vocabulary (128,256 for a shape not named), layers read, items of a row, the aim in GiB."""


def build(shape: Shape, vocabulary: int, depth: int, device: str) -> nn.Module:
    """A random Llama of a shape, drawn where it will stay."""
    config = LlamaConfig(
        hidden_size=shape.d, intermediate_size=shape.f, num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads, num_hidden_layers=depth, vocab_size=vocabulary,
        tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().requires_grad_(False)


def layer_size(shape: Shape) -> int:
    """Weights of one layer."""
    return 2 * shape.d**2 + 2 * shape.d**2 // shape.heads * shape.kv_heads + 3 * shape.d * shape.f


def measured(model: nn.Module, shape: Shape, layer: int, items: int, device: str) -> tuple[Row, Watch]:
    """One sweep as a row of the table."""
    ids = torch.arange(items)
    _, watch = timed(lambda: item_norms(model, layer, ids), device)
    depth, size = model.config.num_hidden_layers, layer * layer_size(shape)
    what = f"layer {layer} of {depth}, {items:,} items" + ("" if layer == depth else " (ours)")
    note = f"batches of {batch_size(model):,}; peak of the process {watch.peak / GIB:.2f} GiB"
    cost = {"operations": 2 * size * items, "bytes": 4 * size}
    return watch.row(what, note=note, **cost), watch


def ladder(shape: Shape, vocabulary: int, options: argparse.Namespace) -> Iterator[tuple[Row, Watch]]:
    """Rows over the layer that is read, for half the depth and for the whole."""
    for depth in (shape.layers // 2, shape.layers):
        model = build(shape, vocabulary, depth, options.device)
        item_norms(model, 1, torch.arange(64))  # the first pass pays for set-up
        last = [depth] if depth == shape.layers else []
        for layer in [n for n in LAYERS if n < depth] + last:
            yield measured(model, shape, layer, min(options.items, vocabulary), options.device)
        if last and options.all:
            yield measured(model, shape, LAYERS[1], vocabulary, options.device)
        del model


def options_of(parser: argparse.ArgumentParser) -> None:
    """The options of this benchmark alone."""
    parser.add_argument("--items", type=int, default=ITEMS, help="items of a row (default: %(default)s)")
    parser.add_argument("--all", action="store_true", help="one more row with the whole vocabulary")


def main() -> None:
    """Print the table and store the record."""
    options = parse(__doc__, ("small", "llama-3.2-1b"), "llama-3.2-1b", options_of)
    shape, vocabulary = SHAPES[options.shape], VOCABULARY.get(options.shape, 128_256)
    rates = limits(options.device)
    found = list(ladder(shape, vocabulary, options))
    peak = max(watch.peak for _, watch in found) / GIB
    facts = {"vocabulary": vocabulary, "peak_gib": round(peak, 2), "allowed_gib": ALLOWED_GIB}
    store("vocabulary", options, rates, [row for row, _ in found], **facts, within=peak <= ALLOWED_GIB)


if __name__ == "__main__":
    main()
