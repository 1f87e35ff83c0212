"""How a checkpoint writes where nobody says: generation_config.json -> options of `tasks.generate.Decoding`, and back.

One rule holds for every verb: what the checkpoint says, over it what the verb says of its own (a conversation may have
512 tokens, a text of regions 1,024), over it what the caller says. Who samples is given no beams by the checkpoint, and
who says how many beams draws nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sightloop.errors import CheckpointError, from_options
from sightloop.tasks.generate import Decoding
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
# Rules that are not known here, and what says there that there is none.
_NO_RULE: Mapping[str, tuple[Any, ...]] = {
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
_TOP_K = 50  # of the reference, where a file that wants sampling does not say
_IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")


def decoding_defaults(
    given: JsonMapping,
    config: JsonMapping,
    *,
    end_id: int | None = None,
    start_ids: Sequence[int] = (),
) -> JsonDict:
    """From a parsed generation_config.json or, where that is empty, a config.json of before there were such.

    end_id, start_ids: what the network ends texts with, and starts them from. What is drawn at random there
    (`do_sample`) is drawn here, unless there are beams too. Raises CheckpointError that names a rule which is not
    known.
    """
    every = given or {**(config.get("text_config") or {}), **_stated(config)}
    said = _stated(every)
    if not start_ids:  # it says what follows one first token, and a prompt is longer
        said.pop("forced_bos_token_id", None)
    ends = said.get("eos_token_id", end_id)
    ends = ends if isinstance(ends, list) else [ends]
    if start_ids and "min_length" in said:  # which counts the token that a text starts from
        said["min_new_tokens"] = max(said.pop("min_length") - 1, said.get("min_new_tokens", 0))
    rules = {**_NO_RULE, "forced_eos_token_id": (ends[0], ends[:1])}
    rules |= {"decoder_start_token_id": tuple(start_ids)} if start_ids else {}
    for name, none in rules.items():
        if name in said and said[name] not in none:
            raise CheckpointError(
                f"generation_config.json: {name}={said[name]!r} is not supported; take it out to write without it"
            )
    found = {ours: said[theirs] for ours, theirs in _NAMES.items() if theirs in said}
    found |= {"force_eos": True} if "forced_eos_token_id" in said else {}
    found |= {} if end_id is None or ends == [end_id] else {"end_ids": ends}
    if said.get("do_sample") and found.get("num_beams", 1) == 1:
        drawn = {"temperature": 1.0, "top_k": _TOP_K, "top_p": 1.0}
        drawn |= {name: said[name] for name in drawn if said.get(name) is not None}
        neutral = {"top_k": 0, "top_p": 1.0}
        found |= {name: value for name, value in drawn.items() if value != neutral.get(name)}
    return found


def _stated(data: JsonMapping) -> JsonDict:
    return {name: value for name, value in data.items() if value is not None}


def decoding_options(habits: JsonMapping, usual: JsonMapping, given: JsonMapping) -> Decoding:
    """The rule: of the checkpoint, of the verb, of the caller. Raises UsageError for what does not go together."""
    own = {**habits, **usual}
    if any(given.get(name) is not None for name in _SAMPLING):
        own.pop("num_beams", None)
    elif "num_beams" in given:
        own = {name: value for name, value in own.items() if name not in _SAMPLING}
    if isinstance(most := given.get("max_new_tokens"), int) and "min_new_tokens" in own:
        own["min_new_tokens"] = min(own["min_new_tokens"], most)
    return from_options(Decoding, {**own, **given}, "decoding option")


def generation_config(habits: JsonMapping, config: JsonMapping, end_id: int) -> JsonDict:
    """A generation_config.json that says the habits; config: the config.json beside it, for the ids that it repeats."""
    everywhere = {**config, **(config.get("text_config") or {})}
    out = {name: everywhere[name] for name in _IDS if everywhere.get(name) is not None}
    out |= {theirs: habits[ours] for ours, theirs in _NAMES.items() if ours in habits}
    drawn = {name: habits[name] for name in _SAMPLING if name in habits}
    if drawn:
        out |= {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, **drawn}
    ends = list(habits.get("end_ids") or [end_id])
    out["eos_token_id"] = ends[0] if len(ends) == 1 else ends
    return out | ({"forced_eos_token_id": ends[0]} if habits.get("force_eos") else {})
