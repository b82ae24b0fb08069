"""Exact joint attention over fewer tokens, for pipelines without T5.

Without its third text encoder, diffusers' SD3 pipeline appends `max_sequence_length` zero embeddings. They have no
positions, so they stay alike in every layer: n equal keys weigh in a softmax as one key whose logit is raised by log n.
One token with that bias gives the same velocity, to rounding: on the built-in world 41 tokens do the work of 296.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from diffusers import SD3Transformer2DModel
from diffusers.models.attention_processor import Attention, JointAttnProcessor2_0
from torch import Tensor


class RepeatedTokenProcessor(JointAttnProcessor2_0):
    """SD3's joint attention in which the last context token stands for `repeats` equal ones."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        repeats: int = 1,
    ) -> Tensor | tuple[Tensor, Tensor]:
        if repeats == 1 or encoder_hidden_states is None:
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask)

        def heads(x: Tensor) -> Tensor:
            return x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)

        def normed(norm: torch.nn.Module | None, x: Tensor) -> Tensor:
            return x if norm is None else norm(x)

        image, context = hidden_states, encoder_hidden_states
        query = [heads(attn.to_q(image)), heads(attn.add_q_proj(context))]
        key = [heads(attn.to_k(image)), heads(attn.add_k_proj(context))]
        query = [normed(norm, x) for norm, x in zip((attn.norm_q, attn.norm_added_q), query, strict=True)]
        key = [normed(norm, x) for norm, x in zip((attn.norm_k, attn.norm_added_k), key, strict=True)]
        value = [heads(attn.to_v(image)), heads(attn.add_v_proj(context))]
        query, key, value = (torch.cat(parts, dim=2) for parts in (query, key, value))
        mixed = _attention(query, key, value, math.log(repeats)).transpose(1, 2).flatten(2)
        image, context = mixed.split([image.shape[1], context.shape[1]], dim=1)
        image = attn.to_out[1](attn.to_out[0](image))
        return image, context if attn.context_pre_only else attn.to_add_out(context)


def _attention(query: Tensor, key: Tensor, value: Tensor, last: float) -> Tensor:
    """softmax(q k / sqrt(d) + bias) v over (B, heads, T, d), with the bias `last` on the last key.

    Written out on the CPU: there, the backward of the fused kernel takes half of a training step at so few tokens.
    """
    bias = query.new_zeros(key.shape[2])
    bias[-1] = last
    if query.device.type != "cpu":
        return F.scaled_dot_product_attention(query, key, value, attn_mask=bias.expand(1, 1, 1, -1))
    batch = query.shape[:2]
    query, key, value = (x.flatten(0, 1) for x in (query, key, value))
    scores = torch.baddbmm(bias, query, key.transpose(1, 2), alpha=key.shape[-1] ** -0.5)
    return torch.bmm(scores.softmax(-1), value).unflatten(0, batch)


def allow_repeats(transformer: SD3Transformer2DModel) -> None:
    """Lets `joint_attention_kwargs={"repeats": n}` through to the joint attention; without it nothing changes."""
    for block in transformer.transformer_blocks:
        block.attn.set_processor(RepeatedTokenProcessor())
        if block.attn2 is not None:  # of the image alone, in SD3.5-medium: it is told too, and has nothing to repeat
            block.attn2.set_processor(RepeatedTokenProcessor())
