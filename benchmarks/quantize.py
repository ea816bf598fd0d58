"""Simulated quantization: perplexity under each scheme against the plain forward passes, and the statistics.

    python benchmarks/quantize.py                 # zoo/smollm2, 2,048 tokens
    python benchmarks/quantize.py --shape small   # a random model of three layers

The aim on a CPU: no scheme takes more than 1.5 times the plain passes. Rows are in units of these.
"""

import torch
from common import SHAPES, Row, limits, parse, store, timed
from transformers import AutoModelForCausalLM, LlamaConfig

import sdnb

WINDOW = 512


def inputs(name: str) -> tuple[torch.nn.Module, torch.Tensor]:
    """A model and 2,048 tokens: SmolLM2 on Python's help topics, or a random one on random tokens."""
    if name != "smollm2":
        shape = SHAPES[name]
        config = LlamaConfig(
            hidden_size=shape.d, intermediate_size=shape.f, num_hidden_layers=shape.layers, vocab_size=1024,
            num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads,
        )  # fmt: skip
        torch.manual_seed(0)
        ids = torch.randint(1024, (4 * WINDOW,))
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval(), ids
    loaded = sdnb.load("zoo/smollm2", device="cpu")
    return loaded.model, torch.cat(sdnb.encode(loaded).lines)[: 4 * WINDOW]


def main() -> None:
    """Print the table and store the record."""
    options = parse(__doc__, ("small", "smollm2"), "smollm2")
    model, ids = inputs(options.shape)
    model, ids = model.to(options.device), ids.to(options.device)
    weights = sum(linear.weight.numel() for linear in sdnb.linear_modules(model).values())
    weights += model.get_output_embeddings().weight.numel()
    cost = {"operations": 2.0 * len(ids) * weights, "bytes": 4.0 * weights}

    def row(what: str, work, difference: str = "") -> tuple[Row, object]:
        answer, watch = timed(work, options.device)
        return watch.row(what, **cost, difference=difference), answer

    def losses() -> torch.Tensor:
        return sdnb.perplexity(model, ids, window=WINDOW).nll

    losses()  # the first call starts libraries
    first, intact = row("no quantization", losses)
    rows = [first]
    for title, scheme in sdnb.SCHEMES.items():
        with sdnb.quantized(model, scheme):
            measured, found = row(title, losses)
        ratio = sdnb.perplexity_ratio(found, intact)
        words = f"perplexity {ratio.ratio:.3f} times, +- {ratio.error:.3f}"
        rows.append(Row(**vars(measured) | {"difference": words}))
    lines = list(ids.split(WINDOW))
    for what, scheme in (("input statistics", None), ("with errors of int8", sdnb.SCHEMES["int8 tensor"])):
        rows.append(row(what, lambda scheme=scheme: sdnb.input_statistics(model, lines, scheme=scheme))[0])
    store("quantize", options, limits(options.device), rows, tokens=len(ids), window=WINDOW)


if __name__ == "__main__":
    main()
