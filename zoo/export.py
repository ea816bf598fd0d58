"""Turn a run's kept weights into a `from_pretrained` folder with a model card and a training record."""

import dataclasses
import json
import math
import platform
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel

from zoo.card import write_card
from zoo.recipe import Recipe
from zoo.run import Data, write_atomically
from zoo.tokens import BEGIN_ID, END_ID, PAD_ID, held_out_windows, wrap_tokenizer
from zoo.watch import alone_cosine, held_out_loss, probe_norms

PROBE_WINDOWS, PROBE_LENGTH = 256, 32
SAMPLE_STRIDE = 16
PROMPTS = ("Return", "The function", "Parameters\n----------\n")


def held_out_record(model: PreTrainedModel, data: Data, context: int) -> dict[str, Any]:
    """Measure the loss on the whole held-out text, by the protocol of the cards.

    The topics of `pydoc_data`, in the order of their names, each followed by the end token, make one stream;
    it is cut into windows of `context` tokens that do not overlap (the rest is left out); each window is
    predicted from a begin token and its own earlier tokens; the loss is the mean over all predicted tokens.

    Args:
        model: the model as it is shipped.
        data: the held-out stream.
        context: tokens in a window.

    Returns:
        `loss` in nats per token, `perplexity`, `bits_per_byte`, `context`, `tokens` (predicted), and
        `sample_loss`, the loss on every 16th window, for quick checks.
    """
    inputs, targets = held_out_windows(data.held_out, context)
    loss = held_out_loss(model, inputs, targets)
    sample_loss = held_out_loss(model, inputs[::SAMPLE_STRIDE], targets[::SAMPLE_STRIDE])
    text = data.tokenizer.decode(targets.flatten().tolist(), skip_special_tokens=True)
    bits = loss * targets.numel() / math.log(2) / len(text.encode())
    return {
        "loss": round(loss, 4),
        "perplexity": round(math.exp(loss), 2),
        "bits_per_byte": round(bits, 4),
        "sample_loss": round(sample_loss, 4),
        "context": context,
        "tokens": targets.numel(),
    }


def samples(folder: Path, seed: int = 0) -> list[str]:
    """Let a saved model write a few lines.

    Args:
        folder: the model's folder.
        seed: of the sampling.

    Returns:
        One continuation for each of `PROMPTS`, the prompt included.
    """
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(seed)
    texts = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        written = model.generate(**ids, max_new_tokens=80, do_sample=True, temperature=0.7, top_k=50)
        texts.append(tokenizer.decode(written[0], skip_special_tokens=True))
    return texts


def save_model(model: PreTrainedModel, data: Data, out: Path) -> None:
    """Save weights in bfloat16 (computed with in float32 all the same), tokenizer and generation settings.

    Args:
        model: the model.
        data: its tokenizer.
        out: folder; overwritten when it is there.
    """
    special = {"bos_token_id": BEGIN_ID, "eos_token_id": END_ID, "pad_token_id": PAD_ID}
    model.generation_config = GenerationConfig(**special, do_sample=True, temperature=0.7, top_k=50)
    model.to(torch.bfloat16).save_pretrained(out)
    path = out / "config.json"
    config = json.loads(path.read_text())
    # The file stores rounded weights; from_pretrained then computes with them in float32.
    config["dtype"] = "float32"
    path.write_text(json.dumps(config, indent=2) + "\n")
    wrap_tokenizer(data.tokenizer, model.config.max_position_embeddings).save_pretrained(out)
    path = out / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"  # a name that older releases know as well
    path.write_text(json.dumps(settings, indent=2) + "\n")


def load_weights(model: PreTrainedModel, path: Path) -> None:
    """Put kept weights into a model, every one of them.

    Args:
        model: a model of the same shape; tied weights count once.
        path: safetensors file written by `zoo.run.save_weights`.

    Raises:
        ValueError: if the names differ.
    """
    tensors = load_file(path)
    parameters = dict(model.named_parameters())
    if tensors.keys() != parameters.keys():
        raise ValueError(f"{path} does not fit the model: {sorted(tensors.keys() ^ parameters.keys())[:4]}.")
    with torch.no_grad():
        for name, tensor in tensors.items():
            parameters[name].copy_(tensor)


def training_record(
    recipe: Recipe, data: Data, log: list[dict[str, Any]], step: int, seconds: float, hardware: str
) -> dict[str, Any]:
    """Gather what a run was, for machines.

    Args:
        recipe: the recipe.
        data: the text.
        log: measurements on the way.
        step: exported step.
        seconds: mean time of an optimizer step.
        hardware: what it ran on.

    Returns:
        The training record, its measurements after training still missing.
    """
    return {
        "recipe": dataclasses.asdict(recipe),
        "step": step,
        "seconds": round(seconds * step),
        "hardware": hardware,
        "text": data.about,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "log": [entry for entry in log if entry["step"] <= step],
    }


def export(
    model: PreTrainedModel, recipe: Recipe, data: Data, folder: Path, record: dict[str, Any], out: Path
) -> Path:
    """Export the weights kept at the record's step, and measure the model as it is shipped.

    Args:
        model: a model of the recipe's shape, on the CPU; its weights are replaced.
        recipe: the recipe.
        data: text and tokenizer.
        folder: the run's folder.
        record: see `training_record`; the measurements are added to it.
        out: folder to write; swapped in as a whole at the end.

    Returns:
        The folder.

    Raises:
        FileNotFoundError: if the weights of that step were not kept.
    """
    step = record["step"]
    weights = folder / "steps" / f"{step:06d}.safetensors"
    if not weights.exists():
        kept = ", ".join(str(int(path.stem)) for path in sorted(weights.parent.glob("*.safetensors")))
        raise FileNotFoundError(f"No weights were kept at step {step} (kept: {kept or 'none'}).")
    load_weights(model, weights)
    record["held_out_float32"] = held_out_record(model.eval(), data, recipe.context)
    draft = out.with_name(out.name + ".part")
    shutil.rmtree(draft, ignore_errors=True)
    save_model(model, data, draft)
    saved = AutoModelForCausalLM.from_pretrained(draft, attn_implementation="eager")
    record["held_out"] = held_out_record(saved, data, recipe.context)
    windows = held_out_windows(data.held_out, PROBE_LENGTH)[0][:PROBE_WINDOWS]
    norms = probe_norms(saved, windows, recipe.vocabulary)
    norms["cosine"] = alone_cosine(saved, recipe.vocabulary)
    record["norms"] = {name: [round(value, 4) for value in values] for name, values in norms.items()}
    record["samples"] = samples(draft)
    write_atomically(draft / "training.json", (json.dumps(record, indent=1) + "\n").encode())
    write_card(draft, record)
    shutil.rmtree(out, ignore_errors=True)
    draft.replace(out)
    return out
