"""Memory is kept where the allocator can keep it, loading a checkpoint takes little more than its weights, and writing
one next to nothing. In processes of their own, as all this is of a whole process."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from sightloop.checkpoints.language import language_config
from sightloop.inference.load import load
from sightloop.models.blip import Blip, BlipConfig
from sightloop.towers.text import LanguageModel

CODE = """
import resource, sys
import torch
from sightloop.inference.malloc import keep_freed_memory
print(sys.argv[1] == "keep" and keep_freed_memory())
for _ in range(8):
    torch.zeros(40 << 20)
faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
    torch.zeros(40 << 20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults)
"""


def faults(what: str) -> tuple[bool, int]:
    """Whether memory is kept, and how many pages were mapped anew by three allocations after eight."""
    run = subprocess.run([sys.executable, "-c", CODE, what], capture_output=True, text=True, check=True)
    kept, count = run.stdout.split()
    return kept == "True", int(count)


def test_freed_memory_is_used_again() -> None:
    can, kept = faults("keep")
    if can:
        assert kept < faults("as it is")[1] / 2


LOAD = """
import sys
from pathlib import Path
import torch
from torch import nn
from sightloop.checkpoints.tensors import read_tensors
from sightloop.checkpoints.language import language_config
from sightloop.checkpoints.key_map import load_weights
from sightloop.inference.load import weight_hook_for
from sightloop.inference.malloc import give_back_freed_memory
from sightloop.towers.text import LanguageModel

def memory(what):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(what)) * 1024

def load(width, file, dtype, bits):
    shape = dict(hidden_size=width, intermediate_size=3 * width, num_attention_heads=4, num_hidden_layers=6)
    with torch.device("meta"):
        net = nn.ModuleDict({"language": LanguageModel(language_config(dict(shape, model_type="llama")))})
    with give_back_freed_memory():
        take = weight_hook_for(bits, torch.device("cpu"), dtype)(net)
        load_weights(net, read_tensors([file], dtype), None, weight_hook=take)
    return net

few = {"-": None}.get(sys.argv[3], sys.argv[3])
kept = [load(64, Path(sys.argv[1]), torch.bfloat16, few)]
Path("/proc/self/clear_refs").write_text("5")
before = memory("VmRSS")
kept.append(load(512, Path(sys.argv[2]), torch.bfloat16, few))
print(memory("VmHWM") - before)
"""


def write(width: int, file: Path) -> int:
    """A random language model in float32; the bytes of its weights in bfloat16."""
    shape = {"hidden_size": width, "intermediate_size": 3 * width}
    shape |= {"num_attention_heads": 4, "num_hidden_layers": 6}
    net = nn.ModuleDict({"language": LanguageModel(language_config({**shape, "model_type": "llama"}))})
    tensors = {name: torch.randn(value.shape) for name, value in net.state_dict().items()}
    if file.suffix == ".pth":
        torch.save(tensors, file)
    else:
        save_file(tensors, file)
    return sum(value.numel() for value in tensors.values()) * 2


@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="this system does not tell a process' peak"
)
@pytest.mark.parametrize(("suffix", "bits"), [("safetensors", "-"), ("safetensors", "int4"), ("pth", "-")])
def test_loading_takes_little_more_than_the_weights(tmp_path: Path, suffix: str, bits: str) -> None:
    small, large = tmp_path / f"small.{suffix}", tmp_path / f"large.{suffix}"
    write(64, small)
    weights = write(512, large)  # 103 MB in bfloat16
    code = [sys.executable, "-c", LOAD, str(small), str(large), bits]
    run = subprocess.run(code, capture_output=True, text=True, check=True)
    assert int(run.stdout) < 1.15 * weights * (0.7 if bits == "int4" else 1)


LOAD_BLIP = """
import sys
from pathlib import Path
import sightloop
from sightloop.inference.load import load

def memory(what):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(what)) * 1024

kept = [load("nano", device="cpu")]
Path("/proc/self/clear_refs").write_text("5")
before = memory("VmRSS")
kept.append(load(sys.argv[1], device="cpu", dtype=sys.argv[2], quantize=None if sys.argv[3] == "-" else sys.argv[3]))
print(memory("VmHWM") - before)
"""


def write_blip(folder: Path) -> int:
    """A BLIP of random weights of the shapes of nano, but wide; the bytes of its weights in float32."""
    nano = load("nano", device="cpu")
    wide = {"dim": 512, "heads": 8, "mlp_dim": 2048, "layers": 8}
    config = nano.network.config
    assert isinstance(config, BlipConfig)
    config = replace(
        config,
        vision=replace(config.vision, **wide),
        text=replace(config.text, **wide, memory_dim=512),
        decoder_memory_dim=512,
    )
    network = Blip(config).eval()
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.02)
    replace(nano, network=network).save(folder)
    return sum(parameter.numel() for parameter in network.parameters()) * 4


@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="this system does not tell a process' peak"
)
@pytest.mark.parametrize(
    ("dtype", "bits", "kernels", "share"),
    [
        ("float32", "-", "packed", 1.0),
        ("float32", "-", "plain", 1.0),
        ("float32", "-", "auto", 1.0),
        ("bfloat16", "-", "packed", 0.5),
        ("float32", "int8", "packed", 0.38),  # convolutions keep their dtype
    ],
)
def test_loading_a_blip_takes_little_more_than_its_weights(
    tmp_path: Path, dtype: str, bits: str, kernels: str, share: float
) -> None:
    weights = write_blip(tmp_path / "blip")
    assert weights > 150e6
    code = [sys.executable, "-c", LOAD_BLIP, str(tmp_path / "blip"), dtype, bits]
    environment = os.environ | {"SIGHTLOOP_KERNELS": kernels, "SIGHTLOOP_CACHE_FOLDER": str(tmp_path)}
    run = subprocess.run(code, capture_output=True, text=True, check=True, env=environment)
    assert int(run.stdout) < 1.1 * weights * share + 20e6


SAVE = """
import sys
from pathlib import Path
import torch
from torch import nn
from sightloop.checkpoints.tensors import write_safetensors
from sightloop.checkpoints.language import language_config, language_keys
from sightloop.checkpoints.key_map import export_state_dict, native_state_dict
from sightloop.towers.text import LanguageModel

def memory(what):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(what)) * 1024

def save(width, layout):
    shape = dict(hidden_size=width, intermediate_size=3 * width, num_attention_heads=4, num_hidden_layers=6)
    config = language_config(dict(shape, model_type="llama", vocab_size=9999))
    net = nn.ModuleDict({"language": LanguageModel(config)})
    Path("/proc/self/clear_refs").write_text("5")
    before = memory("VmRSS")
    keys = language_keys(config, "language", "model", "lm_head")
    write_safetensors(native_state_dict(net) if layout == "own" else export_state_dict(net, keys), sys.argv[2])
    return memory("VmHWM") - before

save(64, sys.argv[1])
print(save(512, sys.argv[1]))
"""


@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="this system does not tell a process' peak"
)
@pytest.mark.parametrize("layout", ["own", "theirs"])
def test_saving_takes_next_to_nothing(tmp_path: Path, layout: str) -> None:
    file = tmp_path / "model.safetensors"
    run = subprocess.run(
        [sys.executable, "-c", SAVE, layout, str(file)], capture_output=True, text=True, check=True
    )
    assert file.stat().st_size > 100e6
    assert int(run.stdout) < 0.1 * file.stat().st_size
