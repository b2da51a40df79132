"""Google DeepMind's gemma library: loads a conversion with the lines that to-native printed.

`python -P gemma.py logits SETTINGS INPUT OUTPUT` and `... train SETTINGS FOLDER`, in the library's
environment; see frameworks.py.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

STEPS, LEARNING_RATE = 3, 1e-3


def load(settings: Path) -> tuple[Any, Any]:
    """The model, computing in float32, and its parameters, by the printed lines."""
    import jax
    import jax.numpy as jnp
    from gemma import gm

    jax.config.update("jax_default_matmul_precision", "highest")
    lines = json.loads(settings.read_text(encoding="utf-8"))
    known = {"gm": gm, "dataclasses": dataclasses}
    if "config" in lines:
        known["config"] = eval(lines["config"], known)
    model = eval(lines["model"], known)
    return model.clone(dtype=jnp.float32), eval(lines["params"], known)


def logits(settings: Path, given: Path, out: Path) -> None:
    """Writes the logits of the tokens in `given`."""
    import jax

    model, params = load(settings)
    run = jax.jit(lambda params, ids: model.apply({"params": params}, ids).logits)
    found = run(params, np.load(given)["ids"])
    np.savez(out, logits=np.asarray(found, np.float32))


def train(settings: Path, folder: Path) -> None:
    """Three steps of Adam on random tokens; the library saves the parameters."""
    import jax
    import jax.numpy as jnp
    import optax
    from gemma import gm

    model, params = load(settings)
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params)
    optimizer = optax.adam(LEARNING_RATE)

    def loss(params: Any, ids: Any) -> Any:
        found = model.apply({"params": params}, ids).logits[:, :-1]
        return optax.softmax_cross_entropy_with_integer_labels(found, ids[:, 1:]).mean()

    @jax.jit
    def step(params: Any, state: Any, ids: Any) -> tuple[Any, Any]:
        change, state = optimizer.update(jax.grad(loss)(params, ids), state)
        return optax.apply_updates(params, change), state

    state, random = optimizer.init(params), np.random.default_rng(4)
    for _ in range(STEPS):
        params, state = step(params, state, random.integers(20, 290, (2, 40)))
    gm.ckpts.save_params(params, (folder / "params").absolute(), wait_until_finished=True)


if __name__ == "__main__":
    sys.path.append(str(Path(__file__).parent))
    from asked import run

    sys.exit(run(sys.argv[1:], logits, train))
