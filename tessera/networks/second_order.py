"""Layers whose gradients are differentiated again, as the training of energies asks for.

PyTorch's fused attention has no second derivative, and its GELU takes some thirty passes over the
activations for one. What is here gives the same numbers with less: attention keeps q, k and v only
and computes its weights anew, a few images at a time, whenever they are needed; GELU has its second
derivative in closed form; and whole blocks may be recomputed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel

from tessera.networks.layers import full_precision
from tessera.networks.transformer import DiTBlock, modulate

AttentionKind = Literal["recompute", "explicit", "math"]
"""How attention is made differentiable twice.

recompute: attention weights are computed anew in every pass, for a few images at a time; explicit:
products and softmax, all of whose results are kept; math: PyTorch's unfused kernel. The numbers
are the same.
"""

_CHUNK_CPU, _CHUNK = 1 << 20, 1 << 26
"""Attention weights in memory at a time: as many as caches hold, and as GPUs are busy with."""
_PIECE = 1 << 16
"""Numbers of an elementwise piece that stays in the cache of a core."""


def attend_twice(qkv: Tensor, kind: AttentionKind) -> Tensor:
    """softmax(q k^T / sqrt(d)) v of qkv [N, n, 3, heads, d], as [N, n, heads, d]."""
    if kind == "recompute" and not torch.compiler.is_compiling():
        output: Tensor = _applied(_Attention, qkv)
        return output
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind()
    if kind == "math":
        with sdpa_kernel(SDPBackend.MATH):
            return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    weights = ((q * q.shape[-1] ** -0.5) @ k.mT).softmax(dim=-1).to(v.dtype)
    return torch.matmul(weights, v).transpose(1, 2)


def _applied(function: type[Function], *arguments: Any) -> Any:
    """`function.apply`, which PyTorch leaves without types in some versions."""
    apply: Callable[..., Any] = function.apply
    return apply(*arguments)


class _Attention(Function):
    """Fused attention; its gradient is a function of its own, so that it has one, too."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor) -> Tensor:
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind()
        output = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        ctx.save_for_backward(qkv)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (qkv,) = ctx.saved_tensors
        return _applied(_AttentionGradient, qkv, gradient)


class _AttentionGradient(Function):
    """(qkv, dO) to d(qkv).

    With S = s q k^T, P = softmax(S), dP = dO v^T: dS = P (dP - rowsum(P dP)), dq = s dS k,
    dk = s dS^T q, dv = P^T dO.
    """

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(qkv, gradient)
        result = torch.empty_like(qkv)
        with full_precision(qkv.device):
            for part in _chunks(qkv):
                q, k, v = _heads(qkv[part])
                d = _matrices(gradient[part])
                q = q * q.shape[-1] ** -0.5
                p = _weights(q, k)
                dp = _wide(d @ v.mT)
                ds = _softmax_gradient(p, dp).to(q.dtype)
                p = p.to(q.dtype)
                scaled = (ds @ k).mul_(k.shape[-1] ** -0.5)
                _put(result[part], scaled, ds.mT @ q, p.mT @ d)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, cotangent: Tensor) -> Any:
        """With a, b, e the cotangents of dq, dk and dv: those of qkv and of dO.

        Z = s (a k^T + q b^T) is that of dS, Y = P (Z - r) with r = rowsum(P Z) that of dP, and
        X = Z (dP - D) - r dP + dO e^T with D = rowsum(P dP) that of P.
        """
        qkv, gradient = ctx.saved_tensors
        of_qkv, of_gradient = torch.empty_like(qkv), torch.empty_like(gradient)
        with full_precision(qkv.device):
            for part in _chunks(qkv):
                (q, k, v), (a, b, e) = _heads(qkv[part]), _heads(cotangent[part])
                d = _matrices(gradient[part])
                scale = q.shape[-1] ** -0.5
                q, a = q * scale, a * scale
                p = _weights(q, k)
                dp = _wide(d @ v.mT)
                z = _wide(torch.cat([a, q], dim=-1) @ torch.cat([k, b], dim=-1).mT)
                r = (p * z).sum(dim=-1, keepdim=True)
                x = _wide(d @ e.mT).addcmul_(r, dp, value=-1)
                ds = dp.sub_((p * dp).sum(dim=-1, keepdim=True))
                x.addcmul_(z, ds)
                y = z.sub_(r).mul_(p).to(q.dtype)
                w = _softmax_gradient(p, x).to(q.dtype)
                ds, p = ds.mul_(p).to(q.dtype), p.to(q.dtype)
                dq = (ds @ b).add_(w @ k).mul_(scale)
                dk = (ds.mT @ a).add_(w.mT @ q)
                _put(of_qkv[part], dq, dk, y.mT @ d)
                rows = (p @ e).add_(y @ v)
                of_gradient[part] = _spans(rows, d.shape[0] // qkv.shape[3])
        return of_qkv, of_gradient


def _chunks(qkv: Tensor) -> Iterator[slice]:
    """Spans whose attention weights are computed together."""
    count, tokens, _, heads, _ = qkv.shape
    limit = _CHUNK_CPU if qkv.device.type == "cpu" else _CHUNK
    step = max(1, limit // (heads * tokens**2))
    yield from (slice(first, first + step) for first in range(0, count, step))


def _heads(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[N, n, 3, heads, d] as three times [N heads, n, d]."""
    q, k, v = (_matrices(part) for part in qkv.unbind(dim=2))
    return q, k, v


def _matrices(x: Tensor) -> Tensor:
    """[N, n, heads, d] as [N heads, n, d]; a view of one span."""
    return x.transpose(1, 2).flatten(0, 1)


def _spans(x: Tensor, count: int) -> Tensor:
    """[N heads, n, d] as [N, n, heads, d]; `_matrices` undone."""
    return x.reshape(count, -1, *x.shape[1:]).transpose(1, 2)


def _put(target: Tensor, *parts: Tensor) -> None:
    """Write q, k and v [N heads, n, d] into [N, n, 3, heads, d]."""
    for index, part in enumerate(parts):
        target[:, :, index] = _spans(part, len(target))


def _weights(q: Tensor, k: Tensor) -> Tensor:
    """softmax(q k^T), at least float32."""
    return _wide(q @ k.mT).softmax(dim=-1)


def _wide(x: Tensor) -> Tensor:
    """x as float32 at least; a tensor of its own only if it was not."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _softmax_gradient(p: Tensor, gradient: Tensor) -> Tensor:
    """The gradient by the scores, from the weights p and the gradient by them."""
    result: Tensor = torch._softmax_backward_data(gradient, p, -1, p.dtype)
    return result


def gelu_twice(x: Tensor) -> Tensor:
    """GELU in its tanh form."""
    if torch.compiler.is_compiling():
        return F.gelu(x, approximate="tanh")
    output: Tensor = _applied(_Gelu, x)
    return output


class _Gelu(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return F.gelu(x, approximate="tanh")

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return _applied(_GeluGradient, x, gradient)


class _GeluGradient(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(x, gradient)
        result: Tensor = torch.ops.aten.gelu_backward(gradient, x, approximate="tanh")
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, cotangent: Tensor) -> Any:
        x, gradient = ctx.saved_tensors
        of_gradient = torch.ops.aten.gelu_backward(cotangent, x, approximate="tanh")
        of_x = torch.empty_like(x, memory_format=torch.contiguous_format)
        flat = [t.reshape(-1) for t in (x, gradient, cotangent)]
        step = _PIECE if x.device.type == "cpu" else max(1, x.numel())
        target = of_x.view(-1)
        for first in range(0, x.numel(), step):
            piece, g, a = (t[first : first + step] for t in flat)
            target[first : first + step] = _gelu_second(piece).mul_(g).mul_(a)
        return of_x, of_gradient


def _gelu_second(x: Tensor) -> Tensor:
    """Second derivative of x s(v), v = 2 sqrt(2 / pi) (x + c x^3), where s is the sigmoid.

    s (1 - s) (2 v' + x (v'' + v'^2 (1 - 2 s))).
    """
    scale, c = 2 * math.sqrt(2 / math.pi), 0.044715
    x = _wide(x)
    square = x * x
    s = torch.sigmoid((square * (scale * c)).add_(scale).mul_(x))
    slope = square.mul_(3 * scale * c).add_(scale)  # v'
    bend = torch.addcmul(x * (6 * scale * c), slope.square(), 1 - 2 * s)
    bend = slope.mul_(2).addcmul_(x, bend)
    return bend.mul_(s).mul_(1 - s)


class TwiceBlock(DiTBlock):
    """A DiT block whose gradient by its tokens can be differentiated again; the same parameters.

    Args:
        width, heads, mlp_ratio: see `DiTBlock`.
        attention: how attention is made differentiable twice.
        recompute: keep the block's input only, and compute the rest again in each of the passes.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        mlp_ratio: float = 4.0,
        *,
        attention: AttentionKind = "recompute",
        recompute: bool = False,
    ) -> None:
        super().__init__(width, heads, mlp_ratio)
        self.attention, self.recompute = attention, recompute

    def twice(self, h: Tensor, c: Tensor, span: int) -> Tensor:
        """As `forward`, for outputs whose gradient by h is differentiated again."""
        if not self.recompute or torch.compiler.is_compiling():
            return self._twice(h, c, span)

        def run(tokens: Tensor, condition: Tensor) -> Tensor:
            return self._twice(tokens, condition, span)

        return recomputed(run, h, c, self)

    def _twice(self, h: Tensor, c: Tensor, span: int) -> Tensor:
        s1, k1, g1, s2, k2, g2 = self.adaLN_modulation(c)[:, None].to(h.dtype).chunk(6, dim=-1)
        h = torch.addcmul(h, g1, self._attend(modulate(h, s1, k1), span))
        hidden = gelu_twice(self.mlp.fc1(modulate(h, s2, k2)))
        return torch.addcmul(h, g2, self.mlp.fc2(hidden))

    def _attend(self, x: Tensor, span: int) -> Tensor:
        batch, tokens, width = x.shape
        qkv = self.attn.qkv(x).reshape(-1, span, 3, self.attn.heads, width // self.attn.heads)
        output: Tensor = self.attn.proj(
            attend_twice(qkv, self.attention).reshape(batch, tokens, width)
        )
        return output


Run = Callable[[Tensor, Tensor], Tensor]


def recomputed(run: Run, h: Tensor, c: Tensor, owner: nn.Module) -> Tensor:
    """run(h, c), of which only h and c are kept, also while its gradient is differentiated.

    PyTorch's checkpoints keep what they recompute for the first gradient until the second has been
    taken. The gradient that is differentiated again is that by h alone: c and the parameters get
    theirs in the last pass.

    Args:
        run: a function of h and c with the parameters of `owner`.
    """
    kind = h.device.type
    known = torch.amp.is_autocast_available(kind)
    dtype = torch.get_autocast_dtype(kind) if known else torch.float32
    enabled = known and torch.is_autocast_enabled(kind)

    def again(tokens: Tensor, condition: Tensor) -> Tensor:
        # Backward passes happen outside of the caller's autocast.
        with torch.autocast(kind, dtype) if enabled else full_precision(h.device):
            return run(tokens, condition)

    parameters = [p for p in owner.parameters() if p.requires_grad]
    output: Tensor = _applied(_Recomputed, again, h, c, *parameters)
    return output


class _Recomputed(Function):
    @staticmethod
    def forward(ctx: Any, run: Run, h: Tensor, c: Tensor, *parameters: Tensor) -> Tensor:
        ctx.run, ctx.parameters = run, parameters
        ctx.save_for_backward(h, c)
        return run(h, c)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        h, c = ctx.saved_tensors
        if torch.is_grad_enabled():  # this gradient will be differentiated
            of_h = _applied(_RecomputedGradient, ctx.run, h, c, gradient, *ctx.parameters)
            return None, of_h, None, *(None for _ in ctx.parameters)
        h, c = _leaves(h, c)
        with torch.enable_grad():
            output = ctx.run(*_views(h, c))
        return None, *_gradients(output, (h, c, *ctx.parameters), gradient)


class _RecomputedGradient(Function):
    """(h, c, d run(h, c)) to dh."""

    @staticmethod
    def forward(
        ctx: Any, run: Run, h: Tensor, c: Tensor, gradient: Tensor, *parameters: Tensor
    ) -> Tensor:
        ctx.run, ctx.parameters = run, parameters
        ctx.save_for_backward(h, c, gradient)
        (h,) = _leaves(h)
        with torch.enable_grad():
            output = run(*_views(h, c.detach()))
        return torch.autograd.grad(output, h, gradient)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, cotangent: Tensor) -> Any:
        h, c, gradient = _leaves(*ctx.saved_tensors)
        with torch.enable_grad():
            output = ctx.run(*_views(h, c))
            (of_h,) = torch.autograd.grad(output, h, gradient, create_graph=True)
        return None, *_gradients(of_h, (h, c, gradient, *ctx.parameters), cotangent)


def _leaves(*tensors: Tensor) -> list[Tensor]:
    return [tensor.detach().requires_grad_() for tensor in tensors]


def _views(*tensors: Tensor) -> list[Tensor]:
    """No leaves: hooks on modules' inputs, as of FLOP counters, refuse them inside of backward."""
    return [tensor.view_as(tensor) for tensor in tensors]


def _gradients(
    output: Tensor, inputs: tuple[Tensor, ...], gradient: Tensor
) -> tuple[Tensor | None, ...]:
    return torch.autograd.grad(output, inputs, gradient, allow_unused=True)
