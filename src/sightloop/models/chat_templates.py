"""Chat templates: the forms in which conversations are written for language models, as data.

No template of a checkpoint is ever run. `checkpoints.chat_templates` recognizes its text as one of these.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sightloop.errors import UnsupportedError, UsageError
from sightloop.types import IMAGE_PLACEHOLDER, ChatTemplate, Message

_CURIOUS = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions. "
)
# The instruction that LLaVA 1.5 was trained to answer with a one-sentence caption (Liu et al. 2023, table 7).
_CAPTION = "Provide a one-sentence caption for the provided image."


_VICUNA = frozenset((": ", IMAGE_PLACEHOLDER + "\n", " ", "ASSISTANT:"))
_MISTRAL = frozenset(("<<SYS>>\n", "\n<</SYS>>\n\n", "[INST] ", IMAGE_PLACEHOLDER + "\n", " [/INST]", " "))
_INST = "[INST] {} [/INST]"
_SYS = "<<SYS>>\n{}\n<</SYS>>\n\n"

QUESTION_PROMPTS: Mapping[str, str] = {
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


def render_chat(name: str, messages: Sequence[Message]) -> str:
    """The prompt of a conversation, up to the assistant's next words.

    The images of a message come before its text, each as IMAGE_PLACEHOLDER and a newline.

    Args:
        name: of CHAT_TEMPLATES.
        messages: the conversation, ending with the user's message.

    Raises:
        UnsupportedError: there is no template of that name.
        UsageError: the last message is not the user's, or a role is none of "system" (first only), "user", "assistant".
    """
    template = _template(name)
    if not messages or messages[-1].role != "user":
        raise UsageError("messages: the last one must be the user's, for the model to answer")
    out = "" if messages[0].role == "system" else template.opening
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
        out += {"user": template.user, "assistant": template.assistant, "system": template.system}[
            message.role
        ].format(words)
    return out + template.asks


def render_questions(messages: Sequence[Message]) -> str:
    """The prompt of a conversation with BLIP-2 (Li et al. 2023, section 4.1): images, then "Question: ... Answer: ...".

    Raises UsageError as `render_chat` does.
    """
    text = render_chat("questions", messages)
    return IMAGE_PLACEHOLDER * text.count(IMAGE_PLACEHOLDER) + text.replace(f"{IMAGE_PLACEHOLDER}\n", "")


def template_prompts(name: str) -> Mapping[str, str]:
    """Task -> prompt about one image in a chat template: IMAGE_PLACEHOLDER for it, "{}" for the caller's words."""
    template = _template(name)

    def one(words: str) -> str:
        return template.opening + template.user.format(f"{IMAGE_PLACEHOLDER}\n{words}") + template.asks

    return {"caption": one(_CAPTION), "answer": one("{}"), "prompt": one("{}")}


def _template(name: str) -> ChatTemplate:
    if name not in CHAT_TEMPLATES:
        raise UnsupportedError(
            "the chat template of this checkpoint is of no known form, and it is not run; known: those of "
            "llava-hf/llava-1.5-7b-hf and llava-hf/llava-v1.6-mistral-7b-hf. Leave the template out of its folder "
            "(chat_template.jinja, chat_template.json) to prompt it as its language model was trained"
        )
    return CHAT_TEMPLATES[name]
