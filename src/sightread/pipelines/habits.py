"""How a checkpoint writes where nobody says: generation_config.json -> options of `tasks.generate.Decoding`, and back.

One rule holds for every verb: what the checkpoint says, over it what the verb says of its own (a conversation may have
512 tokens, a text of regions 1,024), over it what the caller says. Who samples is given no beams by the checkpoint, and
who says how many beams draws nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sightread.tasks.generate import Decoding

# Our option -> the name in generation_config.json. Lengths that count the prompt (max_length) are not read.
_NAMES = {
    "num_beams": "num_beams",
    "length_penalty": "length_penalty",
    "repetition_penalty": "repetition_penalty",
    "no_repeat_ngram": "no_repeat_ngram_size",
    "min_new_tokens": "min_new_tokens",
    "max_new_tokens": "max_new_tokens",
    "first_id": "forced_bos_token_id",
}
_SAMPLING = ("temperature", "top_k", "top_p")
_TOP_K = 50  # of the reference, where a file that wants sampling does not say
_IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")


def habits_of(said: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """From a parsed generation_config.json or, where that is empty, a config.json of before there were such.

    What is drawn at random there (`do_sample`) is drawn here, unless there are beams too.
    """
    if not said:
        said = {**(config.get("text_config") or {}), **{k: v for k, v in config.items() if v is not None}}
    found = {ours: said[theirs] for ours, theirs in _NAMES.items() if said.get(theirs) is not None}
    flags = {"stop_early": said.get("early_stopping") is True}
    flags["end_last"] = said.get("forced_eos_token_id") is not None
    found |= {name: True for name, on in flags.items() if on}
    if said.get("do_sample") and found.get("num_beams", 1) == 1:
        drawn = {"temperature": 1.0, "top_k": _TOP_K, "top_p": 1.0}
        drawn |= {name: said[name] for name in drawn if said.get(name) is not None}
        neutral = {"top_k": 0, "top_p": 1.0}
        found |= {name: value for name, value in drawn.items() if value != neutral.get(name)}
    return found


def options(habits: Mapping[str, Any], usual: Mapping[str, Any], given: Mapping[str, Any]) -> Decoding:
    """The rule: of the checkpoint, of the verb, of the caller. Raises UsageError for what does not go together."""
    own = {**habits, **usual}
    if any(given.get(name) is not None for name in _SAMPLING):
        own.pop("num_beams", None)
    elif "num_beams" in given:
        own = {name: value for name, value in own.items() if name not in _SAMPLING}
    return Decoding.of({**own, **given})


def generation_config(habits: Mapping[str, Any], config: Mapping[str, Any], end_id: int) -> dict[str, Any]:
    """A generation_config.json that says the habits; config: the config.json beside it, for the ids that it repeats."""
    everywhere = {**config, **(config.get("text_config") or {})}
    out = {name: everywhere[name] for name in _IDS if everywhere.get(name) is not None}
    out |= {theirs: habits[ours] for ours, theirs in _NAMES.items() if ours in habits}
    drawn = {name: habits[name] for name in _SAMPLING if name in habits}
    if drawn:
        out |= {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, **drawn}
    out |= {"early_stopping": True} if habits.get("stop_early") else {}
    return out | ({"forced_eos_token_id": end_id} if habits.get("end_last") else {})
