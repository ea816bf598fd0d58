"""What the anatomy makes of one model type: a small random model, all its layers, and their broken twins."""

from collections import Counter

from sdnb.errors import ModelError, SdnbError
from sdnb.layers.broken import broken_views, caught
from sdnb.layers.overrides import NO_SPECIAL_CASE, OUT_OF_SCOPE
from sdnb.layers.reading import layer_view
from sdnb.layers.small_configs import FORMS, HEADS, small_model
from sdnb.layers.trace import decoder_layers
from sdnb.layers.view import LayerView

WORST_FIRST = ("sampled", "approximate", "exact")


def cover(kind: str) -> dict:
    """Builds a small random model of a type and puts every layer through the check.

    Args:
        kind: a type of the causal-LM mapping.

    Returns:
        `status` ("exact", "approximate", "sampled", "refused", "unbuilt"; of several layers the worst
        that was taken), `reason`, for a refusal whether it is `out_of_scope`, the numbers of the `layers`
        taken `of` how many, attention's `error` on normed rows and `error_far` on their sums and multiples,
        the `form` it was built in where there are others, and for an exact layer `twins`: kind of damage ->
        [caught, tried].
    """
    try:
        model = small_model(kind)
    except ModelError as error:
        named = (OUT_OF_SCOPE | NO_SPECIAL_CASE).get(kind)
        if named is not None:
            return {"status": "refused", "out_of_scope": kind in OUT_OF_SCOPE, "reason": named}
        return {"status": "unbuilt", "reason": str(error)}
    refused = {"status": "refused", "out_of_scope": kind in OUT_OF_SCOPE}
    try:
        layers = len(decoder_layers(model))
    except SdnbError as error:
        return refused | {"reason": str(error)}
    views: list[LayerView] = []
    reasons: list[str] = []
    for number in range(1, layers + 1):
        try:
            views.append(layer_view(model, number))
        except SdnbError as error:
            reasons.append(str(error))
    row: dict = {"reason": reasons[0] if reasons else None, "of": layers}
    row |= {"form": FORMS[kind]} if kind in FORMS else {}
    if not views:
        return refused | row
    row["status"] = next(status for status in WORST_FIRST if any(view.status == status for view in views))
    row["layers"] = [view.number for view in views]
    row["error"] = max(view.errors.attention for view in views)
    row["error_far"] = max(view.errors.linearity for view in views)
    exact = next((view for view in views if view.status == "exact"), None)
    if exact is not None:
        row["twins"] = tried_twins(exact, HEADS)
    return row


def tried_twins(view: LayerView, heads: int) -> dict[str, list[int]]:
    """How many broken twins of a layer the check refuses.

    Args:
        view: a view that passed the check.
        heads: how many attention heads the layer has.

    Returns:
        Kind of damage -> [caught, tried].
    """
    found: Counter[str] = Counter()
    tried: Counter[str] = Counter()
    for kind, twin in broken_views(view, heads):
        tried[kind] += 1
        found[kind] += caught(twin)
    return {kind: [found[kind], count] for kind, count in tried.items()}
