"""Hidden states by forward hooks on the decoder layers; the model is never patched.

`hidden_states[0]` is what enters layer 1, `hidden_states[l]` the output of layer l, before the final norm.
Every function of this package takes a model or what `sdnb.load` returns.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, suppress
from functools import partial

import torch
from torch import Tensor, nn

from sdnb.bar import progress
from sdnb.layers import WeightMatrix, decoder_layers
from sdnb.layers.calls import Call, StopForward, unwrap

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

    def show(number: int, module: nn.Module, args: tuple, output: object) -> None:
        visit(number, unwrap(output))
        if number == last:
            raise StopForward

    def show_input(module: nn.Module, args: tuple, kwargs: dict) -> None:
        visit(0, Call.of(args, kwargs).hidden)
        if last == 0:
            raise StopForward

    with ExitStack() as hooks:
        hooks.enter_context(layers[0].register_forward_pre_hook(show_input, with_kwargs=True))
        for number, layer in enumerate(layers[:last], start=1):
            hooks.enter_context(layer.register_forward_hook(partial(show, number)))
        given = "inputs_embeds" if ids.is_floating_point() else "input_ids"
        with suppress(StopForward):
            model.base_model(**{given: ids.to(input_device(model))}, use_cache=False)


def hidden_states(model: object, ids: Tensor, *, stop_after: int | None = None) -> Tensor:
    """Return the residual stream between the layers, (K+1, B, T, d) in float32 on the CPU.

    Index 0 is what enters layer 1, index l the output of layer l, before the final norm.

    Args:
        model: a causal language model.
        ids: token ids, (B, T).
        stop_after: K, the last layer to run (0..L); all of them when None.
    """
    states: list[Tensor] = []
    # `.clone()`: a float32 state on the CPU would otherwise be the layer's own buffer.
    visit_states(model, ids, lambda _, s: states.append(s.float().cpu().clone()), stop_after=stop_after)
    return torch.stack(states)


def hidden_norms(model: object, ids: Tensor) -> Tensor:
    """Return |h_l| for l = 0..L and every token of `ids` (B, T), (L+1, B, T) in float32 on the CPU."""
    norms: list[Tensor] = []
    visit_states(model, ids, lambda _, s: norms.append(s.float().norm(dim=-1).cpu()))
    return torch.stack(norms)


def token_batches(
    lines: Iterable[Tensor], *, max_tokens: int = 4096
) -> Iterator[tuple[Tensor, Tensor, list[int]]]:
    """Yield right-padded batches of lines of similar length: ids (B, T), which are real (B, T), line numbers.

    A causal model gives the real tokens the same states with padding behind them, so no mask is needed.

    Args:
        lines: token ids of each line, (T_i,).
        max_tokens: the largest batch, in tokens, padding included; a longer line is a batch of its own.
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


def matrix_inputs(
    model: object, lines: Iterable[Tensor], matrices: Sequence[WeightMatrix]
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Return what matrices read on a text, the norms of the hidden states, (L+1, N), and positions, (N,).

    Lines of equal length run together, so that an encoder sees no padding; tokens come in that order. The
    inputs (N, m) of each matrix, by its name, have the model's dtype; neighbours that read the same (Q, K and
    V; gate and up) share one tensor.

    Args:
        model: a language model, decoder or encoder.
        lines: token ids of each line, (T_i,).
        matrices: whose inputs are kept; N m numbers for each tensor that is read.
    """
    batches: dict[int, list[Tensor]] = defaultdict(list)
    for line in lines:
        batches[len(line)].append(line)
    newest: dict[nn.Module, Tensor] = {}
    read: dict[nn.Module, list[Tensor]] = {matrix.module: [] for matrix in matrices}
    norms, positions = [], []

    def keep(module: nn.Module, args: tuple) -> None:
        newest[module] = args[0].detach().clone()

    with ExitStack() as hooks:
        for module in read:
            hooks.enter_context(module.register_forward_pre_hook(keep))
        for length, batch in progress(batches.items(), desc="inputs", total=len(batches)):
            norms.append(hidden_norms(model, torch.stack(batch)).flatten(1))
            positions.append(torch.arange(length).repeat(len(batch)))
            for module, states in newest.items():  # of this pass, not of one that looked for the layers
                read[module].append(states.flatten(0, -2))
    found: dict[str, Tensor] = {}
    last = torch.empty(0)
    for matrix in matrices:
        rows = torch.cat(read[matrix.module])
        last = found[matrix.name] = last if torch.equal(last.to(rows), rows) else rows
    return found, torch.cat(norms, dim=1), torch.cat(positions)


def not_finite_because(model: object, ids: Tensor) -> str:
    """Say behind which layer the states of a line, (T,), cease to be finite, and what to do about it."""
    dtype, finite = str(next(as_module(model).parameters()).dtype).removeprefix("torch."), []
    visit_states(model, ids[None], lambda _, state: finite.append(bool(state.isfinite().all())))
    place = "logits" if all(finite) else f"states behind layer {finite.index(False)}"
    if dtype == "float16":
        limit = "pass 65,504, the largest number of float16: load the model in bfloat16 or float32"
        return f"The {place} {limit}; if that does not help, its weights are damaged."
    remedy = "" if dtype == "float32" else "Load the model in float32; if that does not help, "
    return f"The {place} are not finite in {dtype}. {remedy}Check the weights: they may be damaged."
