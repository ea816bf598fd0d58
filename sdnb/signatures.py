"""Signatures: which models descend from one another, by their high-norm direction and their embeddings.

Two kinds of evidence, each with the chance of it between unrelated models:

1. The angle between the empirical directions (paper A). Its chance is the larger of two probabilities, under
   isotropic directions and under random signed permutations of the coordinates, because a direction that is
   nearly one coordinate coincides with another such one once in d pairs, not once in 1e500.
2. The alignment of the embeddings: nuclear norm of A^T B over |A| |B|, rows of A and B the tokens that both
   models know, centred and of unit length. No rotation of the residual stream changes it, and the rotation
   that goes with it carries one direction into the other's coordinates. That of the output embeddings does
   not: it brings even unrelated directions together, since all models answer a first token alike.
"""

import functools
import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.sparse.csgraph import connected_components
from scipy.special import log_ndtr, logsumexp
from torch import Tensor, nn

from sdnb.activations import find_defect, input_device
from sdnb.bar import progress
from sdnb.checkpoint import locate
from sdnb.decompose import angle_deg, log10_chance
from sdnb.errors import ParameterError
from sdnb.loading import load
from sdnb.text import encode

CHANCE = 1e-6  # two directions say "related" when unrelated ones come so close less often than this
# Alignment, 0 for shuffled tokens and 1 for a copy, from which embeddings are "undecided", and from which
# "related": chosen so that unrelated models stay below the first, and checkpoints late in a training and
# fine-tunings of one another come above the second.
INPUT_LIMITS, OUTPUT_LIMITS = (0.5, 0.6), (0.65, 0.75)
MASSIVE_SHARE = 0.1  # a coordinate with this share of a direction's squared norm is massive
DIFFERENT_KINDS_DEG = 10.0  # initial and noninitial states further apart are not averaged; initial ones count
_REPLICATES, _TOP = 200, 4  # resamplings of the lines; coordinates whose places are enumerated
_TOO_FEW_TOKENS = 0.7  # alignment of shuffled tokens above which so few are shared that it tells nothing
_REACH = 0.1  # variance of the embeddings along a direction, 1 on average, that carries it by their rotation
_VERDICTS = ("related", "undecided", "no sign of a relation", "not comparable")
_NUMBERS = (
    "angle_deg", "uncertainty_deg", "chance_log10", "isotropic_log10", "permutation_log10",
    "beyond_massive_deg", "beyond_massive_log10", "shared_tokens", "alignment", "shuffled_alignment",
    "alignment_beyond_shuffled", "output_alignment", "carried_angle_deg", "carried_log10", "direction",
    "embeddings",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Signature:
    """What two models are compared by; it keeps nothing else of the model."""

    name: str  #: the model as it was asked for
    direction: Tensor | None  #: unit vector, (d,), float32; None without a high-norm state
    #: 95 % of the directions of resampled lines lie within this angle; None without one
    radius_deg: float | None
    kind: str  #: "all" high-norm states, or the "initial" ones only, where the two kinds differ
    count: int  #: high-norm states behind the direction
    embedding: Tensor  #: input embeddings, (V, d)
    output_embedding: Tensor | None  #: untied output embeddings, (V, d), or None
    output_gain: Tensor  #: gain of the norm before them, (d,)
    tokenizer: object  #: the model's
    text_hash: str | None  #: of the lines that were read

    @functools.cached_property
    def pieces(self) -> dict[str, int]:
        """Row of every piece of the tokenizer's vocabulary."""
        return {piece: i for piece, i in self.tokenizer.get_vocab().items() if i < len(self.embedding)}

    @functools.cached_property
    def texts(self) -> dict[str, int]:
        """Row of every token by the text it stands for, " the" and "the" apart; special ones have none."""
        anchor = self.tokenizer.encode("a", add_special_tokens=False)[-1]
        ids = sorted({*self.pieces.values()} - {*self.tokenizer.all_special_ids}, reverse=True)
        pairs = [[anchor], *([anchor, i] for i in ids)]
        first, *texts = self.tokenizer.batch_decode(pairs, clean_up_tokenization_spaces=False)
        found = {text[len(first) :]: i for text, i in zip(texts, ids, strict=True)}
        return {text: i for text, i in found.items() if text and "\ufffd" not in text}

    @property
    def massive(self) -> dict[int, float]:
        """The massive coordinates of the direction, the largest first, with their values."""
        u = torch.zeros(0) if self.direction is None else self.direction
        order = u.abs().argsort(descending=True).tolist()
        return {i: u[i].item() for i in order if u[i] ** 2 >= MASSIVE_SHARE}


def signature(loaded: object, text: object, *, seed: int = 0) -> Signature:
    """Measure a model's signature on a text.

    With a begin token at position 0 the first state is the same in every line, and the radius says nothing.

    Args:
        loaded: the model (`sdnb.load`).
        text: encoded lines (`sdnb.encode`).
        seed: of the resampling.

    Returns:
        The signature; its direction is None where no token of the text is high-norm.
    """
    states = find_defect(loaded, text).states
    initial = states.position == 0
    means = (states.states[which].double().mean(dim=0) for which in (initial, ~initial))
    apart = float(angle_deg(*means)) > DIFFERENT_KINDS_DEG  # not where one kind has none: the angle is NaN
    chosen, kind = (initial, "initial") if apart else (torch.ones_like(initial), "all")
    direction = radius = None
    if len(states.states):
        direction, radius = _resampled_mean(states.states[chosen], states.line[chosen], len(text.lines), seed)
    embedding, output = _embeddings(loaded.model)
    return Signature(
        loaded.name, direction, radius, kind, int(chosen.sum()), embedding, output,
        _final_gain(loaded.model, embedding.shape[1]), loaded.tokenizer, text.hash,
    )  # fmt: skip


def _resampled_mean(states: Tensor, line: Tensor, lines: int, seed: int) -> tuple[Tensor, float]:
    """Unit mean of states (n, d), and the angle within which 95 % of the means over resampled lines lie."""
    sums = torch.zeros(lines, states.shape[1], dtype=torch.float64).index_add_(0, line, states.double())
    counts = torch.bincount(line, minlength=lines).double()
    draws = torch.randint(lines, (_REPLICATES, lines), generator=torch.Generator().manual_seed(seed))
    times = torch.stack([torch.bincount(draw, minlength=lines) for draw in draws]).double()
    mean, means = sums.sum(dim=0), (times @ sums)[times @ counts > 0]
    radius = torch.quantile(angle_deg(means, mean), 0.95).item()
    return nn.functional.normalize(mean, dim=0).float(), radius


def _embeddings(model: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Copies of the input and the output embeddings, (V, d) each; no output where it is tied or offloaded."""
    module, head = model.get_input_embeddings(), model.get_output_embeddings()
    with torch.no_grad():  # by a call, which works for offloaded weights, too
        rows = module(torch.arange(len(module.weight), device=input_device(model))).to("cpu", copy=True)
    if head is None or head.weight is module.weight or head.weight.is_meta:
        return rows, None
    return rows, head.weight.detach().to("cpu", copy=True)


def _final_gain(model: nn.Module, d: int) -> Tensor:
    """The gain of the norm before the output embeddings, (d,), measured; ones where there is no norm."""
    parts = model.get_decoder().children()
    norms = [part for part in parts if getattr(getattr(part, "weight", None), "shape", None) == (d,)]
    if not norms or norms[-1].weight.is_meta:
        return torch.ones(d)
    x = torch.ones_like(norms[-1].weight)[None, None]
    x[..., 1::2] = -1  # its mean is zero
    with torch.no_grad():
        return ((norms[-1](x) - norms[-1](-x)) / 2 / x).flatten().float().cpu()


@dataclass(frozen=True)
class Alignment:
    """How alike two tables of embeddings are up to a rotation."""

    value: float  #: nuclear norm of A^T B over |A| |B|, 0 to 1
    shuffled: float  #: the same with the rows of B shuffled
    rotation: Tensor  #: orthogonal Procrustes, (d_a, d_b): it carries vectors of B's space into A's

    @property
    def beyond_shuffled(self) -> float:
        """(value - shuffled) / (1 - shuffled), which depends on the number of tokens less than the value."""
        return (self.value - self.shuffled) / (1 - self.shuffled)

    def says(self, limits: tuple[float, float]) -> str | None:
        """The verdict by these limits; None where so few tokens are shared that any two tables are alike."""
        if self.shuffled > _TOO_FEW_TOKENS:
            return None
        return _VERDICTS[2 - sum(self.beyond_shuffled >= limit for limit in limits)]


def alignment(first: Tensor, second: Tensor, *, seed: int = 0) -> Alignment:
    """Align two tables of embeddings: sum of the singular values of A^T B, over |A| |B|.

    Rows are centred over the tokens and brought to unit length; with A^T B = U S V^T the rotation is U V^T.

    Args:
        first: a row for each token, (n, d_a).
        second: rows of the same tokens in the same order, (n, d_b).
        seed: of the shuffling.

    Returns:
        The alignment.
    """
    A, B = _unit_rows(first), _unit_rows(second)
    size = (A.norm(dtype=torch.float64) * B.norm(dtype=torch.float64)).item()
    U, S, Vh = torch.linalg.svd(A.T @ B, full_matrices=False)
    order = torch.randperm(len(B), generator=torch.Generator().manual_seed(seed))
    shuffled = torch.linalg.svdvals(A.T @ B[order]).sum().item()
    return Alignment(S.sum().item() / size, shuffled / size, U @ Vh)


def _unit_rows(E: Tensor) -> Tensor:
    """Rows centred and of unit length, (n, d) in float32."""
    return nn.functional.normalize(E.float() - E.float().mean(dim=0), dim=1)


def _shared_tokens(first: Signature, second: Signature) -> tuple[Tensor, Tensor]:
    """Rows of the tokens that two models share: by their pieces with one tokenizer, else by their texts."""
    same = first.tokenizer.get_vocab() == second.tokenizer.get_vocab()
    a, b = (first.pieces, second.pieces) if same else (first.texts, second.texts)
    both = sorted(a.keys() & b.keys())
    return tuple(torch.tensor([rows[token] for token in both], dtype=torch.int64) for rows in (a, b))


def _log10_isotropic_chance(angle: float, d: int) -> float:
    """log10 of the chance of an angle in degrees between isotropic directions; -9999 for an angle of zero."""
    return max(log10_chance(angle, d), -9999.0)


def _log10_permutation_chance(first: Tensor, second: Tensor, angle: float) -> float:
    """log10 of how often a random signed permutation brings two directions within an angle in degrees."""
    # P(|sum_i s_i a_i b_pi(i)| >= cos angle) for random signs s and a random permutation pi. Where the four
    # largest coordinates of a fall, on which of the four largest of b, is enumerated; the rest of the sum is
    # taken as normal, with its variance.
    units = (nn.functional.normalize(x.double(), dim=0) for x in (first, second))
    a, b = (u.abs().sort(descending=True).values.numpy() for u in units)
    top = min(_TOP, len(a) // 2)
    rest_a, rest_b = (np.square(x[top:]).mean() for x in (a, b))
    ways = []

    def place(i: int, left: tuple, log_p: float, matched: float, variance: float) -> None:
        free = len(a) - i
        if i == top:
            ways.append((log_p, matched, variance + sum(b[j] ** 2 for j in left) * rest_a))
            return
        place(i + 1, left, log_p + np.log1p(-len(left) / free), matched, variance + a[i] ** 2 * rest_b)
        for j, sign in itertools.product(left, (1, -1)):
            others = tuple(k for k in left if k != j)
            place(i + 1, others, log_p - np.log(2 * free), matched + sign * a[i] * b[j], variance)

    place(0, tuple(range(top)), 0.0, 0.0, (len(a) - top) * rest_a * rest_b)
    log_p, matched, variance = np.array(ways).T
    missing = np.cos(np.radians(angle)) - 1e-9 - matched
    tails = log_ndtr(-missing / np.sqrt(variance.clip(min=1e-30)))
    return min((logsumexp(log_p + tails) + np.log(2)).item() / math.log(10), 0.0)


def compare_signatures(first: Signature, second: Signature, *, chance: float = CHANCE, seed: int = 0) -> dict:
    """Compare two signatures.

    The angle between the true directions differs from the measured one by at most the sum of both radii. The
    direction says "related" when even the largest such angle is less likely than `chance` under both nulls,
    "undecided" when only the smallest is; the embeddings by the limits of this module. One that says
    "related" decides, unless the other has reasons against it: then the verdict is "undecided".

    Args:
        first: a signature.
        second: another one.
        chance: limit of the chance of the angle.
        seed: of the shuffled tokens.

    Returns:
        A row of record 13, with None where there is nothing to tell: `first`, `second`; `angle_deg`,
        `uncertainty_deg`, `chance_log10` (the larger of `isotropic_log10` and `permutation_log10`),
        `beyond_massive_deg` and `beyond_massive_log10` (without the massive coordinates of both);
        `shared_tokens`, `alignment`, `shuffled_alignment`, `alignment_beyond_shuffled`, `output_alignment`;
        `carried_angle_deg` and `carried_log10` (after the rotation of the embeddings); what `direction` and
        `embeddings` say; `verdict`, `note`.

    Raises:
        ParameterError: a chance outside of 0 to 1.
    """
    if not 0 < chance < 1:
        raise ParameterError(f"chance is {chance}: give a probability between 0 and 1")
    limit, both = math.log10(chance), (first, second)
    row = {"first": first.name, "second": second.name} | dict.fromkeys(_NUMBERS)
    row |= _directions(first, second, limit) | _embeddings_of(first, second, seed)
    sizes = [x.embedding.shape[1] for x in both]
    notes = [f"{x.name} has no high-norm token" for x in both if x.direction is None]
    notes += [f"widths {sizes[0]} and {sizes[1]}"] if sizes[0] != sizes[1] else []
    notes += ["different tokenizers"] if first.tokenizer.get_vocab() != second.tokenizer.get_vocab() else []
    notes += ["measured on different texts"] if first.text_hash != second.text_hash else []
    notes += [f"{first.kind} and {second.kind} states"] if first.kind != second.kind else []
    direction, embeddings, carried = row["direction"], row["embeddings"], row["carried_log10"]
    row["verdict"] = next((v for v in _VERDICTS if v in (direction, embeddings)), "not comparable")
    if direction == "related" and embeddings == _VERDICTS[2]:
        row["verdict"] = "undecided"
        notes.append("the directions agree, the embeddings do not")
    elif embeddings == "related" and direction != "related" and carried is not None:
        moved = carried < limit
        row["verdict"] = "related" if moved else "undecided"
        notes.append("in other coordinates" if moved else "the embeddings agree, the directions do not")
    return row | {"note": "; ".join(notes)}


def _directions(first: Signature, second: Signature, limit: float) -> dict:
    """What the angle between two directions says."""
    a, b, d = first.direction, second.direction, first.embedding.shape[1]
    if a is None or b is None or len(a) != len(b):
        return {}
    angle, spread = float(angle_deg(a, b)), first.radius_deg + second.radius_deg
    near, here, far = (
        (_log10_isotropic_chance(x, d), _log10_permutation_chance(a, b, x))
        for x in (max(angle - spread, 0.0), angle, min(angle + spread, 90.0))
    )
    row = dict(angle_deg=angle, uncertainty_deg=spread, chance_log10=max(here))
    row |= dict(isotropic_log10=here[0], permutation_log10=here[1])
    row["direction"] = _VERDICTS[2 - (max(near) < limit) - (max(far) < limit)]
    rest = sorted({*range(d)} - first.massive.keys() - second.massive.keys())
    if len(rest) > 1:
        row["beyond_massive_deg"] = beyond = float(angle_deg(a[rest], b[rest]))
        row["beyond_massive_log10"] = _log10_isotropic_chance(beyond, len(rest))
    return row


def _embeddings_of(first: Signature, second: Signature, seed: int) -> dict:
    """What the embeddings of two models say, and the angle between the directions after their rotation."""
    rows, second_rows = _shared_tokens(first, second)
    if len(rows) < 2:
        return {"shared_tokens": len(rows)}
    tables = first.embedding[rows], second.embedding[second_rows]
    found = alignment(*tables, seed=seed)
    row = dict(shared_tokens=len(rows), alignment=found.value, shuffled_alignment=found.shuffled)
    row |= dict(alignment_beyond_shuffled=found.beyond_shuffled, embeddings=found.says(INPUT_LIMITS))
    if first.output_embedding is not None and second.output_embedding is not None:
        output = alignment(
            first.output_embedding[rows].float() * first.output_gain,
            second.output_embedding[second_rows].float() * second.output_gain,
            seed=seed,
        )
        row["output_alignment"] = output.value
        said = {row["embeddings"], output.says(OUTPUT_LIMITS)}  # the one that tells more
        row["embeddings"] = next((verdict for verdict in _VERDICTS if verdict in said), None)
    if first.direction is None or second.direction is None:
        return row
    a, b = first.direction, second.direction
    # How much the embeddings vary along a direction: where they hardly do, their rotation is not determined.
    reach = [len(u) * (_unit_rows(E) @ u).square().mean() for E, u in zip(tables, (a, b), strict=True)]
    if min(reach) >= _REACH:
        row["carried_angle_deg"] = angle = float(angle_deg(a, found.rotation @ b))
        row["carried_log10"] = _log10_isotropic_chance(angle, min(len(a), len(b)))
    return row


def related_groups(names: Sequence[str], pairs: Sequence[dict]) -> list[int]:
    """Number the groups of related models, chains of related pairs, from 1 in the order of the names."""
    place = {name: i for i, name in enumerate(names)}
    related = np.zeros((len(names), len(names)))
    for row in pairs:
        related[place[row["first"]], place[row["second"]]] = row["verdict"] == "related"
    return (connected_components(related, directed=False)[1] + 1).tolist()


# --- the command


def signature_command(args: object, **loading: object) -> int:
    """Do what `sdnb signature` does: compare the models, two by two, and print what was found."""
    names, found = list(dict.fromkeys(args.models)), []
    if not 0 < args.chance < 1:  # refused before the first model is measured
        raise ParameterError(f"--chance {args.chance:g}: give a probability between 0 and 1")
    for name in names:
        locate(name, loading.get("revision"))
    for name in progress(names, desc="signatures"):
        loaded = load(name, **loading)
        found.append(signature(loaded, encode(loaded, args.text, max_lines=args.max_lines)))
        del loaded
    pairs = [compare_signatures(a, b, chance=args.chance) for a, b in itertools.combinations(found, 2)]
    values = {"names": names, "groups": related_groups(names, pairs), "pairs": pairs}
    print(json.dumps(values, indent=1, ensure_ascii=False) if args.json else _described(**values))  # noqa: T201
    return 0


def _described(names: Sequence[str], groups: Sequence[int], pairs: Sequence[dict]) -> str:
    """A comparison as text for a terminal: the groups, then the pairs, the surest first."""

    def shown(value: float | None, form: str) -> str:
        return "-" if value is None else form.format(value)

    lines = ["group  model", *(f"{group:>5}  {name}" for group, name in zip(groups, names, strict=True)), ""]
    lines.append(f"{'verdict':<21}  {'angle':>14}  log10 chance  embeddings  {'carried':>7}  models")
    for row in sorted(pairs, key=lambda row: _VERDICTS.index(row["verdict"])):
        angle = " ± ".join(shown(row[key], "{:.2f}°") for key in ("angle_deg", "uncertainty_deg"))
        lines.append(
            f"{row['verdict']:<21}  {angle:>14}  {shown(row['chance_log10'], '{:.1f}'):>12}  "
            f"{shown(row['alignment'], '{:.3f}'):>10}  {shown(row['carried_angle_deg'], '{:.1f}°'):>7}  "
            f"{row['first']}  {row['second']}  {row['note']}".rstrip()
        )
    return "\n".join(lines) + (
        "\n\nchance: of so small an angle between unrelated directions, the larger one of two nulls"
        "\nembeddings: alignment, 1 for a rotated copy; judged by how far it is above shuffled tokens'"
        "\ncarried: the angle after the rotation that aligns the embeddings"
    )
