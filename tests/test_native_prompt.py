"""Prompts with images: both JAX forward passes put soft tokens in as transformers does."""

from dataclasses import replace
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
from cases import FAMILIES
from gemma_jax_by_hand import gemma_jax_tree, nested
from maxtext_by_hand import maxtext_tree
from safetensors.numpy import load_file
from test_tiny import processor_of

from gemma_convert.forward import decoder_layer
from gemma_convert.forward.arithmetic import head, visible
from gemma_convert.forward.prompt import Prompt
from gemma_convert.layouts.gemma_jax import forward as gemma_jax
from gemma_convert.layouts.maxtext import forward as maxtext
from gemma_convert.logits.divergence import compare
from gemma_convert.model.config import read_architecture

LENGTH = 144  # of what a processor makes of two images, so that few shapes are compiled
IMAGES = np.zeros((2, LENGTH), np.int32)
IMAGES[0, 3:9] = 1
IMAGES[0, 12:36] = 2  # longer than the window
IMAGES[1, :4] = 1
IMAGES[1, 30:46] = 2
BOTH_WAYS = ("26b-a4b", "31b")
TREES = {"gemma_jax": gemma_jax, "maxtext": maxtext}


class Case:
    """One tiny checkpoint: transformers' model of it, its facts and both of its native trees."""

    def __init__(self, folder):
        import torch
        from transformers import Gemma4ForConditionalGeneration

        self.folder = folder
        self.model = Gemma4ForConditionalGeneration.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        architecture = read_architecture(folder)
        self.text, self.image_token = architecture.text, architecture.image_token
        hf = load_file(folder / "model.safetensors")
        self.trees = {
            "gemma_jax": nested(gemma_jax_tree(hf, architecture)),
            "maxtext": nested(maxtext_tree(hf, architecture, scanned=False)),
        }
        generator = np.random.default_rng(3)
        shape = (2, LENGTH)
        self.tokens = generator.integers(80, self.text.vocab, shape).astype(np.int32)
        self.tokens[IMAGES != 0] = self.image_token
        self.soft = generator.normal(size=(*shape, self.text.embed)).astype(np.float32)
        self.prompt = Prompt(self.tokens, self.soft, IMAGES)

    @cache  # noqa: B019
    def logits(self):
        """transformers' logits of the tokens and of the soft tokens in the images' places."""
        import torch

        soft = [
            torch.tensor(row[images != 0]) for row, images in zip(self.soft, IMAGES, strict=True)
        ]
        with torch.no_grad():
            found = self.model(
                input_ids=torch.tensor(self.tokens, dtype=torch.long),
                mm_token_type_ids=torch.tensor(IMAGES != 0).int(),
                mm_encoder_outputs={"image": SimpleNamespace(pooler_output=soft)},
            )
        return found.logits.numpy()

    def forward(self, name, prompt=None, text=None):
        module, tree, text = TREES[name], self.trees[name], text or self.text
        (hidden,) = module.final_hidden(tree, text, [prompt or self.prompt])
        return np.asarray(head(module.output_table(tree, text), hidden, text))

    def kl(self, name, prompt=None, text=None):
        """KL of every token [batch length]."""
        found = self.forward(name, prompt, text)
        vocab = found.shape[-1]
        return compare(self.logits().reshape(-1, vocab), found.reshape(-1, vocab)).kl.reshape(
            found.shape[:-1]
        )


@pytest.fixture(scope="module")
def case(tiny):
    return cache(lambda family: Case(tiny(family)))


@pytest.mark.share(6, 1)
@pytest.mark.parametrize("name", TREES)
@pytest.mark.parametrize("family", FAMILIES)
def test_images_are_seen_as_transformers_sees_them(case, family, name):
    one = case(family)
    assert one.text.bidirectional_images == (family in BOTH_WAYS)
    assert one.text.window < (IMAGES == 2).sum(axis=1).max()
    assert one.kl(name).max() < 1e-8
    kinds = decoder_layer.layer._cache_size()
    # What stands where there are no images is not looked at, and neither are the images' ids.
    soft = np.where(IMAGES[..., None] != 0, one.soft, np.nan)
    tokens = np.where(IMAGES != 0, one.text.vocab + 7, one.tokens)
    np.testing.assert_array_equal(
        one.forward(name, Prompt(tokens, soft, IMAGES)), one.forward(name)
    )
    assert decoder_layer.layer._cache_size() == kinds


@pytest.mark.share(4, 2)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_processor_makes_of_two_images(case, family):
    import torch
    from PIL import Image

    one = case(family)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 40, 30, 3), dtype=np.uint8)
    inputs = processor_of(one.folder)(
        images=[Image.fromarray(image) for image in pixels],
        text="<|image|> or <|image|>?",
        return_tensors="pt",
    )
    features = []
    tower = one.model.model.get_image_features
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:

        def spy(*arguments, **options):
            features.append(tower(*arguments, **options))
            return features[-1]

        patch.setattr(one.model.model, "get_image_features", spy)
        expected = one.model(**inputs).logits.numpy()
    ids = inputs["input_ids"][0].numpy()
    tokens = np.full((2, LENGTH), ids[-1])  # padded at the end, which nothing before it sees
    tokens[0, : len(ids)] = ids
    places = tokens == one.image_token
    images = np.cumsum(places & ~np.roll(places, 1, axis=1), axis=1) * places
    assert images.max() == 2
    soft = np.zeros((2, LENGTH, one.text.embed), np.float32)
    soft[places] = torch.cat(list(features[0].pooler_output)).numpy()
    for name in TREES:
        found = one.forward(name, Prompt(tokens, soft, images.astype(np.int32)))
        assert compare(expected[0], found[0, : len(ids)]).kl.max() < 1e-8


@pytest.mark.share(2, 1)
@pytest.mark.parametrize("name", TREES)
def test_an_image_changes_only_what_sees_it(case, name):
    dense, ple = case("31b"), case("e2b")
    for one, first in ((dense, 12), (ple, 35)):
        soft = one.soft.copy()
        soft[0, 35] += 1
        changed = np.abs(one.forward(name, Prompt(one.tokens, soft, IMAGES)) - one.forward(name))
        seen = changed[0].max(axis=-1) > 1e-4
        assert not seen[:first].any() and seen[first:].all()
        assert not changed[1].any()


WRONG = {
    "read forwards only": (
        "31b",
        lambda one: {"text": replace(one.text, bidirectional_images=False)},
    ),
    "read both ways": ("e4b", lambda one: {"text": replace(one.text, bidirectional_images=True)}),
    "two images as one": (
        "26b-a4b",
        lambda one: {"prompt": Prompt(one.tokens, one.soft, np.minimum(IMAGES, 1))},
    ),
    "soft tokens scaled": (
        "31b",
        lambda one: {
            "prompt": Prompt(one.tokens, one.soft * np.float32(one.text.embed**0.5), IMAGES)
        },
    ),
    "the image token's own per-layer embedding": (
        "e2b",
        lambda one: {"text": replace(one.text, pad_token=one.image_token)},
    ),
}


@pytest.mark.share(3)
@pytest.mark.parametrize("mistake", WRONG)
def test_a_mistake_with_images_shows(case, mistake):
    family, wrong = WRONG[mistake]
    one = case(family)
    assert one.kl("gemma_jax", **wrong(one)).max() > 1e-4


def test_prompts_with_and_without_images_run_together(case):
    one = case("31b")
    tree = one.trees["maxtext"]
    tokens = np.where(IMAGES != 0, 90, one.tokens)
    zeros = Prompt(tokens, np.full_like(one.soft, np.nan), np.zeros_like(IMAGES))
    text, none, images = maxtext.final_hidden(tree, one.text, [Prompt(tokens), zeros, one.prompt])
    np.testing.assert_allclose(text, none, atol=1e-5)
    (alone,) = maxtext.final_hidden(tree, one.text, [one.prompt])
    np.testing.assert_array_equal(images, alone)
    assert np.abs(text - images).max() > 0.1


def test_visible_keys():
    def seen(*arguments):
        return ["".join(np.where(row, "x", ".")) for row in np.asarray(visible(*arguments)[0])]

    assert seen(4, None) == ["x...", "xx..", "xxx.", "xxxx"]
    assert seen(4, 2) == ["x...", "xx..", ".xx.", "..xx"]
    images = np.array([[0, 1, 1, 1, 2, 0, 1]])
    assert seen(7, None, images) == [
        "x......",
        "xxxx..x",
        "xxxx..x",
        "xxxx..x",
        "xxxxx..",
        "xxxxxx.",
        "xxxxxxx",
    ]
    assert seen(7, 2, images) == [
        "x......",
        "xxxx..x",
        ".xxx..x",
        "..xx..x",
        "...xx..",
        "....xx.",
        ".....xx",
    ]


def test_the_pad_token_is_looked_up_in_the_places_of_images():
    tokens, images = np.array([[5, 6, 7]]), np.array([[0, 2, 0]])
    np.testing.assert_array_equal(Prompt(tokens).ids(9), tokens)
    prompt = Prompt(tokens, np.zeros((1, 3, 4)), images)
    np.testing.assert_array_equal(prompt.ids(9), [[5, 9, 7]])


@pytest.mark.parametrize(
    ("soft", "images"),
    [
        ((2, 3, 5), None),
        (None, (2, 3)),
        ((2, 4, 5), (2, 3)),
        ((2, 3, 5), (2, 4)),
        ((3, 5), (2, 3)),
    ],
)
def test_arrays_that_do_not_belong_together_are_refused(soft, images):
    arrays = (None if shape is None else np.ones(shape, np.int32) for shape in (soft, images))
    with pytest.raises(ValueError, match="images"):
        Prompt(np.ones((2, 3), np.int32), *arrays)
