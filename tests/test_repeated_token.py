"""One weighted token equals many equal ones, in value and in gradient."""

import tiny
import torch

from sd3_adrpo.models.repeated_token import allow_repeats
from sd3_adrpo.shapes.flow_model import build_transformer


def test_equals_the_stock_transformer_with_all_tokens():
    torch.manual_seed(0)
    transformer = build_transformer()
    noisy, time = torch.randn(3, 16, 8, 8), torch.tensor([990.0, 500.0, 20.0])
    words, pooled = torch.randn(3, 24, 128), torch.randn(3, 128)
    many = torch.cat([words, torch.zeros(3, 256, 128)], dim=1)
    one = torch.cat([words, torch.zeros(3, 1, 128)], dim=1)
    weight = transformer.transformer_blocks[0].attn.add_k_proj.weight

    def run(embeds: torch.Tensor, **extra) -> tuple[torch.Tensor, torch.Tensor]:
        velocity = transformer(noisy, embeds, pooled, time, return_dict=False, **extra)[0]
        return velocity, torch.autograd.grad(velocity.square().mean(), weight)[0]

    expected, gradient = run(many)
    allow_repeats(transformer)
    folded, folded_gradient = run(one, joint_attention_kwargs={"repeats": 256})
    torch.testing.assert_close(folded, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(folded_gradient, gradient, atol=1e-5, rtol=1e-3)
    unfolded, _ = run(many)  # without the argument the processor is the stock one
    assert torch.equal(unfolded, expected)
    assert (run(one)[0] - expected).abs().max() > 1e-3  # the weight matters


def test_second_attentions_are_told_without_a_warning(caplog):
    """SD3.5-medium's blocks have an attention of the image alone, which gets the argument too."""
    transformer = tiny.transformer(dual=True)
    allow_repeats(transformer)
    config = transformer.config
    noisy, time = torch.randn(1, config.in_channels, 8, 8), torch.tensor([500.0])
    embeds, pooled = torch.randn(1, 5, config.joint_attention_dim), torch.randn(1, config.pooled_projection_dim)
    many = torch.cat([embeds, embeds[:, -1:].expand(-1, 3, -1)], dim=1)
    expected = transformer(noisy, many, pooled, time, return_dict=False)[0]
    folded = transformer(noisy, embeds, pooled, time, joint_attention_kwargs={"repeats": 4}, return_dict=False)[0]
    torch.testing.assert_close(folded, expected, atol=1e-5, rtol=0)
    assert not caplog.records
