"""The ranker in its form for answering: the figures of the network, whatever the batch."""

import numpy as np
import pytest
import torch

from raysys.models.base import Candidates
from raysys.models.frozen_ranker import FrozenRanker, freeze_ranker
from raysys.models.ranker import Ranker, RankerConfig, RankerNetwork
from raysys.queries import Queries

N, K, SOURCES = 40, 30, ("a", "b", "c")


def _ranker(content: int) -> Ranker:
    """Every weight and statistic random: heads start at zero, and would hide what goes wrong before them."""
    generator = torch.Generator().manual_seed(0)

    def table(width: int) -> torch.Tensor:
        return torch.cat([torch.randn(N, width, generator=generator), torch.zeros(1, width)])

    network = RankerNetwork(table(8), table(content), torch.rand(N + 1, generator=generator), len(SOURCES), RankerConfig(max_history=6))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
        network.mean.copy_(torch.randn(network.num_dense, generator=generator))
        network.std.copy_(0.5 + torch.rand(network.num_dense, generator=generator))
    return Ranker(network, SOURCES, calibration=(1.2, -0.3))


def _asked() -> tuple[Queries, Candidates]:
    rng = np.random.default_rng(1)
    lengths = (3, 0, 9, 1, 6, 2, 20)
    queries = Queries.from_lists([rng.integers(0, N, length).tolist() for length in lengths])
    items = np.stack([rng.permutation(N)[:K] for _ in lengths]).astype(np.int32)
    fused, log_probs = -rng.random((len(lengths), K)) * 30, -rng.random((len(lengths), K, len(SOURCES))) * 30
    items[1, 5:], fused[1, 5:], log_probs[1, 5:] = -1, -np.inf, -np.inf
    return queries, Candidates(items, fused.astype(np.float32), log_probs.astype(np.float32), SOURCES)


@pytest.mark.parametrize("content", [0, 5])
def test_a_frozen_ranker_says_the_same(content):
    plain, frozen = _ranker(content), _ranker(content)
    freeze_ranker(frozen)
    assert isinstance(frozen.logits, FrozenRanker)
    queries, candidates = _asked()
    expected, found = plain.score(queries, candidates), frozen.score(queries, candidates)
    assert np.ptp(expected[0][0]) > 1, "logits that hardly differ could not tell a wrong one"
    for wanted, given in zip(expected, found, strict=True):
        np.testing.assert_allclose(given, wanted, atol=1e-4, rtol=1e-4)
    assert [part.shape for part in frozen.score(queries[:0], candidates[slice(0, 0)])] == [(0, K), (0, K)]
    for row in range(len(queries)):
        alone = frozen.score(queries[row : row + 1], candidates[slice(row, row + 1)])
        for wanted, given in zip(expected, alone, strict=True):
            np.testing.assert_allclose(given[0], wanted[row], atol=1e-4, rtol=1e-4)


def test_a_ranker_that_moves_computes_by_its_network_again():
    ranker = _ranker(0)
    freeze_ranker(ranker)
    ranker.to("cpu")
    assert not isinstance(ranker.logits, FrozenRanker)
