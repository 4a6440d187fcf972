import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from raysys.train.loss import distilled_softmax_loss, full_softmax_loss, gbce_loss, sampled_softmax_loss
from raysys.train.negatives import Negatives


def _problem(P=37, N=50, D=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(P, D, generator=generator, requires_grad=True)
    vectors = torch.randn(N, D, generator=generator, requires_grad=True)
    return states, vectors, torch.randint(0, N, (P,), generator=generator)


def _gradients(loss, *tensors):
    return torch.autograd.grad(loss, tensors)


@pytest.mark.parametrize("chunk", [1, 10, 37, 1000])
def test_full_softmax_is_cross_entropy_over_all_items(chunk):
    states, vectors, targets = _problem()
    expected = F.cross_entropy(states @ vectors.T, targets, reduction="sum")
    loss = full_softmax_loss(states, vectors, targets, chunk=chunk)
    torch.testing.assert_close(loss, expected)
    for found, wanted in zip(_gradients(3 * loss, states, vectors), _gradients(3 * expected, states, vectors)):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_bfloat16_softmax_is_close_and_returns_float32():
    states, vectors, targets = _problem()
    expected = full_softmax_loss(states, vectors, targets)
    loss = full_softmax_loss(states, vectors, targets, dtype=torch.bfloat16)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=0.01)
    for found, wanted in zip(_gradients(loss, states, vectors), _gradients(expected, states, vectors)):
        assert found.dtype == torch.float32
        assert (found - wanted).norm() < 0.01 * wanted.norm()


def test_full_softmax_of_no_positions_is_zero():
    states, vectors, targets = _problem(P=0)
    loss = full_softmax_loss(states, vectors, targets)
    grad_states, grad_vectors = _gradients(loss, states, vectors)
    assert loss.item() == 0 and grad_states.shape == (0, 8) and not grad_vectors.any()


@pytest.mark.parametrize("chunk", [10, 1000])
def test_items_that_are_left_out_take_no_probability_unless_they_are_the_target(chunk):
    states, vectors, targets = _problem()
    seen = torch.randint(0, 50, (37, 6), generator=torch.Generator().manual_seed(3))
    seen[:5, 0] = targets[:5]
    left_out = torch.zeros(37, 50, dtype=torch.bool).scatter_(1, seen, True).scatter_(1, targets[:, None], False)
    expected = F.cross_entropy((states @ vectors.T).masked_fill(left_out, float("-inf")), targets, reduction="sum")
    loss = full_softmax_loss(states, vectors, targets, seen=lambda rows: seen[rows], chunk=chunk)
    torch.testing.assert_close(loss, expected)
    for found, wanted in zip(_gradients(loss, states, vectors), _gradients(expected, states, vectors)):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_hopeless_target_gives_a_finite_loss():
    states, vectors = torch.tensor([[1000.0]]), torch.tensor([[1.0], [-1.0]])
    assert math.isfinite(full_softmax_loss(states, vectors, torch.tensor([1])).item())


@pytest.mark.parametrize("skewed", [False, True])
def test_sampled_softmax_tends_to_full_softmax(skewed):
    states, vectors, targets = _problem(N=20)
    weights = torch.arange(1.0, 21.0) if skewed else torch.ones(20)
    negatives = torch.multinomial(weights, 200_000, replacement=True, generator=torch.Generator().manual_seed(1))
    log_expected = (200_000 * weights / weights.sum()).log()[negatives] if skewed else math.log(200_000 / 20)
    loss = sampled_softmax_loss(states, vectors[targets], vectors[negatives], targets, negatives, log_expected)
    expected = F.cross_entropy(states @ vectors.T, targets, reduction="sum")
    assert loss.item() == pytest.approx(expected.item(), rel=0.01)
    found, wanted = _gradients(loss, vectors)[0], _gradients(expected, vectors)[0]
    assert (found - wanted).norm() < 0.03 * wanted.norm()


@pytest.mark.parametrize("hidden", [False, True])
def test_distilled_softmax_is_cross_entropy_to_the_mixture(hidden):
    states, vectors, targets = _problem()
    taught, told, _ = _problem(D=5, seed=1)
    seen = torch.randint(0, 50, (37, 6), generator=torch.Generator().manual_seed(3))
    left_out = torch.zeros(37, 50, dtype=torch.bool).scatter_(1, seen, hidden).scatter_(1, targets[:, None], False)
    goal = 0.3 * F.one_hot(targets, 50) + 0.7 * (taught @ told.T).masked_fill(left_out, float("-inf")).softmax(dim=1)
    log_probs = (states @ vectors.T).masked_fill(left_out, float("-inf")).log_softmax(dim=1)
    expected = -(goal * log_probs.masked_fill(left_out, 0.0)).sum()
    given = {"teacher_states_PD": taught.detach(), "teacher_vectors_ND": told.detach(), "share": 0.7}
    loss = distilled_softmax_loss(states, vectors, targets, **given, seen=(lambda rows: seen[rows]) if hidden else None, chunk=10)
    torch.testing.assert_close(loss, expected)
    for found, wanted in zip(_gradients(3 * loss, states, vectors), _gradients(3 * expected, states, vectors)):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    nothing = distilled_softmax_loss(states, vectors, targets, **{**given, "share": 0.0})
    torch.testing.assert_close(nothing, full_softmax_loss(states, vectors, targets))


def test_gbce_by_hand_and_at_its_ends():
    """Every item a negative once: the rate is 1, so beta is 1 whatever the calibration, and the loss is plain binary cross-entropy."""
    states, vectors, targets = _problem(P=5, N=6)
    every = torch.arange(6)
    logits = states @ vectors.T
    is_target = F.one_hot(targets, 6).bool()
    expected = F.binary_cross_entropy_with_logits(logits, is_target.float(), reduction="sum")
    for calibration in (0.0, 0.75):
        loss = gbce_loss(states, vectors[targets], vectors, targets, every, 6, calibration)
        torch.testing.assert_close(loss, expected)
    two = torch.tensor([0, 1])  # rate 2 / 5; beta = .4 (.75 (1 - 2.5) + 2.5) = .55
    positive = -F.logsigmoid(logits[is_target]).sum()
    negative = F.softplus(logits[:, :2].masked_fill(is_target[:, :2], float("-inf"))).sum()
    for calibration, beta in ((0.0, 1.0), (0.75, 0.55), (1.0, 0.4)):
        loss = gbce_loss(states, vectors[targets], vectors[two], targets, two, 6, calibration)
        torch.testing.assert_close(loss, beta * positive + negative)


@pytest.mark.parametrize("sampling", ["uniform", "log_uniform", "mixed"])
def test_negatives_are_drawn_as_often_as_expected(sampling):
    counts = np.array([5, 50, 0, 20, 5, 1, 1, 1])
    negatives = Negatives(sampling, counts)
    assert np.exp(negatives.log_probs).sum() == pytest.approx(1.0, abs=1e-5)
    drawn = negatives.draw(200_000, np.random.default_rng(0))
    expected = np.exp(negatives.log_expected(np.arange(8), 200_000))
    np.testing.assert_allclose(np.bincount(drawn, minlength=8), expected, rtol=0.05)
    assert (expected[1] > 1.5 * expected[2]) == (sampling != "uniform")
    states, vectors, targets = _problem(N=8)
    rows, log_expected = torch.from_numpy(drawn), torch.from_numpy(negatives.log_expected(drawn, len(drawn)))
    loss = sampled_softmax_loss(states, vectors[targets], vectors[rows], targets, rows, log_expected)
    assert loss.item() == pytest.approx(F.cross_entropy(states @ vectors.T, targets, reduction="sum").item(), rel=0.01)


def test_accidental_hits_do_not_count_as_negatives():
    states, vectors, targets = _problem()
    negatives = targets[:1].repeat(5)
    loss = sampled_softmax_loss(states, vectors[targets], vectors[negatives], targets, negatives, 0.0)
    alone = sampled_softmax_loss(states[:1], vectors[targets[:1]], vectors[negatives], targets[:1], negatives, 0.0)
    assert alone.item() == 0.0
    assert loss.item() > 0.0
