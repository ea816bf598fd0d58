"""The book's page about speed, written from the stored records.

python benchmarks/page.py            # writes book/performance.md
"""

import itertools
import json
import re
from pathlib import Path

from common import RESULTS, table, times

PAGE = Path(__file__).parents[1] / "book" / "performance.md"
ABOUT = {
    "linearize": (
        "The FFN's linear fit",
        "B of one layer, from its weights alone and from random inputs. The closed form passes over W and V "
        "once and integrates each unit (its operations count the passes alone); the sampled ways multiply "
        "100,000 inputs by them. The aims at d 2048 are 1000 times (least squares) and 300 times (normal "
        "equations). With as few inputs as were measured a sampled answer is far off; its error falls with "
        "the square root of what they exceed d by.",
    ),
    "decompose": (
        "Leading singular triplets",
        "Two leading triplets of a d x d matrix with two planted ones, by filtered subspace iteration, "
        "against all of them. The iteration takes products with a few vectors, each of which reads the "
        "matrix: bytes are those of one reading, so the limit is out of its reach. "
        "Where values differ on a GPU, it is cuSOLVER's float32 ones that are off: the section on the "
        "singular values of all weight matrices compares them with float64.",
    ),
    "eigenpair": (
        "The nearest eigenpair",
        "The eigenpair of L - I nearest to a direction 20 degrees from it, against a dense decomposition of "
        "the same matrix. Outside the bulk 12 products find it; inside the bulk a factorisation is needed. "
        "The operations are those of these parts alone: checks and small bases come on top. The aim at "
        "d 4096 is 20 times.",
    ),
    "model": (
        "A whole model",
        "All layers: watching and checking each, A, F in closed form, L, and the two leading triplets of all "
        "three. Against it the paper's least squares and three full decompositions a layer. The aims for the "
        "Llama-2-7B shape on one H200 are 5 s and 500 times. The second supposed that a full decomposition "
        "takes minutes; cuSOLVER's takes about a second (above), with values that are off. What is left of "
        "ours is of three kinds: the check of each layer, which a host's Python starts kernel by kernel; "
        "products on tensor cores, of bfloat16 pieces, where the limit counts float32 ones; and the "
        "triplets, which read every matrix many times.",
    ),
    "real": (
        "A real model beside the authors' way",
        "All 30 layers of SmolLM2-135M: watching and checking each, F in closed form, L, its two leading "
        "triplets and the eigenpair of L - I nearest to the empirical direction; against 100,000 random "
        "inputs, least squares, a full decomposition of L and all eigenvectors of L - I. The answers differ "
        "by the sampling noise that is expected of theirs. The aim is 100 times.",
    ),
    "quantize": (
        "Simulated quantization",
        "Perplexity of SmolLM2-135M on four windows of 512 tokens, plainly and with every linear module's "
        "weight and input rounded in the forward pass; then detection's statistics of the inputs. Rows are "
        "in units of the plain passes. The aim is 1.5 times for each scheme.",
    ),
    "offload": (
        "A model larger than the memory",
        "A random model on disk goes through the linear layer, its leading triplets and its nearest "
        "eigenpair one layer at a time. Bytes are those of the stored weights; operations leave out the "
        "checks of each layer, the triplets and the eigenpair. The aim is a peak of anonymous memory (with "
        "what was held before) below three layers' stored weights plus 2 GiB. On a CPU the weights of a "
        "model in memory may stay mapped from their files, and those pages are not anonymous either.",
    ),
    "vocabulary": (
        "A sweep of the vocabulary",
        "Every item as a sequence of its own, up to the layer that is read; the last layer is what a plain "
        "forward pass computes. The aims: the cost grows with that layer and not with the depth, and all "
        "items of a 1B shape fit in 8 GiB.",
    ),
    "spectra": (
        "Singular values of all weight matrices",
        "The seven matrices of a layer, times the layers of the model. Ours takes the eigenvalues of the "
        "smaller Gram matrix in float64.",
    ),
    "fit": (
        "The Marchenko-Pastur fit",
        "Ours beside WeightWatcher's, on noise with entries of variance one, with and without five values "
        "planted above the bulk. What a row found stands in the column of differences.",
    ),
}
WANTED = [
    ("linearize", "llama-3.2-1b", "cpu"), ("linearize", "llama-2-7b", "cpu"),
    ("decompose", "llama-3.2-1b", "cpu"), ("decompose", "llama-2-7b", "cpu"),
    ("eigenpair", "llama-3.2-1b", "cpu"), ("eigenpair", "llama-2-7b", "cpu"),
    ("model", "llama-3.2-1b", "cpu"), ("real", "smollm2", "cpu"), ("quantize", "smollm2", "cpu"),
    ("offload", "quarter-70b", "cpu"), ("offload", "llama-3-70b", "cpu"),
    ("vocabulary", "llama-3.2-1b", "cpu"), ("spectra", "llama-3.2-1b", "cpu"), ("fit", "known", "cpu"),
    ("model", "llama-2-7b", "cuda"),
    ("linearize", "llama-3.2-1b", "cuda"), ("linearize", "llama-2-7b", "cuda"),
    ("decompose", "llama-3.2-1b", "cuda"), ("decompose", "llama-2-7b", "cuda"),
    ("eigenpair", "llama-3.2-1b", "cuda"), ("eigenpair", "llama-2-7b", "cuda"),
    ("vocabulary", "llama-3.2-1b", "cuda"), ("spectra", "llama-3.2-1b", "cuda"),
]  # fmt: skip
HEAD = """# What it costs

<!-- written by `python benchmarks/page.py` from benchmarks/results/; not by hand -->

Each table is one run of a script in `benchmarks/` on one machine, on random weights of the shape named;
`make bench` repeats those that take minutes. Ratios hold within a table. On a CPU they are ratios of
processor time, which does not count what other programs did meanwhile: where the load named exceeds the
cores, wall times are several times longer than on an idle machine, and processor times suffer from shared
caches and memory. With a GPU they are ratios of wall time. Memory is what was taken at most above what was
held before: anonymous memory of the process, sampled every 10 ms, or the GPU's.

"At the limit" is the time that the method would take if it reached, throughout, the rate of a float32 matrix
product and of reading memory that were measured in the same run: the larger of operations over the one and
bytes over the other.
"""


def records(folder: Path) -> list[dict]:
    """The stored records in the order of the page.

    Args:
        folder: where they are.

    Returns:
        Those that exist, wanted ones first to last.
    """
    names = [folder / f"{'-'.join(key)}.json" for key in WANTED]
    return [json.loads(path.read_text(encoding="utf8")) for path in names if path.is_file()]


def limit_table(record: dict) -> str:
    """What each way costs at the limit beside what was reached."""
    gpu, rates = record["machine"]["gpu"] is not None, record["limits"]
    lines = ["| how | operations | bytes read | at the limit, s | reached, s |", "|---|---:|---:|---:|---:|"]
    for row in record["rows"]:
        least = max(row["operations"] / rates["operations_per_s"], row["bytes"] / rates["bytes_per_s"])
        reached = row["wall_s" if gpu else "cpu_s"]
        costs = f"{row['operations']:.2g} | {row['bytes']:.2g} | {least:.3g} | {reached:.3g}"
        lines.append(f"| {row['what']} | {costs} |")
    return "\n".join(lines)


def said(key: str, value: object) -> str:
    """A fact in words, a fraction with three digits."""
    if key == "within":
        return "within what is allowed" if value else "beyond what is allowed"
    number = f"{value:.3g}" if isinstance(value, float) else str(value)
    unit = " GiB" if key.endswith("_gib") else ""
    return f"{key.removesuffix('_gib').replace('_', ' ')} {number}{unit}"


def section(record: dict) -> str:
    """One record's heading, machine, table and limits."""
    there = record["machine"]
    place = f"{there['processor']}, {there['cores']} cores, {there['threads']} used, load {there['load']}"
    place += f", {there['gpu']}" if there["gpu"] else ""
    versions = f"Python {there['python']}, torch {there['torch']}, transformers {there['transformers']}"
    facts = ", ".join(said(*fact) for fact in record["facts"].items())
    head = f"### {record['shape']}, {record['device']}\n\n{record['date']}; {place}; {versions}; {facts}.\n\n"
    if not any(row["operations"] for row in record["rows"]):
        return f"{head}{table(record)}\n"
    rates = record["limits"]
    speed = f"{rates['operations_per_s'] / 1e9:.0f} GFLOP/s, {rates['bytes_per_s'] / 1e9:.0f} GB/s"
    return f"{head}{table(record)}\n\nAt the limit ({speed}):\n\n{limit_table(record)}\n"


def open_rows(there: list[dict]) -> str:
    """What is wanted and was not measured yet."""
    done = {(r["benchmark"], r["shape"], r["device"]) for r in there}
    cut = {"llama-3-70b": " --layers 8"}
    left = [(n, s + cut.get(s, ""), d) for n, s, d in WANTED if (n, s, d) not in done]
    lines = [f"- `benchmarks/{n}.py --shape {s} --device {d}`" for n, s, d in left]
    if not lines:
        return ""
    why = "Not measured yet; rows with `cuda` wait for a GPU, the others for an idle machine with the memory:"
    return f"\n## Open\n\n{why}\n\n" + "\n".join(lines) + "\n"


def comparable(ours: str, other: str) -> bool:
    """Whether two rows are about the same thing: what stands before a colon, and the number of items."""
    items = [re.findall(r"[\d,]+ items", what) for what in (ours, other)]
    about = [what.partition(": ")[0] for what in (ours, other)]
    return items[0] == items[1] and (": " not in ours or about[0] == about[1])


def summary(there: list[dict]) -> str:
    """One line a record: how many times longer the straightforward ways take."""
    lines = ["\n| benchmark | shape | device | ours | against | times |", "|---|---|---|---|---|---:|"]
    for record in there:
        key, rows = ("wall_s" if record["machine"]["gpu"] else "cpu_s"), record["rows"]
        for ours, other in itertools.product(rows, rows):
            if (
                comparable(ours["what"], other["what"])
                and "ours" in ours["what"]
                and "ours" not in other["what"]
            ):
                factor = times(other[key] / ours[key])
                name = ours["what"].replace(" (ours)", "").removeprefix("ours, ")
                start = (record["benchmark"], record["shape"], record["device"])
                lines.append("| " + " | ".join((*start, name, other["what"], factor)) + " |")
    return "\n".join(lines) + "\n"


def page(folder: Path) -> str:
    """The page's text.

    Args:
        folder: where the records are.

    Returns:
        Markdown.
    """
    there = records(folder)
    text = HEAD + summary(there)
    for name, (title, words) in ABOUT.items():
        sections = [section(record) for record in there if record["benchmark"] == name]
        if sections:
            text += f"\n## {title}\n\n{words}\n\n" + "\n".join(sections)
    return text + open_rows(there)


if __name__ == "__main__":
    PAGE.write_text(page(RESULTS), encoding="utf8")
