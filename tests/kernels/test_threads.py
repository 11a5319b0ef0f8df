"""The kernels' own threads."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from scheduler.kernels.library import Product
from scheduler.kernels.native import kernels


@pytest.fixture
def product() -> Product:
    return Product(kernels().pack([torch.randn(700, 256)], None, "int8"))


def test_calls_from_several_threads_take_turns(product: Product) -> None:
    inputs = [torch.randn(rows, 256) for rows in (1, 3, 40, 7) * 5]
    expected = [product(x) for x in inputs]
    with ThreadPoolExecutor(6) as pool:
        for _ in range(20):
            found = pool.map(lambda x: product(x, num_threads=4), inputs)
            assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))


def test_more_threads_than_cores_and_then_fewer(product: Product) -> None:
    x = torch.randn(30, 256)
    expected = product(x)
    for num_threads in (64, 1, 3, 64, 2):
        assert torch.equal(product(x, num_threads=num_threads), expected)
    try:
        kernels().limit_threads(1)
        assert torch.equal(product(x, num_threads=64), expected)
    finally:
        kernels().limit_threads(1024)


def test_a_process_that_was_forked_has_threads_again(product: Product) -> None:
    x = torch.randn(30, 256)
    expected = product(x, num_threads=4)
    child = os.fork()
    if child == 0:  # no test goes on in here
        os._exit(0 if torch.equal(product(x, num_threads=4), expected) else 1)
    assert os.waitpid(child, 0)[1] == 0
