"""Train two steps while the system gives this process no more than some bytes, and write down what came of it.

python train_within.py OUTPUT [BYTES]
"""

import json
import resource
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import TrainerCallback

from hf_vla.prepare import build_trainer
from tests.tiny_run import tiny_recipe

torch.set_num_threads(1)
torch.backends.mkldnn.set_flags(False)  # oneDNN has no words of its own for want of memory


class Limit(TrainerCallback):
    """Lets the address space grow by so many bytes from the first step on, and sees by how much a forward grows it."""

    def __init__(self, allowed: int | None):
        self.allowed, self.before, self.grown = allowed, None, 0

    def on_step_begin(self, args, state, control, **kwargs):
        if self.before is None:
            self.before = address_space()
            if self.allowed is not None:
                resource.setrlimit(resource.RLIMIT_AS, (self.before + self.allowed,) * 2)

    def after_forward(self, *_) -> None:
        self.grown = max(self.grown, address_space() - self.before)


def address_space() -> int:
    """Read how many bytes this process has mapped, as Linux tells."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def main() -> None:
    output, allowed = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else None
    plan = {"save_strategy": "no", "adam_epsilon": 1e-3}
    trainer = build_trainer(tiny_recipe(data={"batch_size": 64, "eval_fraction": 0.0}, training=plan), output)
    limit = Limit(allowed)
    trainer.add_callback(limit)
    trainer.bare_model().register_forward_hook(limit.after_forward)
    trainer.train()
    weights = {name: p.detach().clone() for name, p in trainer.bare_model().named_parameters() if p.requires_grad}
    save_file(weights, output / "weights.safetensors")
    (output / "grown.json").write_text(json.dumps({"grown": limit.grown, "size": trainer.batcher.fit.size}))


if __name__ == "__main__":
    main()
