"""Train truly sharded on two CPU processes, and run out of memory on one of them; called by test_sharded.py.

accelerate shards where it finds several GPUs, and falls back to data parallelism on CPUs without a word. Here it is told
that these processes are of the first kind, and no more: FSDP2, Trainer and ours are as on GPUs, over gloo.
"""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

import hf_vla.prepare
import hf_vla.train
from hf_vla.arguments import training_arguments
from hf_vla.train import build_trainer, is_restarted, train
from tests.tiny_run import tiny_recipe

MODEL = {"freeze_vggt": True, "fusion": {"type": "prefix", "dropout": 0.0}}
STEPS = {"max_steps": 4, "save_steps": 2, "logging_steps": 1, "gradient_accumulation_steps": 2}
SHARDED = {
    "fsdp": True,
    "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer", "Block"]},
}


class Watch(TrainerCallback):
    """Makes sure that all is shards, and lets memory run out on rank 1, in the forward of the third step."""

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        whole = [name for name, parameter in model.named_parameters() if not isinstance(parameter, DTensor)]
        if whole:
            raise AssertionError(f"not sharded: {whole}")
        if state.global_step == 2 and os.environ["RANK"] == "1" and not is_restarted():
            model.model.fusion.register_forward_pre_hook(self.fail)

    def on_substep_end(self, args, state, control, model=None, **kwargs):
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        if not gradients or not all(isinstance(gradient, DTensor) for gradient in gradients):
            raise AssertionError("gradients accumulate whole, not as shards")

    def fail(self, module, inputs):
        raise torch.OutOfMemoryError("injected")


def arguments_of_gpus(recipe, output):
    arguments = training_arguments(recipe, output)
    if arguments.fsdp and arguments.device.type == "cpu":  # asking for the device joins the processes
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    return arguments


def build_watched(recipe, output):
    trainer = build_trainer(recipe, output)
    if trainer.is_sharded:
        trainer.add_callback(Watch())
    return trainer


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    hf_vla.prepare.training_arguments, hf_vla.train.build_trainer = arguments_of_gpus, build_watched
    if not is_restarted():
        train(tiny_recipe(model=MODEL, training=STEPS), folder / "whole")
    train(tiny_recipe(model=MODEL, training={**STEPS, **SHARDED}), folder / "sharded")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
