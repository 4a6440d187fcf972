"""Training of the ranker on held-out positions, with candidates that retrieval really produces.

The retrieval models must not have seen these positions: the caller passes
candidates of models that were fitted without them.

Legend: Q held-out positions, K candidates, N items.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from raysys.models.base import Candidates
from raysys.models.judge import Judge
from raysys.models.ranker import Ranker, RankerConfig, RankerNetwork, network_inputs
from raysys.queries import Queries
from raysys.train.calibration import figures, platt


def train_ranker(
    queries: Queries,
    candidates: Candidates,
    targets: np.ndarray,
    judge: Judge | None,
    *,
    item_vectors: np.ndarray,
    content_vectors: np.ndarray | None,
    item_counts: np.ndarray,
    config: RankerConfig,
    seed: int,
) -> tuple[Ranker, dict]:
    """Learn to order candidates, and where there is no judge also the probability that one is the next item.

    Relevance learns from positions whose target is among the candidates, by a softmax over the target and other
    candidates; the probability from targets against the other real candidates.

    Args:
        queries: Q histories.
        candidates: (Q, K) of retrieval models that have not seen the targets.
        targets: (Q,) int64 item rows.
        judge: knows what is liked; becomes part of the ranker.
        item_vectors: (N, D) float32 of the interest encoder; copied and frozen.
        content_vectors: (N, C) float32 or None.
        item_counts: (N,) training interactions.
        config: see `RankerConfig`.
        seed: of initialisation, order, negatives and dropout.

    Returns:
        The ranker, and {label, negatives, queries, recall}; without a judge also {auc, logloss, ece} on the share kept for calibration.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    network = RankerNetwork(
        _padded(item_vectors),
        _padded(content_vectors if content_vectors is not None else np.zeros((len(item_vectors), 0), np.float32)),
        _padded(np.log1p(item_counts)[:, None])[:, 0],
        candidates.log_probs.shape[2],
        config,
    )
    order = rng.permutation(len(queries))
    num_kept = max(1, int(config.calibration_share * len(order)))
    kept, learnt = np.sort(order[:num_kept]), order[num_kept:]
    _standardise(network, queries, candidates, learnt[:2000])
    is_target = candidates.items == targets[:, None]
    optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], lr=config.lr, weight_decay=1e-3)
    steps = max(1, config.epochs * -(-len(learnt) // config.batch_size))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.lr, total_steps=steps, pct_start=0.1)
    best, best_loss = None, np.inf
    for _ in range(config.epochs):
        network.train()
        for batch in np.array_split(rng.permutation(learnt), -(-len(learnt) // config.batch_size)):
            loss = _loss(network, queries, candidates, is_target, batch, rng, also_next=judge is None)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
        network.eval()
        with torch.inference_mode():
            held_rng = np.random.default_rng(seed)  # the same negatives each time
            parts = np.array_split(kept, max(1, len(kept) // 512))
            losses = [float(_loss(network, queries, candidates, is_target, part, held_rng, also_next=judge is None)) for part in parts]
        if np.mean(losses) < best_loss:
            best, best_loss = {name: tensor.clone() for name, tensor in network.state_dict().items()}, float(np.mean(losses))
    if best is not None:
        network.load_state_dict(best)
    network.eval()
    calibration, measured = None, {}
    if judge is None:
        logits, truth = _next_logits(network, queries, candidates, is_target, kept)
        calibration = platt(logits, truth)
        measured = figures(calibration, logits, truth)
    ranker = Ranker(network, candidates.sources, calibration=calibration, judge=judge)
    report = {"label": ranker.label, "negatives": ranker.negatives, "queries": len(queries), "recall": float(is_target.any(axis=1).mean())}
    return ranker, {**report, **measured}


def _loss(
    network: RankerNetwork,
    queries: Queries,
    candidates: Candidates,
    is_target: np.ndarray,
    rows: np.ndarray,
    rng: np.random.Generator,
    *,
    also_next: bool,
) -> torch.Tensor:
    picked, log_weights = _pick(is_target[rows], candidates.items[rows], network.config.negatives, rng)
    weight = torch.from_numpy(log_weights)
    part = candidates.take(rows, picked)
    relevance, following = network(*_inputs(network, queries.take(rows), part))
    padding = torch.from_numpy(part.items < 0)
    hit = torch.from_numpy(is_target[rows].any(axis=1))
    relevance = (relevance + weight).masked_fill(padding, -1e9)
    loss = 0.0 * relevance.sum()  # a batch without any retrieved target must still have a gradient
    if hit.any():
        # The target stands first where it was retrieved at all.
        loss = F.cross_entropy(relevance[hit], torch.zeros(int(hit.sum()), dtype=torch.long))
    if not also_next:
        return loss
    truth = torch.zeros_like(following)
    truth[hit, 0] = 1.0
    return loss + F.binary_cross_entropy_with_logits(following[~padding], truth[~padding], weight=weight[~padding].exp())


def _pick(is_target: np.ndarray, items: np.ndarray, negatives: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """The target (or the best candidate), the best others, and a random sample of the rest.

    Returns:
        (b, 1 + negatives) columns, and the float32 log of how many candidates each of them stands for: without it, the
        sample would teach that a candidate far down is more likely to be the target than one at the top.
    """
    K = items.shape[1]
    best = min(K, negatives // 2)
    priority = np.empty(items.shape)
    priority[:] = np.arange(K)
    priority[:, best:] = K + rng.random((len(items), K - best))
    priority[items < 0] = np.inf
    priority[is_target] = -1
    columns = np.argsort(priority, axis=1, kind="stable")[:, : negatives + 1]
    sampled = columns >= best
    sampled[:, 0] = False
    rest = np.maximum(((items >= 0)[:, best:]).sum(axis=1) - is_target[:, best:].sum(axis=1), 1)
    stands_for = rest / np.maximum(sampled.sum(axis=1), 1)
    return columns, np.where(sampled, np.log(np.maximum(stands_for, 1.0))[:, None], 0.0).astype(np.float32)


def _next_logits(
    network: RankerNetwork, queries: Queries, candidates: Candidates, is_target: np.ndarray, rows: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    logits, truth = [], []
    with torch.inference_mode():
        for part in np.array_split(rows, max(1, len(rows) // 256)):
            columns = np.tile(np.arange(candidates.items.shape[1]), (len(part), 1))
            _, following = network(*_inputs(network, queries.take(part), candidates.take(part, columns)))
            real = candidates.items[part] >= 0
            logits.append(following.numpy()[real])
            truth.append(is_target[part][real])
    return np.concatenate(logits), np.concatenate(truth)


def _standardise(network: RankerNetwork, queries: Queries, candidates: Candidates, rows: np.ndarray) -> None:
    columns = np.tile(np.arange(0, candidates.items.shape[1], 4), (len(rows), 1))
    part = candidates.take(rows, columns)
    with torch.inference_mode():
        dense = network.dense(*_inputs(network, queries.take(rows), part))[torch.from_numpy(part.items >= 0)]
    network.mean.copy_(dense.mean(dim=0))
    network.std.copy_(dense.std(dim=0).clamp(min=1e-3))


def _padded(vectors: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.concatenate([vectors, np.zeros((1, vectors.shape[1]), vectors.dtype)]).astype(np.float32))


def _inputs(network: RankerNetwork, queries: Queries, candidates: Candidates) -> tuple[Tensor, ...]:
    return tuple(torch.from_numpy(array) for array in network_inputs(network, queries, candidates))
