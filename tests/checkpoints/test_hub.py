from __future__ import annotations

import functools
import http.server
import json
import os
import socket
import struct
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save, save_file

from sightloop.checkpoints import hub as hub_module
from sightloop.checkpoints import tensors as tensor_files
from sightloop.checkpoints.hub import locate
from sightloop.checkpoints.tensors import read_tensors, write_safetensors
from sightloop.data.atomic import write_json
from sightloop.errors import CheckpointError

A, B = torch.arange(6.0).reshape(2, 3), torch.ones(4, dtype=torch.bfloat16)


def put(folder: Path, *names: str, config: dict[str, Any] | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        save_file({name: A}, folder / name) if name.endswith("safetensors") else torch.save(
            {name: A}, folder / name
        )
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def shard(folder: Path, weight_map: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


# Local folders and files.


def test_a_folder(tmp_path: Path) -> None:
    put(
        tmp_path / "m",
        "model.safetensors",
        "pytorch_model.bin",
        "optimizer.pt",
        config={"model_type": "clip"},
    )
    found = locate(tmp_path / "m")
    assert found.name == str(tmp_path / "m")
    assert found.folder == tmp_path / "m"
    assert found.weights == (tmp_path / "m" / "model.safetensors",)
    assert found.config == {"model_type": "clip"}


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        (["a.safetensors", "pytorch_model.bin"], "pytorch_model.bin"),
        (["a.safetensors", "b.bin"], "a.safetensors"),
        (["open_clip_model.safetensors", "open_clip_pytorch_model.bin"], "open_clip_model.safetensors"),
        (["model.safetensors", "open_clip_model.safetensors"], "model.safetensors"),
        (["training_args.bin", "rng_state_0.pth", "optimizer.pt", "model_base.pth"], "model_base.pth"),
    ],
)
def test_which_weights(tmp_path: Path, names: list[str], chosen: str) -> None:
    assert [p.name for p in locate(put(tmp_path, *names)).weights] == [chosen]


def test_a_folder_that_says_too_little_or_nothing(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"several weights files \(a.pth, b.pth\); name the one"):
        locate(put(tmp_path / "two", "a.pth", "b.pth"))
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "notes.md").write_text("x")
    with pytest.raises(CheckpointError, match=r"no weights in this folder \(it holds notes.md\)"):
        locate(tmp_path / "none")


def test_a_folder_around_a_model(tmp_path: Path) -> None:
    """A trainer's folder, our own run, and both at once: the newest checkpoint is named first."""
    for name in ("checkpoint-90", "checkpoint-500"):
        put(tmp_path / "trainer" / name, "model.safetensors", config={})
    with pytest.raises(CheckpointError, match=r"Load the model inside it: \S+trainer/checkpoint-500 or "):
        locate(tmp_path / "trainer")
    put(tmp_path / "run" / "model", "model.safetensors", config={})
    (tmp_path / "run" / "recipe.json").write_text("{}")
    (tmp_path / "run" / "notes").mkdir()
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / "recipe.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"has not written its model yet; resume it"):
        locate(tmp_path / "unfinished")
    put(tmp_path / "models--owner--name" / "snapshots" / SHA, "model.safetensors", config={})
    with pytest.raises(CheckpointError, match=rf"inside it: \S+models--owner--name/snapshots/{SHA}$"):
        locate(tmp_path / "models--owner--name")
    with pytest.raises(CheckpointError, match=r"inside it: \S+run/model$"):
        locate(tmp_path / "run")


@pytest.mark.parametrize("name", ["", "adapter_model.safetensors", "adapter_model.bin"])
def test_an_adapter_is_no_model(tmp_path: Path, name: str) -> None:
    put(tmp_path, name or "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "owner/base"}')
    with pytest.raises(CheckpointError, match=r"LoRA adapter.*load\(BASE, lora=.*owner/base"):
        locate(tmp_path / name)


def test_a_folder_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(CheckpointError, match=r"this folder cannot be read \(Permission denied\)"):
        locate(tmp_path)


def test_one_file(tmp_path: Path) -> None:
    put(tmp_path, "a.pth", "b.safetensors", config={"x": 1})
    assert locate(str(tmp_path / "a.pth")).weights == (tmp_path / "a.pth",)
    assert locate(tmp_path / "b.safetensors").config == {"x": 1}
    with pytest.raises(CheckpointError, match="is no checkpoint; weights end in"):
        locate(tmp_path / "config.json")


def test_open_clip_files_have_their_own_config(tmp_path: Path) -> None:
    put(tmp_path, "open_clip_pytorch_model.bin", config={"from": "transformers"})
    (tmp_path / "open_clip_config.json").write_text('{"from": "open_clip"}')
    assert locate(tmp_path).config == {"from": "open_clip"}
    put(tmp_path, "model.safetensors")
    assert locate(tmp_path).config == {"from": "transformers"}


def test_open_clips_weights_come_before_those_of_timm(tmp_path: Path) -> None:
    """timm/resnet50_clip.openai has timm's image tower too, as model.safetensors and config.json."""
    timm = {"architecture": "resnet50_clip", "num_classes": 1024, "pretrained_cfg": {}}
    put(tmp_path, "model.safetensors", "pytorch_model.bin", "open_clip_model.safetensors", config=timm)
    (tmp_path / "open_clip_config.json").write_text('{"from": "open_clip"}')
    assert locate(tmp_path).weights == (tmp_path / "open_clip_model.safetensors",)
    assert locate(tmp_path).config == {"from": "open_clip"}


@pytest.mark.parametrize("text", ["{", "[1]", '"x"', "\xff\xfe", "[" * 100_000])
def test_a_config_that_is_none(tmp_path: Path, text: str) -> None:
    put(tmp_path, "model.safetensors")
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"config\.json"):
        locate(tmp_path)


@pytest.mark.parametrize(
    "text", ["", "nothing", "./a/b", "a/b/c", "a/..", "../a", "x\0y", "a" * 5000, "no/such.pth\n"]
)
def test_what_is_nothing_at_all(text: str) -> None:
    with pytest.raises(CheckpointError, match="no such folder or file here"):
        locate(text)


def test_the_bundled_model_wins_over_a_folder_of_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub_module, "BUNDLED_FOLDER", tmp_path / "package" / "nano")
    with pytest.raises(CheckpointError, match=r"lacks the model that comes with it; .* name another"):
        locate("nano")
    put(tmp_path / "package" / "nano", "model.safetensors")
    put(tmp_path / "nano", "model.safetensors")
    assert locate("nano").folder == tmp_path / "package" / "nano"
    assert locate("./nano").folder == Path("nano")
    assert locate(Path("nano")).folder == Path("nano")


def test_a_path_is_never_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_module, "_from_hub", lambda *_: pytest.fail("asked the hub"))
    with pytest.raises(CheckpointError):
        locate(Path("owner/name"))
    monkeypatch.chdir(tmp_path)
    put(tmp_path / "owner" / "name", "model.safetensors")
    assert locate("owner/name").folder == Path("owner/name")


def test_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    put(tmp_path / "m", "model.safetensors")
    assert locate("~/m").weights == (tmp_path / "m" / "model.safetensors",)


def test_original_files_are_known_by_name() -> None:
    with pytest.raises(CheckpointError, match=r"download it from https://.*/model_base\.pth"):
        locate("model_base.pth")


# Shards.


def test_shards(tmp_path: Path) -> None:
    put(tmp_path, "model-1-of-2.safetensors", "model-2-of-2.safetensors")
    shard(tmp_path, {"a": "model-2-of-2.safetensors", "b": "model-1-of-2.safetensors"})
    found = locate(tmp_path)
    assert [p.name for p in found.weights] == ["model-1-of-2.safetensors", "model-2-of-2.safetensors"]
    assert set(read_tensors(found.weights)) == {"model-1-of-2.safetensors", "model-2-of-2.safetensors"}
    assert locate(tmp_path / "model.safetensors.index.json") == found.__class__(
        str(tmp_path / "model.safetensors.index.json"), tmp_path, found.weights, None
    )
    (tmp_path / "model-1-of-2.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"1 of 2 shards are missing \(model-1-of-2.safetensors\)"):
        locate(tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        "../x.safetensors",
        "/etc/x.safetensors",
        "a/b.safetensors",
        "a\\b.safetensors",
        "..",
        "",
        "x.txt",
        3,
        None,
        ["x"],
    ],
)
def test_an_index_cannot_lead_elsewhere(tmp_path: Path, name: Any) -> None:
    put(tmp_path, "x.safetensors")
    with pytest.raises(CheckpointError, match=r"not a weights file in the same folder"):
        locate(shard(tmp_path / "sub", {"a": name}))


@pytest.mark.parametrize("index", [{}, {"weight_map": {}}, {"weight_map": ["x"]}])
def test_an_index_without_a_map(tmp_path: Path, index: dict[str, Any]) -> None:
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="weight_map"):
        locate(tmp_path)


def test_a_tensor_in_two_shards(tmp_path: Path) -> None:
    save_file({"a": A, "b": B}, tmp_path / "1.safetensors")
    save_file({"b": B}, tmp_path / "2.safetensors")
    with pytest.raises(CheckpointError, match=r"2\.safetensors: has tensor b, and so has 1\.safetensors"):
        read_tensors([tmp_path / "1.safetensors", tmp_path / "2.safetensors"])


# Tensors.


def check(tensors: Any) -> None:
    assert sorted(tensors) == ["a", "b"]
    assert len(tensors) == 2
    assert "a" in tensors
    assert "c" not in tensors
    assert torch.equal(tensors["a"], A)
    assert torch.equal(tensors["b"], B)
    assert tensors["b"].dtype == torch.bfloat16
    assert not tensors["a"].requires_grad
    with pytest.raises(KeyError):
        tensors["c"]


def test_safetensors(tmp_path: Path) -> None:
    save_file({"a": A, "b": B}, tmp_path / "x.safetensors", metadata={"format": "pt"})
    check(read_tensors([tmp_path / "x.safetensors"]))


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda d: d,
        lambda d: {"model": d, "epoch": 3, "config": {"lr": 1e-4}},
        lambda d: {"state_dict": {f"module.{k}": torch.nn.Parameter(v) for k, v in d.items()}, "name": "x"},
        lambda d: {"checkpoint": {"model_state_dict": d, "optimizer": {"state": {}, "lr": [1]}}, "epoch": 1},
        lambda d: {"my_own_name": d, "args": {"lr": 1}, "optimizer": {"state": {0: {"step": 3, "m": A}}}},
        lambda d: {"model": {f"module._orig_mod.{k}": v for k, v in d.items()}},
        lambda d: {f"_orig_mod.module.{k}": v for k, v in d.items()},
    ],
    ids=["plain", "model", "state_dict", "nested", "only", "wrapped", "compiled"],
)
@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
def test_pickles_of_tensors(tmp_path: Path, wrap: Any, zipped: bool) -> None:
    torch.save(wrap({"a": A, "b": B}), tmp_path / "x.pth", _use_new_zipfile_serialization=zipped)
    check(read_tensors([tmp_path / "x.pth"]))


def test_names_of_wrappers_inside(tmp_path: Path) -> None:
    """One part of a network was compiled; nothing is renamed where two names would become one."""
    tensors = {"text._orig_mod.a": A, "text.b": B, "module.c": A.clone()}
    save_file(tensors, tmp_path / "x.safetensors")
    assert sorted(read_tensors([tmp_path / "x.safetensors"])) == ["module.c", "text.a", "text.b"]
    save_file({"_orig_mod.a": A, "a": B}, tmp_path / "y.safetensors")
    twice = read_tensors([tmp_path / "y.safetensors"])
    assert sorted(twice) == ["_orig_mod.a", "a"]
    assert torch.equal(twice["a"], B)


def test_weights_of_several_networks(tmp_path: Path) -> None:
    torch.save({"student": {"a": A}, "teacher": {"a": B}}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=r"x\.pth: .*several networks \(student, teacher\)"):
        read_tensors([tmp_path / "x.pth"])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript_is_named_as_such(tmp_path: Path) -> None:
    torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)).save(str(tmp_path / "ViT-B-32.pt"))
    with pytest.raises(CheckpointError, match=r"ViT-B-32\.pt: is a TorchScript archive.*torch\.jit\.load"):
        read_tensors([tmp_path / "ViT-B-32.pt"])


class Trap:
    def __init__(self, flag: Path) -> None:
        self.flag = flag

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.flag),))


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_wants_to_run_is_not_run(tmp_path: Path, zipped: bool) -> None:
    torch.save(
        {"a": A, "b": Trap(tmp_path / "ran")}, tmp_path / "x.bin", _use_new_zipfile_serialization=zipped
    )
    with pytest.raises(
        CheckpointError, match=r"x\.bin: cannot be read without running code.*convert it to safetensors"
    ):
        read_tensors([tmp_path / "x.bin"])
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("data", [{}, [A], A, {"a": A, "epoch": 3}, {"model": {"a": A, 3: B}}])
def test_pickles_of_other_things(tmp_path: Path, data: Any) -> None:
    torch.save(data, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=r"x\.pth: holds (no tensors|things that are no tensors)"):
        read_tensors([tmp_path / "x.pth"])


@pytest.mark.parametrize("suffix", ["safetensors", "bin", "pth", "pt"])
def test_pointers_and_empty_files(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"x.{suffix}"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    with pytest.raises(CheckpointError, match="Git LFS pointer"):
        read_tensors([path])
    path.write_bytes(b"")
    with pytest.raises(CheckpointError, match="is empty"):
        read_tensors([path])
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_tensors([tmp_path / f"gone.{suffix}"])


def header(text: str, body: bytes = b"\0" * 8) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode() + body


SLOT = '{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'


def test_a_name_twice_in_one_header(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(header(f'{{"a":{SLOT},"a":{SLOT}}}', b"\0" * 4))
    with pytest.raises(CheckpointError, match="holds a twice"):
        read_tensors([tmp_path / "x.safetensors"])


@pytest.mark.parametrize(
    ("text", "body", "match"),
    [
        ("[]", b"", "header is no table of tensors"),
        ("{", b"", "header is not JSON"),
        ("[" * 100_000, b"", "header is not JSON"),
        ('{"a":3}', b"", "damaged or cut short"),
        (
            '{"a":{"dtype":"F32","shape":[1000000,1000000],"data_offsets":[0,4]}}',
            b"\0" * 4,
            "damaged or cut short",
        ),
        (
            '{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4000000000000]}}',
            b"\0" * 4,
            "damaged or cut short",
        ),
        ('{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}', b"\0" * 4, "damaged or cut short"),
        ('{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}', b"\0" * 8, "damaged or cut short"),
        ('{"a":{"dtype":"F8_E4M3","shape":[4],"data_offsets":[0,4]}}', b"\0" * 4, "not known .F8_E4M3"),
    ],
)
def test_a_header_that_lies(tmp_path: Path, text: str, body: bytes, match: str) -> None:
    (tmp_path / "x.safetensors").write_bytes(header(text, body))
    with pytest.raises(CheckpointError, match=rf"x\.safetensors: .*{match}"):
        read_tensors([tmp_path / "x.safetensors"])


def test_a_header_longer_than_any_is_not_parsed(tmp_path: Path) -> None:
    with (tmp_path / "x.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", 1 << 30))
        file.truncate(1 << 31)  # without blocks on the disk
    with pytest.raises(CheckpointError, match="header does not fit"):
        read_tensors([tmp_path / "x.safetensors"])


def test_a_file_that_becomes_shorter(tmp_path: Path) -> None:
    save_file({"a": A, "b": B}, tmp_path / "x.safetensors")
    tensors = read_tensors([tmp_path / "x.safetensors"])
    os.truncate(tmp_path / "x.safetensors", (tmp_path / "x.safetensors").stat().st_size - 4)
    whole, cut = sorted(tensors, key=lambda name: tensors._places[name]._places[name].offset)
    tensors[whole]
    with pytest.raises(CheckpointError, match="cut short while it was read"):
        tensors[cut]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_numbers_become_another_kind_while_they_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(tensor_files, "_BLOCK", 5)
    torch.manual_seed(0)
    stored = {
        "a": torch.randn(3, 7),
        "b": torch.randn(5, dtype=torch.float64).bfloat16(),
        "none": torch.randn(0, 4),
        "one": torch.randn(()),
        "whole": torch.arange(11),
        "flags": torch.tensor([True, False]),
    }
    save_file(stored, tmp_path / "x.safetensors")
    torch.save(stored, tmp_path / "x.pth")
    for name in ("x.safetensors", "x.pth"):
        found = read_tensors([tmp_path / name], dtype)
        for key, value in stored.items():
            wanted = value.to(dtype) if value.is_floating_point() else value
            assert found[key].dtype == wanted.dtype
            assert torch.equal(found[key], wanted)


@pytest.mark.parametrize("how", ["as it is", "repacked", "compressed", "other byte order"])
def test_a_zip_that_torch_did_not_pack(tmp_path: Path, how: str) -> None:
    """Tensors are read where they lie if that is sure, and by torch where it is not."""
    torch.save({"first": B, "a": A, "view": A.t()[1:]}, tmp_path / "x.pth")
    if how != "as it is":
        kind = zipfile.ZIP_DEFLATED if how == "compressed" else zipfile.ZIP_STORED
        (tmp_path / "x.pth").rename(tmp_path / "old.pth")
        with (
            zipfile.ZipFile(tmp_path / "old.pth") as old,
            zipfile.ZipFile(tmp_path / "x.pth", "w", kind) as new,
        ):
            for entry in old.infolist():
                swaps = how == "other byte order" and entry.filename.endswith("byteorder")
                new.writestr(entry.filename, b"big" if swaps else old.read(entry))
    tensors: Any = read_tensors([tmp_path / "x.pth"], torch.float32)
    wanted = torch.from_numpy(A.numpy().byteswap()) if how == "other byte order" else A
    assert isinstance(tensors._places["a"], tensor_files.TensorFile) == (how == "as it is")
    assert torch.equal(tensors["a"], wanted)
    assert torch.equal(tensors["view"], wanted.t()[1:])


@pytest.mark.parametrize(
    "tensor",
    [
        torch.ones(1).expand(1 << 40),
        torch.empty(3, device="meta"),
        torch.eye(3).to_sparse(),
    ],
    ids=["stretched", "nothing", "sparse"],
)
def test_pickled_tensors_that_are_not_all_there(tmp_path: Path, tensor: torch.Tensor) -> None:
    torch.save({"a": A, "b": tensor}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=r"x\.pth: "):
        read_tensors([tmp_path / "x.pth"], torch.bfloat16)


@pytest.mark.parametrize("kind", ["safetensors", "pth", "old.pth"])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_damage_is_one_error(
    tmp_path_factory: pytest.TempPathFactory, kind: str, data: st.DataObject
) -> None:
    """Whatever is cut from or changed in a file: a CheckpointError, or the tensors (changed values are not seen)."""
    path = tmp_path_factory.mktemp("d") / f"x.{kind}"
    if kind == "safetensors":
        save_file({"a": A, "b": B}, path)
    else:
        torch.save({"a": A, "b": B}, path, _use_new_zipfile_serialization=kind == "pth")
    raw = bytearray(path.read_bytes())
    at = data.draw(st.integers(0, len(raw) - 1))
    if data.draw(st.booleans()):
        del raw[at:]
    else:
        raw[at : at + data.draw(st.integers(1, 8))] = data.draw(st.binary(min_size=1, max_size=8))
    path.write_bytes(raw)
    try:
        tensors = read_tensors([path])
        assert all(isinstance(tensors[name], torch.Tensor) for name in tensors)
    except CheckpointError:
        return


@settings(max_examples=100, deadline=None)
@given(raw=st.binary(max_size=64))
def test_noise_is_one_error(tmp_path_factory: pytest.TempPathFactory, raw: bytes) -> None:
    folder = tmp_path_factory.mktemp("n")
    for name in ("x.safetensors", "x.pth"):
        (folder / name).write_bytes(raw)
        with pytest.raises(CheckpointError, match=name):
            read_tensors([folder / name])


# Writing.


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    write_safetensors({"a": A, "again": A, "b": B, "view": A.t()}, tmp_path / "m.safetensors")
    tensors = read_tensors([tmp_path / "m.safetensors"])
    assert torch.equal(tensors["again"], A)
    assert torch.equal(tensors["view"], A.t())
    assert set(load_file(tmp_path / "m.safetensors")) == {"a", "again", "b", "view"}
    write_safetensors({"a": tensors["a"]}, tmp_path / "m.safetensors")  # over the file that it is read from
    assert torch.equal(tensors["a"], A)
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]


def test_shared_memory_is_written_as_if_each_had_its_own(tmp_path: Path) -> None:
    """The bytes are those that the library writes of copies: views, one tensor under two names, none, one number."""
    whole = torch.arange(24.0).reshape(4, 6)
    tensors = {f"part {i}": part for i, part in enumerate(whole.split(1))} | {"é": whole, "again": whole}
    tensors |= {"turned": whole.t(), "row": whole[:1].expand(3, 6), "last": whole[-1, -1], "none": whole[:0]}
    kinds = (torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int32, torch.int8, torch.bool)
    tensors |= {str(kind): whole.to(kind)[1:] for kind in kinds}
    write_safetensors(tensors, tmp_path / "m.safetensors")
    copies = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    assert (tmp_path / "m.safetensors").read_bytes() == save(copies, {"format": "pt"})


def test_json(tmp_path: Path) -> None:
    write_json({"é": [1, None]}, tmp_path / "x.json")
    assert (tmp_path / "x.json").read_text("utf-8") == '{\n  "é": [\n    1,\n    null\n  ]\n}\n'
    with pytest.raises(ValueError, match="JSON"):
        write_json(float("nan"), tmp_path / "x.json")
    assert len(list(tmp_path.iterdir())) == 1


# The hub: a small one on this machine.

SHA = "a" * 40


class Hub(http.server.BaseHTTPRequestHandler):
    """Enough of the hub's protocol for one repository, `owner/name`, with the files of `content`."""

    protocol_version = "HTTP/1.1"
    content: dict[str, bytes]
    asked: list[str]

    def do_GET(self) -> None:
        self.asked.append(self.path)
        path = self.path.split("?")[0]
        names = list(self.content)
        if path.startswith("/api/models/owner/name/tree/"):
            rows = [
                {"type": "file", "path": n, "size": len(self.content[n]), "oid": f"{i:040x}"}
                for i, n in enumerate(names)
            ]
            return self.send(json.dumps(rows).encode())
        if path in ("/api/models/owner/name", "/api/models/owner/name/revision/main"):
            row = {"id": "owner/name", "sha": SHA, "siblings": [{"rfilename": n} for n in names]}
            return self.send(json.dumps(row).encode())
        name = path.removeprefix(f"/owner/name/resolve/{SHA}/")
        if name in names:
            return self.send(
                self.content[name], {"X-Repo-Commit": SHA, "ETag": f'"{names.index(name):040x}"'}
            )
        kind = "GatedRepo" if "gated" in path else "RepoNotFound"
        return self.send(b"no", {"X-Error-Code": kind}, 403 if "gated" in path else 404)

    do_HEAD = do_GET

    def send(self, body: bytes, headers: dict[str, str] | None = None, status: int = 200) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Quiet."""


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty Hugging Face cache, and no network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


@pytest.fixture
def hub(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    save_file({"a": A}, tmp_path / "m.safetensors")
    weights = (tmp_path / "m.safetensors").read_bytes()
    names = ["config.json", "tokenizer.json", "preprocessor_config.json", "vocab.txt", "model.safetensors"]
    extra = [
        "pytorch_model.bin",
        "open_clip_model.safetensors",
        "tf_model.h5",
        "onnx/model.onnx",
        "README.md",
    ]
    content = {n: weights if n.endswith("safetensors") else b"{}" for n in names + extra}
    handler = type("OneHub", (Hub,), {"content": content, "asked": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=functools.partial(server.serve_forever, poll_interval=0.02), daemon=True)
    thread.start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
    monkeypatch.setattr(
        huggingface_hub.constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        address + "/{repo_id}/resolve/{revision}/{filename}",
    )
    for variable in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(variable, raising=False)
        monkeypatch.delenv(variable.upper(), raising=False)
    yield handler
    server.shutdown()
    server.server_close()
    thread.join()


def test_fetched_once_and_only_what_is_needed(hub: type[Hub]) -> None:
    found = locate("owner/name")
    assert found.name == "owner/name"
    assert found.config == {}
    assert sorted(p.name for p in found.folder.iterdir()) == sorted(
        ["config.json", "tokenizer.json", "preprocessor_config.json", "vocab.txt", "model.safetensors"]
    )
    assert torch.equal(read_tensors(found.weights)["a"], A)
    hub.asked.clear()
    assert locate("owner/name") == found
    assert hub.asked == []


def test_what_a_checkpoint_needs_is_fetched_and_nothing_else(hub: type[Hub]) -> None:
    needed = "generation_config.json chat_template.jinja spiece.model added_tokens.json merges.txt".split()
    others = "all_results.json train.txt flax_model.msgpack modeling_x.py tokenizer.model.v3".split()
    hub.content |= dict.fromkeys(needed + others, b"{}")
    names = {path.name for path in locate("owner/name").folder.iterdir()}
    assert set(needed) <= names
    assert not set(others) & names


def test_of_a_repository_of_timm_open_clips_weights_are_fetched(hub: type[Hub]) -> None:
    hub.content["config.json"] = b'{"architecture": "resnet50_clip"}'
    hub.content["open_clip_config.json"] = b"{}"
    found = locate("owner/name")
    assert [path.name for path in found.weights] == ["open_clip_model.safetensors"]
    assert not (found.folder / "model.safetensors").exists()


def test_a_pickle_is_fetched_only_without_safetensors(hub: type[Hub]) -> None:
    for name in list(hub.content):
        if name.endswith("safetensors"):
            del hub.content[name]
    assert [p.name for p in locate("owner/name").weights] == ["pytorch_model.bin"]


def test_all_shards_are_fetched(hub: type[Hub]) -> None:
    weights = hub.content.pop("model.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    hub.content["model.safetensors.index.json"] = json.dumps(index).encode()
    for name in index["weight_map"].values():
        hub.content[name] = weights
    assert len(locate("owner/name").weights) == 2


def test_a_partly_cached_model_is_completed(hub: type[Hub], monkeypatch: pytest.MonkeyPatch) -> None:
    whole = locate("owner/name")
    (whole.folder / "vocab.txt").unlink()
    (whole.folder / "tokenizer.json").unlink()
    assert locate("owner/name") == whole
    assert (whole.folder / "vocab.txt").exists()
    (whole.folder / "vocab.txt").unlink()
    (whole.folder / "tokenizer.json").unlink()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert locate("owner/name") == whole  # what is missing is for whoever needs it to say
    whole.weights[0].unlink()
    with pytest.raises(CheckpointError, match="HF_HUB_OFFLINE forbids"):
        locate("owner/name")


def test_what_the_hub_does_not_give(hub: type[Hub]) -> None:
    with pytest.raises(CheckpointError, match="no model of that name on the hub"):
        locate("nobody/nothing")
    with pytest.raises(CheckpointError, match="hf auth login"):
        locate("owner/gated")
    hub.content.clear()
    with pytest.raises(CheckpointError, match="no weights that can be read"):
        locate("owner/name")


def test_offline_says_which_files_to_put_where(cache: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        locate("Salesforce/blip-vqa-base")
    for words in ("HF_HUB_OFFLINE", "config.json", "model.safetensors", "vocab.txt", "load ./blip-vqa-base"):
        assert words in str(caught.value)
    with pytest.raises(CheckpointError, match=r"open_clip_config\.json, .* and open_clip_model\.safetensors"):
        locate("timm/resnet50_clip.openai")
    with pytest.raises(CheckpointError, match=r"spiece\.model"):
        locate("google/siglip-base-patch16-256")
    with pytest.raises(CheckpointError, match=r"Did you mean Salesforce/blip-vqa-base"):
        locate("Salesforce/blip-vqa-bas")


def test_no_network(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub_module, "getproxies", dict)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setattr(
            huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{closed.getsockname()[1]}"
        )
        with pytest.raises(CheckpointError, match="cannot be reached"):
            locate("owner/name")


def test_a_name_server_that_never_answers_is_not_waited_for(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub_module, "getproxies", dict)
    monkeypatch.setattr(hub_module, "PROBE_SECONDS", 0.05)
    never = threading.Event()
    monkeypatch.setattr(socket, "create_connection", lambda *_, **__: never.wait(60) and socket.socket())
    with pytest.raises(CheckpointError, match="cannot be reached"):
        locate("owner/name")
    never.set()


def test_behind_a_proxy_the_client_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_module, "getproxies", lambda: {"https": "http://proxy:3128"})
    monkeypatch.setattr(socket, "create_connection", lambda *_, **__: pytest.fail("knocked past the proxy"))
    assert hub_module._is_reachable("https://huggingface.co")


def test_looking_up_loads_neither_torch_nor_the_hub(tmp_path: Path) -> None:
    put(tmp_path, "model.safetensors", config={})
    code = (
        "import sys; from sightloop.checkpoints.hub import locate; locate(sys.argv[1]); "
        "print(sorted({'torch', 'numpy', 'huggingface_hub', 'safetensors'} & set(sys.modules)))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert run.stdout == "[]\n"
