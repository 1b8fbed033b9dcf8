"""The tracker: sees every tensor that PyTorch makes, fake or real, and writes its storage's life into a ledger.

It counts storages, not tensors, so that views cost nothing; it asks autograd which part of the model a backward operation
belongs to; and it counts the arithmetic and traffic of each operation on the way.
"""

import bisect
import itertools
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hf_vla.memory.cuda_rules import no_workspace
from hf_vla.memory.ledger import COMPONENTS, KINDS, PHASES, Ledger, slot_of, sort_frees
from hf_vla.memory.work import Work, WorkLog

_DEVICE = torch.ops.prim.device.default
_TEMPORARY, _ACTIVATION = KINDS.index("temporaries"), KINDS.index("activations")


class MemoryTracker(TorchDispatchMode):
    """Logs the memory of everything that runs inside it.

    A block begins as a temporary. `label` says better what it is; what autograd saves for backward becomes an activation.

    Args:
        workspace: (operation, arguments) -> bytes that the operation takes and gives back while its results are there.
    """

    def __init__(self, workspace: Callable[..., int] = no_workspace):
        super().__init__()
        self._workspace = workspace
        self._events: list[tuple[int, int, int, int, bool]] = []
        self._alive: dict[int, list] = {}  # storage -> [size, slot, block, weak reference]
        self._numbers = itertools.count()
        self._phase = 0
        self._components = ["other"]
        self._marks: list[tuple[int, str]] = [(0, "other")]  # autograd's sequence number -> who ran from there on
        self._on_host = False
        self._work = WorkLog()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Spare each operation torch's guard against compiling this class: nothing is compiled here."""
        return False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Run an operation, log the storages that it makes, and count its work."""
        if func is _DEVICE and isinstance(args[0], FakeTensor):
            return args[0].fake_device  # asked more often than all other operations together
        kwargs = kwargs or {}
        result = None if _is_idle(func, args, kwargs) else func(*args, **kwargs)
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        component = self._component()
        for tensor in made:
            self._see(tensor, slot_of(component, "host" if self._on_host else "temporaries"))
        if not self._on_host:
            self._pass(self._workspace(func, args), slot_of(component, "temporaries"))
            self._work.count(func, args, kwargs, result, made, component, PHASES[self._phase])
        return result

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Put what happens inside under a phase's name."""
        before, self._phase = self._phase, PHASES.index(name)
        self._events.append((0, 0, -1, self._phase, False))  # a phase that makes nothing holds what was there
        yield
        self._phase = before

    @contextmanager
    def component(self, name: str) -> Iterator[None]:
        """Put what is made inside, and later in its backward, under a component's name."""
        self._enter(name)
        yield
        self._leave()

    @contextmanager
    def host(self) -> Iterator[None]:
        """Count what is made inside as the host's memory: on a GPU it would live there."""
        before, self._on_host = self._on_host, True
        yield
        self._on_host = before

    @contextmanager
    def saved_as_activations(self) -> Iterator[None]:
        """Label as activations whatever autograd saves for backward inside."""
        with saved_tensors_hooks(self._pack, lambda tensor: tensor):
            yield

    def follow(self, module: nn.Module, component: str) -> None:
        """Put a module's forward, and its backward, under a component's name from now on."""
        module.register_forward_pre_hook(lambda *_: self._enter(component))
        module.register_forward_hook(lambda *_: self._leave())

    def label(self, tensors: Iterable[Tensor], component: str, kind: str) -> None:
        """Say what tensors are, whether they have been seen yet or not."""
        for tensor in tensors:
            self._relabel(tensor, slot_of(component, kind))

    def label_device(self, tensors: Iterable[Tensor], component: str, kind: str) -> None:
        """Say what those tensors are that live on the device; the host's stay the host's."""
        self.label((tensor for tensor in tensors if not self._is_on_host(tensor)), component, kind)

    def ledger(self, batch_size: int = 1) -> Ledger:
        """Give what was logged so far."""
        size, slot, block, phase, relabels = map(np.array, zip(*self._events, strict=True))
        order = sort_frees(size, block, relabels)
        return Ledger(size[order], slot[order], block[order], phase[order], relabels[order], batch_size=batch_size)

    def work(self) -> Work:
        """Give the arithmetic and traffic counted so far."""
        return self._work.result()

    def _see(self, tensor: Tensor, slot: int) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._alive and storage.nbytes():
            entry = [storage.nbytes(), slot, next(self._numbers), weakref.ref(storage, lambda _: self._forget(key))]
            self._alive[key] = entry
            self._log(entry[0], entry)

    def _is_on_host(self, tensor: Tensor) -> bool:
        entry = self._alive.get(tensor.untyped_storage()._cdata)
        return entry is not None and entry[1] % len(KINDS) == KINDS.index("host")

    def _pass(self, size: int, slot: int) -> None:
        if size:
            entry = [size, slot, next(self._numbers), None]
            self._log(size, entry)
            self._log(-size, entry)

    def _forget(self, key: int) -> None:
        entry = self._alive.pop(key)
        self._log(-entry[0], entry)

    def _relabel(self, tensor: Tensor, slot: int) -> None:
        entry = self._alive.get(tensor.untyped_storage()._cdata)
        if entry is None:
            self._see(tensor, slot)
        elif entry[1] != slot:
            self._log(-entry[0], entry, relabels=True)
            entry[1] = slot
            self._log(entry[0], entry, relabels=True)

    def _log(self, size: int, entry: list, relabels: bool = False) -> None:
        self._events.append((size, entry[1], entry[2], self._phase, relabels))

    def _pack(self, tensor: Tensor) -> Tensor:
        entry = self._alive.get(tensor.untyped_storage()._cdata)
        if entry is not None and entry[1] % len(KINDS) == _TEMPORARY:
            self._relabel(tensor, entry[1] - _TEMPORARY + _ACTIVATION)
        return tensor

    def _enter(self, component: str) -> None:
        self._components.append(component)
        self._mark()

    def _leave(self) -> None:
        self._components.pop()
        self._mark()

    def _mark(self) -> None:
        self._marks.append((torch._C._autograd._get_sequence_nr(), self._components[-1]))

    def _component(self) -> str:
        """Whose operation runs now: in backward, of whoever made the graph's node in forward."""
        node = torch._C._current_autograd_node()
        if node is None:
            return self._components[-1]
        if node.name().endswith("AccumulateGrad"):
            return self._owner(node.variable)
        return self._marks[bisect.bisect_right(self._marks, (node._sequence_nr(), "~")) - 1][1]

    def _owner(self, tensor: Tensor) -> str:
        entry = self._alive.get(tensor.untyped_storage()._cdata)
        return COMPONENTS[entry[1] // len(KINDS)] if entry else "other"


def _is_idle(func, args: tuple, kwargs: dict) -> bool:
    """Whether an operation has nothing to do: on fake tensors, one that only changes numbers, as an optimizer's update."""
    return not func._schema.returns and any(isinstance(leaf, FakeTensor) for leaf in tree_leaves((args, kwargs)))
