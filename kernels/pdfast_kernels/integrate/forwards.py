"""The forwards that `accelerate` sets. One class for each sort of module: `kind`, for people; `why_not(module)`, the
reason to leave it; `forward(self, ...)`, whose self is the module.

Sub-modules are called as modules, so that their hooks, adapters and wrappers run, and parameters are read on each call.
Whether a norm and its SiLU run as one is decided on each call too: hooks on one of them, or a forward set by somebody
else, keep them apart. All are named `forward`, for pickle, which then finds the class's own. TorchScript cannot compile them
and quotes their first lines, which say what to do.
"""

import dis
import functools
import inspect
from collections.abc import Callable
from itertools import pairwise
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from pdfast_kernels.integrate.recognition import (
    code_names,
    forward_class,
    instance_forward,
    is_own,
    qualified_name,
    unknown_version,
    why_not_group_norm,
)
from pdfast_kernels.ops.attention.attention import attention
from pdfast_kernels.ops.group_norm.group_norm import group_norm

_SILU = nn.SiLU.forward  # as it was at the import: one that is put in its place later is another


def is_silu(module: nn.Module | None) -> bool:
    return isinstance(module, nn.SiLU) and type(module).forward is _SILU


def why_not_fused(norm: nn.Module, activation: nn.Module) -> str | None:
    """Return why a GroupNorm and a SiLU after it do not run as one."""
    if _silu_fuses(norm, activation) and is_own(nn.SiLU):
        return None
    if _hooked(norm) or _hooked(activation):
        return "GroupNorm and SiLU stay apart: one has hooks, which would see another tensor"
    return "GroupNorm and SiLU stay apart: one has a forward of its own"


def _hooked(module: nn.Module) -> bool:
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return bool(hooks) or bool(_has_any_global_hook())


def _called_as_usual(module: nn.Module) -> bool:
    return type(module).__call__ is nn.Module.__call__


def _film_fuses(norm: nn.Module) -> bool:
    return instance_forward(norm) is GroupNorm.forward and _called_as_usual(norm) and not _hooked(norm)


def _silu_fuses(norm: nn.Module, activation: nn.Module) -> bool:
    plain = is_silu(activation) and instance_forward(activation) is None and _called_as_usual(activation)
    return plain and not _hooked(activation) and _film_fuses(norm)


def _norm_silu(
    norm: nn.Module, silu: nn.Module, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None
) -> Tensor:
    """silu(norm(x) * (1 + scale) + shift), scale and shift [N, C]."""
    if _silu_fuses(norm, silu):
        return norm(x, scale=scale, shift=shift, silu=True)
    if scale is None or shift is None:
        return silu(norm(x))
    return silu(norm(x) * (1 + scale[:, :, None, None]) + shift[:, :, None, None])


def _divided(x: Tensor, factor: float) -> Tensor:
    return x if factor == 1 else x / factor


class GroupNorm:
    kind = "GroupNorm"

    @staticmethod
    def why_not(norm: Any) -> str | None:
        return why_not_group_norm(norm)

    def forward(  # before torch.jit.script: pdfast_kernels.restore(model)
        self: Any, input: Tensor, *, scale: Tensor | None = None, shift: Tensor | None = None, silu: bool = False
    ):
        return group_norm(input, self.num_groups, self.weight, self.bias, self.eps, scale=scale, shift=shift, silu=silu)


class Sequential:
    kind = "GroupNorm + SiLU"

    @staticmethod
    def pairs(sequential: nn.Sequential) -> list[tuple[nn.Module, nn.Module]]:
        return [(a, b) for a, b in pairwise(sequential) if isinstance(a, nn.GroupNorm) and isinstance(b, nn.SiLU)]

    @staticmethod
    def why_not(sequential: nn.Sequential) -> str | None:
        if not is_own(nn.Sequential):
            return "Sequential.forward was replaced by somebody else's"
        reasons = [why_not_fused(*pair) for pair in Sequential.pairs(sequential)]
        return None if None in reasons else reasons[0]

    # The SiLU's own forward stays: there is code that slices a Sequential, and puts something between the two.
    def forward(self: Any, input: Tensor) -> Tensor:
        modules = list(self)
        done = False
        for module, following in zip(modules, [*modules[1:], None], strict=True):
            if done:
                done = False
            elif following is not None and _silu_fuses(module, following):
                input, done = module(input, silu=True), True
            else:
                input = module(input)
        return input


class ResnetBlock2D:
    """Of diffusers."""

    kind = "ResnetBlock2D: GroupNorm (+ FiLM) + SiLU"
    known = """len get deprecate norm1 nonlinearity upsample shape contiguous downsample conv1 time_emb_proj
        skip_time_act time_embedding_norm norm2 ValueError torch chunk dropout conv2 conv_shortcut training
        output_scale_factor"""

    @staticmethod
    def why_not(block: Any) -> str | None:
        if reason := unknown_version(forward_class(block), "forward", ResnetBlock2D.known):
            return reason
        if block.time_embedding_norm not in ("default", "scale_shift"):
            return f"time_embedding_norm is {block.time_embedding_norm!r}"
        if not is_silu(block.nonlinearity):
            return f"its activation is {type(block.nonlinearity).__name__}, not SiLU"
        return why_not_fused(block.norm1, block.nonlinearity) or why_not_fused(block.norm2, block.nonlinearity)

    def forward(  # before torch.jit.script: pdfast_kernels.restore(model)
        self: Any, input_tensor: Tensor, temb: Tensor | None, *args, **kwargs
    ) -> Tensor:
        scale_shift = self.time_embedding_norm == "scale_shift"
        if args or kwargs or (temb is None) != (self.time_emb_proj is None) or (scale_shift and temb is None):
            return type(self).forward(self, input_tensor, temb, *args, **kwargs)
        x, h = input_tensor, _norm_silu(self.norm1, self.nonlinearity, input_tensor)
        if self.upsample is not None:
            if len(x) >= 64:  # as in diffusers: nearest-neighbour upsampling of large channels-last batches went wrong
                x, h = x.contiguous(), h.contiguous()
            x, h = self.upsample(x), self.upsample(h)
        elif self.downsample is not None:
            x, h = self.downsample(x), self.downsample(h)
        h = self.conv1(h)

        scale = shift = None
        if self.time_emb_proj is not None:
            temb = self.time_emb_proj(temb if self.skip_time_act else self.nonlinearity(temb))
            if scale_shift:
                scale, shift = temb.expand(len(h), -1).chunk(2, dim=1)
            else:
                h = h + temb[:, :, None, None]
        h = _norm_silu(self.norm2, self.nonlinearity, h, scale, shift)
        h = self.conv2(self.dropout(h))
        # While training, diffusers makes x contiguous here. No value depends on it; it copies a channels-last x.
        x = x if self.conv_shortcut is None else self.conv_shortcut(x)
        return _divided(x + h, self.output_scale_factor)


class Attention:
    """Of diffusers."""

    kind = "self-attention"
    known = "set inspect signature processor __call__ parameters keys items len logger warning __class__ __name__"
    processor = "diffusers.models.attention_processor.AttnProcessor2_0"
    known_of_processor = """len get deprecate spatial_norm ndim shape view transpose prepare_attention_mask heads
        group_norm to_q norm_cross norm_encoder_hidden_states to_k to_v norm_q norm_k F scaled_dot_product_attention
        reshape to dtype to_out residual_connection rescale_output_factor"""
    others = ("norm_q", "norm_k", "spatial_norm", "added_kv_proj_dim")

    @staticmethod
    def why_not(block: Any) -> str | None:
        return (
            unknown_version(forward_class(block), "forward", Attention.known)
            or Attention.not_now(block)
            or unknown_version(type(block.processor), "__call__", Attention.known_of_processor)
        )

    @staticmethod
    def not_now(block: Any) -> str | None:
        """Asked on each call: processors come and go."""
        if block.is_cross_attention:
            return "cross attention: its keys and values are of another tensor"
        if qualified_name(type(block.processor)) != Attention.processor:
            return f"its processor is {type(block.processor).__name__}, not AttnProcessor2_0"
        for name in Attention.others:
            if getattr(block, name, None) is not None:
                return f"it has {name}"
        kv_dim = getattr(block, "inner_kv_dim", block.inner_dim)
        if block.to_k is None or block.to_out is None or kv_dim != block.inner_dim:
            return "it has other projections than to_q, to_k, to_v and to_out of one size"
        return None

    def forward(  # before torch.jit.script: pdfast_kernels.restore(model)
        self: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **kwargs,
    ) -> Tensor:
        plain = encoder_hidden_states is None and attention_mask is None and all(name == "temb" for name in kwargs)
        if not plain or Attention.not_now(self):
            return type(self).forward(self, hidden_states, encoder_hidden_states, attention_mask, **kwargs)
        x = hidden_states
        h = x.flatten(2) if x.dim() == 4 else x.transpose(1, 2)  # [N, C, L]; a view of channels-last images
        if self.group_norm is not None:
            h = self.group_norm(h)
        h = h.transpose(1, 2)
        q, k, v = (projection(h).unflatten(2, (self.heads, -1)) for projection in (self.to_q, self.to_k, self.to_v))
        h = self.to_out[0](attention(q, k, v).flatten(2))
        h = self.to_out[1](h)
        if x.dim() == 4:
            h = h.transpose(1, 2).unflatten(2, x.shape[2:])
        return _divided(h + x if self.residual_connection else h, self.rescale_output_factor)


class _Fused:
    """A UNet as its own forward sees it: the norm at its end does the work of the SiLU too. For all others both stay apart."""

    def __init__(self, unet: Any) -> None:
        self._unet = unet

    def __getattr__(self, name: str) -> Any:
        return getattr(self._unet, name)

    def conv_norm_out(self, x: Tensor) -> Tensor:
        return _norm_silu(self._unet.conv_norm_out, self._unet.conv_act, x)

    def conv_act(self, x: Tensor) -> Tensor:
        return x


class UNet:
    """Of diffusers: the end, which the forward of the whole network calls."""

    kind = "GroupNorm + SiLU at its end"

    @staticmethod
    def has_end(unet: Any) -> bool:
        norm, activation = getattr(unet, "conv_norm_out", None), getattr(unet, "conv_act", None)
        return isinstance(norm, nn.GroupNorm) and isinstance(activation, nn.SiLU)

    @staticmethod
    def why_not(unet: Any) -> str | None:
        cls = forward_class(unet)
        theirs = inspect.unwrap(vars(cls)["forward"])
        if not is_own(cls):
            return f"{cls.__name__}.forward was replaced by somebody else's"
        stored = {i.argval for i in dis.get_instructions(theirs) if i.opname in ("STORE_ATTR", "DELETE_ATTR")}
        if ("conv_norm_out", "conv_act") not in pairwise(code_names(theirs)) or stored:
            return f"{cls.__name__}.forward is of an unknown version"
        return why_not_fused(unet.conv_norm_out, unet.conv_act)

    @staticmethod
    @functools.cache
    def around(theirs: Callable) -> Callable:
        """Return the forward to set, with the signature of their class's."""

        @functools.wraps(theirs)
        def forward(self, *args, **kwargs):  # before torch.jit.script: pdfast_kernels.restore(model)
            return theirs(_Fused(self), *args, **kwargs)

        return forward
