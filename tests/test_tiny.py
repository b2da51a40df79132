"""The tiny checkpoints: transformers reads them, and no size or value hides a mistake."""

import importlib.util
import json
import re
import subprocess
import sys
from functools import cache
from math import isqrt

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from gemma_convert.errors import TargetError, UsageError
from gemma_convert.mapping.inventory import huggingface_tensors
from gemma_convert.model.config import read_architecture
from gemma_convert.tiny import make_tiny
from gemma_convert.tiny.tokenizer import FIRST_BYTE, SPECIAL_TOKENS

FAMILIES = ("e2b", "e4b", "26b-a4b", "31b")
BOUNDS = ("input_min", "input_max", "output_min", "output_max")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    root = tmp_path_factory.mktemp("tiny")
    return {family: make_tiny(family, root / family) for family in FAMILIES}


@pytest.fixture(scope="module")
def model(checkpoints):
    """The transformers model of a family in float32, and what loading it reported."""

    @cache
    def load(family):
        from transformers import Gemma4ForConditionalGeneration

        model, info = Gemma4ForConditionalGeneration.from_pretrained(
            checkpoints[family].path, dtype=torch.float32, output_loading_info=True
        )
        return model.eval(), info

    return load


def weights(folder):
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def leftovers(folder):
    """Names that only checkpoints with the leftovers of KV-shared layers have."""
    architecture = read_architecture(folder)
    return set(huggingface_tensors(architecture, True)) - set(
        huggingface_tensors(architecture, False)
    )


# What transformers makes of them


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_loads_every_tensor_and_misses_none(family, checkpoints, model):
    loaded, info = model(family)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        assert not info[kind], kind
    stored = weights(checkpoints[family].path)
    unused = leftovers(checkpoints[family].path)
    assert bool(unused) == (family in ("e2b", "e4b"))
    state = loaded.state_dict()
    assert set(state) - {"lm_head.weight"} == set(stored) - unused
    for name in set(stored) - unused:
        assert torch.equal(state[name], stored[name].float()), name
    assert stored["model.language_model.norm.weight"].dtype == torch.bfloat16


def divergence(reference, other):
    reference = torch.log_softmax(reference.double(), -1)
    other = torch.log_softmax(other.double(), -1)
    return (reference.exp() * (reference - other)).sum(-1)


@pytest.mark.share(2, 1)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_sane_and_float32_noise_is_far_below_the_limit(family, checkpoints, model):
    from transformers import Gemma4ForConditionalGeneration

    fused, _ = model(family)
    plain = Gemma4ForConditionalGeneration.from_pretrained(
        checkpoints[family].path,
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation="eager",
    ).eval()
    vocab = fused.config.text_config.vocab_size
    ids = torch.randint(FIRST_BYTE, vocab, (8, 48), generator=torch.Generator().manual_seed(1))
    ids[:, 0] = SPECIAL_TOKENS["<bos>"]
    with torch.no_grad():
        logits, other = fused(input_ids=ids).logits, plain(input_ids=ids).logits
    assert not torch.equal(logits, other)
    assert divergence(logits, other).max() < 1e-8
    assert 2 < logits.std() < 4
    assert logits.abs().max() < 20
    probabilities = logits.softmax(-1)
    entropy = -(probabilities * probabilities.log()).sum(-1)
    assert 2 < entropy.mean() < np.log(vocab) - 1.5
    assert entropy.min() > 0.05


@pytest.mark.share(2)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_window_and_every_layers_scalar_are_seen_in_the_logits(family, model):
    loaded, _ = model(family)
    text = loaded.model.language_model
    ids = torch.arange(FIRST_BYTE, FIRST_BYTE + 40)[None]
    with torch.no_grad():
        logits = loaded(input_ids=ids).logits
        # The last layer's scalar is cancelled by the norm behind it.
        for layer in text.layers[:-1]:
            kept = layer.layer_scalar.clone()
            layer.layer_scalar.fill_(1)
            assert divergence(logits, loaded(input_ids=ids).logits).max() > 1e-4
            layer.layer_scalar.copy_(kept)
        outside = ids.clone()
        outside[0, 0] += 50
        # What stands outside the window reaches the last token through the full layers alone.
        assert divergence(logits, loaded(input_ids=outside).logits)[0, -1] > 1e-4
    assert text.config.sliding_window < 16


# Sizes and values


@pytest.mark.parametrize("family", FAMILIES)
def test_no_two_axes_share_a_size(family, checkpoints):
    architecture = read_architecture(checkpoints[family].path)
    text, vision, audio = architecture.text, architecture.vision, architecture.audio
    sizes = {"vocab": text.vocab, "embed": text.embed, "layers": len(text.layers)}
    for field in ("heads", "kv_heads", "head_dim", "mlp"):
        values = {getattr(layer, field) for layer in text.layers}
        expected = {
            "heads": 1,
            "kv_heads": 1 + text.key_as_value,
            "head_dim": 2,
            "mlp": 1 + text.double_wide_mlp,
        }
        assert len(values) == expected[field], field
        sizes |= {f"{field} {value}": value for value in values}
    for field in ("ple", "experts", "expert_mlp", "experts_per_token"):
        if getattr(text, field):
            sizes[field] = getattr(text, field)
    for field in ("embed", "layers", "heads", "head_dim", "mlp", "patch", "positions"):
        sizes[f"vision {field}"] = getattr(vision, field)
    if audio is not None:
        for field in ("embed", "layers", "heads", "output", "frequencies", "kernel"):
            sizes[f"audio {field}"] = getattr(audio, field)
        sizes |= {"audio head_dim": audio.embed // audio.heads, "audio mlp": 4 * audio.embed}
        sizes |= {"audio glu": 2 * audio.embed}
        sizes |= dict(zip(("conv 0", "conv 1"), audio.channels, strict=True))
    assert len(set(sizes.values())) == len(sizes), sizes
    assert min(layer.kv_heads for layer in text.layers) > 1
    for width in (text.embed, text.ple or 2, vision.embed, audio.embed if audio else 2):
        assert isqrt(width) ** 2 != width


@pytest.mark.parametrize("family", FAMILIES)
def test_structure_is_that_of_the_published_family(family, checkpoints):
    architecture = read_architecture(checkpoints[family].path)
    text = architecture.text
    assert architecture.family == family
    assert text.period == (5 if family == "e2b" else 6)
    assert bool(text.ple) == bool(text.kv_shared_layers) == (family in ("e2b", "e4b"))
    assert (architecture.audio is not None) == architecture.vision.clipped == bool(text.ple)
    assert architecture.vision.standardize == text.key_as_value == (not text.ple)
    assert text.double_wide_mlp == (family == "e2b")
    assert text.moe == (family == "26b-a4b")
    if text.ple:
        owners = len(text.layers) - text.kv_shared_layers
        assert owners % text.period == 0 and text.kv_shared_layers % text.period == 0
        assert owners >= text.period <= text.kv_shared_layers


@pytest.mark.parametrize("family", FAMILIES)
def test_no_norm_or_scale_is_near_one_or_zero(family, checkpoints):
    seen = set()
    for name, tensor in weights(checkpoints[family].path).items():
        if tensor.ndim != 1:
            continue
        values = tensor.double()
        seen.add(name.rsplit(".", 2)[-2] if name.endswith("weight") else name.rsplit(".", 1)[-1])
        assert values.abs().min() > 0.15, name
        assert (values - 1).abs().min() > 0.04 or name.endswith(("bias", "per_dim_scale")), name
        assert values.numel() == 1 or values.unique().numel() > values.numel() / 3, name
    assert {"layer_scalar", "q_norm", "k_norm", "input_layernorm"} <= seen
    if family == "26b-a4b":
        assert {"scale", "per_expert_scale", "std_scale", "std_bias"} <= seen


def clip_bounds(stored):
    """Module → its four bounds."""
    modules = {name.rsplit(".", 1)[0] for name in stored if name.endswith(BOUNDS)}
    return {module: tuple(stored[f"{module}.{b}"].item() for b in BOUNDS) for module in modules}


@pytest.mark.parametrize("family", ("e2b", "e4b"))
def test_clip_bounds_differ_between_modules_that_do_not_share_them(family, checkpoints):
    bounds = clip_bounds(weights(checkpoints[family].path))
    groups = {}
    for module, values in bounds.items():
        assert np.isfinite(values).all()
        assert values[0] < -1 < 1 < values[1] and values[2] < -1 < 1 < values[3]
        assert len({abs(value) for value in values}) > 2
        shared = module
        if "vision_tower" in module:
            shared = re.sub(r"(gate|up)_proj$", "gating", re.sub(r"[kv]_proj$", "kv", module))
        groups.setdefault(shared, set()).add(values)
    assert all(len(values) == 1 for values in groups.values())
    assert len(set().union(*groups.values())) == len(groups) == len(bounds) - 2 * 3


@pytest.mark.parametrize("family", ("26b-a4b", "31b"))
def test_no_clip_bounds_where_the_published_model_has_none(family, checkpoints):
    assert not clip_bounds(weights(checkpoints[family].path))


# Forms


@pytest.mark.parametrize("family", ("e2b", "e4b"))
def test_omitting_leftovers_changes_no_other_tensor(family, checkpoints, tmp_path):
    report = make_tiny(family, tmp_path / "out", kv_shared="omit")
    kept, omitted = weights(checkpoints[family].path), weights(report.path)
    names = leftovers(report.path)
    shared = read_architecture(report.path).text.kv_shared_layers
    assert len(names) == 3 * shared
    assert all(re.search(r"\.(k_proj|v_proj|k_norm)\.weight$", name) for name in names)
    assert set(kept) - set(omitted) == names and set(omitted) <= set(kept)
    assert all(torch.equal(tensor, kept[name]) for name, tensor in omitted.items())


def test_one_file_is_what_the_safetensors_library_writes(checkpoints, tmp_path):
    folder = checkpoints["e2b"].path
    save_file(weights(folder), tmp_path / "again", metadata={"format": "pt"})
    assert (tmp_path / "again").read_bytes() == (folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize("shards", (2, 3, 7))
def test_shards_hold_the_same_tensors_in_order(shards, checkpoints, tmp_path):
    whole = checkpoints["26b-a4b"]
    report = make_tiny("26b-a4b", tmp_path / "out", shards=shards)
    assert report.bytes == whole.bytes and report.tensors == whole.tensors
    index = json.loads((report.path / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": whole.bytes}
    files = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    assert sorted(path.name for path in report.path.glob("*.safetensors")) == files
    assert list(index["weight_map"]) == sorted(index["weight_map"])
    assert list(dict.fromkeys(index["weight_map"].values())) == files
    for file in files:
        held = load_file(report.path / file)
        assert held and {index["weight_map"][name] for name in held} == {file}
        assert sum(t.nbytes for t in held.values()) < 2 * whole.bytes / shards
    stored, expected = weights(report.path), weights(whole.path)
    assert set(stored) == set(expected) == set(index["weight_map"])
    assert all(torch.equal(stored[name], expected[name]) for name in expected)


def test_as_many_shards_as_tensors(checkpoints, tmp_path):
    count = checkpoints["31b"].tensors
    report = make_tiny("31b", tmp_path / "out", shards=count)
    assert len(list(report.path.glob("*.safetensors"))) == count


@pytest.mark.parametrize("family", ("e2b", "26b-a4b"))
def test_text_only_is_the_same_language_model(family, checkpoints, model, tmp_path):
    from transformers import AutoModelForCausalLM

    report = make_tiny(family, tmp_path / "out", text_only=True)
    config = json.loads((report.path / "config.json").read_text())
    assert config["model_type"] == "gemma4_text"
    assert config["architectures"] == ["Gemma4ForCausalLM"]
    stored, whole = weights(report.path), weights(checkpoints[family].path)
    renamed = {name.replace("model.", "model.language_model.", 1): stored[name] for name in stored}
    assert set(renamed) == {name for name in whole if ".language_model." in name}
    assert all(torch.equal(tensor, whole[name]) for name, tensor in renamed.items())
    text, info = AutoModelForCausalLM.from_pretrained(
        report.path, dtype=torch.float32, output_loading_info=True
    )
    assert type(text).__name__ == "Gemma4ForCausalLM"
    assert not (info["missing_keys"] or info["unexpected_keys"] or info["mismatched_keys"])
    ids = torch.arange(FIRST_BYTE, FIRST_BYTE + 20)[None]
    with torch.no_grad():
        assert torch.equal(text(input_ids=ids).logits, model(family)[0](input_ids=ids).logits)


@pytest.mark.parametrize("text_only", (False, True))
@pytest.mark.parametrize("family", FAMILIES)
def test_both_spellings_are_one_architecture(family, text_only, tmp_path):
    from transformers import AutoConfig

    folders = {
        spelling: make_tiny(
            family, tmp_path / spelling, config_spelling=spelling, text_only=text_only
        ).path
        for spelling in ("published", "saved")
    }
    published, saved = (
        json.loads((folder / "config.json").read_text()) for folder in folders.values()
    )
    if not text_only:
        published, saved = published["text_config"], saved["text_config"]
    assert "global_head_dim" in published and "per_layer_config" not in published
    assert "per_layer_config" in saved and "global_head_dim" not in saved
    assert read_architecture(folders["published"]) == read_architecture(folders["saved"])
    assert weights(folders["published"]).keys() == weights(folders["saved"]).keys()
    configs = [AutoConfig.from_pretrained(folder).get_text_config() for folder in folders.values()]
    ours = read_architecture(folders["saved"]).text.layers
    for config in configs:
        assert config.kv_sharing_modes.count("reuse") == sum(not layer.owns_kv for layer in ours)
        for layer in ours:
            theirs = config.per_layer_config[layer.index]
            assert theirs.head_dim == layer.head_dim
            assert theirs.num_key_value_heads == layer.kv_heads


@pytest.mark.parametrize("text_only", (False, True))
@pytest.mark.parametrize("family", FAMILIES)
def test_the_saved_spelling_is_what_transformers_writes(family, text_only, tmp_path):
    from transformers import AutoConfig

    ours = make_tiny(family, tmp_path / "o", config_spelling="saved", text_only=text_only).path
    AutoConfig.from_pretrained(ours).save_pretrained(tmp_path / "theirs")
    written, expected = (
        json.loads((folder / "config.json").read_text()) for folder in (ours, tmp_path / "theirs")
    )
    del written["transformers_version"], expected["transformers_version"]
    assert written == expected


@pytest.mark.parametrize("dtype", ("float32", "float16"))
def test_other_dtypes_round_the_same_numbers(dtype, checkpoints, tmp_path):
    report = make_tiny("31b", tmp_path / "out", dtype=dtype)
    coarse = weights(checkpoints["31b"].path)
    for name, tensor in weights(report.path).items():
        assert tensor.dtype == getattr(torch, dtype)
        assert torch.allclose(tensor.float(), coarse[name].float(), rtol=2**-7, atol=1e-6), name
    assert read_architecture(report.path).dtype == dtype
    if dtype == "float32":
        assert torch.equal(tensor.bfloat16(), coarse[name])
        assert not torch.equal(tensor, coarse[name].float())


def test_depth_scales_shared_layers_and_keeps_the_other_layers(checkpoints, tmp_path):
    for family, depths in {"e2b": {10: 5, 35: 20}, "e4b": {12: 6, 42: 18}}.items():
        for depth, shared in depths.items():
            report = make_tiny(family, tmp_path / f"{family}-{depth}", layers=depth)
            text = read_architecture(report.path).text
            assert (len(text.layers), text.kv_shared_layers) == (depth, shared)
    deep = weights(make_tiny("31b", tmp_path / "deep", layers=18).path)
    assert all(torch.equal(t, deep[name]) for name, t in weights(checkpoints["31b"].path).items())


# Determinism, refusals, all or nothing


def test_the_seed_decides_every_byte(checkpoints, tmp_path):
    again = make_tiny("e2b", tmp_path / "again", seed=0)
    other = make_tiny("e2b", tmp_path / "other", seed=1)
    assert contents(again.path) == contents(checkpoints["e2b"].path)
    same, different = contents(again.path), contents(other.path)
    assert {name for name in same if same[name] != different[name]} == {"model.safetensors"}
    first, second = weights(again.path), weights(other.path)
    assert not any(torch.equal(first[n], second[n]) for n in first if first[n].numel() > 4)


def test_the_report_counts_what_was_written(checkpoints):
    for family, report in checkpoints.items():
        stored = weights(report.path)
        assert report.family == family
        assert report.tensors == len(stored)
        assert report.parameters == sum(tensor.numel() for tensor in stored.values())
        assert report.bytes == 2 * report.parameters < 8e6


@pytest.mark.parametrize(
    ("family", "arguments"),
    [
        ("27b", {}),
        ("12b", {"layers": 9}),
        ("e2b", {"layers": 5}),
        ("e2b", {"layers": 12}),
        ("e4b", {"layers": 6}),
        ("31b", {"layers": 0}),
        ("31b", {"layers": -6}),
        ("31b", {"layers": 10}),
        ("31b", {"layers": 6 * 1024}),
        ("31b", {"shards": 0}),
        ("31b", {"shards": 10_000}),
        ("31b", {"seed": -1}),
        ("31b", {"dtype": "float64"}),
        ("31b", {"kv_shared": "drop"}),
        ("31b", {"config_spelling": "old"}),
        ("31b", {"weights": "tame"}),
    ],
)
def test_refused_arguments_leave_nothing_behind(family, arguments, tmp_path):
    with pytest.raises(UsageError) as caught:
        make_tiny(family, tmp_path / "out", **arguments)
    assert caught.value.expected and caught.value.found is not None
    assert not list(tmp_path.iterdir())


def test_one_block_is_enough_without_shared_layers(tmp_path):
    assert len(read_architecture(make_tiny("31b", tmp_path / "o", layers=6).path).text.layers) == 6


def test_whatever_stands_at_the_target_is_left_alone(checkpoints, tmp_path):
    make_tiny("31b", tmp_path / "out")
    assert contents(tmp_path / "out") == contents(checkpoints["31b"].path)
    before = contents(tmp_path / "out")
    with pytest.raises(TargetError):
        make_tiny("31b", tmp_path / "out", seed=1)
    assert contents(tmp_path / "out") == before
    (tmp_path / "file").write_text("mine")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for taken in ("file", "dangling"):
        with pytest.raises(TargetError):
            make_tiny("31b", tmp_path / taken)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dangling", "file", "out"]


def test_a_failed_write_leaves_nothing_behind(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("gemma_convert.tiny.checkpoint.write_safetensors", full)
    with pytest.raises(TargetError, match="No space left"):
        make_tiny("31b", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_torch_and_transformers_are_not_needed(tmp_path):
    code = (
        "import sys; from pathlib import Path; from gemma_convert.tiny import make_tiny;"
        f"make_tiny('e2b', Path({str(tmp_path / 'out')!r}));"
        "heavy = {'torch', 'transformers', 'safetensors', 'tokenizers', 'jax'} & set(sys.modules);"
        "sys.exit(', '.join(heavy) or 0)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], check=False, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr


# Tokenizer and processor

TEXTS = (
    "",
    "Hello, world!",
    "  two  spaces \n\ttab\r\n",
    "Grüße 你好 😀👩‍👩‍👧 \u0301\u200b",
    "".join(map(chr, range(0x250))),
    " don't , you ' re . ",
    "a <|image|> b <unused3> <turn|>",
)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_tokenizer_gives_every_text_back(family, checkpoints):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoints[family].path)
    vocab = read_architecture(checkpoints[family].path).text.vocab
    assert len(tokenizer) == vocab
    for text in TEXTS:
        ids = tokenizer(text).input_ids
        assert ids[0] == tokenizer.bos_token_id == SPECIAL_TOKENS["<bos>"]
        assert tokenizer.decode(ids[1:]) == text
        assert max(ids) < vocab
    assert tokenizer("\x00A").input_ids[1:] == [FIRST_BYTE, FIRST_BYTE + ord("A")]
    assert [tokenizer.convert_tokens_to_ids(word) for word in SPECIAL_TOKENS] == list(
        range(len(SPECIAL_TOKENS))
    )
    assert tokenizer.decode(tokenizer("hi").input_ids, skip_special_tokens=True) == "hi"


def test_config_and_tokenizer_agree_on_special_tokens(checkpoints):
    from transformers import AutoTokenizer, GenerationConfig

    folder = checkpoints["e2b"].path
    config = json.loads((folder / "config.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for name in ("image", "audio", "video", "boi", "eoi", "boa", "eoa"):
        assert config[f"{name}_token_id"] == getattr(tokenizer, f"{name}_token_id")
    generation = GenerationConfig.from_pretrained(folder)
    assert generation.eos_token_id == [tokenizer.eos_token_id, SPECIAL_TOKENS["<turn|>"]]
    assert generation.pad_token_id == tokenizer.pad_token_id


def test_the_chat_template_writes_turns(checkpoints):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoints["e2b"].path)
    messages = [
        {"role": "user", "content": " hello "},
        {"role": "assistant", "content": [{"type": "text", "text": "hi"}]},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]},
    ]
    assert tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == (
        "<bos><|turn>user\nhello<turn|>\n<|turn>model\nhi<turn|>\n"
        "<|turn>user\n<|image|>what?<turn|>\n<|turn>model\n"
    )


def processor_of(folder):
    """The checkpoint's processor; without torchvision, without the part that reads videos."""
    from transformers import (
        AutoFeatureExtractor,
        AutoImageProcessor,
        AutoProcessor,
        AutoTokenizer,
        Gemma4Processor,
    )

    if importlib.util.find_spec("torchvision"):
        return AutoProcessor.from_pretrained(folder)

    class WithoutVideos(Gemma4Processor):
        def check_argument_for_proper_class(self, argument_name, argument):
            if argument_name != "video_processor":
                return super().check_argument_for_proper_class(argument_name, argument)
            return None

    return WithoutVideos(
        feature_extractor=AutoFeatureExtractor.from_pretrained(folder),
        image_processor=AutoImageProcessor.from_pretrained(folder),
        tokenizer=AutoTokenizer.from_pretrained(folder),
        video_processor=None,
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_images_go_through_processor_and_model(family, checkpoints, model):
    from PIL import Image

    loaded, _ = model(family)
    processor = processor_of(checkpoints[family].path)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 40, 30, 3), dtype=np.uint8)
    logits = []
    for image in pixels:
        inputs = processor(
            images=Image.fromarray(image), text="<|image|>what is this?", return_tensors="pt"
        )
        soft = (inputs["input_ids"] == SPECIAL_TOKENS["<|image|>"]).sum()
        assert 0 < soft <= 70
        with torch.no_grad():
            logits.append(loaded(**inputs).logits[0, -1])
    assert all(torch.isfinite(each).all() for each in logits)
    assert divergence(*logits) > 1e-4


@pytest.mark.parametrize("shape", [(6, 900), (900, 6), (500, 500)])
def test_images_of_any_shape_stay_inside_the_position_table(shape, checkpoints):
    from PIL import Image

    for report in checkpoints.values():
        vision = read_architecture(report.path).vision
        inputs = processor_of(report.path)(
            images=Image.new("RGB", shape), text="<|image|>", return_tensors="pt"
        )
        assert inputs["image_position_ids"].max() < vision.positions
        assert inputs["pixel_values"].shape[-1] == vision.patch


@pytest.mark.parametrize("family", ("e2b", "e4b"))
def test_clip_bounds_bite_and_let_a_signal_through(family, checkpoints, model):
    loaded, _ = model(family)
    processor = processor_of(checkpoints[family].path)
    generator = np.random.default_rng(0)
    from PIL import Image

    image = Image.fromarray(generator.integers(0, 256, (40, 30, 3), dtype=np.uint8))
    inputs = processor(
        images=image,
        audio=[generator.standard_normal(8000).astype(np.float32)],
        text="<|image|> and <|audio|>",
        return_tensors="pt",
    )
    share = []
    modules = [m for m in loaded.modules() if type(m).__name__ == "Gemma4ClippableLinear"]

    def count(module, arguments, output):
        for bound, values in (
            ("input_min", arguments[0]),
            ("input_max", arguments[0]),
            ("output_min", output),
            ("output_max", output),
        ):
            limit = getattr(module, bound)
            outside = values <= limit if bound.endswith("min") else values >= limit
            share.append(outside.float().mean().item())

    hooks = [module.register_forward_hook(count) for module in modules]
    with torch.no_grad():
        logits = loaded(**inputs).logits
    for hook in hooks:
        hook.remove()
    assert torch.isfinite(logits).all()
    assert len(share) == 4 * len(modules)
    assert max(share) < 0.3
    assert np.mean(np.array(share) > 0) > 0.5
