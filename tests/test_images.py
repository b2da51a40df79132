"""Image prompts: the inputs of transformers' own processor, and the logits of its own model."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from cases import SHALLOW
from PIL import Image

from gemma_convert.errors import SourceError, UsageError
from gemma_convert.logits.reference import Reference, TransformersLogits
from gemma_convert.model.config import read_architecture
from gemma_convert.prompts import soft as soft_module
from gemma_convert.prompts.images import IMAGE, image_sequences
from gemma_convert.prompts.text import TokenSequence, token_sequences

FAMILIES = ("e2b", "26b-a4b")
POOLING = 3
MOST_SOFT_TOKENS = 70
PLACE = 9
"""The tiny tokenizer's token for a soft token of an image."""


class PillowProcessor:
    """Gemma4Processor with the image processor that runs on Pillow, and no video processor."""

    def __init__(self, folder):
        from transformers import (
            AutoFeatureExtractor,
            AutoTokenizer,
            Gemma4ImageProcessorPil,
            Gemma4Processor,
        )

        class WithoutVideos(Gemma4Processor):
            def check_argument_for_proper_class(self, argument_name, argument):
                if argument_name != "video_processor":
                    return super().check_argument_for_proper_class(argument_name, argument)
                return None

        self._processor = WithoutVideos(
            feature_extractor=AutoFeatureExtractor.from_pretrained(folder),
            image_processor=Gemma4ImageProcessorPil.from_pretrained(folder),
            tokenizer=AutoTokenizer.from_pretrained(folder),
            video_processor=None,
        )

    def __call__(self, path, behind=IMAGE.question):
        text = f"{IMAGE.before}<|image|>{behind}"
        return self._processor(images=str(path), text=text, return_tensors="pt")

    def listen(self, sounds):
        return self._processor.feature_extractor(sounds, sampling_rate=16000, return_tensors="pt")


@pytest.fixture(scope="module")
def folders(tiny):
    return {family: tiny(family, layers=SHALLOW[family]) for family in FAMILIES}


@pytest.fixture(scope="module")
def processors(folders):
    return {family: PillowProcessor(folder) for family, folder in folders.items()}


@pytest.fixture(scope="module")
def references(folders):
    return {family: Reference(folder) for family, folder in folders.items()}


def noise(width, height, bands=3, seed=0):
    shape = (height, width, bands) if bands > 1 else (height, width)
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


def oriented():
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    return exif


def palette_with_transparency():
    image = noise(31, 22).quantize(16)
    image.info["transparency"] = 3
    return image


IMAGES = {
    "square.png": lambda: noise(64, 64),
    "wide.png": lambda: noise(900, 6),
    "tall.png": lambda: noise(6, 900),
    "pixel.png": lambda: noise(1, 1),
    "large.jpg": lambda: noise(301, 517),
    "grey.png": lambda: noise(40, 30, 1),
    "alpha.png": lambda: noise(40, 30, 4),
    "palette.png": palette_with_transparency,
    "cmyk.jpg": lambda: noise(40, 30).convert("CMYK"),
    "bits.png": lambda: noise(40, 30, 1).convert("1"),
    "deep.png": lambda: Image.fromarray(np.arange(1200, dtype=np.uint16).reshape(30, 40) * 50),
    "turned.jpg": lambda: noise(50, 20),
}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """The path of each image, by its name."""
    folder = tmp_path_factory.mktemp("pictures")
    for name, make in IMAGES.items():
        options = {"exif": oriented()} if name == "turned.jpg" else {}
        make().save(folder / name, **options)
    return {name: folder / name for name in IMAGES}


@pytest.fixture(scope="module")
def sequences(folders, pictures):
    """sequences[family][name]: the built-in prompt with that image."""
    return {
        family: dict(
            zip(
                IMAGES,
                image_sequences(folder, read_architecture(folder), list(pictures.values())),
                strict=True,
            )
        )
        for family, folder in folders.items()
    }


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


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", IMAGES)
def test_inputs_are_those_of_transformers_processor(family, name, processors, sequences, pictures):
    one, inputs = sequences[family][name], processors[family](pictures[name])
    assert one.ids == tuple(inputs["input_ids"][0].tolist())
    assert one.pixels.dtype == np.float32
    assert np.array_equal(one.pixels, inputs["pixel_values"][0])
    assert np.array_equal(one.positions, inputs["image_position_ids"][0])
    assert np.array_equal(one.places, inputs["mm_token_type_ids"][0])
    assert bool(inputs["attention_mask"].all())


@pytest.mark.parametrize(
    ("name", "columns", "rows"),
    [("square.png", 8, 8), ("wide.png", 70, 1), ("tall.png", 1, 70), ("large.jpg", 6, 10)],
)
def test_soft_tokens_cover_the_image_and_text_stands_on_both_sides(name, columns, rows, sequences):
    one = sequences["e2b"][name]
    places = np.flatnonzero(one.places)
    assert len(places) == columns * rows <= MOST_SOFT_TOKENS
    assert np.array_equal(places, np.arange(places[0], places[-1] + 1))
    assert {one.ids[place] for place in places} == {PLACE}
    assert "".join(one.pieces[: places[0]]) == f"<bos>{IMAGE.before}<|image>"
    assert "".join(one.pieces[places[-1] + 1 :]) == f"<image|>{IMAGE.question}"
    assert np.array_equal(one.compared, [piece != "<|image|>" for piece in one.pieces])
    real = one.positions[(one.positions >= 0).all(axis=1)]
    assert real.tolist() == [
        [x, y] for y in range(POOLING * rows) for x in range(POOLING * columns)
    ]
    assert one.pixels.shape == (MOST_SOFT_TOKENS * POOLING**2, 48) == (len(one.positions), 48)
    assert not one.pixels[len(real) :].any() and one.pixels[: len(real)].any()


def test_a_patch_holds_rows_of_pixels_with_their_colours(folders, tmp_path):
    """At the size that is not resized: 8 by 8 soft tokens of 3 by 3 patches of 4 by 4 pixels."""
    picture = noise(96, 96)
    picture.save(tmp_path / "exact.png")
    folder = folders["e2b"]
    (one,) = image_sequences(folder, read_architecture(folder), [tmp_path / "exact.png"])
    pixels = np.asarray(picture).astype(np.float32)
    found = one.pixels[24 * 5 + 7].reshape(4, 4, 3)
    assert np.allclose(found, pixels[20:24, 28:32] / 255, atol=1e-6)


def test_an_image_is_turned_as_its_exif_says(folders, tmp_path):
    folder = folders["e2b"]
    noise(50, 20).save(tmp_path / "a.png", exif=oriented())
    noise(50, 20).rotate(-90, expand=True).save(tmp_path / "b.png")
    noise(50, 20).save(tmp_path / "c.png")
    turned, by_hand, plain = image_sequences(
        folder, read_architecture(folder), [tmp_path / f"{name}.png" for name in "abc"]
    )
    assert np.array_equal(turned.pixels, by_hand.pixels)
    assert turned.ids == by_hand.ids
    assert not np.array_equal(turned.positions, plain.positions)


def test_each_image_stands_before_each_prompt(folders, processors, pictures):
    folder = folders["26b-a4b"]
    paths = [pictures["square.png"], pictures["grey.png"]]
    found = image_sequences(folder, read_architecture(folder), paths, [" ab", "港?"])
    assert [one.name for one in found] == [
        "image-0 (square.png), prompt-0",
        "image-0 (square.png), prompt-1",
        "image-1 (grey.png), prompt-0",
        "image-1 (grey.png), prompt-1",
    ]
    for one, path, text in zip(
        found, [paths[0]] * 2 + [paths[1]] * 2, [" ab", "港?"] * 2, strict=True
    ):
        inputs = processors["26b-a4b"](path, text)
        assert one.ids == tuple(inputs["input_ids"][0].tolist())
        assert np.array_equal(one.pixels, inputs["pixel_values"][0])


def test_sequences_of_different_pixels_are_not_equal(folders, tmp_path):
    folder = folders["e2b"]
    for seed in (1, 2):
        (tmp_path / str(seed)).mkdir()
        noise(20, 20, seed=seed).save(tmp_path / str(seed) / "a.png")
    one, other = (
        image_sequences(folder, read_architecture(folder), [tmp_path / str(seed) / "a.png"])[0]
        for seed in (1, 2)
    )
    assert one.ids == other.ids and one.name == other.name
    assert one == one and one != other and len({one, other}) == 2


@pytest.mark.parametrize("file", ["processor_config", "preprocessor_config"])
def test_either_file_configures_the_processor(file, folders, tmp_path, pictures, sequences):
    def rescaled(config):
        section = config.get("image_processor", config)
        section["max_soft_tokens"], section["rescale_factor"] = 140, 1 / 510
        return config

    other = {"processor_config", "preprocessor_config"} - {file}
    folder = copied(folders["e2b"], tmp_path, **{file: rescaled}, **dict.fromkeys(other))
    (one,) = image_sequences(folder, read_architecture(folder), [pictures["square.png"]])
    assert one.places.sum() == 121 and len(one.pixels) == 140 * POOLING**2
    assert 0 < one.pixels.max() <= 0.5 < sequences["e2b"]["square.png"].pixels.max()


@pytest.mark.share(4, 1)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["square.png", "tall.png", "turned.jpg"])
def test_logits_are_bit_equal_to_transformers_own_path(
    family, name, folders, processors, references, sequences, pictures
):
    reference = references[family]
    hidden = reference.hidden(sequences[family][name])
    with torch.no_grad():
        expected = own_model(reference)(**on_device(processors[family](pictures[name]), reference))
    assert hidden.shape == (expected.logits.shape[1], reference.architecture.text.embed)
    assert np.array_equal(reference.head(hidden), expected.logits[0].cpu().numpy())


def own_model(reference):
    return reference._model


def on_device(inputs, reference):
    return {name: tensor.to(reference.device) for name, tensor in inputs.items()}


@pytest.mark.share(2)
@pytest.mark.parametrize("family", FAMILIES)
def test_pixels_and_positions_matter(family, references, sequences):
    reference, one = references[family], sequences[family]["square.png"]
    right = reference.hidden(one)[-1]
    swapped = one.positions.copy()
    swapped[:576] = swapped[:576, ::-1]
    for wrong in (replace(one, positions=swapped), replace(one, pixels=1 - one.pixels)):
        assert (reference.hidden(wrong)[-1] - right).abs().max() > 1e-4


def test_only_some_models_see_an_image_in_both_directions(references, sequences):
    """The image's last rows reach its first places where attention goes both ways."""
    for family, both_ways in (("e2b", False), ("26b-a4b", True)):
        one = sequences[family]["square.png"]
        plain = replace(one, places=np.zeros_like(one.places))
        reference = references[family]
        difference = (reference.hidden(one) - reference.hidden(plain)).abs().amax(dim=1)
        assert bool((difference > 1e-4).any()) == both_ways
        assert difference[: np.flatnonzero(one.places)[0]].max() < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_image_features_stand_in_the_images_places(family, references, sequences):
    reference, one = references[family], sequences[family]["large.jpg"]
    features = reference.image_features(one)
    assert features.shape == (60, reference.architecture.text.embed)
    model = own_model(reference)
    ids = torch.tensor([one.ids], device=reference.device)
    scaled = model.get_input_embeddings()(ids).detach()
    seen = {}
    hook = model.model.language_model.register_forward_pre_hook(
        lambda module, arguments, keywords: seen.update(keywords), with_kwargs=True
    )
    reference.hidden(one)
    hook.remove()
    embedded = seen["inputs_embeds"][0].cpu().numpy()
    assert np.array_equal(embedded[one.places == 1], features)
    assert np.array_equal(embedded[one.compared], scaled[0].cpu().numpy()[one.compared])


def test_audio_features_are_those_of_the_padded_sound(references, processors):
    reference = references["e2b"]
    noises = np.random.default_rng(0).standard_normal((2, 9000)).astype(np.float32)
    heard = on_device(processors["e2b"].listen([noises[0, :5300], noises[1]]), reference)
    mask = heard["input_features_mask"]
    with torch.no_grad():
        output = own_model(reference).model.get_audio_features(**heard)
    for number, frames in enumerate(mask.sum(dim=1).tolist()):
        features = heard["input_features"][number, :frames].cpu().numpy().astype(np.float32)
        expected = output.pooler_output[number][output.attention_mask[number]].cpu().numpy()
        assert (frames < mask.shape[1]) == (number == 0)
        found = reference.audio_features(features)
        assert found.shape == expected.shape and len(found) == -(-frames // 4)
        assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()


def test_text_and_images_run_side_by_side(folders, references, sequences):
    folder, reference = folders["26b-a4b"], references["26b-a4b"]
    image = sequences["26b-a4b"]["grey.png"]
    text = token_sequences(folder, reference.architecture, ["ab"])[0]
    logits = TransformersLogits(folder, [text, image])
    for index, one in enumerate((text, image)):
        sliced = np.concatenate(list(logits.slices(index, 7)))
        assert len(sliced) == len(one.ids) == len(one.compared)
        assert np.allclose(sliced, reference.head(reference.hidden(one)), atol=1e-5)
    assert text.compared.all() and text.compared.dtype == bool


def test_the_tokens_of_an_image_without_it_are_plain_places(references, sequences):
    one = sequences["e2b"]["grey.png"]
    reference = references["e2b"]
    without = reference.hidden(TokenSequence(one.name, one.ids))
    assert (without - reference.hidden(one)).abs().max() > 1e-4


def refused(error, match, hf, path, architecture=None, prompts=()):
    with pytest.raises(error, match=match) as caught:
        image_sequences(hf, architecture or read_architecture(hf), [path], prompts)
    return caught.value


def test_files_that_are_no_images_are_refused(folders, tmp_path, pictures):
    hf = folders["e2b"]
    refused(UsageError, "does not exist", hf, tmp_path / "none.png")
    refused(UsageError, "does not exist", hf, tmp_path)
    (tmp_path / "text.png").write_text("no image")
    assert (
        "text.png" in refused(UsageError, "cannot read this file", hf, tmp_path / "text.png").where
    )
    whole = pictures["large.jpg"].read_bytes()
    for length in (0, 2, 40, len(whole) // 2):
        (tmp_path / "part.jpg").write_bytes(whole[:length])
        refused(UsageError, "cannot read this file", hf, tmp_path / "part.jpg")


@pytest.mark.parametrize("kind", [OSError, ValueError, SyntaxError, RuntimeError, EOFError])
def test_whatever_pillow_raises_at_a_damaged_file_is_a_message(
    kind, folders, pictures, monkeypatch
):
    """Pillow's readers raised all but the last when files of eleven formats were damaged."""

    def fail(image):
        raise kind("damaged")

    monkeypatch.setattr("transformers.image_utils.load_image", fail)
    error = refused(UsageError, "cannot read this file", folders["e2b"], pictures["square.png"])
    assert error.found == "damaged"


def test_an_image_beyond_pillows_limit_is_refused(folders, pictures, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64 * 64 // 2 - 1)
    error = refused(UsageError, "more pixels", folders["e2b"], pictures["square.png"])
    assert "4096 pixels" in error.found and error.where.endswith("square.png")


def test_pillow_is_asked_for_by_name(folders, pictures, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    error = refused(UsageError, "Pillow", folders["e2b"], pictures["square.png"])
    assert error.do == "pip install 'gemma-convert[check]'"


def test_models_without_vision_are_refused(tiny, folders, pictures):
    path = pictures["square.png"]
    refused(UsageError, "cannot take images", tiny("e2b", text_only=True), path)
    architecture = read_architecture(folders["e2b"])
    for blind in (replace(architecture, vision=None), replace(architecture, text_only=True)):
        refused(UsageError, "cannot take images", folders["e2b"], path, blind)


def test_checkpoints_without_tokenizer_or_processor_are_refused(folders, tmp_path, pictures):
    path = pictures["square.png"]
    for number, (files, match) in enumerate(
        {
            ("tokenizer",): "need a tokenizer",
            ("processor_config", "preprocessor_config"): "need the configuration of an image",
        }.items()
    ):
        (tmp_path / str(number)).mkdir()
        hf = copied(folders["e2b"], tmp_path / str(number), **dict.fromkeys(files))
        refused(SourceError, match, hf, path)


@pytest.mark.parametrize(
    "change", [{"max_soft_tokens": 71}, {"resample": "no number"}, {"patch_size": "4"}, None]
)
def test_a_broken_processor_is_a_message(change, folders, tmp_path, pictures):
    def spoil(config):
        if change is None:
            return {}
        config["image_processor"] |= change
        return config

    hf = copied(folders["e2b"], tmp_path, processor_config=spoil, preprocessor_config=None)
    refused(SourceError, "image processor", hf, pictures["square.png"])


@pytest.mark.parametrize(
    ("change", "found", "expected"),
    [
        ({"patch_size": 5}, "patch_size 5", "patch_size 4"),
        ({"patch_size": 10**9}, "patch_size 1000000000", "patch_size 4"),
        ({"pooling_kernel_size": "3"}, "pooling_kernel_size '3'", "pooling_kernel_size 3"),
        ({"pooling_kernel_size": 2}, "pooling_kernel_size 2", "pooling_kernel_size 3"),
        ({"max_soft_tokens": 1120}, "positions to 1226", "patches of 48 values"),
    ],
)
def test_another_models_processor_is_refused(change, found, expected, folders, tmp_path, pictures):
    def exchange(config):
        config["image_processor"] |= change
        return config

    hf = copied(folders["e2b"], tmp_path, processor_config=exchange)
    error = refused(SourceError, "does not fit the vision tower", hf, pictures["wide.png"])
    assert found in error.found and expected in error.expected


def test_the_last_position_of_the_table_is_allowed(folders, pictures):
    architecture = read_architecture(folders["e2b"])
    for positions, allowed in ((210, True), (209, False)):
        vision = replace(architecture.vision, positions=positions)
        changed = replace(architecture, vision=vision)
        if allowed:
            assert image_sequences(folders["e2b"], changed, [pictures["wide.png"]])
        else:
            refused(SourceError, "does not fit", folders["e2b"], pictures["wide.png"], changed)


def test_a_tokenizer_without_the_images_tokens_is_refused(folders, tmp_path, pictures):
    def lose(config):
        del config["extra_special_tokens"]["boi_token"]
        return config

    hf = copied(folders["e2b"], tmp_path, tokenizer_config=lose, special_tokens_map=None)
    error = refused(SourceError, "no tokens for an image", hf, pictures["square.png"])
    assert error.found == "no boi_token"


def test_an_image_token_of_another_model_is_refused(folders, pictures):
    architecture = read_architecture(folders["e2b"])
    for token in (None, PLACE + 1):
        error = refused(
            SourceError,
            "differs from the model's",
            folders["e2b"],
            pictures["square.png"],
            replace(architecture, image_token=token),
        )
        assert error.found == str(PLACE)


def test_an_image_token_outside_the_vocabulary_is_refused(folders, pictures):
    architecture = read_architecture(folders["e2b"])
    text = replace(architecture.text, vocab=PLACE)
    refused(
        SourceError,
        "not in the model's vocabulary",
        folders["e2b"],
        pictures["square.png"],
        replace(architecture, text=text),
    )


@pytest.mark.parametrize("place", ["<|image|>", "<|audio|>", "<|video|>"])
def test_a_prompt_with_a_place_of_its_own_is_refused(place, folders, pictures):
    error = refused(
        UsageError,
        "placeholder token of an image",
        folders["e2b"],
        pictures["square.png"],
        prompts=["fine", f"What is {place}?"],
    )
    assert error.where == "prompt-1"


def test_a_tokenizer_that_splits_the_images_token_is_refused(folders, pictures, monkeypatch):
    def split(tokenizer, name, text):
        ids = [token for token in tokenizer(text)["input_ids"] if token != PLACE]
        return TokenSequence(name, tuple(ids))

    monkeypatch.setattr(soft_module, "tokenized", split)
    refused(SourceError, "places of an image", folders["e2b"], pictures["square.png"])
