"""Products with a weight in the processor's own order."""
from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fairseq_earm.ebm import products
from fairseq_earm.ebm.products import Product, Products, bf16_helps


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [0, 1, 3, 7, 64, 130, 700])
def test_large_and_small_weights_give_the_product(rows, bias):
    torch.manual_seed(1)
    for out, inside in ((1024, 256), (5, 3)):
        weight = torch.randn(out, inside)
        offset = torch.randn(out) if bias else None
        product, x = Product(weight, offset), torch.randn(rows, inside)
        exact = F.linear(x.double(), weight.double(), None if offset is None else offset.double())
        assert torch.allclose(product(x).double(), exact, rtol=1e-4, atol=1e-4)
        assert (product.packed is not None) is (products._can_pack() and weight.numel() >= products.LEAST)


def test_any_number_of_rows_takes_few_kernels():
    """A kernel is kept for each number of rows: in training that would be hundreds of megabytes."""
    kernels = set()
    for rows in range(5000):
        sizes = products.block_sizes(rows)
        assert sum(sizes) == rows
        kernels |= {products.kernel_rows(size) for size in sizes}
        assert all(size <= products.kernel_rows(size) < size + products.STEP for size in sizes)
    assert len(kernels) < 25


def test_only_what_gains_is_packed():
    large = torch.randn(1024, 256)
    assert Product(large.double()).packed is None and Product(large.bfloat16()).packed is None
    with torch.autocast("cpu", torch.bfloat16):
        product = Product(large)
        assert product.packed is None and product(torch.randn(2, 256)).dtype == torch.bfloat16


def test_a_torch_without_such_products_is_served_too(monkeypatch):
    def missing(*_):
        raise AttributeError("no such operator")

    monkeypatch.setattr(products, "_pack", missing)
    products._can_pack.cache_clear()
    try:
        weight, x = torch.randn(1024, 256), torch.randn(3, 256)
        assert torch.equal(Product(weight)(x), F.linear(x, weight))
    finally:
        products._can_pack.cache_clear()


@pytest.mark.skipif(not bf16_helps(torch.device("cpu")), reason="this processor does not multiply in bfloat16")
@pytest.mark.parametrize("bias", [True, False])
def test_bfloat16_is_for_large_products_of_float32(bias):
    torch.manual_seed(1)
    linear, x = torch.nn.Linear(256, 1024, bias=bias), torch.randn(7, 256)
    quick, exact = Products(bf16=True).of(linear)(x), linear(x)
    assert quick.dtype == torch.float32
    assert 1e-5 < (quick - exact).abs().max() < 0.05
    joined = Products(bf16=True).joined([linear, linear], (1.0, 0.5))(x)
    assert torch.allclose(joined, torch.cat([exact, 0.5 * exact], 1), atol=0.05)
    small = torch.nn.Linear(16, 16, bias=bias)
    assert torch.equal(Products(bf16=True).of(small)(x[:, :16]), small(x[:, :16]))
    assert Products(bf16=True).of(linear.double())(x.double()).dtype == torch.float64
