"""Text that every machine with the packages installed has: documentation strings, and what is held out.

Training text comes from the documentation strings of the standard library and of `site-packages`. The topics
of `pydoc_data` are held out for evaluation: no training document shares a run of `SHARED_WORDS` words with
them.
"""

import ast
import hashlib
import importlib.metadata
import inspect
import re
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

MINIMUM_CHARACTERS = 200
MINIMUM_SOURCE_CHARACTERS = 400
SHARED_WORDS = 13
LEFT_OUT_OF_STDLIB = {"site-packages", "dist-packages", "test", "tests", "idle_test", "pydoc_data"}
LEFT_OUT_OF_PACKAGES = {"sdnb", "zoo", "pydoc_data"}
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True)
class Corpus:
    """Documents to train on, with what they came from.

    Attributes:
        documents: the texts, in a fixed order, without duplicates.
        packages: licence and version of every distribution that gave at least one document.
        hash: SHA-256 over the documents, in hexadecimal.
    """

    documents: list[str]
    packages: dict[str, dict[str, str]]
    hash: str


def text_hash(documents: list[str]) -> str:
    """Fingerprint a list of documents: SHA-256 over their UTF-8 bytes, each followed by a zero byte.

    Args:
        documents: the texts.

    Returns:
        64 hexadecimal digits.
    """
    digest = hashlib.sha256()
    for document in documents:
        digest.update(document.encode("utf-8", "surrogatepass") + b"\0")
    return digest.hexdigest()


def held_out_documents() -> list[str]:
    """Read the held-out text: the topics of `pydoc_data`, in the order of their names.

    Returns:
        One text for each topic of the Python language reference that `help()` shows.
    """
    from pydoc_data import topics

    return [topics.topics[name] for name in sorted(topics.topics)]


def word_runs(text: str, length: int = SHARED_WORDS) -> set[int]:
    """Hash every run of consecutive words, in lower case and without punctuation.

    Args:
        text: any text.
        length: words in a run.

    Returns:
        One hash for each run; empty for a text of fewer words.
    """
    words = re.findall(r"\w+", text.lower())
    return {hash(tuple(words[i : i + length])) for i in range(len(words) - length + 1)}


def source_files() -> Iterator[tuple[str, Path]]:
    """List the Python files of the standard library and of `site-packages`, in a fixed order.

    Yields:
        The first part of the path below its root (a package's folder, or a module's file), and the path. For
        the standard library the first part is `"python"`.
    """
    stdlib = Path(sysconfig.get_path("stdlib"))
    for path in sorted(stdlib.rglob("*.py"), key=lambda path: path.relative_to(stdlib).as_posix()):
        if not LEFT_OUT_OF_STDLIB.intersection(path.relative_to(stdlib).parts):
            yield "python", path
    for root in dict.fromkeys(Path(sysconfig.get_path(kind)) for kind in ("purelib", "platlib")):
        for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix()):
            parts = path.relative_to(root).parts
            if not LEFT_OUT_OF_PACKAGES.intersection(parts):
                yield parts[0], path


def docstrings_of(source: str) -> list[str]:
    """Read the documentation strings of a module, its classes and functions, with indentation removed.

    Args:
        source: Python source.

    Returns:
        The strings in the order of the syntax tree; empty when the source cannot be parsed.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            tree = ast.parse(source)
        except (SyntaxError, ValueError, RecursionError):
            return []
    found = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, DOCUMENTED))
    return [text.strip() for text in found if text]


def question_for(kind: str, name: str) -> str:
    """Ask for the documentation of a named object in a plain sentence.

    Args:
        kind: `"class"` or `"function"`.
        name: the object's name.

    Returns:
        The question.
    """
    return f"What is the class {name} for?" if kind == "class" else f"What does the function {name} do?"


def questions_of(source: str) -> list[str]:
    """Turn a module's documentation strings into questions and answers about its classes and functions.

    Args:
        source: Python source.

    Returns:
        Texts of the form `Question: ... Answer: ...`, the answer the documentation's first two paragraphs.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            tree = ast.parse(source)
        except (SyntaxError, ValueError, RecursionError):
            return []
    texts = []
    for node in ast.walk(tree):
        if not isinstance(node, DOCUMENTED[1:]) or not (documentation := ast.get_docstring(node)):
            continue
        kind = "class" if isinstance(node, ast.ClassDef) else "function"
        answer = "\n\n".join(inspect.cleandoc(documentation).split("\n\n")[:2]).strip()
        texts.append(f"Question: {question_for(kind, node.name)}\nAnswer: {answer}")
    return texts


def code_of(source: str) -> list[str]:
    """Take a Python file as one document, with its documentation strings left in place.

    Args:
        source: Python source.

    Returns:
        The source alone, or nothing when it is too short to say anything.
    """
    return [source.strip()]


READERS = {
    "docstrings": (docstrings_of, MINIMUM_CHARACTERS),
    "questions": (questions_of, MINIMUM_CHARACTERS),
    "code": (code_of, MINIMUM_SOURCE_CHARACTERS),
}
STDLIB_ONLY = {"code"}  # the source of all packages would be ten times the other texts


def collect(source: str = "docstrings") -> Corpus:
    """Collect a training text from the installed packages, without anything of the held-out text.

    A document is dropped when it is short, when it was seen before, or when it shares a run of `SHARED_WORDS`
    words with the held-out topics.

    Args:
        source: `"docstrings"`, `"questions"` (documentation shaped as questions and answers) or `"code"` (the
            source of the standard library).

    Returns:
        The documents, the packages that they came from, and their hash.

    Raises:
        ValueError: if there is no such source.
    """
    if source not in READERS:
        raise ValueError(f"There is no text source {source!r}: choose one of {', '.join(READERS)}.")
    reader, minimum = READERS[source]
    forbidden = set().union(*(word_runs(topic) for topic in held_out_documents()))
    documents: dict[str, None] = {}
    origins = set()
    for origin, path in source_files():
        if source in STDLIB_ONLY and origin != "python":
            continue
        try:
            content = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        for text in reader(content):
            if len(text) > minimum and text not in documents and not forbidden & word_runs(text):
                documents[text] = None
                origins.add(origin)
    return Corpus(list(documents), package_table(origins), text_hash(list(documents)))


def package_table(origins: set[str]) -> dict[str, dict[str, str]]:
    """Look up version and licence of the distributions that own some folders of `site-packages`.

    Args:
        origins: folder or file names below `site-packages`, and `"python"` for the standard library.

    Returns:
        For each distribution its `version` and `licence`.
    """
    table = {}
    if "python" in origins:
        table["python"] = {"version": ".".join(map(str, sys.version_info[:3])), "licence": "PSF-2.0"}
    owners = importlib.metadata.packages_distributions()
    for origin in sorted(origins - {"python"}):
        for name in owners.get(origin.removesuffix(".py"), []):
            metadata = importlib.metadata.metadata(name)
            table[name.lower()] = {"version": metadata["Version"], "licence": licence_of(metadata)}
    return dict(sorted(table.items()))


def licence_of(metadata: importlib.metadata.PackageMetadata) -> str:
    """Read a distribution's licence: its SPDX expression, else its classifiers, else a short licence field.

    Args:
        metadata: the distribution's metadata.

    Returns:
        The licence in a few words, `"not stated"` when the metadata names none.
    """
    if expression := metadata.get("License-Expression"):
        return expression
    classifiers = [line for line in metadata.get_all("Classifier") or [] if line.startswith("License ::")]
    if classifiers:
        return ", ".join(sorted({line.split(" :: ")[-1] for line in classifiers}))
    stated = (metadata.get("License") or "").strip().splitlines()
    return stated[0][:60] if stated else "not stated"
