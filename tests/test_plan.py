"""Plans of the published models: what they write, that both sides are covered, what is refused."""

import itertools
import math
from collections import defaultdict
from functools import cache

import numpy as np
import pytest
from models import (
    A4B,
    DENSE,
    E2B,
    E4B,
    PUBLISHED,
    UNIFIED,
    WHERE,
    load_architecture,
    load_config,
    load_tensors,
    text_only,
    without_layers,
)
from native_tables import native_data, native_row, read_native
from tables import (
    huggingface_data,
    huggingface_row,
    maxtext_data,
    maxtext_row,
    read_huggingface,
    read_maxtext,
)

from gemma_convert.arrays.dtypes import DTypePolicy, TensorSpec
from gemma_convert.errors import MappingError, SourceError, UsageError
from gemma_convert.mapping.coverage import check_targets
from gemma_convert.mapping.inventory import huggingface_tensors
from gemma_convert.mapping.plan import BLOCK_BYTES, GATHER_BYTES
from gemma_convert.mapping.planning import plan_to_native
from gemma_convert.mapping.region import Extent, Region, RegionCopy, blocks
from gemma_convert.mapping.table import load_table
from gemma_convert.model.config import parse_architecture

P = "params/params/"
LAYERS = "model.language_model.layers."
LOCAL = "decoder/scanned_blocks/local_layers/"
GLOBAL = "decoder/scanned_blocks/global_layer/"
VISION = "vision_encoder/Gemma4VisionEncoderLayer_0/"

# name, scanned, text_only, targets, carried
PLANS = [
    (E2B, False, False, 540, 1471),
    (E2B, False, True, 540, 1471),
    (E4B, False, False, 665, 1465),
    (A4B, False, True, 687, 356),
    (A4B, False, False, 1043, 0),
    (A4B, True, True, 47, 356),
    (A4B, True, False, 403, 0),
    (DENSE, False, True, 832, 356),
    (DENSE, False, False, 1188, 0),
    (DENSE, True, True, 29, 356),
    (DENSE, True, False, 385, 0),
    (UNIFIED, False, False, 666, 11),
    (UNIFIED, True, True, 29, 11),
]
EVERY = pytest.mark.parametrize(("name", "scanned", "text"), [plan[:3] for plan in PLANS])


def make(name, source=None, *, table=None, policy=None, **options):
    return plan_to_native(
        load_architecture(name),
        table or load_table("maxtext"),
        load_tensors(name) if source is None else source,
        policy or DTypePolicy(),
        **options,
    )


@cache
def plan_of(name, scanned, text):
    return make(name, scanned=scanned, text_only=text)


@pytest.mark.parametrize(("name", "scanned", "text", "targets", "carried"), PLANS)
def test_counts(name, scanned, text, targets, carried):
    plan = plan_of(name, scanned, text)
    assert len(plan.targets) == targets
    assert len(plan.carried) == carried
    assert (plan.layout, plan.scanned, plan.tied) == ("maxtext", scanned, {})


@EVERY
def test_every_source_tensor_has_one_fate(name, scanned, text):
    plan, published = plan_of(name, scanned, text), load_tensors(name)
    fates = [*plan.sources, *plan.carried, *plan.tied]
    assert len(fates) == len(set(fates))
    assert set(fates) == set(published)
    assert all(why for why in plan.carried.values())
    assert plan.source_bytes == sum(published[tensor].nbytes for tensor in plan.sources)
    assert plan.source_bytes == 2 * sum(target.spec.size for target in plan.targets.values())


def indices_of(dim):
    """The indices that a dimension's extents take, by indexing an array: no strides."""
    numbers = np.arange(math.prod(extent.size for extent in dim))
    numbers = numbers.reshape([extent.size for extent in dim])
    at = tuple(slice(None) if extent.at is None else extent.at for extent in dim)
    return np.ravel(numbers[at])


@cache
def span(dim):
    indices = indices_of(dim)
    low, high = int(indices[0]), int(indices[-1]) + 1
    assert high - low == len(indices)
    return low, high


def assert_covered(regions, shape):
    """The regions are boxes in the shape that do not meet and fill it."""
    boxes = [tuple(span(dim) for dim in region.dims) for region in regions]
    for region, box in zip(regions, boxes, strict=True):
        assert region.shape == shape
        assert all(0 <= low < high <= size for (low, high), size in zip(box, shape, strict=True))
    assert sum(math.prod(high - low for low, high in box) for box in boxes) == math.prod(shape)
    for left, right in itertools.combinations(boxes, 2):
        assert any(b <= c or d <= a for (a, b), (c, d) in zip(left, right, strict=True))


@EVERY
def test_both_sides_are_covered_once(name, scanned, text):
    plan, published = plan_of(name, scanned, text), load_tensors(name)
    into = defaultdict(list)
    for tensor, source in plan.sources.items():
        assert source.region.shape == source.spec.shape == published[tensor].shape
        assert_covered([copy.source for copy in source.copies], source.spec.shape)
        for copy in source.copies:
            assert copy.source.tensor == tensor
            assert sorted(copy.source.axes) == sorted(copy.target.axes)
            assert copy.source.lengths({}) == tuple(
                copy.target.lengths({})[copy.target.axes.index(axis)] for axis in copy.source.axes
            )
            into[copy.target.tensor].append(copy.target)
    assert into.keys() == plan.targets.keys()
    for target, regions in into.items():
        assert_covered(regions, plan.targets[target].spec.shape)


@EVERY
def test_blocks_are_whole_chunks_of_bounded_size(name, scanned, text):
    plan = plan_of(name, scanned, text)
    for target in plan.targets.values():
        assert math.prod(target.chunk) * target.spec.itemsize <= 64 << 20
        assert len(target.chunk) == len(target.spec.shape)
        if target.spec.nbytes <= 1 << 20:
            assert target.chunk == target.spec.shape
    written = defaultdict(int)
    for source in plan.sources.values():
        read = 0
        for ranges in blocks(source.region, source.steps):
            lengths = source.region.lengths(ranges)
            assert math.prod(lengths) * source.spec.itemsize <= 64 << 20
            for copy in source.copies:
                if copy.source.meets(ranges):
                    read += math.prod(copy.source.lengths(ranges))
                    target = plan.targets[copy.target.tensor]
                    written[copy.target.tensor] += math.prod(copy.target.lengths(ranges))
                    if target.spec.nbytes > 1 << 20:
                        assert_whole_chunks(copy.target.box(ranges), target)
        assert read == source.spec.size
    assert written == {name: target.spec.size for name, target in plan.targets.items()}


def assert_whole_chunks(box, target):
    for (start, length), chunk, size in zip(box, target.chunk, target.spec.shape, strict=True):
        assert start % chunk == 0
        assert length % chunk == 0 or start + length == size


def test_the_bounds_of_blocks_and_gathered_tensors():
    assert (BLOCK_BYTES, GATHER_BYTES) == (32 << 20, 1 << 20)


SHAPES = {
    (E2B, False): {
        "token_embedder/embedding": (262144, 1536),
        "decoder/decoder_norm/scale": (1536,),
        "decoder/per_layer_embedder/embed_tokens_per_layer": (262144, 8960),
        "decoder/per_layer_embedder/per_layer_model_projection/kernel": (1536, 8960),
        "decoder/per_layer_embedder/per_layer_projection_norm/scale": (256,),
        "decoder/layers_0/self_attention/query/kernel": (1536, 8, 256),
        "decoder/layers_4/self_attention/query/kernel": (1536, 8, 512),
        "decoder/layers_0/self_attention/key/kernel": (1536, 1, 256),
        "decoder/layers_14/self_attention/value/kernel": (1536, 1, 512),
        "decoder/layers_15/self_attention/key/kernel": None,
        "decoder/layers_15/self_attention/value/kernel": None,
        "decoder/layers_15/self_attention/key_norm/scale": None,
        "decoder/layers_15/self_attention/query/kernel": (1536, 8, 256),
        "decoder/layers_34/self_attention/out/kernel": (8, 512, 1536),
        "decoder/layers_34/self_attention/query_norm/scale": (512,),
        "decoder/layers_13/self_attention/key_norm/scale": (256,),
        "decoder/layers_14/mlp/wi_0/kernel": (1536, 6144),
        "decoder/layers_15/mlp/wi_1/kernel": (1536, 12288),
        "decoder/layers_34/mlp/wo/kernel": (12288, 1536),
        "decoder/layers_7/per_layer_input_gate/kernel": (1536, 256),
        "decoder/layers_7/per_layer_projection/kernel": (256, 1536),
        "decoder/layers_7/post_per_layer_input_norm/scale": (1536,),
        "decoder/layers_7/layer_scalar": (1,),
        "decoder/layers_35/layer_scalar": None,
    },
    (E4B, False): {
        "token_embedder/embedding": (262144, 2560),
        "decoder/per_layer_embedder/embed_tokens_per_layer": (262144, 10752),
        "decoder/layers_23/self_attention/key/kernel": (2560, 2, 512),
        "decoder/layers_24/self_attention/key/kernel": None,
        "decoder/layers_41/self_attention/out/kernel": (8, 512, 2560),
        "decoder/layers_41/mlp/wi_0/kernel": (2560, 10240),
        "decoder/layers_0/pre_self_attention_norm/scale": (2560,),
    },
    (A4B, False): {
        "decoder/layers_0/mlp/moe_block/MoeBlock_0/wi_0": (128, 2816, 704),
        "decoder/layers_0/mlp/moe_block/MoeBlock_0/wi_1": (128, 2816, 704),
        "decoder/layers_0/mlp/moe_block/MoeBlock_0/wo": (128, 704, 2816),
        "decoder/layers_0/mlp/moe_block/MoeBlock_0/gate/kernel": (2816, 128),
        "decoder/layers_0/mlp/moe_block/MoeBlock_0/per_expert_scale": (128,),
        "decoder/layers_0/mlp/moe_block/shared_experts/wi_0/kernel": (2816, 2112),
        "decoder/layers_0/mlp/moe_block/shared_experts/wo/kernel": (2112, 2816),
        "decoder/layers_0/mlp/wi_0/kernel": None,
        "decoder/layers_0/mlp/pre_forward_scale_2": (2816,),
        "decoder/layers_0/mlp/post_feedforward_layernorm_1/scale": (2816,),
        "decoder/layers_5/self_attention/key/kernel": (2816, 2, 512),
        "decoder/layers_5/self_attention/value/kernel": None,
        "decoder/layers_4/self_attention/value/kernel": (2816, 8, 256),
    },
    (A4B, True): {
        "token_embedder/embedding": (262144, 2816),
        "decoder/decoder_norm/scale": (2816,),
        LOCAL + "mlp/moe_block/MoeBlock_0/wi_0": (128, 5, 5, 2816, 704),
        LOCAL + "mlp/moe_block/MoeBlock_0/wo": (128, 5, 5, 704, 2816),
        LOCAL + "mlp/moe_block/MoeBlock_0/gate/kernel": (2816, 5, 5, 128),
        LOCAL + "mlp/moe_block/MoeBlock_0/per_expert_scale": (128, 5, 5),
        LOCAL + "mlp/moe_block/shared_experts/wi_1/kernel": (2816, 5, 5, 2112),
        LOCAL + "mlp/pre_forward_scale_2": (2816, 5, 5),
        LOCAL + "self_attention/query/kernel": (2816, 5, 5, 16, 256),
        LOCAL + "self_attention/value/kernel": (2816, 5, 5, 8, 256),
        LOCAL + "self_attention/out/kernel": (16, 5, 5, 256, 2816),
        LOCAL + "layer_scalar": (1, 5, 5),
        GLOBAL + "mlp/moe_block/MoeBlock_0/wi_1": (128, 5, 2816, 704),
        GLOBAL + "self_attention/query/kernel": (2816, 5, 16, 512),
        GLOBAL + "self_attention/key/kernel": (2816, 5, 2, 512),
        GLOBAL + "self_attention/value/kernel": None,
        GLOBAL + "self_attention/key_norm/scale": (512, 5),
        GLOBAL + "layer_scalar": (1, 5),
        "decoder/layers_0/layer_scalar": None,
        VISION + "layer_26/mlp/wo/kernel": (4304, 1152),
    },
    (DENSE, False): {
        "decoder/layers_59/self_attention/key/kernel": (5376, 4, 512),
        "decoder/layers_58/mlp/wi_1/kernel": (5376, 21504),
        VISION + "vision_entry/pos_emb_param": (10240, 2, 1152),
        VISION + "vision_entry/input_projection/kernel": (768, 1152),
        VISION + "std_scale": (1152,),
        VISION + "std_bias": (1152,),
        "vision_encoder/Gemma4VisionProjector_0/projection/kernel": (1152, 5376),
        VISION + "layer_26/attention/query/kernel": (1152, 16, 72),
        VISION + "layer_0/attention/value/kernel": (1152, 16, 72),
        VISION + "layer_0/attention/out/kernel": (16, 72, 1152),
        VISION + "layer_0/attention/key_norm/scale": (72,),
        VISION + "layer_0/mlp/wi_1/kernel": (1152, 4304),
        VISION + "layer_27/pre_ffw_norm/scale": None,
    },
    (DENSE, True): {
        LOCAL + "self_attention/query/kernel": (5376, 10, 5, 32, 256),
        LOCAL + "self_attention/key/kernel": (5376, 10, 5, 16, 256),
        LOCAL + "mlp/wi_1/kernel": (5376, 10, 5, 21504),
        LOCAL + "mlp/wo/kernel": (21504, 10, 5, 5376),
        LOCAL + "post_self_attention_norm/scale": (5376, 10, 5),
        GLOBAL + "self_attention/key/kernel": (5376, 10, 4, 512),
        GLOBAL + "self_attention/out/kernel": (32, 10, 512, 5376),
        GLOBAL + "pre_ffw_norm/scale": (5376, 10),
        VISION + "layer_0/pre_attention_norm/scale": (1152,),
    },
    (UNIFIED, False): {
        "token_embedder/embedding": (262144, 3840),
        "decoder/layers_47/self_attention/query/kernel": (3840, 16, 512),
        "decoder/layers_47/self_attention/key/kernel": (3840, 1, 512),
        "decoder/layers_47/self_attention/value/kernel": None,
        "decoder/layers_46/self_attention/value/kernel": (3840, 8, 256),
        "decoder/layers_46/mlp/wi_1/kernel": (3840, 15360),
        "decoder/layers_48/layer_scalar": None,
        "vision_encoder/Gemma4VisionProjector_0/projection/kernel": None,
    },
}


@pytest.mark.parametrize(
    ("layout", "framework"),
    [
        ("maxtext", "MaxText"),
        ("gemma-jax", "The gemma library"),
        ("fast-llm", "Fast-LLM"),
        ("tunix", "Tunix"),
    ],
)
@pytest.mark.parametrize("text", [False, True])
def test_the_embedders_of_12b_are_carried_with_a_reason(layout, framework, text):
    published = load_tensors(UNIFIED)
    why = f"{framework} has no place for the embedders of Gemma 4 12B"
    carried = make(UNIFIED, table=load_table(layout), text_only=text).carried
    assert carried == {name: why for name in published if ".language_model." not in name}
    assert len(carried) == 11


@pytest.mark.parametrize(("name", "scanned"), SHAPES)
def test_shapes_of_targets(name, scanned):
    targets = plan_of(name, scanned, False).targets
    for path, shape in SHAPES[name, scanned].items():
        if shape is None:
            assert P + path not in targets
        else:
            assert (path, targets[P + path].spec.shape) == (path, shape)


def one_copy(plan, source, place=0):
    return plan.sources["model.language_model." + source].copies[place]


@pytest.mark.parametrize(
    ("source", "target", "axes"),
    [
        ("layers.0.self_attn.q_proj.weight", "self_attention/query/kernel", (2, 0, 1)),
        ("layers.0.self_attn.k_proj.weight", "self_attention/key/kernel", (2, 0, 1)),
        ("layers.0.self_attn.v_proj.weight", "self_attention/value/kernel", (2, 0, 1)),
        ("layers.0.self_attn.o_proj.weight", "self_attention/out/kernel", (1, 2, 0)),
        ("layers.0.self_attn.q_norm.weight", "self_attention/query_norm/scale", (0,)),
        ("layers.0.self_attn.k_norm.weight", "self_attention/key_norm/scale", (0,)),
        ("layers.0.input_layernorm.weight", "pre_self_attention_norm/scale", (0,)),
        ("layers.0.post_attention_layernorm.weight", "post_self_attention_norm/scale", (0,)),
        ("layers.0.pre_feedforward_layernorm.weight", "pre_ffw_norm/scale", (0,)),
        ("layers.0.post_feedforward_layernorm.weight", "post_ffw_norm/scale", (0,)),
        ("layers.0.mlp.gate_proj.weight", "mlp/wi_0/kernel", (1, 0)),
        ("layers.0.mlp.up_proj.weight", "mlp/wi_1/kernel", (1, 0)),
        ("layers.0.mlp.down_proj.weight", "mlp/wo/kernel", (1, 0)),
        ("layers.0.per_layer_input_gate.weight", "per_layer_input_gate/kernel", (1, 0)),
        ("layers.0.per_layer_projection.weight", "per_layer_projection/kernel", (1, 0)),
        ("layers.0.layer_scalar", "layer_scalar", ()),
    ],
)
def test_where_the_tensors_of_a_layer_go(source, target, axes):
    copy = one_copy(plan_of(E2B, False, False), source)
    assert copy.target.tensor == f"{P}decoder/layers_0/{target}"
    assert (copy.permutation, copy.scale) == (axes, None)


@pytest.mark.parametrize(
    ("source", "target", "axes"),
    [
        ("mlp.gate_proj.weight", "moe_block/shared_experts/wi_0/kernel", (1, 0)),
        ("mlp.up_proj.weight", "moe_block/shared_experts/wi_1/kernel", (1, 0)),
        ("mlp.down_proj.weight", "moe_block/shared_experts/wo/kernel", (1, 0)),
        ("experts.down_proj", "moe_block/MoeBlock_0/wo", (0, 2, 1)),
        ("router.proj.weight", "moe_block/MoeBlock_0/gate/kernel", (1, 0)),
        ("router.per_expert_scale", "moe_block/MoeBlock_0/per_expert_scale", (0,)),
        ("router.scale", "pre_forward_scale_2", (0,)),
        ("pre_feedforward_layernorm_2.weight", "pre_feedforward_layernorm_2/scale", (0,)),
        ("post_feedforward_layernorm_1.weight", "post_feedforward_layernorm_1/scale", (0,)),
        ("post_feedforward_layernorm_2.weight", "post_feedforward_layernorm_2/scale", (0,)),
    ],
)
def test_where_the_tensors_of_a_mixture_of_experts_go(source, target, axes):
    copy = one_copy(plan_of(A4B, False, True), f"layers.3.{source}")
    assert copy.target.tensor == f"{P}decoder/layers_3/mlp/{target}"
    assert (copy.permutation, copy.scale) == (axes, None)


TOWER = "vision_tower."
BLOCK = "vision_tower.encoder.layers.2."


@pytest.mark.parametrize(
    ("source", "target", "axes"),
    [
        ("embed_vision.embedding_projection.weight",
         "vision_encoder/Gemma4VisionProjector_0/projection/kernel", (1, 0)),
        (TOWER + "patch_embedder.input_proj.weight",
         VISION + "vision_entry/input_projection/kernel", (1, 0)),
        (TOWER + "patch_embedder.position_embedding_table",
         VISION + "vision_entry/pos_emb_param", (1, 0, 2)),
        (TOWER + "std_scale", VISION + "std_scale", (0,)),
        (TOWER + "std_bias", VISION + "std_bias", (0,)),
        (BLOCK + "self_attn.q_proj.linear.weight", "attention/query/kernel", (2, 0, 1)),
        (BLOCK + "self_attn.k_proj.linear.weight", "attention/key/kernel", (2, 0, 1)),
        (BLOCK + "self_attn.v_proj.linear.weight", "attention/value/kernel", (2, 0, 1)),
        (BLOCK + "self_attn.o_proj.linear.weight", "attention/out/kernel", (1, 2, 0)),
        (BLOCK + "self_attn.q_norm.weight", "attention/query_norm/scale", (0,)),
        (BLOCK + "self_attn.k_norm.weight", "attention/key_norm/scale", (0,)),
        (BLOCK + "input_layernorm.weight", "pre_attention_norm/scale", (0,)),
        (BLOCK + "post_attention_layernorm.weight", "post_attention_norm/scale", (0,)),
        (BLOCK + "pre_feedforward_layernorm.weight", "pre_ffw_norm/scale", (0,)),
        (BLOCK + "post_feedforward_layernorm.weight", "post_ffw_norm/scale", (0,)),
        (BLOCK + "mlp.gate_proj.linear.weight", "mlp/wi_0/kernel", (1, 0)),
        (BLOCK + "mlp.up_proj.linear.weight", "mlp/wi_1/kernel", (1, 0)),
        (BLOCK + "mlp.down_proj.linear.weight", "mlp/wo/kernel", (1, 0)),
    ],
)  # fmt: skip
def test_where_the_tensors_of_the_vision_tower_go(source, target, axes):
    (copy,) = plan_of(DENSE, True, False).sources["model." + source].copies
    path = f"{VISION}layer_2/{target}" if source.startswith(BLOCK) else target
    assert (copy.target.tensor, copy.permutation) == (P + path, axes)


def test_fused_experts_are_split_gate_first():
    source = plan_of(A4B, False, True).sources[f"{LAYERS}3.experts.gate_up_proj"]
    folder = f"{P}decoder/layers_3/mlp/moe_block/MoeBlock_0/"
    assert [copy.target.tensor for copy in source.copies] == [folder + "wi_0", folder + "wi_1"]
    boxes = [copy.source.box({}) for copy in source.copies]
    assert boxes == [
        ((0, 128), (0, 704), (0, 2816)),
        ((0, 128), (704, 704), (0, 2816)),
    ]
    assert [copy.permutation for copy in source.copies] == [(0, 2, 1)] * 2


def words(region):
    return [[extent.axis for extent in dim] for dim in region.dims]


def test_per_layer_embeddings_stay_in_order_of_layers():
    plan = plan_of(E2B, False, False)
    copy = one_copy(plan, "per_layer_model_projection.weight")
    assert words(copy.source) == [["layers", "ple"], ["embed"]]
    assert words(copy.target) == [["embed"], ["layers", "ple"]]
    assert copy.permutation == (2, 0, 1)
    copy = one_copy(plan, "embed_tokens_per_layer.weight")
    assert words(copy.source) == words(copy.target) == [["ple_vocab"], ["layers", "ple"]]
    assert (copy.permutation, copy.scale) == ((0, 1, 2), None)


@pytest.mark.parametrize(
    ("layer", "path", "box"),
    [
        (0, LOCAL, ((0, 21504), (0, 1), (0, 1), (0, 5376))),
        (4, LOCAL, ((0, 21504), (0, 1), (4, 1), (0, 5376))),
        (5, GLOBAL, ((0, 21504), (0, 1), (0, 5376))),
        (6, LOCAL, ((0, 21504), (1, 1), (0, 1), (0, 5376))),
        (27, LOCAL, ((0, 21504), (4, 1), (3, 1), (0, 5376))),
        (29, GLOBAL, ((0, 21504), (4, 1), (0, 5376))),
        (58, LOCAL, ((0, 21504), (9, 1), (4, 1), (0, 5376))),
        (59, GLOBAL, ((0, 21504), (9, 1), (0, 5376))),
    ],
)
def test_where_a_layer_stands_in_a_scan(layer, path, box):
    copy = one_copy(plan_of(DENSE, True, True), f"layers.{layer}.mlp.down_proj.weight")
    assert copy.target.tensor == f"{P}{path}mlp/wo/kernel"
    assert copy.target.box({}) == box


@pytest.mark.parametrize("name", PUBLISHED)
def test_only_the_embedding_is_scaled(name):
    plan = plan_of(name, False, False)
    scaled = {copy.target.tensor: copy.scale for copy in plan.copies if copy.scale is not None}
    width = {E2B: 1536, E4B: 2560, A4B: 2816, DENSE: 5376, UNIFIED: 3840}[name]
    assert scaled == {P + "token_embedder/embedding": math.sqrt(width)}
    assert plan.targets[P + "token_embedder/embedding"].scale == math.sqrt(width)


@pytest.mark.parametrize(
    ("dtype", "scaled", "kernels", "embedding"),
    [
        ("keep", "float32", "bfloat16", "float32"),
        ("keep", "bfloat16", "bfloat16", "bfloat16"),
        ("float32", "float32", "float32", "float32"),
        ("float32", "bfloat16", "float32", "bfloat16"),
        ("bfloat16", "float32", "bfloat16", "float32"),
    ],
)
@pytest.mark.parametrize("scanned", [False, True])
def test_dtypes_of_targets(dtype, scaled, kernels, embedding, scanned):
    plan = make(A4B, policy=DTypePolicy(dtype, scaled), scanned=scanned)
    dtypes = {name: target.spec.dtype for name, target in plan.targets.items()}
    assert dtypes.pop(P + "token_embedder/embedding") == embedding
    assert set(dtypes.values()) == {kernels}
    assert max(math.prod(t.chunk) * t.spec.itemsize for t in plan.targets.values()) <= 64 << 20
    sizes = {"bfloat16": 2, "float32": 4}
    table = 262144 * 2816
    others = plan.source_bytes // 2 - table
    assert plan.target_bytes == table * sizes[embedding] + others * sizes[kernels]


def with_dtype(source, dtype, *names):
    return source | {name: TensorSpec(dtype, source[name].shape) for name in names}


def test_a_stack_takes_the_widest_dtype_of_its_layers():
    name = f"{LAYERS}7.mlp.up_proj.weight"
    source = with_dtype(load_tensors(DENSE), "float32", name)
    stacked = make(DENSE, source, scanned=True).targets
    assert stacked[f"{P}{LOCAL}mlp/wi_1/kernel"].spec.dtype == "float32"
    assert stacked[f"{P}{LOCAL}mlp/wi_0/kernel"].spec.dtype == "bfloat16"
    assert stacked[f"{P}{GLOBAL}mlp/wi_1/kernel"].spec.dtype == "bfloat16"
    apart = make(DENSE, source).targets
    assert apart[f"{P}decoder/layers_7/mlp/wi_1/kernel"].spec.dtype == "float32"
    assert apart[f"{P}decoder/layers_8/mlp/wi_1/kernel"].spec.dtype == "bfloat16"
    half = make(DENSE, with_dtype(load_tensors(DENSE), "float16", name), scanned=True).targets
    assert half[f"{P}{LOCAL}mlp/wi_1/kernel"].spec.dtype == "float32"


def test_blocks_of_a_stack_of_several_dtypes_are_whole_chunks():
    name = f"{LAYERS}0.experts.gate_up_proj"
    source = with_dtype(load_tensors(A4B), "float32", name)
    plan = make(A4B, source, policy=DTypePolicy("bfloat16"), scanned=True)
    for tensor in plan.sources.values():
        for ranges in blocks(tensor.region, tensor.steps):
            for copy in tensor.copies:
                target = plan.targets[copy.target.tensor]
                if copy.source.meets(ranges) and target.spec.nbytes > GATHER_BYTES:
                    assert_whole_chunks(copy.target.box(ranges), target)


def lean(name):
    """The tensor list as `save_pretrained` writes it: nothing for KV-shared layers."""
    listed = huggingface_tensors(load_architecture(name), kv_leftovers=False)
    return {tensor: TensorSpec("bfloat16", shape) for tensor, shape in listed.items()}


@pytest.mark.parametrize(("name", "fewer"), [(E2B, 60), (E4B, 54), (A4B, 0)])
def test_the_form_without_leftovers_gives_the_same_targets(name, fewer):
    plan, whole = make(name, lean(name)), plan_of(name, False, False)
    assert plan.targets == whole.targets
    assert len(whole.carried) - len(plan.carried) == fewer


@pytest.mark.parametrize("name", [E2B, A4B])
def test_a_text_only_checkpoint_gives_the_same_targets(name):
    model = parse_architecture(text_only(load_config(name)), WHERE)
    source = {
        tensor.replace("model.language_model.", "model."): spec
        for tensor, spec in load_tensors(name).items()
        if tensor.startswith("model.language_model.")
    }
    source["lm_head.weight"] = source["model.embed_tokens.weight"]
    plan = plan_to_native(model, load_table("maxtext"), source, DTypePolicy())
    assert plan.targets == plan_of(name, False, True).targets
    assert plan.tied == {"lm_head.weight": "model.embed_tokens.weight"}


def test_a_tied_head_is_neither_converted_nor_carried():
    source = load_tensors(DENSE)
    source["lm_head.weight"] = TensorSpec("bfloat16", (262144, 5376))
    plan = make(DENSE, source)
    assert plan.tied == {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    assert plan.targets == plan_of(DENSE, False, False).targets


def test_why_tensors_are_carried():
    carried = plan_of(E2B, False, False).carried
    assert carried[f"{LAYERS}15.self_attn.v_proj.weight"] == (
        "nothing reads the keys and values of KV-shared layers"
    )
    assert carried["model.embed_vision.embedding_projection.weight"] == (
        "MaxText has no vision tower for E2B and E4B"
    )
    assert carried["model.audio_tower.output_proj.bias"] == "MaxText has no audio tower"
    towers = plan_of(DENSE, False, True).carried
    assert set(towers.values()) == {"the towers are carried on request (--text-only)"}
    assert all("vision" in tensor for tensor in towers)


def refused(name, source, **options):
    with pytest.raises(SourceError) as caught:
        make(name, source, where="checkpoints/mine", **options)
    assert caught.value.exit_code == 3
    return caught.value


def test_a_missing_tensor():
    source = load_tensors(E2B)
    del source["model.language_model.norm.weight"]
    error = refused(E2B, source)
    assert error.what == "The checkpoint lacks 1 tensor."
    assert error.expected == "model.language_model.norm.weight [1536]"
    assert error.where == "checkpoints/mine"


def test_many_missing_tensors_are_counted_and_five_are_named():
    source = {name: spec for name, spec in load_tensors(A4B).items() if ".layers.29." not in name}
    error = refused(A4B, source)
    assert error.what == "The checkpoint lacks 21 tensors."
    assert error.expected.endswith(", and 16 more")
    assert error.expected.count("layers.29.") == 5


def test_a_tower_that_is_missing_is_not_overlooked():
    source = {name: spec for name, spec in load_tensors(E2B).items() if "audio" not in name}
    assert refused(E2B, source).what == "The checkpoint lacks 752 tensors."
    assert refused(E2B, source, text_only=True).what.startswith("The checkpoint lacks 752 tensors")


def test_an_unexpected_tensor():
    source = load_tensors(DENSE)
    source[f"{LAYERS}5.self_attn.v_proj.weight"] = TensorSpec("bfloat16", (2048, 5376))
    source["surprise"] = TensorSpec("int64", (3, 4))
    error = refused(DENSE, source)
    assert error.what.startswith("The checkpoint has 2 tensors")
    assert error.what.endswith("config.json does not account for.")
    assert error.found == f"{LAYERS}5.self_attn.v_proj.weight [2048, 5376], surprise [3, 4]"


def test_leftovers_of_layers_that_do_not_exist_are_unexpected():
    source = load_tensors(E2B)
    source[f"{LAYERS}35.self_attn.k_proj.weight"] = TensorSpec("bfloat16", (256, 1536))
    assert "config.json does not account for" in refused(E2B, source).what


@pytest.mark.parametrize("shape", [(1536, 1536), (2048,), (1536, 2048), (2048, 1536, 1), ()])
def test_a_wrong_shape(shape):
    name = f"{LAYERS}0.self_attn.q_proj.weight"
    error = refused(E2B, load_tensors(E2B) | {name: TensorSpec("bfloat16", shape)})
    assert error.what.startswith("The checkpoint has 1 tensor")
    assert "a shape that config.json does not ask for" in error.what
    assert error.where == f"checkpoints/mine, tensor {name}"
    assert (error.expected, error.found) == ("[2048, 1536]", str(list(shape)))


def test_a_wrong_shape_of_a_tensor_that_is_carried():
    name = f"{LAYERS}20.self_attn.k_proj.weight"
    source = load_tensors(E2B) | {name: TensorSpec("bfloat16", (256, 1537))}
    assert refused(E2B, source).where == f"checkpoints/mine, tensor {name}"


@pytest.mark.parametrize(
    "suffix", ["weight_scale", "weight_scale_inv", "scales", "biases", "weight_packed", "qweight"]
)
def test_a_quantized_export(suffix):
    name = f"{LAYERS}0.mlp.up_proj.{suffix}"
    error = refused(E2B, load_tensors(E2B) | {name: TensorSpec("uint8", (6144, 1))})
    assert error.what.startswith("This is a quantized export")
    assert error.found == name


@pytest.mark.parametrize("word", ["k_proj", "v_proj"])
def test_half_of_a_group_of_leftovers(word):
    name = f"{LAYERS}20.self_attn.{word}.weight"
    source = load_tensors(E2B)
    del source[name]
    error = refused(E2B, source)
    assert error.what == "Some of the tensors that belong together are missing."
    assert name in error.expected
    assert name not in error.found
    source = lean(E2B) | {name: load_tensors(E2B)[name]}
    assert refused(E2B, source).found == name


def test_leftovers_of_some_layers_only():
    source = load_tensors(E2B)
    for word in ("k_proj", "v_proj", "k_norm"):
        del source[f"{LAYERS}20.self_attn.{word}.weight"]
    assert len(make(E2B, source).carried) == 1468
    source[f"{LAYERS}20.self_attn.k_norm.weight"] = TensorSpec("bfloat16", (256,))
    assert "belong together" in refused(E2B, source).what


@pytest.mark.parametrize("dtype", ["float64", "bool"])
def test_a_dtype_that_is_not_converted(dtype):
    name = "model.language_model.norm.weight"
    error = refused(E2B, with_dtype(load_tensors(E2B), dtype, name))
    assert error.what == "A weight has a dtype that gemma-convert does not convert."
    assert (error.expected, error.found) == ("bfloat16, float16, float32", dtype)


def test_a_dtype_that_is_not_converted_names_the_tensor():
    name = "model.language_model.norm.weight"
    assert name in refused(E2B, with_dtype(load_tensors(E2B), "float64", name)).where


@pytest.mark.parametrize("name", [E2B, E4B])
def test_models_that_are_not_scanned(name):
    with pytest.raises(UsageError, match="MaxText scans no model with per-layer embeddings"):
        make(name, scanned=True)


@pytest.mark.parametrize("layers", [10, 17, 31])
def test_a_depth_of_no_whole_blocks_is_not_scanned(layers):
    model = parse_architecture(without_layers(load_config(DENSE), layers), WHERE)
    with pytest.raises(UsageError, match="multiple of the scanned block") as caught:
        plan_to_native(model, load_table("maxtext"), {}, DTypePolicy(), scanned=True)
    assert caught.value.found == f"{layers} layers"
    assert "--no-scan-layers" in caught.value.do


def faulty(name, *changes, inventory=None, scanned=False):
    """The error of a plan with a table in which some rows are changed."""
    data = maxtext_data()
    for change in changes:
        change(data)
    table = read_maxtext(data, inventory)
    with pytest.raises(MappingError) as caught:
        make(name, table=table, scanned=scanned)
    return caught.value


def native(hf, path, place=0):
    return lambda data: maxtext_row(data, hf, place).update(native=path)


def where_of(hf):
    """The place in the file of a row, as messages name it."""
    for number, section in enumerate(maxtext_data()["section"], 1):
        for place, row in enumerate(section["rows"], 1):
            if row["hf"] == hf:
                return f"maxtext.toml, section {number}, row {place}"
    raise AssertionError(hf)


def test_two_rows_that_write_the_same_target():
    error = faulty(E2B, native("post_attention_layernorm.weight", "pre_ffw_norm/scale [embed]"))
    assert error.what == "Two copies write the same part of a target."
    assert where_of("post_attention_layernorm.weight") in error.where
    assert where_of("pre_feedforward_layernorm.weight") in error.where
    assert "layers_0/pre_ffw_norm/scale" in error.found
    assert "layers.0.post_attention_layernorm.weight" in error.found


def scalar_copy(row):
    return RegionCopy(row, Region(f"from {row}", ()), Region("bound", ()), None)


def test_two_rows_that_write_the_same_scalar():
    """A target of one element has no dimension in which its copies could be apart."""
    check_targets([scalar_copy("row 1")], {"bound": ()})
    with pytest.raises(MappingError, match="write the same part") as caught:
        check_targets([scalar_copy("row 1"), scalar_copy("row 2")], {"bound": ()})
    assert caught.value.where == "row 1 and row 2"
    assert caught.value.found == "bound, from from row 1 and from row 2"


def piece(row, *box):
    """A copy into a box of a target, one axis for each dimension, cut out of a longer one."""
    dims = tuple(
        tuple(
            Extent(axis, size, at)
            for axis, size, at in ((f"outer{place}", 12 // length, start // length),
                                   (f"inner{place}", length, None))
        )
        for place, (start, length) in enumerate(box)
    )  # fmt: skip
    return RegionCopy(row, Region(f"from {row}", dims), Region("target", dims), None)


@pytest.mark.parametrize(
    ("boxes", "what"),
    [
        ([((0, 12), (0, 6)), ((0, 12), (6, 6))], None),
        ([((0, 12), (0, 6)), ((0, 6), (6, 6)), ((6, 6), (6, 6))], None),
        ([((0, 12), (0, 6)), ((0, 12), (0, 6))], "write the same part"),
        ([((0, 12), (0, 6)), ((6, 6), (0, 12))], "write the same part"),
        ([((0, 12), (0, 12)), ((8, 4), (9, 3))], "write the same part"),
        ([((0, 12), (0, 6))], "leave a hole"),
        ([((0, 12), (0, 6)), ((0, 6), (6, 6))], "leave a hole"),
    ],
)
@pytest.mark.parametrize("backwards", [False, True])
def test_boxes_of_copies(boxes, what, backwards):
    copies = [piece(f"row {number}", *box) for number, box in enumerate(boxes)]
    copies = copies[::-1] if backwards else copies
    if what is None:
        check_targets(copies, {"target": (12, 12)})
        return
    with pytest.raises(MappingError, match=what) as caught:
        check_targets(copies, {"target": (12, 12)})
    assert all(copy.row in caught.value.where for copy in copies[: len(boxes)])


@pytest.mark.parametrize("scanned", [False, True])
def test_layers_that_are_written_over_each_other(scanned):
    """Every layer of two rows at its place in one array: each place is taken twice."""
    stack = [
        lambda data: data["section"][1]["rows"].remove(maxtext_row(data, "input_layernorm.weight")),
        lambda data: data["section"][1]["rows"].remove(
            maxtext_row(data, "post_attention_layernorm.weight")
        ),
        lambda data: data["section"].append(
            {
                "hf": "model.language_model.layers.{layer}.",
                "native": P,
                "rows": [
                    {"hf": "input_layernorm.weight", "native": "all [layers embed]"},
                    {"hf": "post_attention_layernorm.weight", "native": "all [layers embed]"},
                ],
            }
        ),
    ]
    error = faulty(DENSE, *stack, scanned=scanned)
    assert error.what == "Two copies write the same part of a target."
    assert error.where == f"{appended(1)} and {appended(2)}"


def appended(row):
    """The place of a row in a section behind all others."""
    return f"maxtext.toml, section {len(maxtext_data()['section']) + 1}, row {row}"


def apart(hf, rows):
    """Takes a row out of the layers, and puts rows for it in a section of its own."""

    def change(data):
        data["section"][1]["rows"].remove(maxtext_row(data, hf))
        data["section"].append(
            {"hf": "model.language_model.layers.{layer}.", "native": P, "rows": rows}
        )

    return change


def test_a_hole():
    rows = [
        {"hf": "input_layernorm.weight", "native": "some [layers embed]", "when": "sliding"},
        {"hf": "input_layernorm.weight", "native": "others/{layer} [embed]", "when": "!sliding"},
    ]
    error = faulty(E2B, apart("input_layernorm.weight", rows))
    assert error.what == "The copies leave a hole in a target."
    assert error.where == appended(1)
    assert error.expected == f"{P}some [35, 1536], {35 * 1536} elements"
    assert error.found == f"{28 * 1536} elements covered"


def test_layers_of_different_shapes_in_one_array():
    rows = [{"hf": "self_attn.q_norm.weight", "native": "all [layers head_dim]"}]
    error = faulty(E2B, apart("self_attn.q_norm.weight", rows))
    assert error.what == "Two copies disagree about the shape of their target."
    assert error.where == appended(1)
    assert (error.expected, error.found) == ("(35, 256)", f"{P}all (35, 512)")


def test_layers_that_are_interleaved_in_one_array():
    rows = [{"hf": "input_layernorm.weight", "native": "all [(embed layers)]"}]
    error = faulty(E2B, apart("input_layernorm.weight", rows))
    assert error.where == appended(1)


def test_a_part_of_a_source_that_is_no_box():
    data = huggingface_data()
    huggingface_row(data, "experts.gate_up_proj")["name"] = (
        "experts.gate_up_proj [experts (expert_mlp gate_up) embed]"
    )
    error = faulty(A4B, inventory=read_huggingface(data))
    assert error.what == "The parts of a tensor are not boxes of its target."
    assert error.where == where_of("experts.gate_up_proj")


def test_a_target_in_which_blocks_would_be_no_boxes():
    path = "mlp/wi_{gate_up}/kernel [(embed mlp)]"
    error = faulty(DENSE, native("mlp.{gate_up}_proj.weight", path))
    assert error.what == "The parts of a tensor are not boxes of its target."
    assert error.where == where_of("mlp.{gate_up}_proj.weight")
    assert error.found == "embed mlp"


def test_two_rows_that_convert_the_same_tensor():
    def again(data):
        data["section"][1]["rows"].append({"hf": "layer_scalar", "native": "again [1]"})

    error = faulty(E2B, again)
    count = len(maxtext_data()["section"][1]["rows"]) + 1
    assert error.what == "Two rows convert the same tensor."
    assert error.where == f"{where_of('layer_scalar')} and maxtext.toml, section 2, row {count}"
    assert error.found == f"{LAYERS}0.layer_scalar"


def test_a_tensor_that_no_row_takes():
    error = faulty(E2B, lambda data: maxtext_row(data, "layer_scalar").update(when="sliding"))
    assert error.what.startswith("No row converts this tensor")
    assert error.found in {f"{LAYERS}{full}.layer_scalar" for full in range(4, 35, 5)}

    def of_towers(data):
        rows = [row for row in data["carried"] if row["hf"] == "model.vision_tower.*"]
        next(row for row in rows if row["when"] == "ple")["when"] = "moe"

    error = faulty(E2B, of_towers)
    assert error.found.startswith("model.vision_tower.")


def test_a_scale_by_an_axis_without_a_size():
    error = faulty(E2B, lambda data: maxtext_row(data, "norm.weight").update(scale="head_dim"))
    assert error.what == "The axis `head_dim` has no size here."
    assert error.where == where_of("norm.weight")


def test_a_tied_row_that_names_nothing():
    data = huggingface_data()
    huggingface_row(data, "lm_head")["tied"] = "model.embed.weight"
    table = read_maxtext(maxtext_data(), read_huggingface(data))
    source = load_tensors(E2B) | {"lm_head.weight": TensorSpec("bfloat16", (262144, 1536))}
    with pytest.raises(MappingError, match="`tied` names no row") as caught:
        make(E2B, source, table=table)
    assert caught.value.where == "huggingface.toml, section 3, row 1"


# The gemma library and Fast-LLM.

# layout, name, source tensors, arrays, tensors that another stands for, carried
OTHER_PLANS = [
    ("gemma-jax", E2B, 2011, 1316, 128, 0),
    ("gemma-jax", E4B, 2130, 1421, 128, 0),
    ("gemma-jax", A4B, 1013, 618, 0, 0),
    ("gemma-jax", DENSE, 1188, 738, 0, 0),
    ("gemma-jax", UNIFIED, 677, 578, 0, 11),
    ("fast-llm", A4B, 1013, 602, 0, 356),
    ("fast-llm", DENSE, 1188, 722, 0, 356),
    ("fast-llm", UNIFIED, 677, 578, 0, 11),
    ("tunix", E2B, 2011, 565, 0, 1411),
    ("tunix", E4B, 2130, 677, 0, 1411),
    ("tunix", A4B, 1013, 632, 0, 356),
    ("tunix", DENSE, 1188, 782, 0, 356),
    ("tunix", UNIFIED, 677, 626, 0, 11),
]
OTHERS = pytest.mark.parametrize(("layout", "name"), [plan[:2] for plan in OTHER_PLANS])


@cache
def plan_for(layout, name):
    return make(name, table=load_table(layout))


@pytest.mark.parametrize(("layout", "name", "tensors", "arrays", "shared", "carried"), OTHER_PLANS)
def test_counts_of_other_layouts(layout, name, tensors, arrays, shared, carried):
    plan, published = plan_for(layout, name), load_tensors(name)
    assert len(published) == tensors
    assert len(plan.targets) == arrays
    assert (len(plan.shared), len(plan.carried), plan.filled) == (shared, carried, {})
    assert len(plan.sources) == tensors - shared - carried
    fates = [*plan.sources, *plan.carried, *plan.shared]
    assert len(fates) == len(set(fates))
    assert set(fates) == set(published)
    assert plan.equal == plan.shared
    assert all(copy.scale is None for copy in plan.copies)
    assert plan.source_bytes == 2 * sum(target.spec.size for target in plan.targets.values())
    assert (plan.layout, plan.scanned, plan.tied) == (layout, False, {})


@OTHERS
def test_both_sides_of_other_layouts_are_covered_once(layout, name):
    plan, published = plan_for(layout, name), load_tensors(name)
    into = defaultdict(list)
    for tensor, source in plan.sources.items():
        assert source.region.shape == source.spec.shape == published[tensor].shape
        assert_covered([copy.source for copy in source.copies], source.spec.shape)
        for copy in source.copies:
            into[copy.target.tensor].append(copy.target)
    assert into.keys() == plan.targets.keys()
    for target, regions in into.items():
        assert_covered(regions, plan.targets[target].spec.shape)


@OTHERS
def test_blocks_of_other_layouts_are_whole_chunks_of_bounded_size(layout, name):
    plan = plan_for(layout, name)
    for target in plan.targets.values():
        assert math.prod(target.chunk) * target.spec.itemsize <= BLOCK_BYTES
        assert len(target.chunk) == len(target.spec.shape)
    for source in plan.sources.values():
        for ranges in blocks(source.region, source.steps):
            for copy in source.copies:
                target = plan.targets[copy.target.tensor]
                if copy.source.meets(ranges) and target.spec.nbytes > GATHER_BYTES:
                    assert_whole_chunks(copy.target.box(ranges), target)


OTHER_SHAPES = {
    ("gemma-jax", E2B): {
        "embedder/input_embedding": (262144, 1536),
        "embedder/per_layer_embeddings": (262144, 35, 256),
        "embedder/per_layer_model_projection/w": (1536, 35, 256),
        "layer_0/attn/q_einsum/w": (8, 1536, 256),
        "layer_4/attn/kv_einsum/w": (2, 1, 1536, 512),
        "layer_34/attn/kv_einsum/w": (2, 1, 1536, 512),
        "layer_34/attn/attn_vec_einsum/w": (8, 512, 1536),
        "layer_14/mlp/gating_einsum/w": (2, 6144, 1536),
        "layer_15/mlp/gating_einsum/w": (2, 12288, 1536),
        "layer_15/mlp/linear/w": (12288, 1536),
        "layer_0/skip_scale": (1,),
        "vision_encoder/entry/pos_emb": (10240, 2, 768),
        "vision_encoder/standardize/scale": None,
        "vision_encoder/transformer/stacked_layers/block/attn/kv_einsum/w": (16, 2, 12, 768, 64),
        "vision_encoder/transformer/stacked_layers/block/attn/kv_einsum/clip_input_max": (16,),
        "audio_encoder/'conformer/stacked_layers_11'/lconv/depthwise_conv1d/kernel": (5, 1, 1024),
        "audio_encoder/'conformer/stacked_layers_0'/trans_atten/post/kernel": (8, 128, 1024),
        "audio_encoder/'conformer/stacked_layers_0'/trans_atten/post/clip_input_min": (),
        "audio_encoder/feature/input_proj/kernel": (32, 32, 1024),
        "audio_encoder/feature/subsampling_1/kernel": (3, 3, 128, 32),
    },
    ("gemma-jax", A4B): {
        "layer_0/mlp/gating_einsum/w": (128, 2, 704, 2816),
        "layer_0/mlp/linear/w": (128, 704, 2816),
        "layer_0/mlp/router_logits/w": (2816, 128),
        "layer_0/mlp2/gating_einsum/w": (2, 2112, 2816),
        "layer_4/attn/kv_einsum/w": (2, 8, 2816, 256),
        "layer_5/attn/k_einsum/w": (2, 2816, 512),
        "layer_5/attn/kv_einsum/w": None,
        "vision_encoder/standardize/scale": (1152,),
        "vision_encoder/transformer/stacked_layers/block/mlp/linear/w": (27, 4304, 1152),
    },
    ("gemma-jax", UNIFIED): {
        "layer_0/attn/kv_einsum/w": (2, 8, 3840, 256),
        "layer_47/attn/k_einsum/w": (1, 3840, 512),
        "layer_47/attn/kv_einsum/w": None,
        "layer_47/mlp/linear/w": (15360, 3840),
        "embedder/mm_input_projection/w": None,
        "embedder/audio_input_projection/w": None,
    },
    ("tunix", E2B): {
        "embedder/input_embedding/value": (262144, 1536),
        "embedder/per_layer_input_embedding/value": (262144, 35, 256),
        "embedder/per_layer_model_projection/w/value": (1536, 35, 256),
        "layers/4/attn/kv_einsum/w/value": (2, 1, 1536, 512),
        "layers/34/attn/kv_einsum/w/value": (2, 1, 1536, 512),
        "layers/34/attn/attn_vec_einsum/w/value": (8, 512, 1536),
        "layers/14/mlp/gate_proj/kernel/value": (1536, 6144),
        "layers/15/mlp/up_proj/kernel/value": (1536, 12288),
        "layers/15/mlp/down_proj/kernel/value": (12288, 1536),
        "layers/0/skip_scale/value": (1,),
        "layers/35/skip_scale/value": None,
    },
    ("tunix", A4B): {
        "layers/0/moe/gating_einsum/value": (128, 2, 704, 2816),
        "layers/0/moe/linear/value": (128, 704, 2816),
        "layers/0/moe/router_logits/value": (2816, 128),
        "layers/0/mlp/gate_proj/kernel/value": (2816, 2112),
        "layers/4/attn/kv_einsum/w/value": (2, 8, 2816, 256),
        "layers/5/attn/k_einsum/w/value": (2, 2816, 512),
        "layers/5/attn/kv_einsum/w/value": None,
    },
    ("fast-llm", UNIFIED): {
        "decoder.47.mixer.key_value.weight/weights": (512, 3840),
        "decoder.46.mixer.key_value.weight/weights": (2 * 8 * 256, 3840),
        "decoder.0.mlp.layer_1.weight/weights": (2 * 15360, 3840),
    },
    ("fast-llm", A4B): {
        "decoder.0.mlp.routed.layer_1.weight/weights": (128 * 2 * 704, 2816),
        "decoder.0.mlp.routed.layer_2.weight/weights": (128 * 704, 2816),
        "decoder.0.mlp.dense.layer_1.weight/weights": (2 * 2112, 2816),
        "decoder.4.mixer.key_value.weight/weights": (2 * 8 * 256, 2816),
        "decoder.5.mixer.key_value.weight/weights": (2 * 512, 2816),
        "decoder.0.norm_2.weight/weights": None,
    },
    ("fast-llm", DENSE): {
        "embeddings.word_embeddings_weight/weights": (262144, 5376),
        "decoder.59.mlp.layer_1.weight/weights": (2 * 21504, 5376),
        "decoder.59.mlp.layer_2.weight/weights": (21504, 5376),
        "decoder.59.mixer.query.weight/weights": (32 * 512, 5376),
        "decoder.59.mixer.dense.weight/weights": (5376, 32 * 512),
        "decoder.0.output_scale/weights": (1,),
    },
}


@pytest.mark.parametrize(("layout", "name"), OTHER_SHAPES)
def test_shapes_of_other_layouts(layout, name):
    targets = plan_for(layout, name).targets
    for path, shape in OTHER_SHAPES[layout, name].items():
        if shape is None:
            assert path not in targets
        else:
            assert (path, targets[path].spec.shape) == (path, shape)


@pytest.mark.parametrize("name", [E2B, E4B])
def test_what_save_pretrained_leaves_out_is_filled_in(name):
    plan, whole = make(name, lean(name), table=load_table("gemma-jax")), plan_for("gemma-jax", name)
    assert {t: target.spec for t, target in plan.targets.items()} == {
        t: target.spec for t, target in whole.targets.items()
    }
    owners = [layer.owns_kv for layer in load_architecture(name).text.layers]
    expected = {
        f"layer_{index}/attn/{array}": value
        for index, owns in enumerate(owners)
        for array, value in (("kv_einsum/w", 0), ("key_norm/scale", 1))
        if not owns
    }
    assert {target: planned.fill for target, planned in plan.filled.items()} == expected
    assert all(planned.scale is None for planned in plan.filled.values())
    for planned in plan.filled.values():
        assert math.prod(planned.chunk) * planned.spec.itemsize <= BLOCK_BYTES


@pytest.mark.parametrize(("dtype", "stored"), [("keep", "float16"), ("bfloat16", "bfloat16")])
def test_what_is_filled_in_has_the_usual_dtype(dtype, stored):
    source = with_dtype(lean(E4B), "float16", *lean(E4B))
    source = with_dtype(source, "float32", "model.language_model.norm.weight")
    policy = DTypePolicy(dtype, "float32")
    plan = make(E4B, source, table=load_table("gemma-jax"), policy=policy)
    assert {target.spec.dtype for target in plan.filled.values()} == {stored}


def test_text_only_plans_fill_in_nothing_of_the_towers():
    plan = make(E2B, lean(E2B), table=load_table("gemma-jax"), text_only=True)
    assert not [name for name in plan.targets if name.startswith(("vision_", "audio_"))]
    assert len(plan.filled) == 40
    assert plan.shared == {}
    assert {plan.carried[name] for name in plan.carried} == {
        "the towers are carried on request (--text-only)"
    }
    assert len(plan.carried) == 2011 - 600


def test_which_bounds_stand_for_which():
    shared = plan_for("gemma-jax", E2B).shared
    layers = "model.vision_tower.encoder.layers."
    assert shared[f"{layers}15.self_attn.v_proj.output_min"] == (
        f"{layers}15.self_attn.k_proj.output_min"
    )
    assert shared[f"{layers}0.mlp.up_proj.input_max"] == f"{layers}0.mlp.gate_proj.input_max"
    assert all(name.startswith(layers) for name in shared)


def other_refusal(layout, config, **options):
    model = parse_architecture(config, WHERE)
    with pytest.raises(UsageError) as caught:
        plan_to_native(model, load_table(layout), {}, DTypePolicy(), where="here", **options)
    return caught.value


@pytest.mark.parametrize(("name", "tensors"), [(E2B, 108), (E4B, 129)])
def test_models_that_fast_llm_cannot_hold(name, tensors):
    error = other_refusal("fast-llm", load_config(name))
    assert error.what.startswith("Fast-LLM has no per-layer embeddings; Fast-LLM has no layers")
    assert ("one width of the feed-forward" in error.what) == (name == E2B)
    assert f"no place for {tensors} tensors: model.language_model.embed_tokens_per" in error.found
    assert (error.where, error.exit_code) == ("here", 2)
    assert error.expected == "a model that fast-llm can hold"


def test_keys_and_values_that_stem_from_elsewhere():
    config = load_config(E4B)
    config["text_config"]["num_kv_shared_layers"] += 1
    error = other_refusal("gemma-jax", config)
    assert "shared keys and values from the last two layers that own them" in error.what
    assert error.found == "e4b"


@pytest.mark.parametrize("layout", ["gemma-jax", "fast-llm"])
def test_other_layouts_have_no_scanned_form(layout):
    error = other_refusal(layout, load_config(DENSE), scanned=True)
    assert error.what == f"The layout {layout} has no scanned form."


def test_an_optional_tensor_that_is_not_filled_in_leaves_no_hole():
    """Without `fill` the array of a layer is not written; nothing else changes."""
    data = native_data("gemma-jax")
    for hf in ("self_attn.{kv}_proj.weight", "self_attn.k_proj.weight", "self_attn.k_norm.weight"):
        del native_row(data, hf)[1]["fill"]
    plan = make(E2B, lean(E2B), table=read_native(data, "gemma-jax"))
    assert plan.filled == {}
    assert len(plan.targets) == 1316 - 40


def test_keys_used_as_values_are_filled_in_too():
    """No published model has both; the array of a full layer has another name and no values."""
    config = load_config(DENSE)
    config["text_config"]["num_kv_shared_layers"] = 6
    model = parse_architecture(config, WHERE)
    source = {
        tensor: TensorSpec("bfloat16", shape)
        for tensor, shape in huggingface_tensors(model, kv_leftovers=False).items()
    }
    plan = plan_to_native(model, load_table("gemma-jax"), source, DTypePolicy())
    filled = {target: (planned.spec.shape, planned.fill) for target, planned in plan.filled.items()}
    assert len(filled) == 12
    assert filled["layer_59/attn/k_einsum/w"] == ((4, 5376, 512), 0)
    assert filled["layer_58/attn/kv_einsum/w"] == ((2, 16, 5376, 256), 0)
    assert filled["layer_59/attn/key_norm/scale"] == ((512,), 1)
