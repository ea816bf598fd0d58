"""What records 10 and 11 say, in words and tables; every number from the record or published."""

from sdnb.report import published_paths as published
from sdnb.report.paths import code
from sdnb.report.tables import number


def training_dynamics(v: dict) -> tuple[str, list]:
    """Say what record 10 holds.

    Args:
        v: its values.

    Returns:
        A sentence and the rows of the table.
    """
    exploded = [step for step, count in zip(v["steps"], v["high_norm_count"], strict=True) if count]
    settled = [
        step
        for number_, step in enumerate(v["steps"])
        if all(a is not None and a < 10 for a in v["angle_to_final_deg"][number_:])
    ]
    if not exploded:
        sentence = "No checkpoint has a high-norm token on this text."
    else:
        sentence = (
            f"The first checkpoint with a high-norm token is step {exploded[0]:,}. {_settling(v, settled)}"
        )
    rows = []
    columns = ("steps", "peak_ratio", "explosion_layers", "angle_to_final_deg", "sink_rate", "loss")
    for step, ratio, layers, angle, sink, loss in zip(*(v[key] for key in columns), strict=True):
        text = (
            f"ratio {number(ratio)}, explosion layers {number(layers)}, angle {number(angle, '°')}, sink "
            "rate "
            f"{number(sink)}, loss {number(loss)}"
        )
        rows.append((f"step {step:,}", text, published.SETTLES if step == v["steps"][-1] else ""))
    return sentence, rows


def _settling(v: dict, settled: list[int]) -> str:
    """When the direction has come within 10° of the last one for good, against paper A."""
    last = v["steps"][-1]
    if not settled or settled[0] == last:
        return "The direction does not settle within 10° of the last one before the end."
    if settled[0] <= last / 2:
        return (
            f"From step {settled[0]:,} on, the direction stays within 10° of the last one, as paper A says."
        )
    return f"The direction turns until late: it stays within 10° of the last one from step {settled[0]:,} on."


def fine_tuning(v: dict) -> tuple[str, list]:
    """Say what record 11 holds.

    Args:
        v: its values.

    Returns:
        A sentence and the rows of the table.
    """
    angles = dict(zip(v["names"][1:], v["angle_deg"][1:], strict=True))
    near = [name for name, angle in angles.items() if angle is not None and angle <= 10]
    far = [name for name in angles if name not in near]
    sentence = f"Within 10° of {code(v['names'][0])}: {', '.join(map(code, near)) or 'none'}."
    if far:
        sentence += f" Farther away, or without a direction: {', '.join(map(code, far))}."
    sentence += (
        f" Two random directions of this dimension make {number(v['random_angle_deg'], '°')} on average; "
        "paper A "
        "finds that a direction survives fine-tuning."
    )
    rows = []
    columns = ("names", "angle_deg", "explosion_layers", "decay_layers", "peak_ratio")
    for place, (name, angle, up, down, ratio) in enumerate(zip(*(v[key] for key in columns), strict=True)):
        text = (
            f"angle {number(angle, '°')}, explosion layers {number(up)}, decay layers {number(down)}, ratio "
            f"{number(ratio)}"
        )
        rows.append((code(name), text, published.SURVIVES if place == 1 else ""))
    return sentence, rows
