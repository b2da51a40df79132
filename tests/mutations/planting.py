"""Plants a mistake in a function of the forward passes: its source with one piece replaced."""

from __future__ import annotations

import inspect
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

MODULES = {
    "arithmetic": "forward.arithmetic",
    "decoder": "forward.decoder",
    "decoder_layer": "forward.decoder_layer",
    "jax_model": "forward.jax_model",
    "vision": "forward.vision",
    "audio": "layouts.gemma_jax.audio",
    "maxtext": "layouts.maxtext.forward",
    "gemma_jax": "layouts.gemma_jax.forward",
    "fast_llm": "layouts.fast_llm.forward",
    "tunix": "layouts.tunix.forward",
}
"""All that may know a function by its name is imported before it is replaced."""


@contextmanager
def planted(place: str, old: str, new: str) -> Iterator[None]:
    """Within it the function `place` (a key of MODULES, a dot, a name) has `new` for `old`.

    `old` must stand there once. Everything that JAX has compiled is forgotten, before and after.
    """
    import jax

    for name in MODULES.values():
        import_module(f"gemma_convert.{name}")
    module_name, _, path = place.partition(".")
    module = import_module(f"gemma_convert.{MODULES[module_name]}")
    *owners, name = path.split(".")
    owner: Any = module
    for part in owners:
        owner = getattr(owner, part)
    original = getattr(owner, name)
    source = textwrap.dedent(inspect.getsource(inspect.unwrap(original)))
    assert source.count(old) == 1, f"{place} has {source.count(old)} times: {old}"
    code = compile(source.replace(old, new), f"{place} with a mistake", "exec", flags=_FUTURE)
    kept = module.__dict__.get(name)
    exec(code, module.__dict__)
    mistaken = module.__dict__.pop(name)
    if kept is not None:
        module.__dict__[name] = kept
    holders = [owner] if owners else list(_holders(original, name))
    for holder in holders:
        setattr(holder, name, mistaken)
    jax.clear_caches()
    try:
        yield
    finally:
        for holder in holders:
            setattr(holder, name, original)
        jax.clear_caches()


_FUTURE = __import__("__future__").annotations.compiler_flag


def _holders(function: object, name: str) -> Iterator[Any]:
    """The modules that know a function by its name."""
    for module in list(sys.modules.values()):
        if module.__name__.startswith("gemma_convert.") and getattr(module, name, None) is function:
            yield module
