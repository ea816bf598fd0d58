"""Train a small language model from a recipe: `python zoo/train.py zoo/recipes/llama.yaml`.

Runs on a GPU when there is one, else on the CPU (`--threads`). A run killed at any moment goes on from its
last checkpoint when the same command is given again. The run's folder (text, checkpoints, kept weights) stays
out of git.
"""

import argparse
import copy
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

if __name__ == "__main__":  # make the package importable from any working directory
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from zoo.export import export, training_record
from zoo.graphs import GraphedStep
from zoo.recipe import Recipe, read_recipe
from zoo.run import Data, claim, differences, prepare_data, save_checkpoint, save_weights
from zoo.tokens import BEGIN_ID, END_ID, draw_batch, held_out_windows
from zoo.watch import held_out_loss, probe_norms

ZOO = Path(__file__).resolve().parent
PROBE_WINDOWS, PROBE_LENGTH = 64, 32


def build_model(recipe: Recipe, base: Path | None = None) -> PreTrainedModel:
    """Make the model that a recipe starts from.

    Args:
        recipe: type, sizes and seed.
        base: folder of the model to fine-tune, or None for random weights.

    Returns:
        The model, in float32.
    """
    if base:
        return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    values = dict(recipe.model)
    config = AutoConfig.for_model(
        values.pop("type"),
        vocab_size=recipe.vocabulary,
        bos_token_id=BEGIN_ID,
        eos_token_id=END_ID,
        pad_token_id=None,
        **values,
    )
    torch.manual_seed(recipe.seed)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def build_optimizer(model: PreTrainedModel, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only.

    Args:
        model: the model, on its device.
        recipe: learning rate, weight decay and betas.

    Returns:
        The optimizer, its two groups the matrices and the vectors. On a GPU the learning rate is a tensor
        there, because a recorded step reads it anew at each replay.
    """
    parameters = list(model.parameters())
    device = parameters[0].device
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": recipe.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    for group in groups if device.type == "cuda" else ():
        group |= {"lr": torch.tensor(recipe.learning_rate, device=device), "capturable": True}
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=tuple(recipe.betas), fused=True)


class Trainer:
    """One run: its model, optimizer, random state and log, saved and restored as one checkpoint.

    Args:
        recipe: what to train.
        folder: the run's folder.
        data: text and tokenizer.
        device: `"cpu"` or `"cuda"`.
        base: folder of the model to fine-tune, or None.
    """

    def __init__(
        self, recipe: Recipe, folder: Path, data: Data, device: str = "cpu", base: Path | None = None
    ) -> None:
        self.recipe, self.folder, self.data, self.device = recipe, folder, data, device
        self.model = build_model(recipe, base).to(device)
        self.optimizer = build_optimizer(self.model, recipe)
        # A twin computes attention weights, which the fast attention of the trained model does not return.
        config = copy.deepcopy(self.model.config)  # the choice of attention is noted there
        self.twin = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        self.twin = self.twin.to(device).eval()
        self.take = GraphedStep(self.descend) if device.startswith("cuda") else self.descend
        self.generator = torch.Generator().manual_seed(recipe.seed + 1)
        self.step, self.seconds, self.log = 0, 0.0, []
        self.probes = held_out_windows(data.held_out, PROBE_LENGTH)[0][:PROBE_WINDOWS]
        self.sample = tuple(part[::8] for part in held_out_windows(data.held_out, recipe.context))
        if (folder / "checkpoint.pt").exists():
            self.restore()

    def save(self) -> None:
        """Save the run's state, so that a run killed later goes on from here."""
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "step": self.step,
            "seconds": self.seconds,
            "log": self.log,
        }
        save_checkpoint(self.folder / "checkpoint.pt", state)

    def restore(self) -> None:
        """Go back to the run's last saved state."""
        state = torch.load(self.folder / "checkpoint.pt", map_location=self.device, weights_only=True)
        self.model.load_state_dict(state["model"])
        groups = self.optimizer.state_dict()["param_groups"]  # this device's, not those of where it was saved
        self.optimizer.load_state_dict({**state["optimizer"], "param_groups": groups})
        self.generator.set_state(state["generator"].cpu())
        self.step, self.seconds, self.log = state["step"], state["seconds"], state["log"]

    def descend(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Move the weights along the gradient of one batch.

        Args:
            inputs: token ids (batch, T), on the model's device.
            targets: token ids (batch, T), on the model's device.

        Returns:
            The batch's mean cross-entropy, in nats; a tensor, so that a GPU need not be waited for.
        """
        logits = self.model(input_ids=inputs, use_cache=False).logits
        loss = functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()

    def update(self) -> Tensor:
        """Take one optimizer step.

        Returns:
            The batch's mean cross-entropy, in nats.
        """
        rate = self.recipe.learning_rate_at(self.step)
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
        batch = draw_batch(self.data.stream, self.recipe, self.step, self.generator)
        self.step += 1
        return self.take(*batch)

    def measure(self, loss: float) -> dict[str, Any]:
        """Measure the model as it is now.

        Args:
            loss: mean training loss since the last measurement, in nats.

        Returns:
            An entry of the log: step, losses, and the lists of `zoo.watch.probe_norms`.
        """
        self.twin.load_state_dict(self.model.state_dict())
        held_out = held_out_loss(self.twin, *self.sample)
        norms = probe_norms(self.twin, self.probes, self.recipe.vocabulary)
        rounded = {name: [round(value, 4) for value in values] for name, values in norms.items()}
        return {"step": self.step, "loss": round(loss, 4), "held_out_sample": round(held_out, 4), **rounded}


def progress_line(entry: dict[str, Any]) -> str:
    """Write a log entry as one line.

    Args:
        entry: see `Trainer.measure`.

    Returns:
        Losses, then per layer the median norm at position 0 and that of the rest, then the largest sink rate.
    """
    pairs = zip(entry["first"], entry["rest"], strict=True)
    layers = " ".join(f"{first:.0f}/{rest:.0f}" for first, rest in pairs)
    return (
        f"step {entry['step']:6d}  loss {entry['loss']:.3f}  held out {entry['held_out_sample']:.3f}  "
        f"norms {layers}  alone {max(entry['alone']):.0f}  sink {max(entry['sink']):.2f}"
    )


def train(trainer: Trainer, until: int, every: int = 250) -> None:
    """Train up to a step, reporting, saving and keeping weights on the way.

    Args:
        trainer: the run.
        until: last step.
        every: steps between measurements, each followed by a checkpoint.
    """
    keep = set(trainer.recipe.keep_steps) | {trainer.recipe.steps}
    if trainer.step == 0 and 0 in keep:
        save_weights(trainer.folder / "steps" / "000000.safetensors", trainer.model)
    losses = []
    with tqdm(total=until, initial=trainer.step, unit="step", mininterval=5, disable=None) as bar:
        while trainer.step < until:
            start = time.monotonic()
            losses.append(trainer.update())
            report = trainer.step % every == 0 or trainer.step == until
            if report:
                loss = torch.stack(losses).mean().item()  # waits for a GPU
            trainer.seconds += time.monotonic() - start
            bar.update()
            if trainer.step in keep:
                save_weights(trainer.folder / "steps" / f"{trainer.step:06d}.safetensors", trainer.model)
            if report:
                trainer.log.append(trainer.measure(loss))
                losses.clear()
                tqdm.write(f"{progress_line(trainer.log[-1])}  {trainer.seconds / trainer.step:.2f} s/step")
                sys.stdout.flush()
                trainer.save()


def warn_of_differences(recipe: Recipe, data: Data) -> None:
    """Say on stderr where the text differs from that of the committed model of the same name.

    Args:
        recipe: the recipe, whose name is the committed folder's.
        data: the run's text.
    """
    record = ZOO / recipe.name / "training.json"
    if not record.exists():
        return
    lines = differences(data.about, json.loads(record.read_text())["text"])
    if lines:
        print(f"warning: this run will not reproduce zoo/{recipe.name} exactly:", file=sys.stderr)
        print("\n".join(f"  {line}" for line in lines), file=sys.stderr)


def main(arguments: list[str] | None = None) -> None:
    """Train a recipe's model and export it, or export a kept step.

    Args:
        arguments: command line, without the program's name.
    """
    parser = argparse.ArgumentParser(description="Train a small language model from a recipe.")
    parser.add_argument("recipe", type=Path, help="YAML file, see zoo/recipes")
    parser.add_argument("--run", type=Path, help="working folder (default: zoo/runs/NAME)")
    parser.add_argument("--out", type=Path, help="finished model (default: model/ in the working folder)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: all)")
    parser.add_argument("--every", type=int, default=250, help="steps between measurements and checkpoints")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda if there is one")
    parser.add_argument("--export", type=int, metavar="STEP", help="export a kept step, train nothing")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    recipe = read_recipe(options.recipe)
    base = (options.recipe.parent / recipe.start_from).resolve() if recipe.start_from else None
    folder = options.run or ZOO / "runs" / recipe.name
    claim(folder, recipe)
    data = prepare_data(folder, recipe, base)
    warn_of_differences(recipe, data)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    trainer = Trainer(recipe, folder, data, device, base)
    if options.export is None:
        train(trainer, recipe.steps, options.every)
    step = recipe.steps if options.export is None else options.export
    out = options.out or folder / "model"
    hardware = torch.cuda.get_device_name() if device == "cuda" else "a CPU"
    record = training_record(
        recipe, data, trainer.log, step, trainer.seconds / max(trainer.step, 1), hardware
    )
    print(export(trainer.model.cpu(), recipe, data, folder, record, out))


if __name__ == "__main__":
    main()
