"""What a model cannot do, said with what it can and which model can."""

from __future__ import annotations

from collections.abc import Set

from sightloop.checkpoints.catalog import has_capability, models_for
from sightloop.errors import UnsupportedError


def need_capability(name: str, capabilities: Set[str], capability: str) -> None:
    """Checks that a model can do something.

    Args:
        name: of the model.
        capabilities: of the model.
        capability: a key of `checkpoints.catalog.CAPABILITIES`.

    Raises:
        UnsupportedError: it cannot; the message names models that can.
    """
    if not has_capability(capabilities, capability):
        others = " or ".join(models_for(capability)[:2])
        error = unsupported(name, capabilities, capability)
        raise UnsupportedError(f"{error}. For {capability}, load {others}")


def unsupported(name: str, capabilities: Set[str], capability: str) -> UnsupportedError:
    """The error of a model that cannot do something, with what it can."""
    own = ", ".join(sorted(capabilities)) or "nothing that is known here"
    return UnsupportedError(f"{name} cannot {capability}; it can: {own}")
