"""The frozen VGGT beside training: the next optimizer step's pairs, on a CUDA stream of their own, while this one trains.

What training leaves idle of a GPU (short kernels, gaps between them, the optimizer's traffic) VGGT may use. How much that is
only a GPU can say, so a recipe has to ask for it. On a CPU the same is done in the same order, one after the other.
"""

from collections import deque
from collections.abc import Iterator
from itertools import islice

import torch

from hf_vla.memory.encode_ahead import EncodeAhead
from hf_vla.memory.microbatch import Tell
from hf_vla.memory.out_of_memory import free_cache
from hf_vla.memory.pieces import Batch


class Lookahead:
    """Iterates over an epoch's batches, and holds those of the next optimizer step while VGGT encodes them.

    The two streams wait for each other once a step, so the allocator needs no `record_stream`, which would hold memory back
    for as long as the host runs ahead. Copies need nothing either: the host's allocator keeps pinned pixels until the
    stream that copies them is through.
    Source: PyTorch's page on `Tensor.record_stream`, and its CUDA semantics, "CUDA streams" and "Use pinned memory buffers".

    Args:
        ahead: encodes.
        size: batches of an optimizer step.
        device: that trains; without a stream of its own where it is a CPU.
        tell: told when looking ahead is given up.
    """

    def __init__(self, ahead: EncodeAhead, size: int, device: torch.device, tell: Tell = lambda kind, text: None):
        self.is_given_up = False
        self._ahead, self._size, self._tell = ahead, size, tell
        self._batches: Iterator[Batch] = iter(())
        self._held: deque[Batch] = deque()
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def over(self, batches: Iterator[Batch]) -> "Lookahead":
        """Go over the batches of an epoch; called before each optimizer step, whose batches are then taken from here.

        VGGT's stream waits for the last step's training, whose features nobody holds after this: only then may their memory
        be used again there.
        """
        if self._stream:
            self._stream.wait_stream(torch.cuda.current_stream())
        if batches is not self._batches:
            self._batches = batches
            self._held.clear()
        return self

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        return self._held.popleft() if self._held else next(self._batches)

    def run(self, batches: list[Batch]) -> None:
        """Give an optimizer step's batches their features, and launch VGGT on those of the next.

        They have them already, unless the epoch begins with them. Training waits for what it is about to read, and not for
        what is launched after that.
        """
        with torch.cuda.stream(None if self.is_given_up else self._stream):
            self._ahead.run(batches)
        if self._stream:
            torch.cuda.current_stream().wait_stream(self._stream)
        if self._ahead.pairs and not self.is_given_up:
            self._look_ahead()

    def give_up(self) -> None:
        """Look ahead no more, to the end of the run: memory is short, and this only saves time."""
        if not self.is_given_up:
            self.is_given_up = True
            self._tell(
                "overlap_given_up", "From now on VGGT encodes a step's pairs before it, not beside the last one."
            )

    def _look_ahead(self) -> None:
        """Take the next step's batches, and encode all or none of them; at the end of an epoch there are none."""
        self._held.extend(islice(self._batches, self._size))
        with torch.cuda.stream(self._stream):
            fits = self._ahead.attempt(self._held)
        if not fits:
            free_cache()
            self._tell("out_of_memory", "VGGT can't encode the next step's pairs beside this step.")
            self.give_up()
