"""LeRobot's own SmolVLA, trained by LeRobot's own step; runs in its environment, and imports nothing of hf_vla.

    python lerobot_policy.py train SIZE BATCH STEPS      what training takes
    python lerobot_policy.py size SIZE                   its parameters and a sample's arithmetic

Each ends with a line of JSON. Settings are LeRobot's defaults: the vision-language model frozen, its first 16 layers kept;
the action expert and the projections trained; chunks of 50, pictures padded to 512 pixels, AdamW and its schedule, no
autocast. As where published weights are fine-tuned, the vision-language model's are read in bfloat16, from a folder that
transformers wrote; here they are random.

Letters: B batch, L text tokens, T chunk length.
"""

import json
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from lerobot.configs.types import FeatureType, PolicyFeature
from lerobot.policies.smolvla.modeling_smolvla import SmolVLAConfig, SmolVLAPolicy
from lerobot.scripts.lerobot_train import update_policy
from lerobot.utils.constants import ACTION, OBS_LANGUAGE_ATTENTION_MASK, OBS_LANGUAGE_TOKENS, OBS_STATE
from lerobot.utils.logging_utils import AverageMeter, MetricsTracker
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from training_cost import Memory, cost, count_flops, device, parameters, seconds_a_step
from transformers import (
    PreTrainedTokenizerFast,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    SmolVLMImageProcessor,
    SmolVLMProcessor,
    SmolVLMVideoProcessor,
)

L, STATE_DIM, ACTION_DIM = 47, 8, 7
CAMERAS = ("observation.images.image", "observation.images.image2")
"""Two pictures, state and actions as in LIBERO, whose pictures have 256 pixels a side."""
VOCABULARY = 384
"""Of the smaller size; text is drawn from it for both."""
SCHEDULED_STEPS = 100_000
"""LeRobot's own default of a training's length."""

SIZES = {
    "full": {
        "vision": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
        "text": {
            "hidden_size": 960,
            "intermediate_size": 2560,
            "num_hidden_layers": 32,
            "num_attention_heads": 15,
            "num_key_value_heads": 5,
            "vocab_size": 49280,
        },
        "kept_layers": 16,
        "image_size": 512,
    },
    "proportional": {
        "vision": {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 2},
        "text": {
            "hidden_size": 96,
            "intermediate_size": 256,
            "num_hidden_layers": 8,
            "num_attention_heads": 3,
            "num_key_value_heads": 1,
            "vocab_size": VOCABULARY,
        },
        "kept_layers": 4,
        "image_size": 256,
    },
}
"""`full`: SmolVLM2-500M-Video-Instruct's config.json on the Hub. `proportional`: about a thousandth of the arithmetic, by a
tenth and a twelfth of the widths, a quarter of the layers and half of the picture's side; patches, chunk and text stay."""


def train(size: str, batch_size: str, steps: str) -> dict[str, float]:
    """Train on one batch over and over, and say what it takes."""
    count, memory = int(batch_size), Memory()
    policy, step = make_step(size, count)
    memory.start()
    return cost(count / seconds_a_step(step, int(steps)), memory, policy, step, count)


def measure_size(size: str) -> dict[str, int]:
    """Count parameters, and a sample's arithmetic in a training step."""
    policy, step = make_step(size, 1)
    return {**parameters(policy), "flops_a_sample": count_flops(step)}


def make_step(size: str, batch_size: int) -> tuple[SmolVLAPolicy, partial]:
    """Build policy, optimizer and schedule as LeRobot's training does; return the policy and its step on a batch."""
    torch.backends.cudnn.benchmark = True
    torch.backends.cuda.matmul.allow_tf32 = True
    accelerator = Accelerator(step_scheduler_with_optimizer=False, cpu=device() == "cpu")
    policy = make_policy(size)
    config = policy.config
    optimizer = config.get_optimizer_preset().build(policy.get_optim_params())
    schedule = config.get_scheduler_preset().build(optimizer, SCHEDULED_STEPS)
    policy, optimizer, schedule = accelerator.prepare(policy, optimizer, schedule)
    meters = {name: AverageMeter(name) for name in ("loss", "grad_norm", "lr", "update_s")}
    step = partial(
        update_policy,
        MetricsTracker(batch_size, batch_size, 1, meters, accelerator=accelerator),
        policy,
        make_batch(config, batch_size),
        optimizer,
        config.optimizer_grad_clip_norm,
        accelerator=accelerator,
        lr_scheduler=schedule,
    )
    return policy, step


def make_policy(size: str) -> SmolVLAPolicy:
    """Build the policy around a vision-language model that it reads from a folder."""
    sizes = SIZES[size]
    side = sizes["image_size"]
    pictures = {name: PolicyFeature(FeatureType.VISUAL, (3, side // 2, side // 2)) for name in CAMERAS}
    with tempfile.TemporaryDirectory() as folder:
        write_vlm(sizes, Path(folder))
        config = SmolVLAConfig(
            input_features={**pictures, OBS_STATE: PolicyFeature(FeatureType.STATE, (STATE_DIM,))},
            output_features={ACTION: PolicyFeature(FeatureType.ACTION, (ACTION_DIM,))},
            vlm_model_name=folder,
            load_vlm_weights=True,
            num_vlm_layers=sizes["kept_layers"],
            resize_imgs_with_padding=(side, side),
            device=device(),
        )
        return SmolVLAPolicy(config).to(device())


def write_vlm(sizes: dict[str, Any], folder: Path) -> None:
    """Write config, random weights, processor and tokenizer of a vision-language model."""
    words = ["<unk>", "<image>", "<fake_token_around_image>", "<global-img>"]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0])),
        unk_token=words[0],
        extra_special_tokens=dict(
            zip(["image_token", "fake_image_token", "global_image_token"], words[1:], strict=True)
        ),
    )
    SmolVLMProcessor(SmolVLMImageProcessor(), tokenizer, SmolVLMVideoProcessor()).save_pretrained(folder)
    config = SmolVLMConfig(
        vision_config={**sizes["vision"], "image_size": sizes["image_size"], "patch_size": 16},
        text_config={**sizes["text"], "model_type": "llama"},
        scale_factor=4,
        image_token_id=1,
        pad_token_id=0,
    )
    SmolVLMForConditionalGeneration(config).to(torch.bfloat16).save_pretrained(folder)


def make_batch(config: SmolVLAConfig, size: int) -> dict[str, Tensor]:
    """Make a batch of noise such as LeRobot's processors give: pictures (B, 3, H, W), ids (B, L), actions (B, T, 7)."""
    batch = {name: torch.rand(size, *feature.shape) for name, feature in config.input_features.items()}
    batch[ACTION] = torch.rand(size, config.chunk_size, ACTION_DIM)
    batch[OBS_LANGUAGE_TOKENS] = torch.randint(VOCABULARY, (size, L))
    batch[OBS_LANGUAGE_ATTENTION_MASK] = torch.ones(size, L, dtype=torch.bool)
    return {key: tensor.to(config.device) for key, tensor in batch.items()}


COMMANDS = {"train": train, "size": measure_size}

if __name__ == "__main__":
    print(json.dumps(COMMANDS[sys.argv[1]](*sys.argv[2:])))
