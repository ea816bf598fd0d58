"""The training text: what is collected, and that nothing of the held-out text is."""

from pathlib import Path

import pytest

from zoo import text

TOPIC = text.held_out_documents()[0]
FILLER = "This sentence only makes the documentation long enough for the collection. " * 4


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that stands for all installed packages."""
    files = lambda: [("toy", path) for path in sorted(tmp_path.glob("*.py"))]  # noqa: E731
    monkeypatch.setattr(text, "source_files", files)
    return tmp_path


def module(documentation: str) -> str:
    return f"def f():\n    {documentation!r}\n"


def test_docstrings_and_questions_about_them():
    source = (
        '"""M."""\nclass C:\n    """C.\n\n        in\n    """\n    async def g(self):\n        """G."""\n'
    )
    assert text.docstrings_of(source) == ["M.", "C.\n\nin", "G."]
    assert text.docstrings_of("def broken(:") == []
    source = 'def f():\n    """One.\n\n    Two.\n\n    Three."""\nclass K:\n    """Four."""\n'
    questions = text.questions_of(source)
    assert "Question: What does the function f do?\nAnswer: One.\n\nTwo." in questions
    assert "Question: What is the class K for?\nAnswer: Four." in questions


def test_short_and_repeated_documents_are_dropped(packages: Path):
    (packages / "a.py").write_text(module(FILLER))
    (packages / "b.py").write_text(module(FILLER) + module("too short"))
    corpus = text.collect()
    assert corpus.documents == [FILLER.strip()]
    assert corpus.hash == text.text_hash([FILLER.strip()])


def test_documents_that_quote_the_held_out_text_are_dropped(packages: Path, monkeypatch: pytest.MonkeyPatch):
    words = TOPIC.split()
    quotation = FILLER + " ".join(words[5 : 5 + 3 * text.SHARED_WORDS])
    (packages / "quoting.py").write_text(module(quotation))
    (packages / "other.py").write_text(module(FILLER))
    assert text.collect().documents == [FILLER.strip()]
    # The same file is collected when nothing is held out, so it is the filter that drops it.
    monkeypatch.setattr(text, "held_out_documents", list)
    assert len(text.collect().documents) == 2


def test_no_run_of_words_of_the_real_text_is_held_out(monkeypatch: pytest.MonkeyPatch):
    everything = list(text.source_files())
    assert not [path for _, path in everything if "pydoc_data" in path.parts]
    few = [(origin, path) for origin, path in everything if origin == "python" and path.name < "enum"][:60]
    monkeypatch.setattr(text, "source_files", lambda: few)
    documents = text.collect().documents
    assert len(documents) > 50

    def runs(document: str) -> set[str]:
        letters = (letter if letter.isalnum() or letter == "_" else " " for letter in document.lower())
        words = "".join(letters).split()
        return {" ".join(words[i : i + 13]) for i in range(len(words) - 12)}

    held_out = set().union(*map(runs, text.held_out_documents()))
    assert len(held_out) > 50_000
    assert not [document for document in documents if held_out & runs(document)]
