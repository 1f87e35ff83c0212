"""Where a checkpoint's files are, and its tensors, read one by one without running anything that a file says.

Local first: a folder, a file, the Hugging Face cache. The network is asked only for what is on none of them, and an
answer that does not come within seconds is an error that says which files to put where.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import socket
import threading
from collections.abc import Collection, Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from itertools import islice
from pathlib import Path
from typing import cast
from urllib.parse import urlsplit
from urllib.request import getproxies

from sightloop.checkpoints.catalog import BUNDLED, find_entry, recommended_for, similar_names
from sightloop.checkpoints.file_lists import PROCESSOR_FILES, SMALL_FILES, TOKENIZER_FILES, expected_files
from sightloop.checkpoints.pipeline_files import (
    PIPELINE_FILE,
    choose_part_weights,
    files_to_fetch,
    parts_of,
    tokenizers_of,
)
from sightloop.checkpoints.tensors import MAX_JSON_BYTES
from sightloop.errors import CheckpointError, SightloopError
from sightloop.types import JsonDict

PROBE_SECONDS = 3.0
REQUEST_SECONDS = 6.0

_SUFFIXES = (".safetensors", ".bin", ".pth", ".pt", ".ckpt")
# The names that weights have, the best first; after them, a file that is the only one of its kind.
_KNOWN_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "open_clip_pytorch_model.bin",
)
# What a training run leaves beside the weights.
_NOT_WEIGHTS = (
    "training_args*",
    "optimizer*",
    "scheduler*",
    "scaler*",
    "rng_state*",
    "random_states*",
    "adapter_*",
)
BUNDLED_FOLDER = Path(__file__).resolve().parent.parent / BUNDLED

_ADAPTER = "adapter_"  # how the names of PEFT's files begin
_BLOCK, _BLOCKS = 4096, 256  # bytes and number of the parts of a weights file that its identity reads
_MAX_FOLDERS = 500  # looked into for a model, to name it in an error
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+", re.ASCII)


@dataclass(frozen=True, slots=True)
class CheckpointFiles:
    """A checkpoint on this machine. `name` is for messages, `config` the parsed config file or None without one.

    weights: one file, or the shards of one checkpoint in a fixed order.
    """

    name: str
    folder: Path
    weights: tuple[Path, ...]
    config: JsonDict | None


def locate(source: str | os.PathLike[str], *, revision: str | None = None) -> CheckpointFiles:
    """Find a checkpoint: a folder or a file of this machine, or a hub id `owner/name` (a `str`), cached or fetched.

    The str "nano" is the model that comes with the package; a folder of that name is "./nano".
    revision: branch, tag or commit of a hub id; "main" by default.
    Raises CheckpointError that says what is missing and where it belongs. Waits for an absent network for some
    seconds at most; HF_HUB_OFFLINE=1 forbids the network, HF_ENDPOINT names a mirror.
    """
    text = os.fspath(source)
    if source == BUNDLED and BUNDLED_FOLDER.is_dir():
        return _from_folder(BUNDLED_FOLDER, text)
    path = Path(text).expanduser()
    if text and os.path.isdir(path):
        return _from_folder(path, text)
    if text and os.path.isfile(path):
        return _from_weights_file(path, text)
    if isinstance(source, str) and _HUB_ID.fullmatch(text) and ".." not in text:
        return _from_hub(text, revision)
    raise CheckpointError(_not_found_message(text))


def is_cached(source: str) -> bool:
    """Whether the Hugging Face cache has a folder of the hub model `source`, complete or not."""
    if os.path.exists(os.path.expanduser(source)) or not _HUB_ID.fullmatch(source):
        return False
    from huggingface_hub.constants import HF_HUB_CACHE

    return (Path(HF_HUB_CACHE) / f"models--{source.replace('/', '--')}").is_dir()


def weights_identity(source: str, lora: Path | None = None) -> str:
    """Name and digest of a model: "nano@0123456789ab"; the name alone if its files cannot be found.

    The digest is that of sizes and of 256 evenly spaced blocks of 4 KiB, so that a fine-tuned model differs from its
    start. It is not proof against forgery, as `inference.fingerprint` is.

    Args:
        source: Folder, weights file or hub id.
        lora: Folder of a LoRA adapter that is merged in.
    """
    name = Path(source).name if os.path.exists(os.path.expanduser(source)) else source
    try:
        digest = _digest(
            [*locate(source).weights, *sorted((lora or Path()).glob("*.safetensors") if lora else ())]
        )
    except (SightloopError, OSError):
        return name
    return f"{name}@{digest}"


def is_same_model(first: str, second: str) -> bool:
    """Whether two identities are of the same weights: by their digests, or by their names if one has none."""
    (name, _, digest), (other_name, _, other_digest) = first.rpartition("@"), second.rpartition("@")
    if name and other_name:
        return digest == other_digest
    return first.partition("@")[0] == second.partition("@")[0]


def read_json(path: Path) -> JsonDict:
    """A config or an index. Raises CheckpointError for what is too large, damaged or no table of settings."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise CheckpointError(f"{path}: too large for a config ({path.stat().st_size} bytes)")
        data = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON ({error}); download it again") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: holds a {type(data).__name__}, not the settings of a model")
    return cast("JsonDict", data)


def _from_folder(folder: Path, name: str) -> CheckpointFiles:
    try:
        entries = list(os.scandir(folder))
        names = [entry.name for entry in entries if entry.is_file()]
    except OSError as error:
        raise CheckpointError(f"{name}: this folder cannot be read ({error.strerror})") from error
    if PIPELINE_FILE in names:
        return _from_parts(folder, name)
    config = folder / "config.json"
    is_timm = _is_ambiguous(names) and _is_timm_config(read_json(config))
    chosen = _choose_weights(names, name, open_clip_first=is_timm)
    if chosen is None and any(file.startswith(_ADAPTER) for file in names):
        raise CheckpointError(_adapter_message(name, folder))
    if chosen is None:
        some = ", ".join(sorted(entry.name for entry in entries)[:8]) or "nothing"
        raise CheckpointError(f"{name}: no weights in this folder (it holds {some}). {_remedy(folder, name)}")
    return _from_weights_file(folder / chosen, name)


def _from_parts(folder: Path, name: str) -> CheckpointFiles:
    """A checkpoint of parts: the weights of all, and their configs by the part's name beside the index's entries."""
    index = read_json(folder / PIPELINE_FILE)
    parts, weights = parts_of(index, name), list[Path]()
    missing = [f for f in (*parts, *tokenizers_of(index), "scheduler") if not (folder / f).is_dir()]
    if missing:
        raise CheckpointError(
            f"{name}: has no folder {', '.join(missing)}, which {PIPELINE_FILE} asks for; put the checkpoint's there"
        )
    for part in parts:
        path = folder / part / choose_part_weights(os.listdir(folder / part), f"{name}/{part}")
        weights += _shard_paths(path) if path.suffix == ".json" else (path,)
        index[part] = read_json(folder / part / "config.json")
    index["scheduler"] = read_json(folder / "scheduler" / "scheduler_config.json")
    return CheckpointFiles(name, folder, tuple(weights), index)


def _remedy(folder: Path, name: str) -> str:
    """What to load instead of a folder without weights."""
    if inner := _model_folders(folder):
        return f"Load the model inside it: {' or '.join(os.path.join(name, part) for part in inner[:3])}"
    if (folder / "recipe.json").is_file():
        return "It is a run of `sightloop train` that has not written its model yet; resume it first"
    return "Put model.safetensors and config.json there, or name the weights file itself."


def _model_folders(folder: Path) -> list[str]:
    """Folders inside with weights and a config, up to three levels down (a cache has snapshots/COMMIT), the nearest and
    of a trainer's the newest first: checkpoint-500 before checkpoint-90."""
    folders: list[str] = []
    for path, inner, names in islice(os.walk(folder), _MAX_FOLDERS):
        relative = os.path.relpath(path, folder)
        if relative.count(os.sep) == 2:
            inner.clear()  # goes no deeper
        weights = any(file in _KNOWN_WEIGHTS or file.endswith(_SUFFIXES[:1]) for file in names)
        if weights and {"config.json", "open_clip_config.json"} & set(names):
            folders.append(relative)

    def order(name: str) -> tuple[int, int, str]:
        numbers = re.findall(r"\d{1,18}", os.path.basename(name))
        return name.count(os.sep), -int(numbers[-1]) if numbers else 0, name

    return sorted(folders, key=order)


def _adapter_message(name: str, folder: Path) -> str:
    config = folder / "adapter_config.json"
    base = read_json(config).get("base_model_name_or_path") if config.is_file() else None
    model = f"{base}" if isinstance(base, str) and base else "its base model"
    return (
        f"{name}: holds a LoRA adapter (PEFT), not a model. An adapter of `sightloop train` is loaded with its base "
        f'model: load(BASE, lora="{name}"); merge another into {model} with PEFT\'s merge_and_unload(), save that '
        "with save_pretrained(), and load the folder"
    )


def _from_weights_file(path: Path, name: str) -> CheckpointFiles:
    if path.name.startswith(_ADAPTER) and path.suffix in _SUFFIXES:
        raise CheckpointError(_adapter_message(name, path.parent))
    if path.name.endswith(".index.json"):
        weights = _shard_paths(path)
    elif path.suffix in _SUFFIXES:
        weights = (path,)
    else:
        raise CheckpointError(f"{name}: is no checkpoint; weights end in {', '.join(_SUFFIXES)}")
    return CheckpointFiles(name, path.parent, weights, _find_config(path))


def _find_config(weights: Path) -> JsonDict | None:
    """The config that belongs to these weights: open_clip's own name for open_clip's files, else config.json."""
    names = ["config.json", "open_clip_config.json"]
    if weights.name.startswith("open_clip"):
        names.reverse()
    for name in names:
        if (weights.parent / name).is_file():
            return read_json(weights.parent / name)
    return None


def _is_ambiguous(names: Collection[str]) -> bool:
    """Whether there are weights of open_clip and others, and a config that says what the others are."""
    own = [name.startswith("open_clip") for name in _KNOWN_WEIGHTS if name in names]
    return any(own) and not all(own) and "config.json" in names


def _is_timm_config(config: JsonDict) -> bool:
    """Whether a config.json describes weights of timm: an image tower alone, as in timm/resnet50_clip.openai."""
    return "architecture" in config and "model_type" not in config


def _choose_weights(names: Collection[str], where: str, *, open_clip_first: bool = False) -> str | None:
    """The weights (or their index) among a folder's file names, safetensors first; None where there are none."""
    order = sorted(_KNOWN_WEIGHTS, key=lambda name: open_clip_first and not name.startswith("open_clip"))
    for known in order:
        if known in names:
            return known
    for suffixes in (_SUFFIXES[:1], _SUFFIXES[1:]):
        candidates = sorted(
            name
            for name in names
            if name.endswith(suffixes) and not any(fnmatch(name, p) for p in _NOT_WEIGHTS)
        )
        if len(candidates) > 1:
            raise CheckpointError(
                f"{where}: several weights files ({', '.join(candidates[:8])}); name the one to load, "
                f"for example {where.rstrip('/')}/{candidates[0]}"
            )
        if candidates:
            return candidates[0]
    return None


def _shard_paths(index: Path) -> tuple[Path, ...]:
    """Files that an index lists, all in its folder: a name that leads elsewhere is refused."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: has no weight_map; download it again")
    listed = list(cast("JsonDict", weight_map).values())
    for file in listed:
        if (
            not isinstance(file, str)
            or not re.fullmatch(r"[\w][\w. -]*", file)
            or not file.endswith(_SUFFIXES)
        ):
            raise CheckpointError(f"{index}: names {file!r}, which is not a weights file in the same folder")
    files = set(listed)
    missing = sorted(file for file in files if not (index.parent / file).is_file())
    if missing:
        raise CheckpointError(
            f"{index.parent}: {len(missing)} of {len(files)} shards are missing ({', '.join(missing[:8])}); "
            f"put them beside {index.name}"
        )
    return tuple(index.parent / file for file in sorted(files))


# The hub.


def _from_hub(name: str, revision: str | None) -> CheckpointFiles:
    """From the cache if the cache has all of it, else from the network, else what the cache has of it."""
    cached = _from_cache(name, revision)
    if cached is not None and _is_complete(cached):
        return cached
    try:
        return _fetch(name, revision)
    except CheckpointError:
        if cached is None:
            raise
        return cached


def _is_complete(files: CheckpointFiles) -> bool:
    """Whether a cached snapshot has a config, a tokenizer and, if it is not in our own layout, a processor config."""
    if files.config is None:
        return False
    if (files.folder / PIPELINE_FILE).is_file():
        return True  # its parts were looked at
    needed = [TOKENIZER_FILES, *([] if "format" in files.config else [PROCESSOR_FILES])]
    return all(any((files.folder / name).exists() for name in names) for names in needed)


def _from_cache(name: str, revision: str | None) -> CheckpointFiles | None:
    """The cached snapshot, None where its weights are not all there."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        folder = snapshot_download(name, revision=revision, local_files_only=True)
    except (
        LocalEntryNotFoundError
    ) as error:  # a snapshot of which some file is not wanted counts as incomplete
        folder = getattr(error, "snapshot_path", None)
    except HFValidationError as error:
        raise CheckpointError(_not_found_message(name)) from error
    if folder is None:
        return None
    try:
        return _from_folder(Path(folder), name)
    except CheckpointError:
        return None


def _fetch(name: str, revision: str | None) -> CheckpointFiles:
    from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download

    if constants.HF_HUB_OFFLINE:
        raise CheckpointError(_offline_message(name, "HF_HUB_OFFLINE forbids asking the hub"))
    if not _is_reachable(constants.ENDPOINT):
        raise CheckpointError(_offline_message(name, f"{constants.ENDPOINT} cannot be reached"))
    with _hub_errors(name, revision):
        info = HfApi().model_info(name, revision=revision, timeout=REQUEST_SECONDS)
    everything = [file.rfilename for file in info.siblings or []]
    names = [file for file in everything if "/" not in file]
    if PIPELINE_FILE in names:
        with _hub_errors(name, revision):
            index = read_json(Path(hf_hub_download(name, PIPELINE_FILE, revision=info.sha or revision)))
        wanted = list(files_to_fetch(everything, index, name))
        with _hub_errors(name, revision):
            folder = snapshot_download(name, revision=revision, allow_patterns=wanted)
        return _from_folder(Path(folder), name)
    is_timm = False
    if _is_ambiguous(names):
        with _hub_errors(name, revision):
            config = hf_hub_download(name, "config.json", revision=info.sha or revision)
        is_timm = _is_timm_config(read_json(Path(config)))
    patterns = _files_to_fetch(names, name, open_clip_first=is_timm)
    with _hub_errors(name, revision):
        folder = snapshot_download(name, revision=revision, allow_patterns=patterns)
    return _from_folder(Path(folder), name)


@contextmanager
def _hub_errors(name: str, revision: str | None) -> Generator[None]:
    """What can go wrong between here and the hub, in plain words."""
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        yield
    except GatedRepoError as error:
        remedy = f"accept its licence at {constants.ENDPOINT}/{name} and log in with `hf auth login`"
        raise CheckpointError(f"{name}: the owner asks for an agreement first; {remedy}") from error
    except RevisionNotFoundError as error:
        raise CheckpointError(f"{name}: has no revision {revision!r}") from error
    except RepositoryNotFoundError as error:
        private = "and no model of that name on the hub, or a private one (then: `hf auth login`)"
        raise CheckpointError(_not_found_message(name, private)) from error
    # Anything else: the hub's client has changed its HTTP library, and with it these types, before.
    except Exception as error:
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise CheckpointError(_offline_message(name, f"{constants.ENDPOINT} failed ({reason})")) from error


def _files_to_fetch(names: list[str], where: str, *, open_clip_first: bool = False) -> list[str]:
    """Of a repository's files, one copy of the weights and the small files beside them."""
    chosen = _choose_weights(names, where, open_clip_first=open_clip_first)
    if chosen is None and any(name.startswith(_ADAPTER) for name in names):
        raise CheckpointError(_adapter_message(where, Path(where)))
    if chosen is None:
        raise CheckpointError(
            f"{where}: its repository has no weights that can be read ({', '.join(_SUFFIXES)})"
        )
    kept = {name for name in names if name in SMALL_FILES} | {chosen}
    if chosen.endswith(".index.json"):
        stem, suffix = os.path.splitext(chosen.removesuffix(".index.json"))
        kept |= {name for name in names if fnmatch(name, f"{stem}-*{suffix}")}
    return sorted(re.sub(r"([*?[])", r"[\1]", name) for name in kept)


def _is_reachable(endpoint: str) -> bool:
    """Whether anything answers there. Behind a proxy only the hub's own client can tell."""
    proxies = getproxies()
    parts = urlsplit(endpoint)
    if parts.hostname is None or parts.scheme in proxies or "all" in proxies:
        return True
    address = (parts.hostname, parts.port or (80 if parts.scheme == "http" else 443))
    answered: list[bool] = []

    def knock() -> None:
        try:
            socket.create_connection(address, timeout=PROBE_SECONDS).close()
        except OSError:
            return
        answered.append(True)

    # A thread, because a DNS lookup has no time limit.
    thread = threading.Thread(target=knock, daemon=True)
    thread.start()
    thread.join(PROBE_SECONDS)
    return bool(answered)


def _offline_message(name: str, why: str) -> str:
    entry, folder = find_entry(name), name.split("/")[-1]
    *small, weights = expected_files(entry)
    older = {"clip": " (or vocab.json, merges.txt)", "blip": " (or vocab.txt)"}
    files = ", ".join(small).replace(
        "tokenizer.json", f"tokenizer.json{older.get(entry.family if entry else '', '')}"
    )
    other = "" if entry is not None and entry.layout == "diffusers" else " (or pytorch_model.bin)"
    return (
        f"{name}: not a folder here, not in the Hugging Face cache, and {why}. With a connection, download {files} and "
        f"{weights}{other} from https://huggingface.co/{name} into one folder, for example with "
        f"`hf download {name} --local-dir {folder}`; bring it here and load ./{folder}{_suggestion(name)}"
    )


def _not_found_message(text: str, hub: str = "and a hub model is called owner/name") -> str:
    entry = find_entry(text)
    if entry is not None and entry.name == BUNDLED:
        return (
            f"{text}: this copy of sightloop lacks the model that comes with it; install the package, or name another "
            f"model, such as {recommended_for('caption').name}"
        )
    if entry is not None and entry.url:
        return f"{text}: no such file here; download it from {entry.url} and name its path"
    return f"{text or '(empty)'}: no such folder or file here, {hub}{_suggestion(text)}"


def _suggestion(text: str) -> str:
    close = [] if find_entry(text) else similar_names(text)
    return f". Did you mean {' or '.join(close)}?" if close else ""


def _digest(files: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            digest.update(f"{size} ".encode())
            step = max(_BLOCK, size // _BLOCKS)
            for start in range(0, size, step):
                file.seek(start)
                digest.update(file.read(_BLOCK))
    return digest.hexdigest()[:12]
