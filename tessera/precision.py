"""The arithmetic of networks: what a device multiplies natively, and what `auto` makes of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:  # recipes are listed without PyTorch
    import torch

Concrete = Literal["fp32", "bf16", "fp16"]
Precision = Literal["auto", "fp32", "bf16", "fp16"]


def fast_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the processor multiplies it natively, elsewhere float32.

    In emulation bfloat16 is many times slower than float32 (on CPUs with AVX2 only, 8 times for
    convolutions and 40 times for products of matrices).
    """
    import torch

    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "cpu" and hasattr(torch.cpu, "get_capabilities"):
        found = torch.cpu.get_capabilities()
        native = bool(found.get("avx512_bf16") or found.get("amx_bf16"))
    else:
        native = False
    return torch.bfloat16 if native else torch.float32


def _is_fast(device: torch.device) -> bool:
    import torch

    return fast_dtype(device) == torch.bfloat16


def resolve(precision: Precision, device: torch.device, *, together: bool = False) -> Concrete:
    """What `auto` is on a device: bf16 where `fast_dtype` says so, else fp32; others stay.

    Args:
        together: bf16 only if it is fast on the devices of all processes, which all must ask.

    Example:
        >>> import torch
        >>> resolve("fp16", torch.device("cpu"))
        'fp16'
    """
    if precision != "auto":
        return precision
    fast = _is_fast(device)
    if together:
        from tessera import distributed

        fast = all(distributed.gather(fast))
    return "bf16" if fast else "fp32"


def reason(asked: Precision, device: torch.device) -> str:
    """Why a network computes as it does on `device`, in a few words."""
    here = "this processor" if device.type == "cpu" else "this device"
    native = _is_fast(device)
    if asked == "auto":
        return f"auto: {here} multiplies bfloat16 " + (
            "natively" if native else "in emulation only"
        )
    if (asked == "bf16" and not native) or (asked == "fp16" and device.type == "cpu"):
        return f"as the recipe says, though {here} multiplies it in emulation only, and fp32 faster"
    return "as the recipe says"


def autocast(device: torch.device, precision: Concrete) -> torch.autocast:
    """The context in which a network computes in `precision`; its weights stay float32."""
    import torch

    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype, enabled=precision != "fp32")
