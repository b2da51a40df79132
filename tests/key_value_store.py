"""The key-value store of JAX's coordination service, in this process."""

from __future__ import annotations

import threading

from jax.errors import JaxRuntimeError


class Store:
    """What has been said, by key; `asked` are the keys that were waited for."""

    def __init__(self, words=()):
        self.words = {f"gemma-convert/{key}": word for key, word in dict(words).items()}
        self.asked: list[str] = []
        self._change = threading.Condition()

    def said(self, key):
        return self.words.get(f"gemma-convert/{key}")

    def key_value_set(self, key, word):
        with self._change:
            if key in self.words:
                raise JaxRuntimeError(f"ALREADY_EXISTS: key {key} already exists.\nmore")
            self.words[key] = word
            self._change.notify_all()

    def key_value_dir_get(self, place):
        with self._change:
            return [(key, word) for key, word in self.words.items() if key.startswith(place)]

    def blocking_key_value_get(self, key, timeout_ms):
        self.asked.append(key.removeprefix("gemma-convert/"))
        with self._change:
            if not self._change.wait_for(lambda: key in self.words, timeout_ms / 1000):
                raise JaxRuntimeError(f"DEADLINE_EXCEEDED: timed out with key: {key}")
            return self.words[key]
