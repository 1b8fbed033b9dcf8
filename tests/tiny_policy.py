"""A tiny random policy, its batch and its processor, for the tests of the model and of what is built on it."""

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hf_vla.model.configuration_vla import VLAConfig
from hf_vla.model.modeling_vla import VLAForActionPrediction
from hf_vla.model.processing_vla import VLAProcessor

torch.set_num_threads(1)  # threads only wait for each other on models this small

SIDE = 28
VOCAB = 260
FUSION_TYPES = ("cross_attention", "gated", "prefix")
HEAD_TYPES = ("l1", "flow", "discrete")


def tiny_config(fusion="cross_attention", head="l1", **kwargs) -> VLAConfig:
    fusion = fusion if isinstance(fusion, dict) else {"type": fusion}
    head = head if isinstance(head, dict) else {"type": head}
    vggt = {
        "img_size": SIDE,
        "embed_dim": 32,
        "depth": 2,
        "num_heads": 2,
        "num_register_tokens": 2,
        "init_values": 1.0,
        "encoder_depth": 1,
        "encoder_num_heads": 2,
    }
    text = {
        "model_type": "llama",
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    return VLAConfig(
        vggt_config=vggt,
        text_config=text,
        view_fusion_config={"hidden_size": 32, "num_layers": 2, "num_heads": 2, **fusion},
        head_config={"hidden_size": 32, "num_layers": 1, "num_bins": 16, "num_inference_steps": 4, **head},
        **{"num_views": 2, "state_dim": 3, "action_dim": 4, "chunk_size": 5, "pool_grid": 2, **kwargs},
    )


def tiny_model(fusion="cross_attention", head="l1", seed=0, **kwargs) -> VLAForActionPrediction:
    torch.manual_seed(seed)
    return VLAForActionPrediction(tiny_config(fusion, head, **kwargs)).eval()


def tiny_batch(config: VLAConfig, size=4, text_length=6, seed=0) -> dict[str, torch.Tensor]:
    """Texts of different lengths, chunks of different lengths, everything else random."""
    generator = torch.Generator().manual_seed(seed)
    lengths = text_length - torch.arange(size) % 3
    steps = config.chunk_size - torch.arange(size) % config.chunk_size
    return {
        "pixel_values": torch.rand(size, config.num_views, 3, SIDE, SIDE, generator=generator),
        "input_ids": torch.randint(1, VOCAB, (size, text_length), generator=generator),
        "attention_mask": (torch.arange(text_length) < lengths[:, None]).long(),
        "state": torch.randn(size, config.state_dim, generator=generator),
        "actions": torch.rand(size, config.chunk_size, config.action_dim, generator=generator) * 2 - 1,
        "action_is_pad": torch.arange(config.chunk_size) >= steps[:, None],
    }


def without(batch: dict, *names: str) -> dict:
    return {name: value for name, value in batch.items() if name not in names}


def observation_of(batch: dict) -> dict:
    return without(batch, "actions", "action_is_pad")


def rows(batch: dict, index) -> dict:
    return {name: value[index] for name, value in batch.items()}


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes as tokens, and no padding token: as LLaMA-2's."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate([*alphabet, "<s>", "</s>"])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def tiny_stats(state_dim=3, action_dim=4, seed=0) -> dict[str, dict]:
    generator = np.random.default_rng(seed)
    data = {"observation.state": generator.normal(1, 2, (500, state_dim))}
    data["action"] = generator.normal(0, 0.5, (500, action_dim))
    return {key: stats_of(values) for key, values in data.items()}


def stats_of(values: np.ndarray) -> dict[str, list[float]]:
    return {
        "mean": values.mean(0).tolist(),
        "std": values.std(0).tolist(),
        "min": values.min(0).tolist(),
        "max": values.max(0).tolist(),
        "q01": np.quantile(values, 0.01, axis=0).tolist(),
        "q99": np.quantile(values, 0.99, axis=0).tolist(),
        "count": [len(values)],
    }


def tiny_processor(**kwargs) -> VLAProcessor:
    defaults = {"views": ["front", "wrist"], "stats": tiny_stats(), "image_size": SIDE}
    return VLAProcessor(tiny_tokenizer(), **{**defaults, **kwargs})
