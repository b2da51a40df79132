"""Sound prompts: the inputs of transformers' own processor, and checks that hear them."""

import json
import shutil
import sys
import wave
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from cases import SHALLOW
from native_checkpoints import alter, nested_tree
from PIL import Image
from test_tiny import processor_of

from gemma_convert.cli.app import main
from gemma_convert.errors import SourceError, UsageError
from gemma_convert.logits import running
from gemma_convert.logits.check import logit_check
from gemma_convert.logits.part_check import FACTOR
from gemma_convert.logits.reference import Reference
from gemma_convert.logits.report_table import render
from gemma_convert.model.config import read_architecture
from gemma_convert.prompts import soft as soft_module
from gemma_convert.prompts.batches import batches
from gemma_convert.prompts.sounds import SOUND, sound_sequences
from gemma_convert.prompts.text import TokenSequence, token_sequences

FAMILIES = ("e2b", "e4b")
RATE = 16000
PLACE = 12
"""The tiny tokenizer's token for a soft token of a sound."""

LIMIT = 1e-8
"""Largest KL of a token: 5e-11 was seen on the tiny models, and logits 4e-5 apart."""

SAMPLES = {
    "frame.wav": 161,
    "short.wav": 1000,
    "whole.wav": 128 * 75,
    "odd.wav": 12345,
    "long.wav": 40077,
}
"""One frame; lengths that are padded and that are not; more than two chunks of attention."""


def write(path, data, width=2, channels=1, rate=RATE):
    """`data` bytes of little-endian samples as a WAV file."""
    with wave.open(str(path), "wb") as file:
        file.setparams((channels, width, rate, 0, "NONE", ""))
        file.writeframes(data)
    return path


def noise(samples, seed=0):
    """A quarter of full scale, in 16 bits [samples]."""
    return np.random.default_rng(seed).normal(0, 8192, samples).clip(-32768, 32767).astype("<i2")


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """The path of each sound, by its name."""
    folder = tmp_path_factory.mktemp("clips")
    return {
        name: write(folder / name, noise(samples).tobytes()) for name, samples in SAMPLES.items()
    }


@pytest.fixture(scope="module")
def folders(tiny):
    return {family: tiny(family, layers=SHALLOW[family]) for family in FAMILIES}


@pytest.fixture(scope="module")
def sequences(folders, clips):
    """sequences[family][name]: the built-in prompt with that sound."""
    return {
        family: dict(
            zip(
                clips,
                sound_sequences(folder, read_architecture(folder), list(clips.values())),
                strict=True,
            )
        )
        for family, folder in folders.items()
    }


@pytest.fixture(scope="module")
def processors(folders):
    return cache(lambda family: processor_of(folders[family]))


@pytest.fixture(scope="module")
def references(folders):
    return cache(lambda family: Reference(folders[family]))


def processed(processor, samples, behind=SOUND.question):
    """What Gemma4Processor gives the model for a sound of 16-bit samples."""
    text = f"{SOUND.before}<|audio|>{behind}"
    sound = samples.astype(np.float32) / 32768
    return processor(audio=[sound], text=text, return_tensors="pt")


def copied(folder, tmp_path, **changes):
    """A copy without weights; `changes` give JSON files new contents, None takes them away."""
    target = tmp_path / "copy"
    shutil.copytree(folder, target, ignore=shutil.ignore_patterns("*.safetensors"))
    for name, change in changes.items():
        path = target / f"{name}.json"
        if change is None:
            path.unlink()
        else:
            path.write_text(json.dumps(change(json.loads(path.read_text()))))
    return target


def one_of(hf, path, prompts=()):
    (one,) = sound_sequences(hf, read_architecture(hf), [path], prompts)
    return one


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", SAMPLES)
def test_inputs_are_those_of_transformers_processor(family, name, processors, sequences):
    one, inputs = sequences[family][name], processed(processors(family), noise(SAMPLES[name]))
    assert one.ids == tuple(inputs["input_ids"][0].tolist())
    heard = inputs["input_features_mask"][0]
    assert one.features.dtype == np.float32
    assert np.array_equal(one.features, inputs["input_features"][0][heard].numpy())
    assert np.array_equal(one.places * 3, inputs["mm_token_type_ids"][0])
    assert one.arguments["input_features"] is one.features
    assert one.arguments["input_features_mask"].shape == (len(one.features),)
    assert one.arguments["input_features_mask"].all()
    assert one.arguments.keys() == {"input_features", "input_features_mask"} <= inputs.keys()


@pytest.mark.parametrize(
    ("name", "frames", "soft_tokens"),
    [("frame.wav", 1, 1), ("short.wav", 6, 2), ("odd.wav", 77, 20), ("long.wav", 250, 63)],
)
def test_soft_tokens_cover_the_sound_and_text_stands_on_both_sides(
    name, frames, soft_tokens, sequences
):
    one = sequences["e2b"][name]
    places = np.flatnonzero(one.places)
    assert one.features.shape == (frames, 52) and len(places) == soft_tokens
    assert np.array_equal(places, np.arange(places[0], places[-1] + 1))
    assert {one.ids[place] for place in places} == {PLACE}
    assert "".join(one.pieces[: places[0]]) == f"<bos>{SOUND.before}<|audio>"
    assert "".join(one.pieces[places[-1] + 1 :]) == f"<audio|>{SOUND.question}"
    assert np.array_equal(one.compared, [piece != "<|audio|>" for piece in one.pieces])
    assert one.name == f"sound-{list(SAMPLES).index(name)} ({name})"


def sixteen(samples):
    return samples.astype("<i2").tobytes()


def eight(samples):
    return (samples // 256 + 128).astype(np.uint8).tobytes()


def thirty_two(samples):
    return (samples.astype("<i4") * 65536 + 321).astype("<i4").tobytes()


def twenty_four(samples):
    return b"".join((int(value) * 256 + 77).to_bytes(3, "little", signed=True) for value in samples)


@pytest.mark.parametrize(
    ("width", "encode", "exact"),
    [
        (1, eight, lambda x: (x // 256) / 128),
        (2, sixteen, lambda x: x / 2**15),
        (3, twenty_four, lambda x: (x * 256 + 77) / 2**23),
        (4, thirty_two, lambda x: (x * 65536 + 321) / 2**31),
    ],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_samples_of_every_width_and_number_of_channels(
    width, encode, exact, channels, folders, tmp_path, monkeypatch
):
    from transformers import Gemma4AudioFeatureExtractor

    heard = []
    original = Gemma4AudioFeatureExtractor.__call__

    def listen(self, raw_speech, **options):
        heard.append(raw_speech)
        return original(self, raw_speech, **options)

    monkeypatch.setattr(Gemma4AudioFeatureExtractor, "__call__", listen)
    samples = noise(900).astype(np.int64)
    samples[:4] = -32768, 32767, 0, -1
    one_of(folders["e2b"], write(tmp_path / "a.wav", encode(samples), width, channels))
    ((found,),) = heard
    expected = np.array([exact(x) for x in samples.tolist()]).reshape(-1, channels).sum(axis=1)
    assert found.dtype == np.float32 and found.shape == (900 // channels,)
    np.testing.assert_allclose(found, expected / channels, rtol=1e-7, atol=1e-9)
    if channels == 1:
        assert np.array_equal(found, expected.astype(np.float32))


def test_each_sound_stands_before_each_prompt(folders, clips, processors):
    folder = folders["e2b"]
    names = ["short.wav", "odd.wav"]
    found = sound_sequences(
        folder, read_architecture(folder), [clips[name] for name in names], [" ab", "港?"]
    )
    assert [one.name for one in found] == [
        "sound-0 (short.wav), prompt-0",
        "sound-0 (short.wav), prompt-1",
        "sound-1 (odd.wav), prompt-0",
        "sound-1 (odd.wav), prompt-1",
    ]
    for one, name, text in zip(
        found, ["short.wav"] * 2 + ["odd.wav"] * 2, [" ab", "港?"] * 2, strict=True
    ):
        inputs = processed(processors("e2b"), noise(SAMPLES[name]), text)
        assert one.ids == tuple(inputs["input_ids"][0].tolist())
        assert len(one.features) == inputs["input_features_mask"][0].sum()


def test_sequences_of_different_sounds_are_not_equal(folders, tmp_path):
    one, other = (
        one_of(folders["e2b"], write(tmp_path / "a.wav", noise(900, seed).tobytes()))
        for seed in (1, 2)
    )
    assert one.ids == other.ids and one.name == other.name
    assert one == one and one != other and len({one, other}) == 2


@pytest.mark.parametrize("file", ["processor_config", "preprocessor_config"])
def test_either_file_configures_the_feature_extractor(file, folders, tmp_path, clips, sequences):
    def louder(config):
        section = config.setdefault("feature_extractor", {}) if "processor_class" in config else {}
        wanted = {"feature_size": 52, "sampling_rate": 16000, "input_scale_factor": 4.0}
        section |= wanted
        return config if "processor_class" in config else config | wanted

    other = {"processor_config", "preprocessor_config"} - {file}
    folder = copied(folders["e2b"], tmp_path, **{file: louder}, **dict.fromkeys(other))
    one = one_of(folder, clips["odd.wav"])
    expected = sequences["e2b"]["odd.wav"].features
    assert one.features.shape == expected.shape
    assert np.median(one.features - expected) == pytest.approx(np.log(4), abs=0.01)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["frame.wav", "odd.wav", "long.wav"])
def test_logits_are_those_of_transformers_own_path(family, name, processors, references, sequences):
    """Bit for bit without the frames of padding, and to rounding with them."""
    reference, one = references(family), sequences[family][name]
    hidden = reference.hidden(one)
    inputs = {
        key: tensor.to(reference.device)
        for key, tensor in processed(processors(family), noise(SAMPLES[name])).items()
    }
    padded = own_logits(reference, inputs)
    heard = inputs["input_features_mask"][0]
    inputs["input_features"] = inputs["input_features"][:, heard]
    inputs["input_features_mask"] = inputs["input_features_mask"][:, heard]
    assert hidden.shape == (len(one.ids), reference.architecture.text.embed)
    found = reference.head(hidden)
    assert np.array_equal(found, own_logits(reference, inputs))
    assert np.abs(found - padded).max() < 2e-3


def own_logits(reference, inputs):
    with torch.no_grad():
        return reference._model(**inputs).logits[0].cpu().numpy()


def test_the_sound_matters_behind_it_alone(references, sequences):
    reference, one = references("e2b"), sequences["e2b"]["odd.wav"]
    first = np.flatnonzero(one.places)[0]
    right = reference.hidden(one)
    for wrong in (
        replace(one, features=one.features[:, ::-1].copy()),
        replace(one, features=one.features[::-1].copy()),
        TokenSequence(one.name, one.ids),
    ):
        difference = (reference.hidden(wrong) - right).abs().amax(dim=1)
        assert difference[-1] > 1e-4 and difference[:first].max() == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_audio_features_stand_in_the_sounds_places(family, references, sequences):
    reference, one = references(family), sequences[family]["odd.wav"]
    seen = {}
    hook = reference._model.model.language_model.register_forward_pre_hook(
        lambda module, arguments, keywords: seen.update(keywords), with_kwargs=True
    )
    reference.hidden(one)
    hook.remove()
    embedded = seen["inputs_embeds"][0].cpu().numpy()
    assert np.array_equal(embedded[one.places == 1], reference.audio_features(one.features))


def refused(error, match, hf, path, architecture=None, prompts=()):
    with pytest.raises(error, match=match) as caught:
        sound_sequences(hf, architecture or read_architecture(hf), [path], prompts)
    return caught.value


def test_files_that_are_no_wav_files_are_refused(folders, tmp_path, clips):
    hf = folders["e2b"]
    refused(UsageError, "does not exist", hf, tmp_path / "none.wav")
    refused(UsageError, "does not exist", hf, tmp_path)
    (tmp_path / "text.wav").write_text("no sound at all, however long it may be")
    error = refused(UsageError, "not a WAV file", hf, tmp_path / "text.wav")
    assert error.where.endswith("text.wav") and "-ar 16000 " in error.do
    whole = bytearray(clips["odd.wav"].read_bytes())
    for length in (0, 2, 11, 30, 40):
        (tmp_path / "part.wav").write_bytes(whole[:length])
        assert refused(UsageError, "not a WAV file", hf, tmp_path / "part.wav").found
    (tmp_path / "part.wav").write_bytes(whole[:1045])
    error = refused(UsageError, "ends early", hf, tmp_path / "part.wav")
    assert (error.expected, error.found) == ("12345 samples", "500")
    whole[20] = 3
    (tmp_path / "float.wav").write_bytes(whole)
    assert "format: 3" in refused(UsageError, "not a WAV file", hf, tmp_path / "float.wav").found


def test_damaged_files_are_messages(folders, tmp_path, clips):
    """Any one of the first 48 bytes changed: a message of ours, or a sound."""
    hf, architecture = folders["e2b"], read_architecture(folders["e2b"])
    whole = clips["frame.wav"].read_bytes()
    for place in range(48):
        for value in (0, 1, 0x7F, 0xFF):
            damaged = bytearray(whole)
            damaged[place] = value
            (tmp_path / "a.wav").write_bytes(damaged)
            try:
                (one,) = sound_sequences(hf, architecture, [tmp_path / "a.wav"])
            except UsageError:
                continue
            assert one.places.any() and np.isfinite(one.features).all()


def test_sounds_of_another_rate_are_not_resampled(folders, tmp_path):
    path = write(tmp_path / "cd.wav", noise(4000).tobytes(), rate=44100)
    error = refused(UsageError, "another sampling rate", folders["e2b"], path)
    assert (error.expected, error.found) == ("16000 Hz", "44100 Hz")
    assert "ffmpeg" in error.do and "-ar 16000 " in error.do


def test_the_feature_extractors_own_rate_counts(folders, tmp_path, clips):
    def slower(config):
        config["feature_extractor"]["sampling_rate"] = 8000
        return config

    hf = copied(folders["e2b"], tmp_path, processor_config=slower)
    assert refused(UsageError, "rate", hf, clips["odd.wav"]).expected == "8000 Hz"
    path = write(tmp_path / "a.wav", noise(800).tobytes(), rate=8000)
    assert len(one_of(hf, path).features) == 9


def test_wide_samples_are_refused(folders, tmp_path, clips):
    whole = bytearray(clips["odd.wav"].read_bytes())
    whole[34] = 40
    (tmp_path / "a.wav").write_bytes(whole)
    assert refused(UsageError, "too wide", folders["e2b"], tmp_path / "a.wav").found == "40 bits"


@pytest.mark.parametrize("samples", [0, 1, 127, 128, 129, 160])
def test_sounds_without_a_frame_are_refused(samples, folders, tmp_path):
    path = write(tmp_path / "a.wav", noise(samples).tobytes())
    error = refused(UsageError, "too short", folders["e2b"], path)
    assert (error.expected, error.found) == ("more than 160 samples", str(samples))


@pytest.mark.parametrize(("limit", "allowed"), [(20, True), (19, False)])
def test_the_processors_limit_counts(limit, allowed, folders, tmp_path, clips):
    def limited(config):
        return config | {"audio_seq_length": limit}

    hf = copied(folders["e2b"], tmp_path, processor_config=limited)
    if allowed:
        assert one_of(hf, clips["odd.wav"]).places.sum() == 20
    else:
        error = refused(UsageError, "longer than", hf, clips["odd.wav"])
        assert (error.expected, error.found) == ("at most 19 soft tokens", "20")


def test_half_a_minute_is_heard_and_no_sample_more(folders, tmp_path):
    """transformers 5.23 cuts off what is longer, and takes 750 soft tokens where it is not told."""

    def unlimited(config):
        del config["audio_seq_length"]
        return config

    hf = copied(folders["e2b"], tmp_path, processor_config=unlimited)
    quiet = np.zeros(480001, "<i2")
    whole = one_of(hf, write(tmp_path / "a.wav", quiet[:-1].tobytes()))
    assert len(whole.features) == 2999 and whole.places.sum() == 750
    for folder, name in ((hf, "b.wav"), (folders["e2b"], "c.wav")):
        error = refused(UsageError, "longer than", folder, write(tmp_path / name, quiet.tobytes()))
        assert (error.expected, error.found) == ("at most 480000 samples", "480001")


def test_the_built_in_limit_is_750_soft_tokens(folders, tmp_path):
    def dense(config):
        del config["audio_seq_length"]
        config["feature_extractor"]["hop_length_ms"] = 9.0
        return config

    hf = copied(folders["e2b"], tmp_path, processor_config=dense)
    path = write(tmp_path / "a.wav", bytes(2 * 480000))
    assert refused(UsageError, "longer than", hf, path).expected == "at most 750 soft tokens"


def test_models_without_audio_are_refused(tiny, folders, clips):
    path = clips["odd.wav"]
    refused(UsageError, "cannot take sounds", tiny("31b"), path)
    refused(UsageError, "has no audio tower", tiny("e2b", text_only=True), path)
    architecture = read_architecture(folders["e2b"])
    for deaf in (replace(architecture, audio=None), replace(architecture, text_only=True)):
        refused(UsageError, "cannot take sounds", folders["e2b"], path, deaf)


def test_checkpoints_without_tokenizer_or_extractor_are_refused(folders, tmp_path, clips):
    for number, (files, match) in enumerate(
        {
            ("tokenizer",): "Sounds need a tokenizer",
            (
                "processor_config",
                "preprocessor_config",
            ): "Sounds need the configuration of an audio feature extractor",
        }.items()
    ):
        (tmp_path / str(number)).mkdir()
        hf = copied(folders["e2b"], tmp_path / str(number), **dict.fromkeys(files))
        refused(SourceError, match, hf, clips["odd.wav"])


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"sampling_rate": "fast"}, "is not that of a Gemma 4"),
        ({"frame_length_ms": 0}, "is not that of a Gemma 4"),
        ({"per_bin_mean": [1.0, 2.0]}, "cannot load the audio feature extractor"),
        ({"hop_length_ms": 0}, "is not that of a Gemma 4"),
        ({"padding_side": "behind"}, "cannot make frames"),
    ],
)
def test_a_broken_extractor_is_a_message(change, match, folders, tmp_path, clips):
    def spoil(config):
        config["feature_extractor"] |= change
        return config

    hf = copied(folders["e2b"], tmp_path, processor_config=spoil, preprocessor_config=None)
    refused(SourceError, match, hf, clips["odd.wav"])


def test_broken_json_is_a_message(folders, tmp_path, clips):
    for number, (text, match) in enumerate(
        {
            '{"audio_seq_length": "long"}': "audio_seq_length is not an integer",
            '{"audio_seq_length": true}': "audio_seq_length is not an integer",
            "[]": "not a JSON object",
            "{": "not valid JSON|transformers cannot load",
        }.items()
    ):
        (tmp_path / str(number)).mkdir()
        hf = copied(folders["e2b"], tmp_path / str(number))
        preprocessor = json.loads((hf / "preprocessor_config.json").read_text())
        preprocessor["feature_size"] = 52
        (hf / "preprocessor_config.json").write_text(json.dumps(preprocessor))
        (hf / "processor_config.json").write_text(text)
        refused(SourceError, match, hf, clips["odd.wav"])


def test_another_models_extractor_is_refused(folders, tmp_path, clips):
    def exchange(config):
        config["feature_extractor"]["feature_size"] = 60
        return config

    hf = copied(folders["e2b"], tmp_path, processor_config=exchange)
    error = refused(SourceError, "does not fit the audio tower", hf, clips["odd.wav"])
    assert (error.expected, error.found) == ("feature_size 52", "60")


def test_a_tokenizer_without_the_sounds_tokens_is_refused(folders, tmp_path, clips):
    def lose(config):
        del config["extra_special_tokens"]["eoa_token"]
        return config

    hf = copied(folders["e2b"], tmp_path, tokenizer_config=lose, special_tokens_map=None)
    error = refused(SourceError, "no tokens for a sound", hf, clips["odd.wav"])
    assert error.found == "no eoa_token"


@pytest.mark.parametrize("token", [None, PLACE + 1])
def test_a_sound_token_of_another_model_is_refused(token, folders, tmp_path, clips):
    hf = copied(folders["e2b"], tmp_path, config=lambda found: found | {"audio_token_id": token})
    error = refused(SourceError, "token for a sound differs from the model's", hf, clips["odd.wav"])
    assert error.found == str(PLACE) and f"audio_token_id {token}" in error.expected


def test_a_sound_token_outside_the_vocabulary_is_refused(folders, clips):
    architecture = read_architecture(folders["e2b"])
    changed = replace(architecture, text=replace(architecture.text, vocab=PLACE))
    refused(SourceError, "not in the model's vocab", folders["e2b"], clips["odd.wav"], changed)


@pytest.mark.parametrize("place", ["<|image|>", "<|audio|>", "<|video|>"])
def test_a_prompt_with_a_place_of_its_own_is_refused(place, folders, clips):
    prompts = ["fine", f"What is {place}?"]
    error = refused(UsageError, "sound", folders["e2b"], clips["odd.wav"], prompts=prompts)
    assert error.where == "prompt-1"


def test_a_tokenizer_that_splits_the_sounds_token_is_refused(folders, clips, monkeypatch):
    def split(tokenizer, name, text):
        ids = [token for token in tokenizer(text)["input_ids"] if token != PLACE]
        return TokenSequence(name, tuple(ids))

    monkeypatch.setattr(soft_module, "tokenized", split)
    refused(SourceError, "places of a sound", folders["e2b"], clips["odd.wav"])


@pytest.mark.parametrize("family", ["e2b"])
def test_a_right_conversion_hears_the_same(family, folders, converted, clips):
    native = converted(folders[family], "gemma-jax")
    report = logit_check(folders[family], native, tokens=3, audio=[clips["odd.wav"]])
    assert report.verdict == "same model" and report.divergence.kl_max < LIMIT
    assert report.sounds == 1 and report.images == 0 and report.sequences == 3
    assert report.as_json()["sounds"] == 1
    assert report.as_json()["towers_not_run"] == ["vision"]
    assert report.divergence.max_logit_difference < 1e-3
    assert "1 with a sound" in shown(report) and "with an image" not in shown(report)
    assert "vision tower (add --image)" in shown(report)


def shown(report):
    from rich.console import Console

    console = Console(width=200)
    with console.capture() as capture:
        console.print(render(report))
    return capture.get()


def test_each_sound_runs_by_itself_and_once(sequences):
    one, other = sequences["e2b"]["short.wav"], sequences["e2b"]["odd.wav"]
    text = TokenSequence("text", (5, 6, 7))
    assert batches([text, one, text, other]) == [[0, 2], [1], [3]]


@pytest.mark.share(2, 1)
@pytest.mark.parametrize("whole_model", [False, True])
def test_text_around_a_sound_is_compared_and_its_places_are_not(
    whole_model, folders, converted, clips
):
    hf, native = folders["e2b"], converted(folders["e2b"], "gemma-jax")
    sounds = [clips["odd.wav"]]
    report = logit_check(hf, native, tokens=3, audio=sounds, whole_model=whole_model)
    assert report.passed and report.divergence.kl_max < LIMIT
    architecture = read_architecture(hf)
    text = sum(len(one.ids) for one in token_sequences(hf, architecture, tokens=3))
    assert report.divergence.tokens == text + len(one_of(hf, clips["odd.wav"]).ids) - 20


def swapped(left, right):
    def break_tower(items):
        tower = nested_tree(items)["audio_encoder"]["conformer/stacked_layers_1"]
        arrays = [tower["trans_atten"]["self_atten"][name]["kernel"] for name in (left, right)]
        for name, array in zip((left, right), reversed(arrays), strict=True):
            put(items, f"trans_atten/self_atten/{name}/kernel", lambda _, array=array: array)

    return break_tower


def put(items, path, edit):
    alter(items, f"audio_encoder/'conformer/stacked_layers_1'/{path}", edit)


FAULTS = {
    "query and key": swapped("query", "key"),
    "key and value": swapped("key", "value"),
    "a square matrix transposed": lambda items: put(
        items, "trans_atten/self_atten/query/kernel", np.transpose
    ),
    "heads of the distances crossed": lambda items: put(
        items,
        "trans_atten/self_atten/relative_position_embedding/pos_proj/kernel",
        lambda kernel: kernel[:, ::-1],
    ),
    "signal and gate": lambda items: put(
        items, "lconv/linear_start/kernel", lambda kernel: np.roll(kernel, len(kernel), axis=1)
    ),
    "time of the convolution": lambda items: put(
        items, "lconv/depthwise_conv1d/kernel", lambda kernel: kernel[::-1]
    ),
    "a clip bound lost": lambda items: put(
        items, "fflayer_end/ffn_layer1/clip_output_min", lambda bound: bound * np.inf
    ),
    "a norm lost": lambda items: put(items, "lconv/conv_norm/scale", np.ones_like),
    "the output's bias lost": lambda items: alter(
        items, "audio_encoder/output_projection/bias", np.zeros_like
    ),
    "the projection into the text": lambda items: alter(
        items, "embedder/audio_input_projection/w", lambda kernel: kernel[::-1]
    ),
}


FAILING = {
    "query and key": ["audio layer 1, queries", "audio layer 1, keys"],
    "key and value": ["audio layer 1, keys", "audio layer 1, values"],
    "a square matrix transposed": ["audio layer 1, queries"],
    "heads of the distances crossed": ["audio layer 1, attention"],
    "signal and gate": ["audio layer 1, light convolution"],
    "time of the convolution": ["audio layer 1, light convolution"],
    "a clip bound lost": ["audio layer 1, second feed-forward"],
    "a norm lost": ["audio layer 1, light convolution"],
    "the output's bias lost": ["audio, the projected frames"],
    "the projection into the text": ["audio, the soft tokens"],
}
"""Each fault → the parts that fail by themselves, and no other does."""


@pytest.mark.share(10)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_tower_is_heard(fault, folders, converted, clips, tmp_path):
    items = tmp_path / "native"
    shutil.copytree(converted(folders["e2b"], "gemma-jax"), items)
    FAULTS[fault](items)
    report = logit_check(folders["e2b"], items, tokens=3, audio=[clips["odd.wav"]])
    assert report.verdict == "not the same model", report.divergence
    assert report.divergence.kl_max > 3e-5
    assert report.divergence.worst.sequence == "sound-0 (odd.wav)"
    assert [one.name for one in report.local.failed] == FAILING[fault]


def test_a_broken_tower_is_not_seen_by_text(folders, converted, tmp_path):
    items = tmp_path / "native"
    shutil.copytree(converted(folders["e2b"], "gemma-jax"), items)
    FAULTS["key and value"](items)
    assert logit_check(folders["e2b"], items, tokens=3).passed


@pytest.mark.large
def test_a_sound_and_an_image_side_by_side(folders, converted, clips, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    report = logit_check(
        folders["e2b"],
        converted(folders["e2b"], "gemma-jax"),
        tokens=3,
        images=[tmp_path / "a.png"],
        audio=[clips["odd.wav"]],
    )
    assert report.passed and report.divergence.kl_max < LIMIT
    assert (report.images, report.sounds, report.sequences) == (1, 1, 4)
    for tower in ("vision", "audio"):
        parts = [one for one in report.local.parts if one.tower == tower]
        names = [one.name for one in parts]
        assert len(set(names)) == len(names) and f"{tower} layer 1, output" in names
        assert max(one.times for one in parts) < FACTOR / 2
    assert "1 with an image, 1 with a sound" in shown(report)


@pytest.mark.parametrize(
    ("source", "of", "layout"),
    [
        ({}, {}, "maxtext"),
        ({}, {"text_only": True}, "gemma-jax"),
    ],
)
def test_trees_without_the_tower_hear_nothing(
    source, of, layout, tiny, converted, clips, monkeypatch
):
    """Before the original is loaded, which may take long."""
    monkeypatch.setattr(running, "LayerwiseReference", None)
    native = converted(tiny("e2b", **of), layout)
    with pytest.raises(UsageError, match="has no audio tower, so it cannot take") as caught:
        logit_check(tiny("e2b", **source), native, tokens=3, audio=[clips["odd.wav"]])
    assert caught.value.found == f"layout {layout}" and "--audio" in caught.value.do


def test_a_model_that_hears_nothing_is_refused(tiny, converted, clips):
    source = tiny("31b")
    for layout in ("fast-llm", "gemma-jax"):
        with pytest.raises(UsageError, match="The model cannot take sounds"):
            logit_check(source, converted(source, layout), tokens=3, audio=[clips["odd.wav"]])


def test_golden_logits_hold_no_sounds(folders, converted, clips, tmp_path):
    with pytest.raises(UsageError, match="come from the golden") as caught:
        logit_check(
            folders["e2b"],
            converted(folders["e2b"], "gemma-jax"),
            audio=[clips["odd.wav"]],
            golden=tmp_path / "none.safetensors",
        )
    assert "--audio" in caught.value.do


def command(monkeypatch, *arguments):
    """The exit code of a command in this process."""
    monkeypatch.setattr(sys, "argv", ["gemma-convert", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        main()
    return caught.value.code


def test_exit_codes(folders, converted, clips, tmp_path, monkeypatch, capsys):
    hf, native = folders["e2b"], converted(folders["e2b"], "gemma-jax")
    check = ("logit-check", hf, native, "--tokens", 3)
    two = ("--audio", clips["odd.wav"], "--audio", clips["odd.wav"])
    assert not command(monkeypatch, *check, *two, "--json")
    assert json.loads(capsys.readouterr().out)["sounds"] == 2
    broken = tmp_path / "native"
    shutil.copytree(native, broken)
    FAULTS["a norm lost"](broken)
    assert command(monkeypatch, "logit-check", hf, broken, "--tokens", 3, *two) == 1
    assert "not the same model" in capsys.readouterr().out
    assert command(monkeypatch, *check, "--audio", tmp_path / "none.wav") == 2
    assert "error: The sound does not exist." in capsys.readouterr().err
    without = copied(hf, tmp_path, tokenizer=None)
    assert command(monkeypatch, "logit-check", without, native, *two) == 3
    assert "Sounds need a tokenizer" in capsys.readouterr().err


def test_attention_that_transformers_is_asked_for(monkeypatch):
    """5.17 reads an eager mask of the audio tower the wrong way round; 5.23 has no other one."""
    from transformers.models.gemma4.modeling_gemma4 import Gemma4AudioModel

    from gemma_convert.logits.reference import eager_attention

    monkeypatch.setattr(Gemma4AudioModel, "_supports_sdpa", False)
    assert eager_attention() == "eager"
    monkeypatch.setattr(Gemma4AudioModel, "_supports_sdpa", True)
    assert eager_attention() == {
        "": "eager",
        "text_config": "eager",
        "vision_config": "eager",
        "audio_config": "sdpa",
    }
