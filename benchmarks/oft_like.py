"""A policy of OpenVLA-OFT's shapes, built from transformers and PEFT, to be measured beside ours; not its code.

Two pictures pass DINOv2-L and SigLIP-So400M; their patch tokens, joined by channel and projected, stand before the text in
LLaMA, then places for the actions, all of which a head reads at once (arXiv 2502.19645; adapters of rank 32 on everything).

Letters: B batch, V views, P patches of a view, L text tokens, K action places (8 steps x 7 dims), D LLaMA width.
"""

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Dinov2Config, Dinov2Model, LlamaConfig, LlamaModel, SiglipVisionConfig, SiglipVisionModel
from transformers.utils import ModelOutput

V, SIDE, PATCH, L, K = 2, 224, 14, 35, 56
RANK = 32

FULL = {
    "dino": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16},
    "siglip": {
        "hidden_size": 1152,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "intermediate_size": 4304,
    },
    "llama": {
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "intermediate_size": 11008,
        "vocab_size": 32000,
    },
}
PROPORTIONAL = {
    "dino": {"hidden_size": 64, "num_hidden_layers": 6, "num_attention_heads": 2},
    "siglip": {"hidden_size": 72, "num_hidden_layers": 7, "num_attention_heads": 2, "intermediate_size": 269},
    "llama": {
        "hidden_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "intermediate_size": 688,
        "vocab_size": 384,
    },
}
"""A thousandth of the arithmetic, as ours at that scale: a sixteenth of the widths, and less of the depth than ours keeps,
for attention over as many tokens as at full size, and adapters of the same rank, weigh more the narrower it is."""


class OFTLike(nn.Module):
    """Pictures and text in, an L1 loss of all actions at once out."""

    def __init__(self, sizes: dict[str, dict]):
        super().__init__()
        pictures = {"image_size": SIDE, "patch_size": PATCH}
        self.dino = Dinov2Model(Dinov2Config(**sizes["dino"], **pictures))
        self.siglip = SiglipVisionModel(SiglipVisionConfig(**sizes["siglip"], **pictures, vision_use_head=False))
        width, seen = sizes["llama"]["hidden_size"], sizes["dino"]["hidden_size"] + sizes["siglip"]["hidden_size"]
        self.project = nn.Sequential(
            nn.Linear(seen, 4 * seen), nn.GELU(), nn.Linear(4 * seen, width), nn.GELU(), nn.Linear(width, width)
        )
        self.llama = LlamaModel(LlamaConfig(**sizes["llama"]))
        self.head = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1))

    def forward(self, pictures: Tensor, input_ids: Tensor, actions: Tensor) -> ModelOutput:
        """Compute the loss of pictures (B, V, 3, H, W), ids (B, L) and actions (B, K)."""
        flat = pictures.flatten(0, 1)
        seen = [self.dino(flat).last_hidden_state[:, 1:], self.siglip(flat).last_hidden_state]
        views = self.project(torch.cat(seen, dim=-1)).unflatten(0, pictures.shape[:2]).flatten(1, 2)
        text = self.llama.get_input_embeddings()(input_ids)
        places = text.new_zeros(len(text), K, text.shape[-1])
        sequence = torch.cat([views.to(text.dtype), text, places], dim=1)
        states = self.llama(inputs_embeds=sequence, use_cache=False).last_hidden_state
        return ModelOutput(loss=F.l1_loss(self.head(states[:, -K:])[..., 0].float(), actions))

    @staticmethod
    def batch(model: nn.Module, size: int, device: str) -> dict[str, Tensor]:
        """Make a batch of noise."""
        vocabulary = model.get_base_model().llama.config.vocab_size
        return {
            "pictures": torch.rand(size, V, 3, SIDE, SIDE, device=device),
            "input_ids": torch.randint(vocabulary, (size, L), device=device),
            "actions": torch.rand(size, K, device=device),
        }


def make_oft(full: bool) -> nn.Module:
    """Build it in bfloat16 with float32 adapters; projector and head train in full."""
    model = OFTLike(FULL if full else PROPORTIONAL).to(torch.bfloat16)
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    targets = [name for name in linear if name.split(".")[0] in ("dino", "siglip", "llama")]
    config = LoraConfig(r=RANK, lora_alpha=16, target_modules=targets, modules_to_save=["project", "head"])
    adapted = get_peft_model(model, config)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return adapted
