"""Sampling from a model whose parameters are there only while they are asked for."""
from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from torch import nn

from fairseq_earm.sampling.ancestral import AncestralSampler
from fairseq_earm.sampling.isolation import gathered, isolated
from fairseq_earm.sampling.search import GeneratorSampler
from tests.tiny_model import tiny_batch, tiny_model


class Flattened(nn.Module):
    """The inner of the two wrappers that fairscale puts around a module."""

    def __init__(self, module):
        super().__init__()
        self.module = module


class Sharded(nn.Module):
    """As fairscale's FullyShardedDataParallel: parameters that no inner wrapper has are gone outside its forward."""

    def __init__(self, module):
        super().__init__()
        self.wrapped = Flattened(module)
        self.calls = self.summoned = 0
        self.own = [parameter for parameter in module.parameters() if parameter.numel() > 0]
        self.kept = [parameter.data for parameter in self.own]
        self.free()

    @property
    def module(self):
        return self.wrapped

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.wrapped.module, name)

    def gather(self):
        for parameter, data in zip(self.own, self.kept):
            parameter.data = data

    def free(self):
        for parameter in self.own:
            parameter.data = torch.empty(0)

    def forward(self, *args, **kwargs):
        self.calls += 1
        self.gather()
        try:
            return self.wrapped.module(*args, **kwargs)
        finally:
            self.free()

    @contextmanager
    def summon_full_params(self, recurse=True, volatile=False):
        assert recurse and volatile
        wrappers = [module for module in self.modules() if isinstance(module, Sharded)]
        for wrapper in wrappers:
            wrapper.summoned += 1
            wrapper.gather()
        try:
            yield
        finally:
            for wrapper in wrappers:
                wrapper.free()


def sharded_model(decoder_too):
    """The tiny model in a wrapper, its layers in wrappers of their own, and its decoder around them if so asked."""
    model = tiny_model().train()
    for part in (model.encoder, model.decoder):
        part.layers[0] = Sharded(part.layers[0])
    if decoder_too:
        model.decoder = Sharded(model.decoder)
    return Sharded(model)


def wrappers(model):
    return [module for module in model.modules() if isinstance(module, Sharded)]


@pytest.mark.parametrize("decoder_too", [False, True])
@pytest.mark.parametrize("kind", [AncestralSampler, GeneratorSampler])
def test_a_sharded_model_is_gathered_once_and_draws_what_the_whole_one_does(kind, decoder_too):
    whole, model = tiny_model(), sharded_model(decoder_too)
    sampler = kind(whole.decoder.dictionary, max_len_a=0.0, max_len_b=4)
    torch.manual_seed(3)
    expected = sampler(whole, tiny_batch(whole), negatives=50)
    before = wrappers(model)
    found = sampler(model, tiny_batch(whole), negatives=50)
    assert torch.equal(found.tokens, expected.tokens) and torch.equal(found.log_q, expected.log_q)
    # A wrapper that is called waits for the other workers, which may have drawn the end long before.
    assert wrappers(model) == before and [(wrapper.summoned, wrapper.calls) for wrapper in before] == [(1, 0)] * len(before)
    assert all(module.training for module in model.modules())
    assert all(parameter.numel() == 0 for parameter in model.parameters())


def test_a_failure_leaves_a_sharded_model_as_it_was():
    model = sharded_model(decoder_too=True)
    before = wrappers(model)
    with pytest.raises(KeyError):
        with gathered(model):
            assert wrappers(model) == [model] and all(parameter.numel() > 0 for parameter in model.parameters())
            raise KeyError
    assert wrappers(model) == before and all(parameter.numel() == 0 for parameter in model.parameters())


def test_mixed_precision_keeps_its_gradients():
    model = tiny_model().float().train()
    net_input = tiny_batch(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with isolated(model, net_input["src_tokens"]):
            model.encoder(**net_input)
        model.encoder(**net_input)["encoder_out"][0].float().sum().backward()
    weights = [p for name, p in model.encoder.named_parameters() if "fc1.weight" in name or "q_proj.weight" in name]
    assert weights and all(weight.grad is not None for weight in weights)
