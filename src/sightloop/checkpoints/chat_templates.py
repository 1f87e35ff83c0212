"""Chat templates of checkpoints (Jinja): recognized by the strings that they print, and written for other programs.

No template is ever run.
"""

from __future__ import annotations

import json
import re
from itertools import chain

from sightloop.models.llava import Llava
from sightloop.types import IMAGE_PLACEHOLDER, ChatTemplate


def template_name(jinja: str) -> str:
    """The name of the known chat template that a Jinja template writes, "" if it is none of them.

    Recognized by the string literals that it prints, so comments, spacing and variable names make no difference:
    `{{ 'USER: ' + m['content'] + ' ' }}` prints "USER: " and " ".
    """
    printed = "".join(re.findall(r"\{\{-?(.*?)-?\}\}", re.sub(r"\{#.*?#\}", "", jinja, flags=re.S), re.S))
    indices = re.compile(r"\[\s*(['\"]).*?\1\s*\]|raise_exception\(.*?\)")  # message['role'], errors
    strings = re.findall(r"'((?:[^'\\]|\\.)*)'|\"((?:[^\"\\]|\\.)*)\"", indices.sub("", printed))
    literals = frozenset(_unescape(single or double) for single, double in strings) - {""}
    for name, template in Llava.chat_templates.items():
        if literals in (template.literals, _literals(template)):
            return name
    return ""


def _literals(template: ChatTemplate) -> frozenset[str]:
    """The strings that `jinja_template` prints."""
    turns = (template.user, template.assistant, template.system)
    parts = chain.from_iterable(turn.split("{}") for turn in turns)
    return frozenset((*parts, template.asks, template.opening, f"{IMAGE_PLACEHOLDER}\n")) - {""}


def jinja_template(name: str) -> str:
    """A Jinja template that writes the chat template of this name; `template_name` recognizes it."""
    template = Llava.chat_templates[name]

    def contents(kind: str, value: str) -> str:
        return f"{{% for c in m['content'] if c['type'] == '{kind}' %}}{{{{ {value} }}}}{{% endfor %}}"

    def turn(role: str, shape: str, keyword: str) -> str:
        before, after = (json.dumps(text) for text in shape.split("{}"))
        return f"{{% {keyword} m['role'] == '{role}' %}}{{{{ {before} }}}}{images}{words}{{{{ {after} }}}}"

    images = contents("image", json.dumps(f"{IMAGE_PLACEHOLDER}\n"))
    words = contents("text", "c['text']")
    turns = (
        turn("system", template.system, "if")
        + turn("user", template.user, "elif")
        + turn("assistant", template.assistant, "elif")
    )
    opening = asks = ""
    if template.opening:
        text = json.dumps(template.opening)
        opening = f"{{% if messages[0]['role'] != 'system' %}}{{{{ {text} }}}}{{% endif %}}"
    if template.asks:
        asks = f"{{% if add_generation_prompt %}}{{{{ {json.dumps(template.asks)} }}}}{{% endif %}}"
    return f"{opening}{{% for m in messages %}}{turns}{{% endif %}}{{% endfor %}}{asks}"


def _unescape(literal: str) -> str:
    """What Jinja makes of an escaped literal, as Python does; an unknown escape stays."""
    known = {"n": "\n", "t": "\t", "\\": "\\", "'": "'", '"': '"'}
    return re.sub(r"\\(.)", lambda match: known.get(match[1], match[0]), literal, flags=re.S)
