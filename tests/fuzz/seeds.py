"""Inputs that once found something: each stays as a test."""

from __future__ import annotations

import json

_ENTRY = '{"dtype":"U8","shape":[60],"data_offsets":[0,60]}'


def _file(header: str) -> bytes:
    text = header.encode()
    return len(text).to_bytes(8, "little") + text + bytes(60)


_NESTED = "[" * 900 + "]" * 900
_EMPTY = f'{{"dtype":"U8","shape":[0,{1 << 40},{1 << 40}],"data_offsets":[60,60]}}'

HEADERS = (
    _file(f'{{"__metadata__":5,"a":{_ENTRY}}}'),
    _file(f'{{"__metadata__":{{"format":1}},"a":{_ENTRY}}}'),
    _file(f'{{"\\ud800":{_ENTRY}}}'),
    _file(f'{{"__metadata__":{{"note":"\\ud800"}},"a":{_ENTRY}}}'),
    _file(f'{{"__metadata__":{{"\\udfff":"x"}},"a":{_ENTRY}}}'),
    _file("[5]"),
    _file(f'{{"a":{_ENTRY},"b":{_EMPTY}}}'),
    _file(f'{{"a":{{"dtype":{_NESTED},"shape":[60],"data_offsets":[0,60]}}}}'),
    _file(f'{{"a":{{"dtype":"U8","shape":[{"9" * 4000}],"data_offsets":[0,60]}}}}'),
    _file('{"a\\u001b[2J":{"dtype":"U8"}}'),
)
"""Headers: what the library refuses, sizes that numpy cannot have, values that cannot be shown."""

INDEXES = (
    b'{"weight_map":{"a":"model-1.safetensors","a":"model-2.safetensors"}}',
    b'{"weight_map":{"a":%s}}' % (b"[" * 900 + b"]" * 900),
    json.dumps({"weight_map": {"\ud800": "model-1.safetensors"}}).encode(),
)
"""Indexes: a tensor in two places, a name that is no text, a value that is too deep to show."""

CONFIGS = (
    f'{{"model_type":"gemma4_text","num_hidden_layers":{_NESTED}}}'.encode(),
    b'{"model_type":%s}' % (b"[" * 900 + b"]" * 900),
    b'{"model_type":"gemma4","model_type":"gemma4_text"}',
    b'{"model_type":"gemma4","ignored":NaN}',
    b'{"model_type":"gemma4","ignored":1e999}',
    b'{"model_type":"\\u001b[2J"}',
)
"""Configs: values too deep to show, keys that stand twice, numbers that are none, escapes."""


def _tree(*keys: object, **leaf: object) -> bytes:
    entry = {"key_metadata": [{"key": key, "key_type": 2} for key in keys], **leaf}
    return json.dumps({"tree_metadata": {"x": entry}, "use_ocdbt": False}).encode()


_ARRAY = {"value_metadata": {"value_type": "np.ndarray"}}

TREES = (
    _tree(**_ARRAY),
    _tree("it's", **_ARRAY),
    _tree("", **_ARRAY),
    _tree("..", **_ARRAY),
    _tree("..", "secret", **_ARRAY),
    _tree("\ud800", **_ARRAY),
    _tree("a", value_metadata=[]),
    _tree("a", value_metadata={"value_type": [[]]}),
    _tree("a", **_ARRAY).replace(b'"a"', b"[" * 900 + b"]" * 900),
    b'{"tree_metadata": []}',
)
"""Trees: no keys, keys that no path can hold or that lead elsewhere, entries of other kinds."""

KEYS = ("../secret", "a/../../secret", "/../secret", "secret/..", "./secret", "a//b", "/tmp", "a/")
"""Keys that would name a file elsewhere."""

_MERGES = "\n".join(
    f"m{level}: &m{level} {{<<: [{', '.join(['*m' + str(level - 1)] * 10)}]}}"
    for level in range(1, 12)
)

YAML = (
    f"m0: &m0 {{a: 1}}\n{_MERGES}\nformat: fast_llm\n".encode(),
    b"format: fast_llm\nx: " + b"1:" * 200_000 + b"1\n",
    b"format: fast_llm\nx: 0x" + b"f" * 100_000 + b"\n",
    b"format: &a [*a, *a]\n",
    b"format: !!bool maybe\n",
    b"format: !!timestamp 2001-13-45\n",
    b"format: !!python/object/apply:os.system [touch x]\n",
    b"format: fast_llm\nmetadata: {state_index: {a: 0x" + b"f" * 990 + b"}}\n",
    b"\xff\xfe",
)
"""Metadata: merges that double at each step, values whose parsing is slow, tags, references."""

MANIFESTS = (
    {"tensors": {"a": 5}},
    {"tensors": {"a": {"kept": "carried", "dtype": "float32"}}},
    {"tensors": [], "shards": []},
    {"files_sha256": {"../../x": "0"}},
    {"files_sha256": {"/etc/passwd": "0"}},
    {"files_sha256": {"a": None}},
    {"regions": {"embedder/input_embedding": [[[[0]], "x"]]}},
    {"regions": {"embedder/input_embedding": [[[[0, -1], [0, 1]], "x"]]}},
    {"regions": {"embedder/input_embedding": 3}},
    {"lossy_rows": ["a"]},
    {"lossy_rows": [{"row": "a"}]},
    {"shards": [{"file": "model.safetensors", "size": True}]},
    {"shards": [{"file": "../model.safetensors", "size": 5}]},
    {"not_carried": [5]},
)
"""Changes of a manifest: entries of other kinds, names that lead elsewhere."""

_KEY = b'{"key": "k"}\n'

JOURNALS = (
    _KEY + b"[" * 100_000 + b"\n",
    _KEY + b'{"tensor": "\xc2\x85"}\n{"tensor"',
    _KEY + '{"tensor": "\u2028"}\n{'.encode(),
    _KEY + b"\xff\n",
    _KEY + b'{"rounded": {"a": NaN}}\n',
    b"",
    _KEY[:-1],
)
"""Journals: lines that nest too deep, that hold other line ends, that are cut short."""

GOLDENS = (
    ({"versions": ["torch"]}, {}, None),
    ({"versions": None}, {}, None),
    ({"weights": [{"name": "x"}]}, {}, None),
    ({"weights": 5}, {}, None),
    ({"sequences": [{"name": "one"}]}, {}, None),
    ({"sequences": []}, {}, None),
    ({"format": [[]]}, {}, None),
    ({}, {"logits.0": {"dtype": "I32"}}, None),
    ({}, {"ids.0": {"dtype": "F32"}}, None),
    ({}, {"logits.0": {"shape": [15]}}, None),
    ({}, {"logits.0": {"shape": [5, 3]}}, None),
    ({}, {}, b"\xff" * 120),
)
"""Golden files: facts of other kinds, other dtypes and shapes, tokens that no vocabulary has."""
