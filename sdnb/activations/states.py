"""The residual stream by forward hooks on the decoder layers, and what its branches add; nothing is patched.

`hidden_states[0]` is what enters layer 1, `hidden_states[l]` the output of layer l, before the final norm.
Every function of this package takes a model or what `sdnb.load` returns.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from sdnb.bar import progress
from sdnb.layers import WeightMatrix, decoder_layers, residual_branches
from sdnb.layers.calls import Call, StopForward, unwrap


def as_module(model: object) -> nn.Module:
    """The model itself, of a model or of what `sdnb.load` returned."""
    return model if isinstance(model, nn.Module) else model.model


def input_device(model: object) -> torch.device:
    """Where a model takes its input: where its embedding is, or the CPU for one that is offloaded."""
    device = as_module(model).get_input_embeddings().weight.device
    return torch.device("cpu") if device.type == "meta" else device


@torch.no_grad()
def visit_states(
    model: object, ids: Tensor, visit: Callable[[int, Tensor], None], *, stop_after: int | None = None
) -> None:
    """Run the base model on `ids`, (B, T), or embeddings, (B, T, d), and show its hidden states to `visit`.

    It is called as `visit(l, state)` with l in 0..L and the state (B, T, d), in the model's dtype and on its
    device, and must not keep the tensor itself: some layers add to it in place afterwards. `stop_after` is
    the last layer to run, 0..L; all of them when None.
    """
    model = as_module(model)
    layers = decoder_layers(model)
    last = len(layers) if stop_after is None else stop_after

    def show(number: int, state: Tensor) -> None:
        visit(number, state)
        if number == last:
            raise StopForward

    def show_input(module: nn.Module, args: tuple, kwargs: dict) -> None:
        show(0, Call.of(args, kwargs).hidden)

    def show_output(number: int, module: nn.Module, args: tuple, output: object) -> None:
        show(number, unwrap(output))

    with ExitStack() as hooks:
        hooks.enter_context(layers[0].register_forward_pre_hook(show_input, with_kwargs=True))
        for number, layer in enumerate(layers[:last], start=1):
            hooks.enter_context(layer.register_forward_hook(partial(show_output, number)))
        given = "inputs_embeds" if ids.is_floating_point() else "input_ids"
        with suppress(StopForward):
            model.base_model(**{given: ids.to(input_device(model))}, use_cache=False)


def hidden_states(model: object, ids: Tensor, *, stop_after: int | None = None) -> Tensor:
    """Return h_0..h_K of token ids (B, T), (K+1, B, T, d) in float32 on the CPU; K is `stop_after`, or L."""
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

    A causal model gives the real tokens the same states with padding after them, so no mask is needed. A
    batch has at most `max_tokens`, padding included; a longer line (T_i,) is a batch of its own.
    """
    lines = list(lines)
    groups: list[list[int]] = []
    for index in sorted(range(len(lines)), key=lambda i: len(lines[i])):
        if not groups or len(lines[index]) * (len(groups[-1]) + 1) > max_tokens:
            groups.append([])
        groups[-1].append(index)
    for group in groups:
        lengths = torch.tensor([len(lines[i]) for i in group])
        place = torch.arange(int(lengths.max()))
        # A line is filled up with its own last token, which stretches the range of a quantized input least.
        ids = torch.stack([lines[i][place.clamp(max=len(lines[i]) - 1)] for i in group])
        yield ids, place < lengths[:, None], group


def matrix_inputs(
    model: object, lines: Iterable[Tensor], matrices: Sequence[WeightMatrix]
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Return what matrices read on a text, the norms of the hidden states, (L+1, N), and positions, (N,).

    Lines of equal length (T_i,) run together, so that an encoder sees no padding; tokens come in that order.
    The inputs (N, m) of each matrix, by its name, have the model's dtype; neighbours that read the same (Q, K
    and V; gate and up) share one tensor.
    """
    batches: dict[int, list[Tensor]] = defaultdict(list)
    for line in lines:
        batches[len(line)].append(line)
    read: dict[nn.Module, list[Tensor]] = {matrix.module: [] for matrix in matrices}
    norms, positions = [], []

    def keep(module: nn.Module, args: tuple) -> None:
        read[module].append(args[0].detach().flatten(0, -2).clone())

    decoder_layers(model)  # found now: the pass that finds them must not be recorded
    with ExitStack() as hooks:
        for module in read:
            hooks.enter_context(module.register_forward_pre_hook(keep))
        for length, batch in progress(batches.items(), desc="inputs", total=len(batches)):
            norms.append(hidden_norms(model, torch.stack(batch)).flatten(1))
            positions.append(torch.arange(length).repeat(len(batch)))
    found, last = {}, torch.empty(0)
    for matrix in matrices:
        rows = torch.cat(read[matrix.module])
        last = found[matrix.name] = last if torch.equal(last.to(rows), rows) else rows
    return found, torch.cat(norms, dim=1), torch.cat(positions)


def not_finite_because(model: object, ids: Tensor) -> str:
    """Say after which layer the states of a line, (T,), cease to be finite, and what to do about it."""
    dtype, finite = str(next(as_module(model).parameters()).dtype).removeprefix("torch."), []
    visit_states(model, ids[None], lambda _, state: finite.append(bool(state.isfinite().all())))
    place = "logits" if all(finite) else f"states after layer {finite.index(False)}"
    range_ = "It ends at 65,504: load the model in bfloat16 or float32. " if dtype == "float16" else ""
    return f"The {place} are not finite in {dtype}. {range_}The weights may also be damaged."


@dataclass(frozen=True)
class Ledger:
    """Coordinates along a unit vector u; `start` and all entries add up to the last state's.

    Where the stream itself passes norms (BERT norms the sum) their change is an entry of its own: it
    belongs to no branch, and the branches' entries are those of what they add, before that norm.
    """

    start: Tensor  #: u . h_0 of every token, (B, T)
    attention: Tensor  #: u . (what attention adds), (L, B, T)
    ffn: Tensor  #: u . (what the FFN adds), (L, B, T)
    stream: Tensor  #: u . (what the stream's own norms and coefficients change), (L, B, T); zeros as a rule
    coordinate: Tensor  #: u . h_l, (L+1, B, T)
    norms: Tensor  #: |h_l|, (L+1, B, T)


@torch.no_grad()
def ledger(model: object, ids: Tensor, direction: Tensor) -> Ledger:
    """Return what every attention and FFN output adds along `direction`, token by token, from one pass.

    h_l = h_{l-1} + attention_l + ffn_l + stream_l, hence u.h_L = u.h_0 + the sum of u.(entries) over layers.
    `ids` are token ids, (B, T), `direction` is any vector along u, (d,); entries are float64 on the CPU.
    """
    u = nn.functional.normalize(direction.double().cpu(), dim=0)
    entries: dict[tuple[int, str], Tensor] = {}
    coordinates, norms, dtypes = [], [], []

    def along(x: Tensor) -> Tensor:
        return (x.double() @ u.to(x.device)).cpu().reshape(ids.shape)  # OPT's FFN has rows

    def write(key: tuple[int, str], scale: object, module: nn.Module, args: tuple, result: object) -> None:
        entries[key] = along(scale * unwrap(result))

    def visit(layer: int, state: Tensor) -> None:
        coordinates.append(along(state))
        norms.append(state.float().norm(dim=-1).cpu())
        dtypes.append(state.dtype)

    with ExitStack() as hooks:
        for found in residual_branches(model):
            for branch in ("attention", "ffn"):
                parts = getattr(found, branch)
                # Not `output`: Bloom's attention adds the residual to what it returns.
                last = parts.ablated if parts.post_norm is None else parts.post_norm
                hook = partial(write, (found.number, branch), parts.multiplier)
                hooks.enter_context(last.register_forward_hook(hook))
        visit_states(model, ids, visit)
    coordinate, lengths = torch.stack(coordinates), torch.stack(norms)
    steps, none = coordinate.diff(dim=0), torch.zeros_like(coordinate[0])
    numbers = range(1, len(coordinates))
    attention, ffn = (torch.stack([entries.get((n, b), none) for n in numbers]) for b in ("attention", "ffn"))
    rest = steps - attention - ffn
    # What rounding leaves is the FFN's, so that the columns add up to the measured states.
    limit = 32 * torch.finfo(dtypes[-1]).eps * (lengths[:-1] + lengths[1:])
    rounding = (rest.abs() <= limit).flatten(1).all(dim=1)[:, None, None] * rest
    return Ledger(coordinate[0], attention, ffn + rounding, rest - rounding, coordinate, lengths)
