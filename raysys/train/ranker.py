"""Training of the ranker on held-out positions, with candidates that retrieval really produces.

The retrieval models must not have seen these positions: the caller passes
candidates of models that were fitted without them.

Legend: Q held-out positions, K candidates, N items.
"""

import dataclasses
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss, roc_auc_score

from raysys.models.base import Candidates
from raysys.models.ranker import Ranker, RankerConfig, RankerNetwork, network_inputs
from raysys.queries import Queries


@dataclass(frozen=True)
class Logged:
    """The held-out events themselves: one item a query, shown and judged by the user.

    Attributes:
        candidates: (Q, 1) the item of the event with its retrieval scores.
        positive: (Q,) bool, whether the event was a positive target.
    """

    candidates: Candidates
    positive: np.ndarray


def train_ranker(
    queries: Queries,
    candidates: Candidates,
    targets: np.ndarray,
    logged: Logged | None,
    *,
    item_vectors: np.ndarray,
    content_vectors: np.ndarray | None,
    item_counts: np.ndarray,
    config: RankerConfig,
    seed: int,
) -> tuple[Ranker, dict]:
    """Learn to order candidates, and the probability that an item is liked.

    Relevance learns from positions whose target is among the candidates, by a
    softmax over the target and other candidates. Like learns from logged
    positives against logged non-positives where there are both; else from
    targets against the other real candidates.

    Args:
        queries: Q histories.
        candidates: (Q, K) of retrieval models that have not seen the targets.
        targets: (Q,) int64 item rows.
        logged: the events behind the targets, None where nothing tells positives from non-positives.
        item_vectors: (N, D) float32 of the interest encoder; copied and frozen.
        content_vectors: (N, C) float32 or None.
        item_counts: (N,) training interactions.
        config: see `RankerConfig`.
        seed: of initialisation, order, negatives and dropout.

    Returns:
        The ranker, and {auc, logloss, ece, label, negatives, queries, recall} measured on the share kept for calibration.
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
    use_logged = logged is not None and min(logged.positive.sum(), (~logged.positive).sum()) >= 20
    if not use_logged:
        network.start_from_retrieval()
    optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], lr=config.lr, weight_decay=1e-3)
    steps = max(1, config.epochs * -(-len(learnt) // config.batch_size))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.lr, total_steps=steps, pct_start=0.1)
    best, best_loss = None, np.inf
    for _ in range(config.epochs):
        network.train()
        for batch in np.array_split(rng.permutation(learnt), -(-len(learnt) // config.batch_size)):
            loss = _loss(network, queries, candidates, is_target, logged if use_logged else None, batch, config, rng)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
        network.eval()
        with torch.inference_mode():
            held_rng = np.random.default_rng(seed)  # the same negatives each time
            parts = np.array_split(kept, max(1, len(kept) // 512))
            losses = [
                float(_loss(network, queries, candidates, is_target, logged if use_logged else None, p, config, held_rng)) for p in parts
            ]
        if np.mean(losses) < best_loss:
            best, best_loss = {name: tensor.clone() for name, tensor in network.state_dict().items()}, float(np.mean(losses))
    if best is not None:
        network.load_state_dict(best)
    network.eval()
    label = "positive event, given that the user took the item" if use_logged else "the user's next event, given a retrieved item"
    negatives = "logged non-positive events" if use_logged else "other retrieved candidates"
    logits, truth = _like_logits(network, queries, candidates, is_target, logged if use_logged else None, kept)
    ranker = Ranker(network, candidates.sources, calibration=_platt(logits, truth), label=label, negatives=negatives)
    report = {"label": label, "negatives": negatives, "queries": len(queries), "recall": float(is_target.any(axis=1).mean())}
    return ranker, {**report, **_figures(ranker, logits, truth)}


def _loss(
    network: RankerNetwork,
    queries: Queries,
    candidates: Candidates,
    is_target: np.ndarray,
    logged: Logged | None,
    rows: np.ndarray,
    config: RankerConfig,
    rng: np.random.Generator,
) -> torch.Tensor:
    picked, log_weights = _pick(is_target[rows], candidates.items[rows], config.negatives, rng)
    weight = torch.from_numpy(log_weights)
    query = take_queries(queries, rows)
    part = _take(candidates, rows, picked)
    relevance, like = network(*network_inputs(network, query, part))
    padding = torch.from_numpy(part.items < 0)
    hit = torch.from_numpy(is_target[rows].any(axis=1))
    relevance = (relevance + weight).masked_fill(padding, -1e9)
    loss = relevance.new_zeros(())
    if hit.any():
        # The target stands first where it was retrieved at all.
        loss = F.cross_entropy(relevance[hit], torch.zeros(int(hit.sum()), dtype=torch.long))
    if logged is not None:
        single = _take(logged.candidates, rows, np.zeros((len(rows), 1), np.int64))
        _, like = network(*network_inputs(network, query, single))
        truth = torch.from_numpy(logged.positive[rows].astype(np.float32))
        return loss + F.binary_cross_entropy_with_logits(like[:, 0], truth)
    truth = torch.zeros_like(like)
    truth[hit, 0] = 1.0
    return loss + F.binary_cross_entropy_with_logits(like[~padding], truth[~padding], weight=weight[~padding].exp())


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


def _like_logits(
    network: RankerNetwork, queries: Queries, candidates: Candidates, is_target: np.ndarray, logged: Logged | None, rows: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    logits, truth = [], []
    with torch.inference_mode():
        for part in np.array_split(rows, max(1, len(rows) // 256)):
            source = logged.candidates if logged is not None else candidates
            columns = np.tile(np.arange(source.items.shape[1]), (len(part), 1))
            _, like = network(*network_inputs(network, take_queries(queries, part), _take(source, part, columns)))
            real = source.items[part] >= 0
            logits.append(like.numpy()[real])
            truth.append((logged.positive[part][:, None] if logged is not None else is_target[part])[real])
    return np.concatenate(logits), np.concatenate(truth)


def _platt(logits: np.ndarray, truth: np.ndarray) -> tuple[float, float] | None:
    """Slope and intercept of the logit (Platt, 1999); None without both classes."""
    if truth.all() or not truth.any():
        return None
    model = LogisticRegression(C=1e6).fit(logits[:, None], truth)
    slope = float(model.coef_[0, 0])
    # A negative slope would turn the order round: the head has learnt nothing, the base rate is the honest answer.
    if slope <= 0:
        return 0.0, float(np.log(truth.mean() / (1 - truth.mean())))
    return slope, float(model.intercept_[0])


def _figures(ranker: Ranker, logits: np.ndarray, truth: np.ndarray) -> dict:
    if ranker.calibration is None:
        return {"auc": None, "logloss": None, "ece": None}
    slope, intercept = ranker.calibration
    probabilities = 1 / (1 + np.exp(-(slope * logits + intercept)))
    bins = np.array_split(np.argsort(probabilities, kind="stable"), 15)
    gaps = [abs(probabilities[b].mean() - truth[b].mean()) * len(b) for b in bins if len(b)]
    return {
        "auc": float(roc_auc_score(truth, logits)),
        "logloss": float(log_loss(truth, probabilities)),
        "ece": float(sum(gaps) / len(truth)),
    }


def _standardise(network: RankerNetwork, queries: Queries, candidates: Candidates, rows: np.ndarray) -> None:
    columns = np.tile(np.arange(0, candidates.items.shape[1], 4), (len(rows), 1))
    part = _take(candidates, rows, columns)
    with torch.inference_mode():
        dense = network.dense(*network_inputs(network, take_queries(queries, rows), part))[torch.from_numpy(part.items >= 0)]
    network.mean.copy_(dense.mean(dim=0))
    network.std.copy_(dense.std(dim=0).clamp(min=1e-3))


def take_queries(queries: Queries, rows: np.ndarray) -> Queries:
    """Any rows of a batch, in any order."""
    lengths = queries.lengths[rows]
    indptr = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    take = np.arange(indptr[-1]) + np.repeat(queries.indptr[rows] - indptr[:-1], lengths)
    return Queries(queries.items[take], queries.events[take], queries.times[take], indptr, queries.now[rows])


def _take(candidates: Candidates, rows: np.ndarray, columns: np.ndarray) -> Candidates:
    at = (rows[:, None], columns)
    return dataclasses.replace(candidates, items=candidates.items[at], fused=candidates.fused[at], log_probs=candidates.log_probs[at])


def _padded(vectors: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.concatenate([vectors, np.zeros((1, vectors.shape[1]), vectors.dtype)]).astype(np.float32))
