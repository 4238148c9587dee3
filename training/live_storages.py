"""Counts the bytes of tensors that operations have made and that are still alive, on any device, meta included."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveStorages(TorchDispatchMode):
    """While it is active, every storage that an operation makes is counted once, for as long as anything holds it:
    autograd's saved tensors, activation checkpointing's, what autograd functions keep, and what the caller does.

    Args:
        known: tensors that are there already, which operations give back as views.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self._known = {storage_identity(tensor) for tensor in known}
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0
        """The largest total after an operation, since this was last set to 0."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        made = False
        for tensor in tree_leaves(out):
            if not isinstance(tensor, Tensor) or (key := storage_identity(tensor)) in self._known or key in self._made:
                continue
            # The weak reference keeps the key from being given to another storage.
            storage, made = tensor.untyped_storage(), True
            self._made[key] = StorageWeakRef(storage), storage.nbytes()
        if made:
            self.peak = max(self.peak, self.total())
        return out

    def total(self) -> int:
        """Bytes that are alive."""
        self._made = {key: entry for key, entry in self._made.items() if not entry[0].expired()}
        return sum(size for _, size in self._made.values())


def storage_identity(tensor: Tensor) -> int:
    """Storages on the meta device have no address to tell them apart by."""
    return tensor.untyped_storage()._cdata
