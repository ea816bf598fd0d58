"""What a model makes of a text: perplexity by the protocol of the quantization literature; continuations."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sdnb.activations.states import as_module, input_device, not_finite_because
from sdnb.bar import progress
from sdnb.errors import ParameterError, TextError
from sdnb.text import position_limit

LONGEST_WINDOW = 2048
LOGITS_AT_ONCE = 2**26  # numbers: a quarter of a GiB in float32


@dataclass(frozen=True)
class Perplexity:
    """Perplexity of a text and the loss of each of its windows."""

    value: float  #: exp of the mean negative log-likelihood of a predicted token
    nll: Tensor  #: mean negative log-likelihood in each window, in nats, (W,), float64 on the CPU
    tokens: int  #: number of predicted tokens
    window: int  #: tokens in a window, a begin token included


@torch.no_grad()
def perplexity(
    model: object, ids: Tensor, *, window: int | None = None, begin_token: int | None = None
) -> Perplexity:
    """Return exp( -mean log p(x_t | x_<t) ), the text cut into windows, each predicted from within itself.

    The protocol of GPTQ and SmoothQuant: the text is one string of tokens, cut into windows of the model's
    length up to 2048 without overlap; the incomplete window at the end is dropped, and the first token of a
    window is not predicted. A text `ids`, (N,), shorter than one window is one window of its own length. All
    windows weigh the same. They have as many tokens as `window_length` says; a `begin_token` stands in front
    of each, which then holds one token of text less, all predicted.

    Raises:
        ParameterError: logits that are not finite, or another window than `window_length` allows.
    """
    model = as_module(model)
    windows = text_windows(ids, window_length(model, window), begin_token)
    length = windows.shape[1]
    batch = max(1, LOGITS_AT_ONCE // (length * model.get_input_embeddings().weight.shape[0]))
    nll = torch.cat([_window_losses(model, part) for part in progress(windows.split(batch), "windows")])
    if nll.isnan().any():
        raise ParameterError(not_finite_because(model, windows[nll.isnan()][0]))
    return Perplexity(nll.mean().exp().item(), nll, len(nll) * (length - 1), length)


def window_length(model: object, window: int | None = None) -> int:
    """Return the tokens in a window: the number asked for, or the smaller of the model's positions and 2048.

    Raises:
        ParameterError: fewer than two tokens are asked for, or more than the model has positions.
    """
    positions = position_limit(as_module(model).config)
    if window is None:
        return min(positions or LONGEST_WINDOW, LONGEST_WINDOW)
    if window < 2 or (positions is not None and window > positions):
        limit = f"from 2 to {positions}" if positions else "of 2 or more"
        raise ParameterError(f"window is {window}; give a number of tokens {limit}, or null")
    return window


def text_windows(ids: Tensor, window: int, begin_token: int | None = None) -> Tensor:
    """Return a text (N,) cut into windows without overlap, (W, window), or (1, N) when shorter than one.

    A `begin_token` stands in front of every window, counted in `window`.

    Raises:
        TextError: too few tokens to predict one.
    """
    front = torch.tensor([] if begin_token is None else [begin_token], dtype=ids.dtype)
    if len(ids) + len(front) < 2:
        raise TextError(f"{len(ids)} tokens are too few for a perplexity; give a longer text")
    body = min(window - len(front), len(ids))
    count = len(ids) // body
    windows = ids[: count * body].reshape(count, body).cpu()
    return torch.cat([front.expand(count, -1), windows], dim=1)


def _window_losses(model: nn.Module, windows: Tensor) -> Tensor:
    """Mean negative log-likelihood in nats of each window, (B, T) ids -> (B,) in float64 on the CPU."""
    ids = windows.to(input_device(model))
    logits = model(input_ids=ids, use_cache=False).logits
    # One window at a time: a float32 copy of all logits would double the memory.
    losses = [
        nn.functional.cross_entropy(scores[:-1].float(), row[1:].to(scores.device), reduction="none")
        for scores, row in zip(logits, ids, strict=True)
    ]
    return torch.stack(losses).double().mean(dim=1).cpu()


@torch.no_grad()
def continuation(
    model: object, ids: Tensor, count: int, *, temperature: float = 0.8, seed: int = 0
) -> Tensor:
    """Return the ids of a sampled continuation, x_t ~ softmax(logits / temperature), (count,), on the CPU.

    It follows `ids`, (T,); temperature 0 takes the likeliest token. Each step is a full forward pass without
    a cache, so that an intervention acts on all of it. The random numbers (by `seed`), one per token, do not
    depend on the model, so that texts can be compared.
    """
    model = as_module(model)
    device = input_device(model)
    uniform = torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    for number in uniform:
        logits = model(input_ids=ids[None].to(device), use_cache=False).logits[0, -1].double().cpu()
        steps = torch.softmax(logits / max(temperature, 1e-6), dim=0).cumsum(dim=0)
        chosen = int((steps < number * steps[-1]).sum())
        ids = torch.cat([ids, torch.tensor([chosen])])
    return ids[len(ids) - count :]
