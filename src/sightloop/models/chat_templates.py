"""The forms in which conversations are written for language models, as data. No template of a checkpoint is ever run:
its text is compared with what the known forms write, and one that is not known is an error when it is needed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

from sightloop.errors import UnsupportedError, UsageError
from sightloop.types import Message

IMAGE_PLACEHOLDER = "<image>"
_CURIOUS = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions. "
)
# What LLaVA 1.5 was trained to answer with one sentence about the image (Liu et al. 2023, table 7).
_CAPTION = "Provide a one-sentence caption for the provided image."


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """How each role's words are written, `{}` for them; `asks`: what the answer follows. opening: what comes first
    where no message is of the system. literals: what the hub's template of this form prints, apart from the words."""

    user: str
    assistant: str
    system: str
    asks: str
    literals: frozenset[str]
    opening: str = ""


_VICUNA = frozenset((": ", IMAGE_PLACEHOLDER + "\n", " ", "ASSISTANT:"))
_MISTRAL = frozenset(("<<SYS>>\n", "\n<</SYS>>\n\n", "[INST] ", IMAGE_PLACEHOLDER + "\n", " [/INST]", " "))
_INST = "[INST] {} [/INST]"
_SYS = "<<SYS>>\n{}\n<</SYS>>\n\n"

QUESTIONS: Mapping[str, str] = {
    "caption": IMAGE_PLACEHOLDER,
    "prompt": f"{IMAGE_PLACEHOLDER}{{}}",
    "answer": f"{IMAGE_PLACEHOLDER}Question: {{}} Answer:",
}

CHAT_TEMPLATES: Mapping[str, ChatTemplate] = {
    "questions": ChatTemplate(
        "Question: {} ", "Answer: {}. ", "{} ", "Answer:", frozenset(("Question: ", "Answer: "))
    ),
    "vicuna": ChatTemplate("USER: {} ", "ASSISTANT: {} ", "{} ", "ASSISTANT:", _VICUNA),
    "vicuna_curious": ChatTemplate(
        "USER: {} ", "ASSISTANT: {} ", "{} ", "ASSISTANT:", _VICUNA | {_CURIOUS}, _CURIOUS
    ),
    "mistral": ChatTemplate(_INST, " {}</s> ", _SYS, "", _MISTRAL | {"</s> "}),
    # What the first files of LLaVA 1.6 say: not the end token, but its letters misspelt.
    "mistral_first": ChatTemplate(_INST, " {}<\\s> ", _SYS, "", _MISTRAL | {"<\\s> "}),
}


def template_name(template: str) -> str:
    """The name of the form that a chat template (Jinja) writes, "" for one that is not known.

    Known by the literals that it prints: comments, spacing and what it calls its variables make no difference.
    """
    printed = "".join(re.findall(r"\{\{-?(.*?)-?\}\}", re.sub(r"\{#.*?#\}", "", template, flags=re.S), re.S))
    indices = re.compile(r"\[\s*(['\"]).*?\1\s*\]|raise_exception\(.*?\)")  # message['role'], errors
    found = re.findall(r"'((?:[^'\\]|\\.)*)'|\"((?:[^\"\\]|\\.)*)\"", indices.sub("", printed))
    literals = frozenset(_unescaped(single or double) for single, double in found) - {""}
    return next(
        (name for name, form in CHAT_TEMPLATES.items() if literals in (form.literals, _own(form))), ""
    )


def _own(form: ChatTemplate) -> frozenset[str]:
    """What `template_of` prints."""
    shapes = (form.user, form.assistant, form.system)
    return frozenset(
        (
            *chain.from_iterable(s.split("{}") for s in shapes),
            form.asks,
            form.opening,
            f"{IMAGE_PLACEHOLDER}\n",
        )
    ) - {""}


def jinja_template(name: str) -> str:
    """A chat template (Jinja) that writes the form, for other programs; `form_of` knows it."""
    form = CHAT_TEMPLATES[name]

    def part(kind: str, value: str) -> str:
        return f"{{% for c in m['content'] if c['type'] == '{kind}' %}}{{{{ {value} }}}}{{% endfor %}}"

    def said(role: str, shape: str, between: str) -> str:
        before, after = (json.dumps(text) for text in shape.split("{}"))
        return f"{{% {between} m['role'] == '{role}' %}}{{{{ {before} }}}}{pictures}{words}{{{{ {after} }}}}"

    pictures, words = part("image", json.dumps(f"{IMAGE_PLACEHOLDER}\n")), part("text", "c['text']")
    turns = (
        said("system", form.system, "if")
        + said("user", form.user, "elif")
        + said("assistant", form.assistant, "elif")
    )
    opening = (
        f"{{% if messages[0]['role'] != 'system' %}}{{{{ {json.dumps(form.opening)} }}}}{{% endif %}}"
        if form.opening
        else ""
    )
    asks = (
        f"{{% if add_generation_prompt %}}{{{{ {json.dumps(form.asks)} }}}}{{% endif %}}" if form.asks else ""
    )
    return f"{opening}{{% for m in messages %}}{turns}{{% endif %}}{{% endfor %}}{asks}"


def render_chat(name: str, messages: Sequence[Message]) -> str:
    """The prompt of a conversation in the form `name`, up to where the assistant's next words stand.

    The images of a message come before its text, PICTURE and a line's end for each. Raises UnsupportedError where
    the form is not known, UsageError where the last message is not the user's or a role is none of "system" (first
    only), "user", "assistant".
    """
    form = _form(name)
    if not messages or messages[-1].role != "user":
        raise UsageError("messages: the last one must be the user's, for the model to answer")
    out = "" if messages[0].role == "system" else form.opening
    for place, message in enumerate(messages):
        if message.role not in ("system", "user", "assistant") or (message.role == "system" and place):
            raise UsageError(
                f"messages[{place}]: role {message.role!r}; there are user and assistant, and system as the first"
            )
        if IMAGE_PLACEHOLDER in message.text:
            raise UsageError(f"messages[{place}]: {IMAGE_PLACEHOLDER} in its text; give images as `images`")
        if message.images and message.role != "user":
            raise UsageError(f"messages[{place}]: only the user's messages have images")
        words = f"{IMAGE_PLACEHOLDER}\n" * len(message.images) + message.text
        out += {"user": form.user, "assistant": form.assistant, "system": form.system}[message.role].format(
            words
        )
    return out + form.asks


def render_questions(messages: Sequence[Message]) -> str:
    """The prompt of a conversation as BLIP-2 was asked (Li et al. 2023, section 4.1): "Question: ... Answer: ...", the
    images before all words. Raises UsageError as `dialogue` does."""
    text = render_chat("questions", messages)
    return IMAGE_PLACEHOLDER * text.count(IMAGE_PLACEHOLDER) + text.replace(f"{IMAGE_PLACEHOLDER}\n", "")


def template_prompts(name: str) -> Mapping[str, str]:
    """Job -> prompt of one image: PICTURE where it stands, "{}" for the caller's words; see `inference.prompting`."""
    form = _form(name)

    def one(words: str) -> str:
        return form.opening + form.user.format(f"{IMAGE_PLACEHOLDER}\n{words}") + form.asks

    return {"caption": one(_CAPTION), "answer": one("{}"), "prompt": one("{}")}


def _form(name: str) -> ChatTemplate:
    if name not in CHAT_TEMPLATES:
        raise UnsupportedError(
            "the chat template of this checkpoint is of no known form, and it is not run; known: those of "
            "llava-hf/llava-1.5-7b-hf and llava-hf/llava-v1.6-mistral-7b-hf. Leave the template out of its folder "
            "(chat_template.jinja, chat_template.json) to prompt it as its language model was trained"
        )
    return CHAT_TEMPLATES[name]


def _unescaped(literal: str) -> str:
    """What Jinja makes of an escaped literal: `\\n` and the like, as Python reads them; an unknown one stays."""
    known = {"n": "\n", "t": "\t", "\\": "\\", "'": "'", '"': '"'}
    return re.sub(r"\\(.)", lambda found: known.get(found[1], found[0]), literal, flags=re.S)
