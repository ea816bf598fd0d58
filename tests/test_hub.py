"""The hub, played by a server in this process that answers like the real one; no network is used."""

import hashlib
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar
from urllib.parse import unquote, urlparse

import pytest
from huggingface_hub import constants

from sdnb import gguf, load
from sdnb.checkpoint import locate
from sdnb.errors import ModelError
from tests.ggufs import small, write_model
from tests.tiny import tiny_model

COMMIT = "0123456789abcdef0123456789abcdef01234567"
CODES = {"org/gated": (403, "GatedRepo"), "org/none": (404, "RepoNotFound")}


class Hub(BaseHTTPRequestHandler):
    """Serves one folder as `org/model` at one commit, and errors for other names."""

    folder = None
    asked: ClassVar[list[str]] = []

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        self.answer()

    def log_message(self, *_):
        pass

    def answer(self):
        path = unquote(urlparse(self.path).path).strip("/")
        self.asked.append(path)
        parts = path.removeprefix("api/models/").split("/")
        name, kind, revision = "/".join(parts[:2]), *(parts[2:4] or ["revision", "main"])
        file = "/".join(parts[4:])
        if name in CODES:
            self.error(*CODES[name])
        elif revision not in ("main", "v1", COMMIT):
            self.error(404, "RevisionNotFound")
        elif kind == "resolve":
            self.file(self.folder / file)
        else:
            files = [path for path in self.folder.rglob("*") if path.is_file()]
            names = [path.relative_to(self.folder).as_posix() for path in files]
            tree = [
                {"type": "file", "path": name, "size": path.stat().st_size, "oid": "0" * 40}
                for name, path in zip(names, files, strict=True)
            ]
            info = {"id": name, "sha": COMMIT, "siblings": [{"rfilename": name} for name in names]}
            data = json.dumps(tree if kind == "tree" else info).encode()
            self.send(200, data, {"Content-Type": "application/json"})

    def file(self, path):
        if not path.is_file():
            self.error(404, "EntryNotFound")
            return
        data = path.read_bytes()
        self.send(200, data, {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha256(data).hexdigest()}"'})

    def error(self, status, code):
        self.send(status, b"", {"X-Error-Code": code, "X-Repo-Commit": COMMIT})

    def send(self, status, data, headers):
        self.send_response(status)
        for key, value in (headers | {"Content-Length": str(len(data))}).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)


def serve(monkeypatch, endpoint):
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    Hub.folder, Hub.asked = tiny_model(tmp_path / "served", layers=1), []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    serve(monkeypatch, f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(gguf, "cache_folder", lambda: tmp_path / "converted")
    yield Hub
    server.shutdown()
    server.server_close()


def go_offline(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def lose_the_network(monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # the client waits between its attempts
    serve(monkeypatch, "http://127.0.0.1:9")


def refused(name, words, **options):
    with pytest.raises(ModelError, match=words):
        load(name, device="cpu", **options)


@pytest.mark.parametrize(
    ("name", "revision", "words"),
    [
        ("org/gated", None, "gated repo.*HF_TOKEN.*terms"),
        ("org/none", None, "org/none could not be fetched .*Not Found.*spelling"),
        ("org/model", "v9", "Revision Not Found"),
    ],
)
def test_what_the_hub_refuses_is_told(hub, name, revision, words):
    refused(name, words, revision=revision)


def test_offline_and_not_cached(hub, monkeypatch):
    go_offline(monkeypatch)
    refused("org/model", "could not be fetched.*HF_HUB_OFFLINE")
    assert not hub.asked


def test_a_hub_that_cannot_be_reached(hub, monkeypatch):
    lose_the_network(monkeypatch)
    refused("org/model", "could not be fetched.*[Nn]etwork")


def test_without_a_network_the_cache_answers(hub, monkeypatch):
    seen = load("org/model", device="cpu").fingerprint
    lose_the_network(monkeypatch)
    assert "model.safetensors" in locate("org/model").files
    assert load("org/model", device="cpu").fingerprint == seen


def test_a_model_is_fetched_quietly_and_its_commit_known(hub, monkeypatch, capfd):
    loaded = load("org/model", revision="v1", device="cpu")
    assert (loaded.revision, loaded.slug) == (COMMIT, "org__model@v1")
    assert loaded.tokenizer is not None
    assert capfd.readouterr() == ("", "")
    go_offline(monkeypatch)
    assert load("org/model", revision="v1", device="cpu").fingerprint == loaded.fingerprint
    assert loaded.fingerprint == load(str(hub.folder), device="cpu").fingerprint


def test_what_is_refused_is_refused_before_weights_are_fetched(hub):
    path = hub.folder / "config.json"
    config = json.loads(path.read_text()) | {"quantization_config": {"quant_method": "gptq"}}
    path.write_text(json.dumps(config))
    refused("org/model", "quantized")
    assert not any(name.endswith(".safetensors") for name in hub.asked)


def test_an_adapter_on_the_hub_is_known_as_one_and_no_model_as_none(hub):
    (hub.folder / "config.json").unlink()
    (hub.folder / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    refused("org/model", "adapter.*org/base")
    (hub.folder / "adapter_config.json").unlink()
    refused("org/model", "no config.json")


def test_a_cached_configuration_without_weights_offline(hub, monkeypatch):
    locate("org/model")
    go_offline(monkeypatch)
    refused("org/model", "no weights")


# --- GGUF repositories


@pytest.fixture
def files(hub, tmp_path):
    """A repository of GGUF files in place of the model."""
    hub.folder = tmp_path / "quantized"
    (hub.folder / "Q8_0").mkdir(parents=True)
    model = small("llama")
    for name, form in (("tiny.Q4_0.gguf", "Q4_0"), ("tiny-IQ4_0.gguf", "Q4_1"), ("Q8_0/tiny.gguf", "Q8_0")):
        write_model(hub.folder / name, model, "llama", formats=lambda name, form=form: form)
    return hub.folder


@pytest.mark.parametrize(
    ("wanted", "form", "slug"),
    [
        ("tiny-IQ4_0.gguf", "gguf Q4_1", "org__model__tiny-iq4_0.gguf"),
        ("Q4_0", "gguf Q4_0", "org__model__q4_0"),
        ("q8_0", "gguf Q8_0", "org__model__q8_0"),
    ],
)
def test_one_file_of_a_repository_is_named_by_file_or_quantization(files, monkeypatch, wanted, form, slug):
    loaded = load(f"org/model:{wanted}", revision="v1", device="cpu")
    assert (loaded.format, loaded.revision, loaded.slug) == (form, COMMIT, f"{slug}@v1")
    assert loaded.title == loaded.name == f"org/model:{wanted}"
    assert [path for path in Hub.asked if "resolve" in path and path.endswith(".gguf")]
    assert len({path for path in Hub.asked if path.endswith(".gguf")}) == 1  # the others are not fetched
    go_offline(monkeypatch)
    assert load(f"org/model:{wanted}", revision="v1", device="cpu").fingerprint == loaded.fingerprint


def test_a_repository_of_several_files_lists_them(files):
    for name in ("org/model", "org/model:Q6_K", "org/model:none.gguf"):
        refused(name, "Q8_0/tiny.gguf.*org/repo:Q4_K_M")


def test_a_base_on_the_hub_is_fetched_without_its_weights(hub, tmp_path):
    small("llama").config.save_pretrained(hub.folder)
    path = write_model(tmp_path / "model.gguf", small("llama"), "llama")
    loaded = load(str(path), base="org/model", device="cpu")
    assert loaded.tokenizer is not None and loaded.revision is None
    assert not any(name.endswith(".safetensors") for name in hub.asked)
