"""Large models on one machine: `python -m benchmarks.large blip2 --dtype bfloat16`, `... llava --quantize int4`.

A checkpoint of the official size with random weights is written in shards (bfloat16 but for `--stored`, 2 to 14 GB of
disk while it runs), loaded as `load` does it, and decoded with. `llama` is a language model of 1.1 B weights alone,
made in memory; `--peer` times `transformers` with the same one. All figures are of one thread; seconds are the
processor's own.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sightloop.checkpoints.key_map import rule_for, tied_names
from sightloop.checkpoints.language import language_config
from sightloop.checkpoints.registry import FAMILIES, build_network, key_map_of
from sightloop.checkpoints.tensors import read_tensors, write_safetensors
from sightloop.data.atomic import write_json
from sightloop.inference.load import weight_hook_for
from sightloop.inference.malloc import give_back_freed_memory
from sightloop.nn.prepack import pack
from sightloop.nn.quantize import quantize_hook
from sightloop.tasks.decoding_options import Decoding
from sightloop.tasks.generate import generate
from sightloop.towers.text import LanguageModel
from sightloop.types import Bits, Encoded

OPT = {"hidden_size": 2560, "num_hidden_layers": 32, "num_attention_heads": 32, "ffn_dim": 10240}
CONFIGS: dict[str, dict[str, Any]] = {
    "blip2": {"text_config": {"model_type": "opt", "vocab_size": 50304, **OPT, "word_embed_proj_dim": 2560}},
    "florence": {
        "vision_config": {
            "embed_dim": [256, 512, 1024, 2048],
            "num_heads": [8, 16, 32, 64],
            "num_groups": [8, 16, 32, 64],
        },
        "text_config": {"vocab_size": 51290, "d_model": 1024, "scale_embedding": False},
        "image_token_id": 51289,
    },
    "llava": {"text_config": {"model_type": "llama", "vocab_size": 32064, "rms_norm_eps": 1e-5}},
}
TOLD = ("language_projection.weight",)  # BLIP-2's second stage is known by it
LLAMA = {"vocab_size": 32064, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16}
LLAMA |= {"num_attention_heads": 32, "num_key_value_heads": 8}
SHARD = 10**9
NEW, PROMPT = 48, 64


def drawn(name: str, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Random weights; norms are ones."""
    if "norm" in name and name.endswith("weight"):
        return torch.ones(shape, dtype=dtype)
    return torch.empty(shape, dtype=dtype).normal_(0, 0.02)


def write_checkpoint(family: str, folder: Path, stored: torch.dtype) -> tuple[Any, list[Path], int]:
    """The family's config, the shards of a random checkpoint of its size, and how many numbers are in them."""
    layout = FAMILIES[family].layouts["transformers"]
    config = layout.configure(CONFIGS[family], dict.fromkeys(TOLD, torch.empty(0)))
    with torch.device("meta"):
        net: nn.Module = FAMILIES[family].network(config)
    tied, shapes = tied_names(net), dict[str, torch.Size]()
    for ours, value in net.state_dict().items():
        if ours not in tied:
            rule = rule_for(ours, key_map_of(layout, config))
            shapes |= {name: part.shape for name, part in zip(rule.names, rule.write(value), strict=True)}
    files: list[Path] = []
    shard: dict[str, Tensor] = {}
    total = 0
    for number, (name, shape) in enumerate(shapes.items(), 1):
        shard[name] = drawn(name, shape, stored)
        if sum(part.nbytes for part in shard.values()) > SHARD or number == len(shapes):
            total += sum(part.numel() for part in shard.values())
            files.append(folder / f"model-{len(files):05d}.safetensors")
            write_safetensors(shard, files[-1])
            shard = {}
    write_json(CONFIGS[family], folder / "config.json")
    return config, files, total


def memory(what: str) -> float:
    """GB of this process: VmRSS, now, or VmHWM, at most since the last `forget_peak`."""
    lines = Path("/proc/self/status").read_text("utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(what)) * 1024 / 1e9


def load_large(family: str, stored: torch.dtype, dtype: torch.dtype, quantize: Bits | None) -> nn.Module:
    """Writes a checkpoint, loads it, says what that took."""
    with tempfile.TemporaryDirectory() as folder:
        with give_back_freed_memory():  # what writing leaves behind would hold a part of what is loaded
            config, files, total = write_checkpoint(family, Path(folder), stored)
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        before, start, clock = memory("VmRSS"), time.process_time(), time.perf_counter()
        tensors = read_tensors(files, dtype)
        taking = weight_hook_for(quantize, torch.device("cpu"), dtype)
        layout = FAMILIES[family].layouts["transformers"]
        with give_back_freed_memory():
            net = build_network(FAMILIES[family], config, tensors, layout, source=family, weight_hook=taking)
            pack(net)
        print(
            f"{family}: checkpoint {total * stored.itemsize / 1e9:.2f} GB, {total * dtype.itemsize / 1e9:.2f} GB in "
            f"{str(dtype).removeprefix('torch.')}; loaded in {time.process_time() - start:.0f} s "
            f"({time.perf_counter() - clock:.0f} s by the clock); "
            f"{memory('VmRSS') - before:.2f} GB in memory, {memory('VmHWM') - before:.2f} GB at most while loading"
        )
    return net


def rate(decode: Any) -> float:
    """Tokens a second of processor time: `NEW` more of them, the start taken off; the best of three."""
    decode(2)
    best = 0.0
    for _ in range(3):
        times = [time.process_time()]
        for count in (2, 2 + NEW):
            decode(count)
            times.append(time.process_time())
        best = max(best, NEW / ((times[2] - times[1]) - (times[1] - times[0])))
    return best


@torch.inference_mode()
def ours(language: LanguageModel) -> float:
    """Tokens a second of one text, greedy, after a prompt of words."""
    ids = torch.randint(3, 1000, (1, PROMPT))

    def decode(count: int) -> None:
        options = Decoding(max_new_tokens=count, min_new_tokens=count)
        first = ids[:, : language.config.text.memory_dim is not None]
        generate(language, Encoded(language.text.embed_tokens(ids)), first, options, end_id=2)

    return rate(decode)


def llama(dtype: torch.dtype, quantize: Bits | None) -> LanguageModel:
    """A language model of 1.1 B random weights."""
    with torch.device("meta"):
        net = nn.ModuleDict({"language": LanguageModel(language_config({"model_type": "llama", **LLAMA}))})
    take = quantize_hook(net, quantize, torch.device("cpu")) if quantize else None
    for name, value in list(net.state_dict().items()):
        weight = drawn(name, value.shape, dtype)
        if take is None or not take(name, weight):
            parent, _, leaf = name.rpartition(".")
            setattr(net.get_submodule(parent), leaf, nn.Parameter(weight, requires_grad=False))
    pack(net)
    return net["language"]  # pyright: ignore[reportReturnType]


def peer(dtype: torch.dtype) -> float:
    """The same model in `transformers`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_default_dtype(dtype)
    net = LlamaForCausalLM(LlamaConfig(**LLAMA, eos_token_id=None, pad_token_id=0)).eval()
    ids = torch.randint(3, 1000, (1, PROMPT))
    given: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "do_sample": False}
    return rate(lambda n: net.generate(**given, max_new_tokens=n, min_new_tokens=n))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", choices=["llama", *CONFIGS])
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument(
        "--stored", choices=["float32", "bfloat16"], default="bfloat16", help="what the file holds"
    )
    parser.add_argument("--quantize", choices=["int8", "int4"])
    parser.add_argument("--peer", action="store_true", help="llama: transformers instead")
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dtype = getattr(torch, given.dtype)
    if given.model == "llama":
        speed = peer(dtype) if given.peer else ours(llama(dtype, given.quantize))
    else:
        net = load_large(given.model, getattr(torch, given.stored), dtype, given.quantize)
        speed = ours(net.language)  # pyright: ignore[reportArgumentType]
    print(f"{given.model}, {given.quantize or given.dtype}: {speed:.1f} tokens/s")


if __name__ == "__main__":
    main()
