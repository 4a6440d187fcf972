"""The mixture of the sources kept in step with the stream: weights and temperatures that explain the newest events better.

The events are ones that no source has learnt yet, so a source that went stale, or
became the best, shows it here first. The step is a maximum a posteriori
estimate: log loss of what users did next among the items they could be
answered, and a prior at the present mixture that many events outweigh and few
do not. No more than the events of one round is looked at; what earlier ones
said is in the mixture that the step starts from.

Legend: V events, P items that can matter for one of them, S sources, G temperatures of a grid.
"""

from collections.abc import Callable, Collection, Mapping

import numpy as np
import torch
from torch import Tensor

from raysys.models.fusion import Fusion, Pools

LEAST_WEIGHT = 0.01
"""A source starts a step with this weight at least: one of weight 0 could never come back."""
NEW_TEMPERATURE = 0.35
"""Of a source that is new, relative to the distance of its first from its hundredth score."""
GRID = tuple(2.0**power for power in range(-4, 5))
"""Temperatures, relative to the present ones, between which normalisers are interpolated; a step stays within them."""
STEPS = 40
STEP_SIZE = 0.15
KEEP = 30
"""Best items a source that are looked at."""


class Evidence:
    """What the sources said about some events before any of them had learnt from these.

    Args:
        fusion: the present mixture, from which steps start.
        sources: name -> scores of a slice of the V events, (b, N) float32; only these get weight.
        targets: (V,) int64 item rows of what was done, in time order.
        allowed: slice -> (b, N) bool mask of items that could be answered.
        fixed: sources whose temperatures stay.
    """

    def __init__(
        self,
        fusion: Fusion,
        sources: Mapping[str, Callable[[slice], np.ndarray]],
        targets: np.ndarray,
        allowed: Callable[[slice], np.ndarray],
        *,
        fixed: Collection[str] = (),
    ):
        self.movable = torch.tensor([float(name not in fixed) for name in sources])
        self.fusion, self.names = fusion, list(sources)
        pools = Pools(sources, targets, allowed, keep=KEEP, chunk=128)
        # A source that is new to the mixture has no temperature yet.
        self.temperatures = {name: fusion.temperatures.get(name, NEW_TEMPERATURE * pools.spread[name]) for name in self.names}
        self.hits = pools.hits
        scaled = [pools.scores[name] / self.temperatures[name] for name in self.names]
        self.scores_VPS = torch.from_numpy(np.stack(scaled, axis=2).astype(np.float32))
        grid = [[pools.log_normaliser(name, self.temperatures[name] * factor) for factor in GRID] for name in self.names]
        self.normalisers_SGV = torch.from_numpy(np.array(grid, np.float32))
        self.valid_VP = torch.from_numpy(pools.valid)

    def refitted(self, *, prior_events: float, first: int | None = None) -> Fusion:
        """The mixture after the events.

        Args:
            prior_events: how many events the present mixture counts for; larger is slower.
            first: use the oldest so many events only; all when None.
        """
        used = np.flatnonzero(self.hits[:first])
        if not len(used) or not torch.isfinite(self.normalisers_SGV).all():
            return self.fusion  # nothing to learn from, or a source is broken and the gate says which
        rows = torch.from_numpy(used)
        start = torch.tensor([max(self.fusion.weights.get(name, 0.0), LEAST_WEIGHT) for name in self.names]).log()
        log_weights, log_warmth = start.clone().requires_grad_(), torch.zeros(len(start), requires_grad=True)
        # Ranks do not change when all of the mixture's logarithms are stretched, but the loss does: how sure it is, is learnt and left.
        sharpness = torch.zeros((), requires_grad=True)
        optimizer = torch.optim.Adam([log_weights, log_warmth, sharpness], lr=STEP_SIZE)
        data = self.scores_VPS[rows], self.normalisers_SGV[:, :, rows], self.valid_VP[rows]
        for step in range(STEPS):
            for group in optimizer.param_groups:
                group["lr"] = STEP_SIZE * (1 - step / STEPS)
            moved = (log_weights - start).square().sum() + log_warmth.square().sum()
            loss = _log_loss(*data, log_weights, log_warmth * self.movable, sharpness) + prior_events / len(used) * moved / 2
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        # What ends below where it started from nothing is not worth the time it would cost in every answer.
        weights = [weight if weight > LEAST_WEIGHT / 2 else 0.0 for weight in torch.softmax(log_weights.detach(), 0).tolist()]
        warmth = _bounded(log_warmth.detach() * self.movable).exp().tolist()
        moved_temperatures = {name: self.temperatures[name] * factor for name, factor in zip(self.names, warmth, strict=True)}
        return Fusion.of(dict(zip(self.names, weights, strict=True)), {**self.fusion.temperatures, **moved_temperatures})


def _bounded(log_warmth: Tensor) -> Tensor:
    return log_warmth.clamp(float(np.log(GRID[0])), float(np.log(GRID[-1])))


def _log_loss(
    scores_VPS: Tensor, normalisers_SGV: Tensor, valid_VP: Tensor, log_weights: Tensor, log_warmth: Tensor, sharpness: Tensor
) -> Tensor:
    """Mean log loss of the targets (column 0) among the items that can matter, nats."""
    log_warmth = _bounded(log_warmth)
    place = (log_warmth - float(np.log(GRID[0]))) / float(np.log(2.0))
    low = place.detach().floor().clamp(0, len(GRID) - 2).long()
    share = (place - low)[:, None]
    sources = torch.arange(len(low))
    normalisers_SV = (1 - share) * normalisers_SGV[sources, low] + share * normalisers_SGV[sources, low + 1]
    log_probs_VPS = scores_VPS / log_warmth.exp() - normalisers_SV.T[:, None, :]
    mixture_VP = torch.logsumexp(log_probs_VPS + torch.log_softmax(log_weights, 0), dim=2) * sharpness.exp()
    mixture_VP = mixture_VP.masked_fill(~valid_VP, -1e9)
    return (torch.logsumexp(mixture_VP, dim=1) - mixture_VP[:, 0]).mean()
