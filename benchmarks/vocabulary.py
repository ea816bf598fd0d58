"""Cost of a vocabulary sweep: seconds and peak memory over the layer that is read and over the model's depth.

    python benchmarks/vocabulary.py                  # a small shape, seconds
    python benchmarks/vocabulary.py --full           # 1B-shaped, 128,256 items
    python benchmarks/vocabulary.py --full --device cuda --dtype bfloat16

The model is random: what a sweep costs does not depend on the weights.
"""

import argparse
import contextlib
import resource
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from sdnb.activations.sweep import batch_size, item_norms

SMALL = {"hidden_size": 256, "intermediate_size": 1024, "num_attention_heads": 8, "num_key_value_heads": 4}
FULL = {"hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32, "num_key_value_heads": 8}
DEPTHS, LAYERS = (4, 8, 16), (1, 2, 4)


def build(sizes: dict, vocabulary: int, depth: int, device: str, dtype: torch.dtype):
    """A random Llama of a shape, drawn where it will stay."""
    config = LlamaConfig(**sizes, num_hidden_layers=depth, vocab_size=vocabulary, tie_word_embeddings=True)
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval().requires_grad_(False)


def reset_peak(device: str) -> None:
    """Start measuring the peak memory anew, where the system allows it."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_gib(device: str) -> float:
    """Peak memory since `reset_peak`, weights included: of the GPU, or of the process."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 2**30
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def seconds(model, layer: int, items: torch.Tensor) -> tuple[float, float]:
    """Wall time and processor time of one sweep; the latter is fair on a machine that others use too."""
    wall, processor = time.perf_counter(), time.process_time()
    item_norms(model, layer, items)
    return time.perf_counter() - wall, time.process_time() - processor


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--full", action="store_true", help="a 1B shape with 128,256 items")
    parser.add_argument("--items", type=int, help="items that are run; all of the vocabulary by default")
    parser.add_argument("--depths", type=int, nargs="+", default=DEPTHS, help="numbers of layers")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    chosen = parser.parse_args()
    sizes, vocabulary = (FULL, 128_256) if chosen.full else (SMALL, 8192)
    items = torch.arange(min(chosen.items or vocabulary, vocabulary))
    print("| layers of the model | layer read | items | batch | wall s | processor s | peak GiB |")
    print("|---:|---:|---:|---:|---:|---:|---:|")
    for depth in chosen.depths:
        model = build(sizes, vocabulary, depth, chosen.device, getattr(torch, chosen.dtype))
        item_norms(model, 1, items[:64])  # the first pass pays for set-up
        for layer in (n for n in LAYERS if n <= depth):
            reset_peak(chosen.device)
            wall, processor = seconds(model, layer, items)
            print(
                f"| {depth} | {layer} | {len(items):,} | {batch_size(model):,} | {wall:.2f} | "
                f"{processor:.2f} | {peak_gib(chosen.device):.2f} |",
                flush=True,
            )
        del model


if __name__ == "__main__":
    main()
