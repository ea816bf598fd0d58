"""Records are written whole or not at all, and what is torn or damaged is found out."""

import json
import os
import resource
import signal
from pathlib import Path

import pytest
import torch

from sdnb.errors import RecordError
from sdnb.records import SCHEMAS, Field, Schema, files, read, store, write

TEMPLATE = "00_sample"
PROVENANCE = {"model": "org/name", "fingerprint": "f" * 64, "layers": 2, "hidden_size": 4}
KEYS = ("first_to_second", "coefficient_first_mean", "coefficient_first_std", "coefficient_second_mean",
        "coefficient_second_std")  # fmt: skip


SAMPLE = Schema(
    TEMPLATE,
    "model",
    (
        *(Field(key, "a number", null=True) for key in KEYS),
        Field("per_layer", "a list", ("L",), required=False),
    ),
    (
        *(Field(name, "an array", ("d",)) for name in ("output_norms", "right_vector")),
        *(Field(name, "an array", ("V",)) for name in ("coefficients_first", "coefficients_second")),
    ),
)


@pytest.fixture(autouse=True, scope="module")
def sample():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SCHEMAS, TEMPLATE, SAMPLE)
        yield


def content(number: float, vocabulary: int = 5) -> tuple[dict, dict]:
    d = torch.full((4,), number)
    v = torch.full((vocabulary,), number)
    values = dict.fromkeys(KEYS, number)
    return values, {"output_norms": d, "right_vector": d, "coefficients_first": v, "coefficients_second": v}


def put(folder, number: float, provenance=PROVENANCE, vocabulary: int = 5):
    return write(folder, "org__name", TEMPLATE, *content(number, vocabulary), provenance)


def number_in(folder) -> float:
    """The number that a whole record holds in all its parts."""
    record = read(folder, "org__name", TEMPLATE)
    numbers = set(record.values.values()) | {float(x) for array in record.arrays.values() for x in array}
    assert len(numbers) == 1
    return numbers.pop()


def test_a_record_comes_back_as_it_was_written(tmp_path):
    written, back = put(tmp_path, 1.5), read(tmp_path, "org__name", TEMPLATE)
    assert back.values == written.values == content(1.5)[0]
    assert back.provenance == PROVENANCE
    assert all(torch.equal(back.arrays[name], array) for name, array in content(1.5)[1].items())
    assert sorted(path.name for path in (tmp_path / "org__name").iterdir()) == [
        ".lock", f"{TEMPLATE}.json", f"{TEMPLATE}.safetensors",
    ]  # fmt: skip


def test_floats_are_stored_as_float32_and_null_as_null(tmp_path):
    values, arrays = content(2.0)
    values["first_to_second"] = None
    arrays["output_norms"] = arrays["output_norms"].double()
    write(tmp_path, "org__name", TEMPLATE, values, arrays, PROVENANCE)
    back = read(tmp_path, "org__name", TEMPLATE)
    assert back.values["first_to_second"] is None
    assert {array.dtype for array in back.arrays.values()} == {torch.float32}


def test_a_view_of_a_larger_tensor_is_stored_alone(tmp_path):
    values, arrays = content(2.0)
    whole = torch.arange(8.0).reshape(4, 2)
    arrays |= {"output_norms": whole[:, 0], "right_vector": whole[:, 1]}
    write(tmp_path, "org__name", TEMPLATE, values, arrays, PROVENANCE)
    assert read(tmp_path, "org__name", TEMPLATE).arrays["right_vector"].tolist() == [1.0, 3.0, 5.0, 7.0]


def test_what_does_not_fit_the_schema_is_not_written(tmp_path):
    values, arrays = content(1.0)
    cases = [
        (values | {"first_to_second": float("nan")}, arrays, "finite"),
        (values | {"extra": 1}, arrays, "extra is not declared"),
        (values, arrays | {"output_norms": torch.zeros(3)}, "3 entries along d, expected 4"),
        (values, arrays | {"output_norms": torch.full((4,), float("nan"))}, "NaN"),
    ]
    for bad_values, bad_arrays, words in cases:
        with pytest.raises(RecordError, match=words):
            write(tmp_path, "org__name", TEMPLATE, bad_values, bad_arrays, PROVENANCE)
    with pytest.raises(RecordError, match="no schema"):
        write(tmp_path, "org__name", "99_none", {}, {}, PROVENANCE)
    assert not (tmp_path / "org__name").exists()


def test_lists_over_layers_are_held_against_the_models_layers(tmp_path):
    values, arrays = content(1.0)
    values["per_layer"] = [1.0, 2.0]
    write(tmp_path, "org__name", TEMPLATE, values, arrays, PROVENANCE)
    with pytest.raises(RecordError, match="2 entries along L, expected 3"):
        write(tmp_path, "org__name", TEMPLATE, values, arrays, PROVENANCE | {"layers": 3})


def test_a_missing_record_says_what_to_run(tmp_path):
    with pytest.raises(RecordError, match=f"run the notebook {TEMPLATE}"):
        read(tmp_path, "org__name", TEMPLATE)


def test_damage_is_found_out(tmp_path):
    def damaged(name: str, change) -> None:
        put(tmp_path, 1.0)
        path = tmp_path / "org__name" / name
        path.write_bytes(change(path.read_bytes()))
        with pytest.raises(RecordError, match="run the notebook again"):
            read(tmp_path, "org__name", TEMPLATE)

    arrays, text = f"{TEMPLATE}.safetensors", f"{TEMPLATE}.json"
    damaged(arrays, lambda data: data[:-1])
    damaged(arrays, lambda data: data[:-1] + bytes([data[-1] ^ 1]))
    damaged(text, lambda data: data[: len(data) // 2])
    damaged(text, lambda data: b"[]")
    damaged(text, lambda data: data.replace(b'"org/name"', b"NaN", 1).replace(b'"provenance"', b'"prov"'))
    put(tmp_path, 1.0)
    (tmp_path / "org__name" / arrays).unlink()
    with pytest.raises(RecordError, match="do not belong together"):
        read(tmp_path, "org__name", TEMPLATE)


def test_a_run_killed_between_the_two_renames_leaves_the_old_pair(tmp_path, monkeypatch):
    put(tmp_path, 1.0)

    class Killed(BaseException):
        pass

    def dies_at_the_json(path: Path, data: bytes) -> None:
        if path.suffix == ".json":
            raise Killed
        files.atomic_write(path, data)

    monkeypatch.setattr(store, "atomic_write", dies_at_the_json)
    for number in (2.0, 3.0):  # a second run dies at the same place
        with pytest.raises(Killed):
            put(tmp_path, number)
        assert number_in(tmp_path) == 1.0
    monkeypatch.undo()
    put(tmp_path, 4.0)
    assert number_in(tmp_path) == 4.0
    assert not list((tmp_path / "org__name").glob(".*.safetensors"))


def in_a_child(work) -> int:
    """Start a process that does the work and ends; its id."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(0)
    return child


@pytest.mark.parametrize("place", ["write", "fsync", "first rename", "second rename"])
def test_a_process_killed_at_a_named_place_loses_nothing(tmp_path, monkeypatch, place):
    put(tmp_path, 1.0)
    real_replace, renames = Path.replace, []

    def die():
        os.kill(os.getpid(), signal.SIGKILL)

    def fsync(number):
        if place == "write":
            os.ftruncate(number, 10)
        die()

    def replace(self, target):
        renames.append(target)
        if len(renames) == (1 if place == "first rename" else 2):
            die()
        return real_replace(self, target)

    if "rename" in place:
        monkeypatch.setattr(Path, "replace", replace)
    else:
        monkeypatch.setattr(os, "fsync", fsync)
    _, status = os.waitpid(in_a_child(lambda: put(tmp_path, 2.0)), 0)
    monkeypatch.undo()
    assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL
    assert number_in(tmp_path) == 1.0
    put(tmp_path, 3.0)
    assert number_in(tmp_path) == 3.0
    assert sorted(path.name for path in (tmp_path / "org__name").iterdir()) == [
        ".lock", f"{TEMPLATE}.json", f"{TEMPLATE}.safetensors",
    ]  # fmt: skip


@pytest.mark.parametrize("rows", [5000, 0])
def test_a_full_disk_leaves_the_old_record_and_nothing_else(tmp_path, rows):
    """The disk is full at the arrays (many rows), or only at the JSON, which comes last."""
    put(tmp_path, 1.0)
    before = sorted(path.name for path in (tmp_path / "org__name").iterdir())
    old_limit, old_signal = (
        resource.getrlimit(resource.RLIMIT_FSIZE),
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN),
    )
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, old_limit[1]))
    try:
        with pytest.raises(RecordError, match="disk is full"):
            put(
                tmp_path, 2.0, PROVENANCE if rows else PROVENANCE | {"note": "x" * 9000}, vocabulary=rows or 5
            )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old_limit)
        signal.signal(signal.SIGXFSZ, old_signal)
    assert number_in(tmp_path) == 1.0
    assert sorted(path.name for path in (tmp_path / "org__name").iterdir()) == before


def test_a_full_disk_at_the_first_record_leaves_nothing(tmp_path, monkeypatch):
    def full_at_the_json(path: Path, data: bytes) -> None:
        if path.suffix == ".json":
            raise RecordError("the disk is full")
        files.atomic_write(path, data)

    monkeypatch.setattr(store, "atomic_write", full_at_the_json)
    with pytest.raises(RecordError, match="full"):
        put(tmp_path, 1.0)
    assert [path.name for path in (tmp_path / "org__name").iterdir()] == [".lock"]


def test_a_file_system_without_hard_links_will_do(tmp_path, monkeypatch):
    def no_links(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "link", no_links)
    put(tmp_path, 1.0)
    put(tmp_path, 2.0)
    assert number_in(tmp_path) == 2.0


def test_a_folder_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "org__name").write_text("a file where the folder should be")
    with pytest.raises(RecordError, match="another results_dir"):
        put(tmp_path, 1.0)


def test_two_writers_and_a_reader_at_once(tmp_path):
    put(tmp_path, 0.0)

    def write_often(number: float) -> None:
        for _ in range(40):
            put(tmp_path, number)
        (tmp_path / f"finished {number}").touch()

    children = [in_a_child(lambda number=number: write_often(number)) for number in (1.0, 2.0)]
    seen, running = [], set(children)
    while running:
        seen.append(number_in(tmp_path))
        running -= {child for child in running if os.waitpid(child, os.WNOHANG)[0]}
    assert len(list(tmp_path.glob("finished *"))) == 2
    assert number_in(tmp_path) in (1.0, 2.0)
    assert set(seen) <= {0.0, 1.0, 2.0}


def test_another_models_record_is_not_overwritten(tmp_path):
    put(tmp_path, 1.0)
    with pytest.raises(RecordError, match="another model"):
        put(tmp_path, 2.0, PROVENANCE | {"model": "/elsewhere/name", "fingerprint": "e" * 64})
    assert number_in(tmp_path) == 1.0
    put(tmp_path, 3.0, PROVENANCE | {"fingerprint": "e" * 64})  # the same model, trained on
    assert number_in(tmp_path) == 3.0


def test_provenance_is_strict_json(tmp_path):
    with pytest.raises(RecordError, match="provenance"):
        put(tmp_path, 1.0, PROVENANCE | {"wall_s": float("nan")})
    put(tmp_path, 1.0)
    text = (tmp_path / "org__name" / f"{TEMPLATE}.json").read_text()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} in the JSON"))


def test_files_are_readable_by_others_as_the_system_wishes(tmp_path):
    old = os.umask(0o022)
    try:
        put(tmp_path, 1.0)
    finally:
        os.umask(old)
    assert (tmp_path / "org__name" / f"{TEMPLATE}.json").stat().st_mode & 0o777 == 0o644
