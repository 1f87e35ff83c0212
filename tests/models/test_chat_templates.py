"""The forms of conversations: the templates that write them, and what is made of templates that do not."""

from __future__ import annotations

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from sightloop.checkpoints.chat_templates import jinja_template, template_name
from sightloop.models.chat_templates import CHAT_TEMPLATES, render_chat, template_prompts
from sightloop.types import Message

MESSAGES = [
    Message("system", "be kind."),
    Message("user", "two?\n", ("a.jpg", "b.jpg")),
    Message("assistant", "yes"),
    Message("user", "{braces} and 'quotes'", ()),
]


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_own_templates_write_the_form_and_are_known(name: str) -> None:
    assert template_name(jinja_template(name)) == name
    for messages in (MESSAGES, MESSAGES[1:], MESSAGES[3:]):
        theirs = [
            {
                "role": m.role,
                "content": [{"type": "image"}] * len(m.images) + [{"type": "text", "text": m.text}],
            }
            for m in messages
        ]
        (written,), _ = render_jinja_template(
            [theirs], chat_template=jinja_template(name), add_generation_prompt=True
        )
        assert written == render_chat(name, messages)
    one = render_chat(name, [Message("user", "what?", ("a.jpg",))])
    assert template_prompts(name)["answer"].replace("{}", "what?") == one


@pytest.mark.parametrize(
    "template",
    [
        "",
        "{{ 'USER: ' }}",
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% endfor %}",
        "{{ ''.__class__.__mro__ }}",
        "{{ 'unclosed",
    ],
)
def test_other_templates_are_not_known(template: str) -> None:
    assert template_name(template) == ""
