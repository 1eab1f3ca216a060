"""The optimisers and the learning-rate schedule."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from engine.train.model import ModelConfig, Qwen3
from engine.train.optim import (
    AdamW,
    Muon,
    learning_rate_factor,
    orthogonalize,
    split_parameters,
)


@pytest.mark.parametrize("shape", [(2, 20, 60), (3, 60, 20), (1, 32, 32)])
def test_orthogonalize_keeps_directions_and_evens_out_lengths(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 1e-3
    u, s, vt = torch.linalg.svd(x, full_matrices=False)
    result = orthogonalize(x)
    in_basis = u.mT @ result @ vt.mT
    lengths = torch.diagonal(in_basis, dim1=-2, dim2=-1)
    clear = s > 0.05 * s.amax(dim=-1, keepdim=True)  # tinier ones need more iterations
    assert lengths[clear].min() > 0.5
    assert lengths.max() < 1.3
    torch.testing.assert_close(in_basis, torch.diag_embed(lengths), atol=1e-3, rtol=0)


def test_muon_moves_every_direction_alike() -> None:
    parameter = nn.Parameter(torch.zeros(8, 8))
    parameter.grad = torch.diag(torch.logspace(0, -1, 8))
    Muon({"w": parameter}, peak_lr=0.1).step(0.5)
    moved = -torch.diagonal(parameter.detach())
    assert (moved > 0.03).all()
    assert (moved < 0.07).all()


def test_adamw_matches_torch() -> None:
    torch.manual_seed(0)
    ours, theirs = (nn.Parameter(torch.ones(5)) for _ in range(2))
    optimizer = AdamW({"w": ours}, peak_lr=0.02, eps=1e-8)
    reference = torch.optim.AdamW([theirs], lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0)
    for _ in range(20):
        gradient = torch.randn(5)
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        optimizer.step(0.5)
        reference.step()
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_both_minimise_a_quadratic() -> None:
    torch.manual_seed(0)
    target = torch.randn(6, 9)
    for make in (Muon, AdamW):
        parameter = nn.Parameter(torch.zeros(6, 9))
        optimizer = make({"w": parameter}, peak_lr=0.3)
        for step in range(200):
            parameter.grad = parameter.detach() - target
            optimizer.step(1 - step / 200)
        assert (parameter - target).abs().max() < 0.1


def test_embeddings_and_norms_are_left_to_adamw() -> None:
    model = Qwen3(ModelConfig(32, 16, 24, 1, 2, 1, 8, 64))
    matrices, others = split_parameters(model)
    assert len(matrices) == 7
    assert all(name.endswith("proj.weight") for name in matrices)
    assert "model.embed_tokens.weight" in others
    assert len(matrices) + len(others) == len(list(model.parameters()))


@given(st.floats(0, 1), st.floats(0, 0.4), st.floats(0.05, 0.5))
def test_schedule_stays_in_bounds(progress: float, warmup: float, decay: float) -> None:
    assert 0 <= learning_rate_factor(progress, warmup=warmup, decay=decay) <= 1


def test_schedule_rises_stays_and_falls_to_zero() -> None:
    points = [0.0, 0.05, 0.1, 0.5, 0.6, 0.8, 1.0]
    factors = [learning_rate_factor(p, warmup=0.1, decay=0.4) for p in points]
    assert factors == pytest.approx([0, 0.5, 1, 1, 1, 0.5, 0])
