"""Hidden states by forward hooks on the decoder layers; the model is never patched.

`hidden_states[0]` is what enters layer 1, `hidden_states[l]` the output of layer l, before the final norm.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from sdnb.anatomy import decoder_layers
from sdnb.anatomy.trace import Call, SeenEnough, unwrap


def input_device(model: nn.Module) -> torch.device:
    """Return where a model takes its input: where its embedding is, or the CPU for one that is offloaded.

    Args:
        model: a causal language model.

    Returns:
        The device for token ids and embeddings.
    """
    device = model.get_input_embeddings().weight.device
    return torch.device("cpu") if device.type == "meta" else device


@torch.no_grad()
def visit_states(
    model: nn.Module, ids: Tensor, visit: Callable[[int, Tensor], None], *, stop_after: int | None = None
) -> None:
    """Run the base model on `ids` and show every hidden state to `visit`.

    Args:
        model: a causal language model.
        ids: token ids, (B, T).
        visit: called as `visit(l, state)` with l in 0..L and the state (B, T, d), in the model's dtype and on
            its device. It must not keep the tensor itself: some layers add to it in place afterwards.
        stop_after: the last layer to run (1..L); all of them when None.
    """
    layers = decoder_layers(model)
    last = len(layers) if stop_after is None else stop_after

    def show(number: int) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict, output: object) -> None:
            visit(number, unwrap(output))
            if number == last:
                raise SeenEnough

        return hook

    def show_input(module: nn.Module, args: tuple, kwargs: dict) -> None:
        visit(0, Call.of(args, kwargs).hidden)
        if last == 0:
            raise SeenEnough

    with ExitStack() as hooks:
        first = layers[0].register_forward_pre_hook(show_input, with_kwargs=True)
        hooks.callback(first.remove)
        for number, layer in enumerate(layers[:last], start=1):
            hooks.callback(layer.register_forward_hook(show(number), with_kwargs=True).remove)
        try:
            model.base_model(input_ids=ids.to(input_device(model)), use_cache=False)
        except SeenEnough:
            return


def hidden_states(model: nn.Module, ids: Tensor, *, stop_after: int | None = None) -> Tensor:
    """Return the residual stream between the layers.

    Args:
        model: a causal language model.
        ids: token ids, (B, T).
        stop_after: the last layer to run (1..L); all of them when None.

    Returns:
        (K+1, B, T, d) in float32 on the CPU, K the last layer run; index 0 is what enters layer 1, index l
        the output of layer l, before the final norm.
    """
    states: list[Tensor] = []
    # `.clone()`: a float32 state on the CPU would otherwise be the layer's own buffer.
    visit_states(
        model, ids, lambda _, state: states.append(state.float().cpu().clone()), stop_after=stop_after
    )
    return torch.stack(states)


def hidden_norms(model: nn.Module, ids: Tensor, *, stop_after: int | None = None) -> Tensor:
    """Return |h_l| for every layer and token, without keeping the states.

    Args:
        model: a causal language model.
        ids: token ids, (B, T).
        stop_after: the last layer to run (1..L); all of them when None.

    Returns:
        (K+1, B, T) in float32 on the CPU.
    """
    norms: list[Tensor] = []
    visit_states(model, ids, lambda _, s: norms.append(s.float().norm(dim=-1).cpu()), stop_after=stop_after)
    return torch.stack(norms)


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
