"""Decoding defaults of a checkpoint: generation_config.json -> options of `tasks.decoding.Decoding`, and back.

Every verb uses the checkpoint's options, overridden by the verb's own (512 new tokens for a conversation, 1,024 for
regions), overridden by the caller's. Sampling options of the caller drop the checkpoint's beams, and `num_beams` of the
caller drops its sampling.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sightloop.errors import CheckpointError, UsageError, check_options, from_options
from sightloop.tasks.decoding_options import Decoding
from sightloop.types import JsonDict, JsonMapping

# Our option -> the name in generation_config.json. Lengths that count the prompt (max_length) are not read.
_NAMES = {
    "num_beams": "num_beams",
    "length_penalty": "length_penalty",
    "repetition_penalty": "repetition_penalty",
    "no_repeat_ngram": "no_repeat_ngram_size",
    "min_new_tokens": "min_new_tokens",
    "max_new_tokens": "max_new_tokens",
    "forced_bos_id": "forced_bos_token_id",
    "early_stopping": "early_stopping",
    "suppress_tokens": "suppress_tokens",
    "begin_suppress_tokens": "begin_suppress_tokens",
}
# Options that are not supported, and their values that mean "off".
_UNSUPPORTED: Mapping[str, tuple[object, ...]] = {
    "bad_words_ids": (),
    "diversity_penalty": (0.0,),
    "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1.0,),
    "exponential_decay_length_penalty": (),
    "force_words_ids": (),
    "guidance_scale": (1.0,),
    "min_length": (0,),
    "num_beam_groups": (1,),
    "num_return_sequences": (1,),
    "penalty_alpha": (0.0,),
    "renormalize_logits": (False,),
    "sequence_bias": (),
    "stop_strings": (),
    "watermarking_config": (),
}
_SAMPLING = ("temperature", "top_k", "top_p")
_TOP_K = 50  # default of `transformers` for a file with do_sample and no top_k
_IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")


def decoding_defaults(
    generation: JsonMapping,
    config: JsonMapping,
    *,
    end_id: int | None = None,
    start_ids: Sequence[int] = (),
    refines: bool = False,
) -> JsonDict:
    """Decoding options of a checkpoint.

    Args:
        generation: parsed generation_config.json, empty if there is none.
        config: parsed config.json, read in its place (checkpoints from before generation_config.json).
        end_id: EOS of the network.
        start_ids: ids that its texts start from.
        refines: generation_config.json changes some of config.json's options, else it replaces them all.

    Returns:
        Fields of `Decoding`. Sampling (`do_sample`) is kept, unless there are beams too.

    Raises:
        CheckpointError: an option that is not supported, by name.
    """
    options = _stated(generation)
    if refines or not generation:
        options = {**_stated(config.get("text_config") or {}), **_stated(config), **options}
    if not start_ids:  # it forces the token after the first one, and a prompt is longer
        options.pop("forced_bos_token_id", None)
    ends = options.get("eos_token_id", end_id)
    ends = ends if isinstance(ends, list) else [ends]
    if start_ids and "min_length" in options:  # which counts the token that a text starts from
        options["min_new_tokens"] = max(options.pop("min_length") - 1, options.get("min_new_tokens", 0))
    allowed = {**_UNSUPPORTED, "forced_eos_token_id": (ends[0], ends[:1])}
    allowed |= {"decoder_start_token_id": tuple(start_ids)} if start_ids else {}
    for name, values in allowed.items():
        if name in options and options[name] not in values:
            raise CheckpointError(
                f"generation_config.json: {name}={options[name]!r} is not supported; remove it to decode without it"
            )
    decoding = {ours: options[hf_name] for ours, hf_name in _NAMES.items() if hf_name in options}
    decoding |= {"force_eos": True} if "forced_eos_token_id" in options else {}
    decoding |= {} if end_id is None or ends == [end_id] else {"end_ids": ends}
    if options.get("do_sample") and decoding.get("num_beams", 1) == 1:
        sampling = {"temperature": 1.0, "top_k": _TOP_K, "top_p": 1.0}
        sampling |= {name: options[name] for name in sampling if options.get(name) is not None}
        off = {"top_k": 0, "top_p": 1.0}
        decoding |= {name: value for name, value in sampling.items() if value != off.get(name)}
    try:
        check_options(Decoding, decoding)
    except UsageError as error:
        raise CheckpointError(f"generation_config.json: {error}") from error
    if not all(isinstance(end, int) for end in ends if end is not None):
        raise CheckpointError(f"generation_config.json: eos_token_id={str(ends)[:40]}: must be whole numbers")
    return decoding


def _stated(data: JsonMapping) -> JsonDict:
    return {name: value for name, value in data.items() if value is not None}


def decoding_options(defaults: JsonMapping, verb_defaults: JsonMapping, options: JsonMapping) -> Decoding:
    """Decoding options of one call: the caller's, else the verb's, else the checkpoint's.

    Raises:
        UsageError: an unknown option, or options that exclude each other.
    """
    merged = {**defaults, **verb_defaults}
    if any(options.get(name) is not None for name in _SAMPLING):
        merged.pop("num_beams", None)
    elif "num_beams" in options:
        merged = {name: value for name, value in merged.items() if name not in _SAMPLING}
    if isinstance(limit := options.get("max_new_tokens"), int) and "min_new_tokens" in merged:
        merged["min_new_tokens"] = min(merged["min_new_tokens"], limit)
    return from_options(Decoding, {**merged, **options}, "decoding option")


def generation_config(defaults: JsonMapping, config: JsonMapping, end_id: int) -> JsonDict:
    """Contents of a generation_config.json.

    Args:
        defaults: the checkpoint's decoding options.
        config: the config.json of the same folder, whose special token ids it repeats.
        end_id: EOS of the network.
    """
    ids = {**config, **(config.get("text_config") or {})}
    data = {name: ids[name] for name in _IDS if ids.get(name) is not None}
    data |= {hf_name: defaults[ours] for ours, hf_name in _NAMES.items() if ours in defaults}
    sampling = {name: defaults[name] for name in _SAMPLING if name in defaults}
    if sampling:
        data |= {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, **sampling}
    ends = list(defaults.get("end_ids") or [end_id])
    data["eos_token_id"] = ends[0] if len(ends) == 1 else ends
    return data | ({"forced_eos_token_id": ends[0]} if defaults.get("force_eos") else {})
