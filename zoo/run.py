"""A run's folder: the text it trains on, its recipe, its last checkpoint and the weights it keeps."""

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer

from zoo.recipe import Recipe
from zoo.text import Corpus, collect, held_out_documents, text_hash
from zoo.tokens import encode_documents, train_tokenizer


@dataclass(frozen=True)
class Data:
    """What a run trains and is measured on.

    Attributes:
        tokenizer: the tokenizer.
        stream: token ids to train on (tokens,), uint16.
        held_out: token ids of the held-out text (tokens,), uint16.
        about: text source, hash, packages and sizes, as written into the training record.
    """

    tokenizer: Tokenizer
    stream: np.ndarray
    held_out: np.ndarray
    about: dict[str, Any]


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that a kill at any moment leaves either the old or the new one.

    Args:
        path: the file.
        content: its bytes.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(path.name + ".part")
    with draft.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Save everything that resuming needs, atomically.

    Args:
        path: the checkpoint.
        state: model, optimizer, generator state, step, log.
    """
    draft = path.with_name(path.name + ".part")
    torch.save(state, draft)
    draft.replace(path)


def save_weights(path: Path, model: torch.nn.Module) -> None:
    """Keep a step's weights as safetensors, in float32.

    Args:
        path: the file.
        model: the model; a tensor that it uses twice is written once.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = dict(model.named_parameters())
    draft = path.with_name(path.name + ".part")
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, draft)
    draft.replace(path)


def claim(folder: Path, recipe: Recipe) -> None:
    """Write the recipe into the run's folder, or check that the folder belongs to this recipe.

    Args:
        folder: the run's folder.
        recipe: the recipe.

    Raises:
        ValueError: if the folder holds a run of another recipe.
    """
    path = folder / "recipe.json"
    wanted = json.loads(json.dumps(dataclasses.asdict(recipe)))
    if not path.exists():
        write_atomically(path, json.dumps(wanted, indent=1).encode())
    elif (found := json.loads(path.read_text())) != wanted:
        changed = sorted(key for key in wanted if wanted[key] != found.get(key))
        names = ", ".join(changed)
        raise ValueError(f"{folder} holds another recipe's run ({names} differ): choose another --run.")


def prepare_data(
    folder: Path, recipe: Recipe, base: Path | None = None, corpus: Corpus | None = None
) -> Data:
    """Read the run's text and tokenizer, or collect and tokenize the text on the first call.

    The text is fixed from then on: packages installed later do not change a run.

    Args:
        folder: the run's folder.
        recipe: text source and vocabulary.
        base: model folder whose tokenizer is used, when fine-tuning.
        corpus: text to use instead of collecting it.

    Returns:
        The data.
    """
    about_path = folder / "text.json"
    if not about_path.exists():
        corpus = corpus or collect(recipe.text)
        if base:
            tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
        else:
            tokenizer = train_tokenizer(corpus.documents, recipe.vocabulary)
        folder.mkdir(parents=True, exist_ok=True)
        tokenizer.save(str(folder / "tokenizer.json"))
        stream = encode_documents(tokenizer, corpus.documents)
        topics = held_out_documents()
        held_out = encode_documents(tokenizer, topics)
        np.save(folder / "stream.npy", stream)
        np.save(folder / "held_out.npy", held_out)
        about = {
            "source": recipe.text,
            "hash": corpus.hash,
            "documents": len(corpus.documents),
            "characters": sum(map(len, corpus.documents)),
            "tokens": len(stream),
            "packages": corpus.packages,
            "held_out": {
                "source": "pydoc_data.topics",
                "hash": text_hash(topics),
                "documents": len(topics),
                "bytes": sum(len(topic.encode()) for topic in topics),
                "tokens": len(held_out),
            },
        }
        write_atomically(about_path, json.dumps(about, indent=1).encode())
    return Data(
        Tokenizer.from_file(str(folder / "tokenizer.json")),
        np.load(folder / "stream.npy", mmap_mode="r"),
        np.load(folder / "held_out.npy"),
        json.loads(about_path.read_text()),
    )


def differences(about: dict[str, Any], card: dict[str, Any]) -> list[str]:
    """Say where a run's text differs from that of the committed model of the same name.

    Args:
        about: the run's text, see `Data.about`.
        card: the same of the committed model.

    Returns:
        One sentence for each difference; empty when the text is the same.
    """
    lines = []
    if about["hash"] != card["hash"]:
        here, there = about["characters"], card["characters"]
        lines.append(f"the text differs: {here} characters here, {there} on the card")
    for name in sorted(about["packages"].keys() | card["packages"].keys()):
        here = about["packages"].get(name, {}).get("version", "not installed")
        there = card["packages"].get(name, {}).get("version", "not installed")
        if here != there:
            lines.append(f"{name}: {here} here, {there} on the card")
    return lines
