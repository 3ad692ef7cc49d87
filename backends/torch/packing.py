"""Weights in oneDNN's own layout, kept for as long as the plain ones live.

oneDNN's integer kernels read a weight that :func:`linear_weight` or :func:`conv_weight` has packed: an opaque tensor
that cannot be saved. So artifacts hold plain int8 codes, and the packed copy is made at the first call. It costs about
the bytes of the codes once more (narrow ones more: oneDNN pads channels to a multiple of its block).
"""

from __future__ import annotations

import functools
import operator
import threading
import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import fx

from qcompiler.errors import InputError

_Packs = dict[Hashable, tuple[int, torch.Tensor]]


class PackedWeights:
    """Packed copies by the storage of the plain weight, so that views and re-wrapped parameters share one.

    A copy is made again when the weight was written to (its version counter moved), and goes when the storage of the
    weight is freed. Writes through ``.data`` or NumPy move no counter: call :meth:`clear` after them.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # The wrapper of a storage lives as long as the storage itself, so a weak reference to it ends with the data.
        self._known: dict[int, tuple[weakref.ref[torch.UntypedStorage], _Packs]] = {}

    def __len__(self) -> int:
        """How many packed copies are held."""
        return sum(len(packs) for _, packs in list(self._known.values()))

    @property
    def nbytes(self) -> int:
        """Bytes of all packed copies."""
        return sum(nbytes_of(p) for _, packs in list(self._known.values()) for _, p in list(packs.values()))

    def clear(self) -> None:
        """Forget every copy; the next call packs anew."""
        with self._lock:
            self._known.clear()

    def get(self, weight: torch.Tensor, key: Hashable, pack: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """The packed form of ``weight``: itself where it is packed already, a copy that is kept, or ``pack(weight)``.

        ``key`` is what the packed form depends on besides the weight.
        """
        if weight.is_mkldnn:
            return weight
        storage = weight.untyped_storage()
        key = (weight.storage_offset(), weight.shape, weight.stride(), key)
        version = -1 if weight.is_inference() else weight._version
        found = self._found(storage, key, version)
        if found is not None:
            return found
        with self._lock:
            found = self._found(storage, key, version)  # another thread may have packed it meanwhile
            if found is None:
                found = pack(weight)
                self._packs(storage)[key] = (version, found)
            return found

    def _found(self, storage: torch.UntypedStorage, key: Hashable, version: int) -> torch.Tensor | None:
        entry = self._known.get(storage._cdata)
        if entry is None or entry[0]() is not storage:
            return None
        kept = entry[1].get(key)
        return kept[1] if kept is not None and kept[0] == version else None

    def _packs(self, storage: torch.UntypedStorage) -> _Packs:
        at, known = storage._cdata, self._known
        entry = known.get(at)
        if entry is not None and entry[0]() is storage:
            return entry[1]

        def freed(_: weakref.ref[torch.UntypedStorage]) -> None:
            # May run inside any allocation, so it takes no lock; a dict gives up a key in one step.
            known.pop(at, None)

        packs: _Packs = {}
        known[at] = (weakref.ref(storage, freed), packs)
        return packs


PACKED = PackedWeights()
"""What the ops of this process hold."""


def linear_weight(weight: torch.Tensor) -> torch.Tensor:
    """int8 codes ``[N, K]`` as the kernel of a linear layer reads them; the packed tensor says its shape is ``[K, N]``.

    Raises InputError for other element types, and where this torch was built without oneDNN.
    """
    _check(weight, "a linear layer")
    packed: torch.Tensor = torch.ops.onednn.qlinear_prepack(weight.detach().contiguous(), None)
    return packed


def conv_weight(
    weight: torch.Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int
) -> torch.Tensor:
    """int8 codes ``[O, I / groups, *kernel]`` as the kernel of that very convolution reads them.

    Of a 1-D convolution the packed tensor has one more axis. Raises what :func:`linear_weight` raises.
    """
    _check(weight, "a convolution")
    # Neither the scales nor the activation's parameters change what is packed.
    scales = torch.ones(weight.shape[0], dtype=torch.float32, device="cpu")
    plain = weight.detach().contiguous()
    packed: torch.Tensor = torch.ops.onednn.qconv_prepack(
        plain, scales, 1.0, 0, stride, padding, dilation, groups, None
    )
    return packed


def nbytes_of(packed: torch.Tensor) -> int:
    """Bytes of a packed weight."""
    return int(torch.ops.mkldnn._nbytes(packed))


def pack(module: fx.GraphModule) -> int:
    """Put packed weights in the place of the plain ones that only ``qlinear`` and ``qconv`` read.

    Such a module holds one copy of its weights instead of two, and can no longer be saved or exported. Returns how
    many weights were packed; those that other calls read too, or convolutions of different strides, stay plain.
    """
    readers: dict[str, list[fx.Node]] = {}
    for node in module.graph.nodes:
        if node.op == "get_attr":
            readers.setdefault(str(node.target), []).extend(node.users)
    count = 0
    for name, users in readers.items():
        plain = operator.attrgetter(name)(module)
        keys = {_key(user, plain, name) for user in users}
        key = keys.pop() if len(keys) == 1 else None
        if key is None or plain.is_mkldnn:
            continue
        home, _, leaf = name.rpartition(".")
        owner = module.get_submodule(home)
        delattr(owner, leaf)
        owner.register_buffer(leaf, linear_weight(plain) if key == () else conv_weight(plain, *key), persistent=False)
        count += 1
    return count


def _key(user: fx.Node, plain: object, name: str) -> tuple[Any, ...] | None:
    """What the packed form of a weight depends on where ``user`` reads it: (), or how a convolution goes over it."""
    weight = user.args[3] if len(user.args) > 3 else None
    if not isinstance(plain, torch.Tensor) or not isinstance(weight, fx.Node) or str(weight.target) != name:
        return None
    if user.target is torch.ops.qcompiler.qlinear.default:
        return ()
    if user.target is torch.ops.qcompiler.qconv.default:
        return tuple(tuple(a) if isinstance(a, list | tuple) else a for a in user.args[6:10])
    return None


def _check(weight: torch.Tensor, what: str) -> None:
    if weight.dtype is not torch.int8:
        raise InputError(f"the weight of {what} has {weight.dtype} codes; oneDNN's integer kernels take torch.int8")
    here: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if not here or not hasattr(torch.ops.onednn, "qlinear_prepack"):
        raise InputError(f"torch {torch.__version__} has no oneDNN here, which computes {what} on 8-bit codes")
    if _saturates():
        raise InputError(
            f"oneDNN computes {what} on 8-bit codes wrongly here: without VNNI (a chip that lacks it, or "
            "ONEDNN_MAX_CPU_ISA) its products saturate in 16 bits; compile the model for this chip, with weights "
            "quantized only"
        )


@functools.cache
def _saturates() -> bool:
    """Whether the largest products that codes can have come out short; told by one small product, once a process."""
    k = 64
    with torch.device("cpu"):
        x, weight = torch.full((1, k), 255, dtype=torch.uint8), torch.full((16, k), 127, dtype=torch.int8)
        one, zero = torch.ones((), dtype=torch.float32), torch.zeros((), dtype=torch.int32)
        scales, zeros = torch.ones(16, dtype=torch.float32), torch.zeros(1, dtype=torch.int64)
    operands = (x, one, zero, torch.ops.onednn.qlinear_prepack(weight, None), scales, zeros, None)
    y = torch.ops.onednn.qlinear_pointwise.tensor(*operands, 1.0, 0, torch.float32, "none", [], "")
    return float(y.min()) != 255 * 127 * k
