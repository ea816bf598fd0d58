"""Hidden states by forward hooks on the decoder layers; the model is never patched.

`hidden_states[0]` is what enters layer 1, `hidden_states[l]` the output of layer l, before the final norm.
Every function of this package takes a model or what `sdnb.load` returns.
"""

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from sdnb.layers import decoder_layers
from sdnb.layers.calls import Call, StopForward, map_tensors, replaced_forward, unwrap

FLOAT16_MAX = 65_504


def as_module(model: object) -> nn.Module:
    """Return the model itself, of a model or of what `sdnb.load` returned."""
    return model if isinstance(model, nn.Module) else model.model


def input_device(model: object) -> torch.device:
    """Return where a model takes its input: where its embedding is, or the CPU for one that is offloaded."""
    device = as_module(model).get_input_embeddings().weight.device
    return torch.device("cpu") if device.type == "meta" else device


@torch.no_grad()
def visit_states(
    model: object, ids: Tensor, visit: Callable[[int, Tensor], None], *, stop_after: int | None = None
) -> None:
    """Run the base model on `ids` and show every hidden state to `visit`.

    Args:
        model: a causal language model.
        ids: token ids, (B, T), or embeddings, (B, T, d).
        visit: called as `visit(l, state)` with l in 0..L and the state (B, T, d), in the model's dtype and on
            its device. It must not keep the tensor itself: some layers add to it in place afterwards.
        stop_after: the last layer to run (0..L); all of them when None.
    """
    model = as_module(model)
    layers = decoder_layers(model)
    last = len(layers) if stop_after is None else stop_after

    def show(number: int) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict, output: object) -> None:
            visit(number, unwrap(output))
            if number == last:
                raise StopForward

        return hook

    def show_input(module: nn.Module, args: tuple, kwargs: dict) -> None:
        visit(0, Call.of(args, kwargs).hidden)
        if last == 0:
            raise StopForward

    with ExitStack() as hooks:
        first = layers[0].register_forward_pre_hook(show_input, with_kwargs=True)
        hooks.callback(first.remove)
        for number, layer in enumerate(layers[:last], start=1):
            hooks.callback(layer.register_forward_hook(show(number), with_kwargs=True).remove)
        given = "inputs_embeds" if ids.is_floating_point() else "input_ids"
        try:
            model.base_model(**{given: ids.to(input_device(model))}, use_cache=False)
        except StopForward:
            return


def hidden_states(model: object, ids: Tensor, *, stop_after: int | None = None) -> Tensor:
    """Return the residual stream between the layers.

    Args:
        model: a causal language model.
        ids: token ids, (B, T).
        stop_after: the last layer to run (0..L); all of them when None.

    Returns:
        (K+1, B, T, d) in float32 on the CPU, K the last layer run; index 0 is what enters layer 1, index l
        the output of layer l, before the final norm.
    """
    states: list[Tensor] = []
    # `.clone()`: a float32 state on the CPU would otherwise be the layer's own buffer.
    visit_states(model, ids, lambda _, s: states.append(s.float().cpu().clone()), stop_after=stop_after)
    return torch.stack(states)


def hidden_norms(model: object, ids: Tensor, *, stop_after: int | None = None) -> Tensor:
    """Return |h_l| for every layer and token, without keeping the states.

    Args:
        model: a causal language model.
        ids: token ids, (B, T).
        stop_after: the last layer to run (0..L); all of them when None.

    Returns:
        (K+1, B, T) in float32 on the CPU.
    """
    norms: list[Tensor] = []
    visit_states(model, ids, lambda _, s: norms.append(s.float().norm(dim=-1).cpu()), stop_after=stop_after)
    return torch.stack(norms)


def text_norms(model: object, lines: Iterable[Tensor]) -> Tensor:
    """Return |h_l| of every token of a text, lines one after the other as in `Defect.norms`.

    Args:
        model: a causal language model.
        lines: token ids of each line, (T_i,).

    Returns:
        (L+1, N) in float32 on the CPU.
    """
    lines = list(lines)
    found: dict[int, Tensor] = {}
    for ids, real, numbers in token_batches(lines):
        norms = hidden_norms(model, ids)
        found |= {number: norms[:, row, real[row]] for row, number in enumerate(numbers)}
    return torch.cat([found[number] for number in range(len(lines))], dim=1)


def token_batches(
    lines: Iterable[Tensor], *, max_tokens: int = 4096
) -> Iterator[tuple[Tensor, Tensor, list[int]]]:
    """Group encoded lines of similar length into right-padded batches.

    A causal model gives the real tokens the same states with padding behind them as without, so no mask is
    needed.

    Args:
        lines: token ids of each line, (T_i,).
        max_tokens: the largest batch, in tokens, padding included; a longer line is a batch of its own.

    Yields:
        ids (B, T), a boolean mask of the real tokens (B, T), and the numbers of the lines in `lines`.
    """
    lines = list(lines)
    order = sorted(range(len(lines)), key=lambda i: len(lines[i]))
    group: list[int] = []
    for index in order:
        if group and len(lines[index]) * (len(group) + 1) > max_tokens:
            yield (*_pad([lines[i] for i in group]), group)
            group = []
        group.append(index)
    if group:
        yield (*_pad([lines[i] for i in group]), group)


def _pad(lines: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Pad (T_i,) lines on the right with their own last token; return ids and real-token mask, (B, T)."""
    length = max(len(line) for line in lines)
    ids = torch.stack([torch.cat([line, line[-1:].expand(length - len(line))]) for line in lines])
    mask = torch.arange(length) < torch.tensor([len(line) for line in lines])[:, None]
    return ids, mask


@torch.no_grad()
def not_finite_because(model: object, ids: Tensor) -> str:
    """Say where states cease to be finite, and why: a float16 model is run again in float32 up to there.

    Args:
        model: a causal language model.
        ids: token ids of one line on which it happens, (T,).

    Returns:
        A sentence that names the layer, the value that passes 65,504 and the remedy.
    """
    model = as_module(model)
    layers, kept = decoder_layers(model), []
    visit_states(model, ids[None], lambda _, state: kept.append(bool(state.isfinite().all())))
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    if all(kept):
        remedy = "the output embedding may be damaged" if dtype == "float32" else "load it in float32"
        return f"The hidden states are finite and the logits are not finite in {dtype}: {remedy}."
    bad = kept.index(False)
    if dtype != "float16" or bad == 0:
        place = "what enters layer 1 is" if bad == 0 else f"the states behind layer {bad} are"
        remedy = "" if dtype == "float32" else " Load it with dtype float32; if that does not help,"
        return f"In {dtype} {place} not finite.{remedy} Check the weights: they may be damaged."
    seen: list[tuple[float, int, str]] = []

    def wide(number: int, layer: nn.Module) -> Callable[..., object]:
        """The layer as a float32 copy that notes which values pass the limit."""

        def watch(name: str) -> Callable[..., None]:
            def note(module: nn.Module, args: tuple, result: object) -> None:
                for value in (*args, unwrap(result)):
                    if torch.is_tensor(value) and value.is_floating_point() and value.numel():
                        largest = value.abs().max().item()
                        if largest > FLOAT16_MAX:
                            seen.append((largest, number, name))

            return note

        def forward(*args: object, **kwargs: object) -> object:
            copied = copy.deepcopy(layer).float()
            vars(copied).pop("forward", None)
            for name, module in copied.named_modules():
                module.register_forward_hook(watch(name))
            change = lambda t: t.float() if t.is_floating_point() else t  # noqa: E731
            result = copied(*map_tensors(args, change), **map_tensors(kwargs, change))
            if seen or number == bad:
                raise StopForward
            return result

        return forward

    forwards = {layer: wide(number, layer) for number, layer in enumerate(layers[:bad], start=1)}
    try:
        with replaced_forward(forwards):
            model.base_model(input_ids=ids[None].to(input_device(model)), use_cache=False)
    except StopForward:
        pass
    if not seen:
        return f"In float16 the states behind layer {bad} are not finite: load it in bfloat16 or float32."
    largest, number, name = seen[0]
    where = f" (in its {name})" if name else ""
    return (
        f"Layer {number}{where} passes 65,504, the largest number of float16: {largest:,.0f} in float32. "
        "Load the model with dtype bfloat16 or float32."
    )
