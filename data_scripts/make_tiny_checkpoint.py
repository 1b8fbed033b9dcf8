"""Write tiny random checkpoints in the very file formats of facebook/VGGT-1B and meta-llama/Llama-2-7b-hf.

    python data_scripts/make_tiny_checkpoint.py tiny
    accelerate launch hf_vla/train.py recipes/lora.json --set model.vggt=tiny/vggt --set model.lang_encoder=tiny/llama

Names of files, tensors and config keys are the released ones; only the widths aren't. The seed decides every weight.
"""

import json
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, LlamaTokenizer

from hf_vla.console import set_up_logging
from hf_vla.model.configuration_vla import VGGTConfig
from hf_vla.model.modeling_vggt import VGGTModel
from hf_vla.model.vggt_heads import DPTHead, GeometryConfig, VGGTGeometry

SIZES = {"small": 32, "medium": 128}
"""Width of both backbones: for tests; for a look at learning curves."""

DEPTH = 4
HEADS = 4
VOCABULARY = 400

# Characters and frequent pairs of instructions; what they lack falls back to bytes, as in LLaMA's own tokenizer.
SENTENCES = [
    "In: What action should the robot take to push the button from the top?\nOut:",
    "In: What action should the robot take to rotate the faucet counter-clockwise?\nOut:",
    "In: What action should the robot take to reach a goal position?\nOut:",
    "pick up the red block and place it in the open drawer, then close the drawer",
    "open the window by its handle; put the bowl on the plate; turn on the stove",
]


def main(
    folder: Annotated[Path, typer.Argument(help="Where the folders vggt and llama are made.")],
    size: Annotated[str, typer.Option(help=f"One of {', '.join(SIZES)}.")] = "small",
    image_size: Annotated[int, typer.Option(help="Pixels a side that VGGT's positions are made for.")] = 56,
    seed: Annotated[int, typer.Option(help="Decides every weight.")] = 0,
) -> None:
    """Write FOLDER/vggt and FOLDER/llama."""
    if size not in SIZES:
        raise typer.BadParameter(f"{size!r}: the sizes are {', '.join(SIZES)}.")
    set_up_logging()
    torch.manual_seed(seed)
    try:
        write_vggt(folder / "vggt", SIZES[size], image_size)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    write_llama(folder / "llama", SIZES[size])
    Console().print(f"Wrote {folder / 'vggt'} and {folder / 'llama'}.")


def write_vggt(folder: Path, width: int, image_size: int = 56) -> None:
    """Write model.safetensors with the aggregator and its heads, and a config.json that says what shapes can't."""
    config = VGGTConfig(
        img_size=image_size,
        embed_dim=width,
        depth=DEPTH,
        num_heads=HEADS,
        encoder_depth=2,
        encoder_num_heads=HEADS,
    )
    geometry = GeometryConfig(
        trunk_depth=1,
        camera_num_heads=HEADS,
        camera_mlp_ratio=1.0,
        dpt_features=8,
        dpt_out_channels=(8, 8, 8, 8),
        dpt_layers=tuple(range(DEPTH)),
    )
    tensors = _vggt_tensors(config, geometry)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(_vggt_keys(config, geometry), indent=2) + "\n")


def _vggt_tensors(config: VGGTConfig, geometry: GeometryConfig) -> dict[str, torch.Tensor]:
    aggregator, heads = VGGTModel(config), VGGTGeometry(config, geometry)
    point_head = DPTHead(2 * config.embed_dim, geometry, channels=4)
    return {
        **{f"aggregator.{name}": tensor for name, tensor in aggregator.state_dict().items()},
        **heads.state_dict(),
        **{f"point_head.{name}": tensor for name, tensor in point_head.state_dict().items()},
        "track_head.tracker.query_ref_token": torch.randn(1, 2, 4),  # one name of its family, which nothing reads
    }


def _vggt_keys(config: VGGTConfig, geometry: GeometryConfig) -> dict:
    released = {"img_size": config.img_size, "patch_size": config.patch_size, "embed_dim": config.embed_dim}
    switches = {f"enable_{head}": True for head in ("camera", "point", "depth", "track")}
    untold = {
        "encoder_num_heads": config.encoder_num_heads,
        "camera_num_heads": geometry.camera_num_heads,
        "dpt_layers": list(geometry.dpt_layers),
    }
    return {**released, **switches, **untold}


def write_llama(folder: Path, width: int) -> None:
    """Write LlamaForCausalLM with its lm_head, and a tokenizer of LLaMA-2's kind, which has no padding token."""
    tokenizer = make_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_tokenizer() -> LlamaTokenizer:
    """Train byte-fallback BPE on a few sentences."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=True)
    tokenizer.decoder = decoders.Metaspace()
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<unk>", "<s>", "</s>", *bytes_], show_progress=False
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    trained = json.loads(tokenizer.to_str())["model"]
    merges = [tuple(pair) for pair in trained["merges"]]
    return LlamaTokenizer(vocab=trained["vocab"], merges=merges, add_bos_token=True)


if __name__ == "__main__":
    typer.run(main)
