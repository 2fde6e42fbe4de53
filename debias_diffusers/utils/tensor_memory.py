"""Memory of tensors by counting: what a computation takes at most, on any device, without computing it; and the way to a device."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

# Layers of UNets that autocast computes in float32 on a GPU, but not on a CPU.
_FLOAT32_ON_CUDA = ("group_norm", "layer_norm")


def sent(values: Tensor, device: Any) -> Tensor:
    """A tensor of the CPU on its way to a device, behind what was launched before and without a wait for it.

    For MPS it is waited for: that would read the memory when it may have been freed (https://github.com/pytorch/pytorch/issues/189690).
    """
    return values.to(device, non_blocking=torch.device(device).type != "mps")


class MemoryCounter(TorchDispatchMode):
    """Counts the bytes of the tensors that operations make within it, from when they are made until they are freed."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, Any] = {}  # a weak reference to each storage by its address

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Computes an operation, and counts what it returns in memory of its own."""
        tree_map_only(Tensor, self._ignore, (args, kwargs))  # what was there before, of which the result may be a view
        result = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._count, result)
        return result

    def _ignore(self, tensor: Tensor) -> None:
        self._know(tensor.untyped_storage(), 0)

    def _count(self, tensor: Tensor) -> None:
        self._know(tensor.untyped_storage(), tensor.untyped_storage().nbytes())

    def _know(self, storage: torch.UntypedStorage, size: int) -> None:
        address = storage._cdata
        if address in self._known:
            return
        self.now += size
        self.peak = max(self.peak, self.now)
        self._known[address] = weakref.ref(storage, lambda _: self._free(address, size))

    def _free(self, address: int, size: int) -> None:
        del self._known[address]
        self.now -= size


@contextlib.contextmanager
def _norms_in_float32() -> Iterator[None]:
    """Normalization layers compute in float32, as autocast has it on a GPU; not as a TorchFunctionMode, which backward suspends."""
    before = {name: getattr(nn.functional, name) for name in _FLOAT32_ON_CUDA}

    def in_float32(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *args, **kwargs: function(*tree_map_only(Tensor, Tensor.float, args), **tree_map_only(Tensor, Tensor.float, kwargs))

    for name, function in before.items():
        setattr(nn.functional, name, in_float32(function))
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(nn.functional, name, function)


@contextlib.contextmanager
def _without_memory(network: nn.Module) -> Iterator[None]:
    """Tensors within are fake ones of the CPU, which only know what they would be; a network on the meta device becomes one of them."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        meta = dict(network.named_parameters())
        fake = {name: torch.empty(p.shape, dtype=p.dtype, device="cpu").requires_grad_(p.requires_grad) for name, p in meta.items()}
        network.load_state_dict(fake, strict=False, assign=True)
        try:
            yield
        finally:
            network.load_state_dict(meta, strict=False, assign=True)


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


def backward_peak(
    network: nn.Module,
    forward: Callable[[], Tensor],
    device_type: str,
    half: torch.dtype | None,
    gradients: Literal["made", "kept", "dropped"],
) -> int:
    """Bytes that forward and backward take at most: activations, copies of the weights for autocast, and gradients.

    Args:
        network: on the meta device, as it is after this, too.
        forward: calls the network, on the CPU.
        device_type: of the device that is meant.
        half: the dtype of autocast; None without.
        gradients: whether they are made by this backward, are all there beforehand (gradient accumulation, DistributedDataParallel), or
            are dropped one after the other (as what is kept of them elsewhere is counted there).
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(_without_memory(network))
        if half is not None and device_type == "cuda":
            stack.enter_context(_norms_in_float32())
        counter = stack.enter_context(MemoryCounter())
        for parameter in (p for p in network.parameters() if p.requires_grad):
            if gradients == "kept":
                parameter.grad = torch.empty_like(parameter)
            elif gradients == "dropped":
                parameter.register_post_accumulate_grad_hook(_drop_gradient)
        with torch.autocast("cpu", half, enabled=half is not None):
            output = forward()
        output.float().square().mean().backward()
        peak: int = counter.peak
        return peak
