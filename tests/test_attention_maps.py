"""The weights of attention that `attention_maps` records."""

from __future__ import annotations

import pytest
import torch

from genkernels.models import GPT, T5, GPTConfig, T5Config, attention_maps


@pytest.mark.parametrize("fused", [True, False])
def test_maps_are_the_softmax_of_the_scores(fused):
    torch.manual_seed(0)
    model = GPT(GPTConfig(30, 12, num_layers=2, num_heads=3, embedding_dim=24), fused).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    input = torch.randint(30, (2, 9))
    inputs = {}
    for block in model.blocks:
        block.attention.register_forward_pre_hook(lambda m, args: inputs.update({m: args[0]}))
    with torch.no_grad():
        expected = model(input)
        with attention_maps(model) as maps:
            torch.testing.assert_close(model(input), expected)
        assert list(maps) == ["blocks.0.attention", "blocks.1.attention"]
        for name, weights in maps.items():
            attention = model.get_submodule(name)
            query, key, _ = attention.qkv(inputs[attention]).chunk(3, dim=-1)
            query, key = (x.unflatten(-1, (3, 8)).transpose(1, 2) for x in (query, key))
            scores = query @ key.mT / 8**0.5
            scores = scores.masked_fill(torch.ones(9, 9).tril() == 0, float("-inf"))
            torch.testing.assert_close(weights, scores.softmax(-1))
        maps.clear()
        model(input)
        assert not maps, "after the block nothing is recorded"


def test_maps_of_an_encoder_and_a_decoder():
    model = T5(T5Config(20, num_layers=1, num_heads=2, embedding_dim=16, feedforward_dim=16)).eval()
    lengths = torch.tensor([5, 3])
    with torch.no_grad(), attention_maps(model) as maps:
        model(torch.randint(20, (2, 5)), torch.randint(20, (2, 4)), lengths)
    sizes = {name: list(weights.shape) for name, weights in maps.items()}
    assert sizes == {
        "encoder.0.attention": [2, 2, 5, 5],
        "decoder.0.attention": [2, 2, 4, 4],
        "decoder.0.cross_attention": [2, 2, 4, 5],
    }
    for weights in maps.values():
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))
    assert not maps["decoder.0.attention"].triu(1).any()
    assert not maps["decoder.0.cross_attention"][1, :, :, 3:].any(), "beyond the source's length"
