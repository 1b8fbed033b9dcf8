"""The language backbone: any decoder that AutoModel builds, without its lm_head, whole or quantised."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModel, BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.quantizers import AutoHfQuantizer
from transformers.utils import logging as transformers_logging

from .checks import check_keys, check_nothing_wrong
from .files import CONFIG, require_file

PUBLISHED = {
    "meta-llama/Llama-2-7b-hf": {
        "model_type": "llama",
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
}
"""Configs of gated repositories, so that planning needs neither network nor licence. Source: their config.json."""

QUANTIZATIONS = {
    "nf4": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": torch.bfloat16,
    },
    "int8": {"load_in_8bit": True},
}
"""Arguments of BitsAndBytesConfig. Source: QLoRA, arXiv 2305.14314; LLM.int8(), arXiv 2208.07339."""

CAUSAL_SDPA = "causal_sdpa"
"""Name under which transformers is given its own `sdpa` attention once more, for sequences that need no mask."""


def lang_encoder_config(source: str | dict[str, Any]) -> PreTrainedConfig:
    """Find the decoder's config without reading its weights.

    Raises:
        ValueError: for a config key that the decoder doesn't have, or a model that isn't a decoder.
        FileNotFoundError: if the source isn't there; says how to get it.
    """
    if isinstance(source, dict):
        return _config_of_keys(source)
    if source in PUBLISHED:
        return _config_of_keys(PUBLISHED[source])
    config = AutoConfig.from_pretrained(_require_config(source).parent)
    if config.is_encoder_decoder:
        raise ValueError(f"{source} is a {config.model_type}: the language encoder must be a decoder, such as LLaMA.")
    return config


def load_lang_encoder(
    source: str | dict[str, Any], dtype: torch.dtype = torch.float32, quantization: str = "none"
) -> PreTrainedModel:
    """Load a decoder without its `lm_head`; or make a random one from a dict of config keys.

    Args:
        source: Hub id or folder of any decoder that AutoModel builds; or its config's keys (`model_type`: llama).
        dtype: of the weights that aren't quantised.
        quantization: `none`, `nf4` (4 bits, double quantisation) or `int8`, of linear layers, through bitsandbytes.

    Raises:
        ValueError: if the weights are damaged, or any but `lm_head` is missing, unexpected or of another shape.
        FileNotFoundError: if the source isn't there; says how to get it.
        ImportError: if a quantisation is asked for and bitsandbytes isn't installed.
    """
    bnb_config = _quantization_config(quantization)
    if not isinstance(source, dict):
        _require_config(source)
        return attend_without_asking(_load(source, dtype, bnb_config))
    model = AutoModel.from_config(_config_of_keys(source), dtype=dtype, attn_implementation="sdpa")
    return attend_without_asking(_quantized_copy(model, dtype, bnb_config) if bnb_config else model.eval())


def quantize_skeleton(model: PreTrainedModel, quantization: str) -> None:
    """Replace the linear layers of a decoder on the meta device by quantised ones, as loading it would."""
    bnb_config = _quantization_config(quantization)
    if bnb_config is not None:
        quantizer = AutoHfQuantizer.from_config(bnb_config)
        quantizer.preprocess_model(model, device_map=None)
        quantizer.postprocess_model(model)
        _keep_packing(model)


def attend_without_asking(model: PreTrainedModel) -> PreTrainedModel:
    """Let a decoder's attention be causal without looking whether several sequences were packed into one.

    Of the `sdpa` that transformers knows, it reads that back from the GPU in every forward (`find_packed_sequence_indices`,
    5.23), and all waits for it; an attention that it has no masks for, it doesn't ask about. What needs masks, a sliding
    window, keeps the usual one.
    """
    kinds = getattr(model.config, "layer_types", None) or ["full_attention"]
    if set(kinds) == {"full_attention"}:
        ALL_ATTENTION_FUNCTIONS.register(CAUSAL_SDPA, sdpa_attention_forward)
        model.set_attn_implementation(CAUSAL_SDPA)
    return model


def _require_config(source: str):
    return require_file(source, [CONFIG], "config of a language model")


def _config_of_keys(keys: dict[str, Any]) -> PreTrainedConfig:
    keys = {"model_type": "llama", **keys}
    kind = keys.pop("model_type")
    default = AutoConfig.for_model(kind)
    check_keys(keys, {*default.to_dict(), *default.attribute_map}, "model.lang_encoder")
    return AutoConfig.for_model(kind, **keys)


def _load(source: str, dtype: torch.dtype, bnb_config: BitsAndBytesConfig | None) -> PreTrainedModel:
    try:
        with _without_load_report():
            model, info = AutoModel.from_pretrained(
                source,
                dtype=dtype,
                attn_implementation="sdpa",
                quantization_config=bnb_config,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # refused below, by name
            )
    except SafetensorError as error:
        raise ValueError(f"{source}: a file of weights is cut short or damaged ({error}); fetch it again.") from None
    except OSError as error:
        raise FileNotFoundError(f"{source}: its weights can't be loaded. {error}") from error
    unexpected = [name for name in info["unexpected_keys"] if not name.startswith("lm_head.")]
    check_nothing_wrong(info["missing_keys"], unexpected, [name for name, *_ in info["mismatched_keys"]], source)
    _keep_packing(model)
    return model.eval()


def _keep_packing(model: PreTrainedModel) -> None:
    """Keep bitsandbytes from packing 4-bit weights anew the first time they are evaluated on a CPU with AVX512-BF16.

    The new packing is for kernels without a gradient, and rounds the scales: training that goes on is silently wrong, and so
    is a model moved to a GPU (bitsandbytes issue 2078, open at 0.50.2).
    """
    for layer in model.modules():
        if type(layer).__name__ == "Linear4bit":
            layer.support_avx512bf16_for_cpu = False


@contextmanager
def _without_load_report() -> Iterator[None]:
    """Keep transformers from warning of the lm_head that is left out on purpose; what else it reports is our error."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)


def _quantization_config(quantization: str) -> BitsAndBytesConfig | None:
    if quantization == "none":
        return None
    if quantization not in QUANTIZATIONS:
        raise ValueError(f"Unknown quantization {quantization!r}; allowed: none, {', '.join(QUANTIZATIONS)}.")
    return BitsAndBytesConfig(**QUANTIZATIONS[quantization])


def _quantized_copy(model: PreTrainedModel, dtype: torch.dtype, bnb_config: BitsAndBytesConfig) -> PreTrainedModel:
    """Quantise a random model the one way that transformers offers: while loading it."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return _load(folder, dtype, bnb_config)
