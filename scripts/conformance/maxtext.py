"""MaxText's own forward pass, trainer and converters, with the settings that to-native printed.

`python -P maxtext.py COMMAND PATH... + COMMAND PATH...`, in MaxText's environment; see
frameworks.py. Besides `logits` and `train` there are

    vision SETTINGS INPUT OUTPUT          INPUT: .npz with `image`, [height, width, 3] in 0 to 1;
                                          into OUTPUT go `features`, float32 [tokens, hidden]
    to_maxtext SETTINGS ORIGINAL FOLDER   MaxText's converter makes FOLDER/0/items, in float32
    to_huggingface SETTINGS ORIGINAL OUT  the way back, of the checkpoint that SETTINGS name
    parameters_only SETTINGS STATE FOLDER FOLDER/run/checkpoints/0/items of a training state
    adapter_to_huggingface ADAPTER ORIGINAL OUT
                                          its converter makes an adapter of PEFT of one of its own

The converters take a model's sizes from a table of published ones; here they are those of
ORIGINAL's config.json. They read safetensors files with torch; here with numpy, the same values.
"""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

STEPS = 3
TUNING = "post_train/sft.yml"
RUN = (
    "run_name=run",
    "dataset_type=synthetic",
    "hardware=cpu",
    "skip_jax_distributed_system=true",
    "enable_checkpointing=true",
    "async_checkpointing=false",
    "attention=dot_product",
    "dtype=float32",
    "weight_dtype=float32",
    "matmul_precision=highest",
    "sparse_matmul=false",
    "megablox=false",
    "log_config=false",
    "enable_goodput_recording=false",
    "monitor_goodput=false",
)


def arguments(*settings: Path, config: str = "base.yml", **more: object) -> list[str]:
    """A command line of MaxText: a config of its own, how we run it, and the printed settings.

    `more` counts most; None takes a setting away.
    """
    import maxtext

    base = Path(next(iter(maxtext.__path__))) / "configs" / config
    told: dict[str, object] = {}
    for file in settings:
        told |= json.loads(file.read_text(encoding="utf-8"))
    told |= more
    return [str(base), *RUN, *(f"{key}={one}" for key, one in told.items() if one is not None)]


def load(settings: Path, batch: int, length: int, adapter: Path | None = None) -> Any:
    """The model with its parameters, and with those of an adapter."""
    from maxtext.configs import pyconfig
    from maxtext.utils import lora_utils, model_creation_utils

    more: dict[str, Any] = {"per_device_batch_size": batch, "max_target_length": length}
    more |= {"base_output_directory": settings.parent.absolute()}
    if adapter is None:
        told = arguments(settings, **more)
    else:
        told = arguments(settings, adapter, config=TUNING, **more)
    config = pyconfig.initialize(["maxtext", *told])
    loaded = model_creation_utils.from_pretrained(config)
    model = loaded[0] if isinstance(loaded, tuple) else loaded
    if adapter is not None:
        model = lora_utils.apply_lora_to_model(model, mesh(model), config)
        lora_utils.restore_lora_from_path(model, config)
    return model


def mesh(model: Any) -> Any:
    """What the model's arrays are laid out on, where it says so."""
    return getattr(model, "mesh", None) or contextlib.nullcontext()


def logits(settings: Path, given: Path, out: Path) -> None:
    """Writes the logits of the tokens in `given`."""
    ids = np.load(given)["ids"]
    np.savez(out, logits=computed(load(settings, *ids.shape), ids))


def adapted(settings: Path, adapter: Path, given: Path, out: Path) -> None:
    """Writes the logits of the tokens in `given`, of the model with an adapter."""
    ids = np.load(given)["ids"]
    np.savez(out, logits=computed(load(settings, *ids.shape, adapter), ids))


def computed(model: Any, tokens: np.ndarray) -> np.ndarray:
    """The logits [batch length vocab] of tokens."""
    import jax.numpy as jnp
    from flax import nnx

    ids = jnp.asarray(tokens, jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
    with mesh(model):
        found = nnx.jit(
            lambda model: model(
                ids,
                positions,
                decoder_segment_ids=jnp.ones_like(ids),
                enable_dropout=False,
                model_mode="train",
            )
        )(model)
    found = found[0] if isinstance(found, tuple) else found
    return np.asarray(found, np.float32)


def vision(settings: Path, given: Path, out: Path) -> None:
    """Writes what the vision encoder makes of an image, as the language model gets it."""
    import jax.numpy as jnp

    model = load(settings, 1, 40)
    with mesh(model):
        found = model.vision_encoder(
            input_images=jnp.asarray(np.load(given)["image"], jnp.float32)[None, None],
            deterministic=True,
        )
    found = found[0] if isinstance(found, list | tuple) else found
    np.savez(out, features=np.asarray(found, np.float32).reshape(-1, found.shape[-1]))


def train(settings: Path, folder: Path) -> None:
    """Three steps of MaxText's trainer on its synthetic data; every step is saved."""
    from maxtext.trainers.pre_train import train as trainer

    more = {"base_output_directory": folder.absolute(), "steps": STEPS, "checkpoint_period": 1}
    more |= {"per_device_batch_size": 1, "max_target_length": 64, "learning_rate": 1e-3}
    trainer.main(["maxtext", *arguments(settings, **more)])


def train_adapter(settings: Path, adapter: Path, folder: Path) -> None:
    """Three steps of MaxText's fine-tuning of an adapter alone, on its synthetic data.

    With the config that its command makes it finds no data: that one cannot be hashed.
    """
    from maxtext.configs import pyconfig
    from maxtext.trainers.post_train.sft import train_sft

    more: dict[str, Any] = {"base_output_directory": folder.absolute(), "steps": STEPS}
    more |= {"checkpoint_period": 1, "learning_rate": 1e-3}
    more |= {"per_device_batch_size": 1, "max_target_length": 64}
    told = arguments(settings, adapter, config=TUNING, **more)
    train_sft.train(pyconfig.initialize(["maxtext", *told]))


def parameters_only(settings: Path, state: Path, folder: Path) -> None:
    """MaxText makes a checkpoint of parameters alone, in bfloat16, of a training state.

    Its script reads the random state of its own trainer only with that one's kind of numbers.
    """
    import jax
    from maxtext.utils import generate_param_only_checkpoint

    jax.config.update("jax_default_prng_impl", "unsafe_rbg")
    more = {"load_parameters_path": None, "load_full_state_path": state.absolute()}
    more |= {"base_output_directory": folder.absolute()}
    generate_param_only_checkpoint.main(["maxtext", *arguments(settings, **more)])


def to_maxtext(settings: Path, original: Path, folder: Path) -> None:
    """MaxText's converter makes FOLDER/0/items of a Hugging Face checkpoint, in float32."""
    _to_maxtext(settings, original, folder, "float32")


def to_maxtext_bfloat16(settings: Path, original: Path, folder: Path) -> None:
    """The same in bfloat16; its time is taken by scripts/benchmark.py."""
    _to_maxtext(settings, original, folder, "bfloat16")


def _to_maxtext(settings: Path, original: Path, folder: Path, dtype: str) -> None:
    from maxtext.checkpoint_conversion import to_maxtext as converter

    given = arguments(settings, load_parameters_path=None, base_output_directory=folder.absolute())
    _sizes_of(original, settings, converter.HF_MODEL_CONFIGS)
    read = converter.load_hf_dict_from_safetensors
    converter.load_hf_dict_from_safetensors = lambda *names, **kinds: read(
        *names, **(kinds | {"framework": "np"})
    )
    converter.main(
        ["maxtext", *given],
        lazy_load_tensors=False,
        hf_model_path=str(original),
        save_dtype=dtype,
        simulated_cpu_devices_count=1,
    )


def to_huggingface(settings: Path, original: Path, out: Path) -> None:
    """MaxText's converter makes the Hugging Face checkpoint OUT of one of MaxText's.

    It collects garbage after every tensor; what stands before is put out of the way of that.
    """
    import gc

    from absl import flags
    from maxtext.checkpoint_conversion import to_huggingface as converter

    given = arguments(settings, base_output_directory=out.absolute())
    _sizes_of(original, settings, converter.HF_MODEL_CONFIGS)
    converter.AutoProcessor = converter.AutoTokenizer
    gc.freeze()
    flags.FLAGS(["maxtext", f"--hf_model_path={original}"])
    converter.main(["maxtext", *given])


def adapter_to_huggingface(adapter: Path, original: Path, out: Path) -> None:
    """MaxText's converter makes an adapter of PEFT of the one that ADAPTER names.

    It gives JAX arrays to safetensors, which takes those of numpy: here it gets them. It does not
    get the arrays of experts, which no adapter has, since it takes their names for one.
    """
    from absl import flags
    from maxtext.checkpoint_conversion import to_huggingface as converter
    from maxtext.checkpoint_conversion.utils import utils

    save = utils.numpy_save_file
    utils.numpy_save_file = lambda arrays, file: save(
        {name: np.ascontiguousarray(array) for name, array in arrays.items()}, file
    )

    transform = converter._transform_weights_to_adapter
    converter._transform_weights_to_adapter = lambda names, arrays: transform(
        {name: to for name, to in names.items() if isinstance(name, str)}, arrays
    )
    given = arguments(adapter, config=TUNING, base_output_directory=out.absolute())
    _sizes_of(original, adapter, converter.HF_MODEL_CONFIGS)
    converter.AutoProcessor = converter.AutoTokenizer
    flags.FLAGS(["maxtext", f"--hf_model_path={original}"])
    converter.main(["maxtext", *given])


def _sizes_of(original: Path, settings: Path, configs: dict[str, Any]) -> None:
    from transformers import AutoConfig

    name = json.loads(settings.read_text(encoding="utf-8"))["model_name"]
    configs[name] = AutoConfig.from_pretrained(original)


CONVERTERS = (to_maxtext, to_maxtext_bfloat16, to_huggingface, parameters_only)


if __name__ == "__main__":
    sys.path.append(str(Path(__file__).parent))
    from asked import run

    commands = (logits, train, vision, *CONVERTERS)
    sys.exit(run(sys.argv[1:], *commands, adapted, train_adapter, adapter_to_huggingface))
