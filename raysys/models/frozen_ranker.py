"""The ranker for answering: the logits of a finished network by NumPy, in fewer operations.

A request has a few hundred candidates, so that on a CPU calling torch's modules costs more than their arithmetic. Here all that is
a product with the candidates' vectors is one product, and the standardisation of features is part of the hidden layer's weights.

Legend: B queries, K candidates, S sources, T history positions, D item dimension, C content dimension, A attention width, F features.
"""

import numpy as np
import torch
import torch.nn.functional as F

from raysys.models.ranker import Ranker, RankerNetwork

AT_ONCE = 4
"""Queries whose candidates' vectors are gathered at once: as many as a core's cache keeps."""
NEVER = np.float32(-1e9)


class FrozenRanker:
    """What `RankerNetwork.forward` gives, but for rounding.

    Args:
        network: finished, on the CPU; later changes of its weights are not seen, those of its tables are.
    """

    def __init__(self, network: RankerNetwork):
        weights = {name: parameter.detach().numpy() for name, parameter in network.named_parameters()}
        self._network, self._weights = network, weights
        width = network.config.attention_width
        self._query, self._query_bias = (weights[f"query.{part}"] / np.float32(width**0.5) for part in ("weight", "bias"))
        self._past = np.concatenate([weights["key.weight"], weights["value.weight"]]).T
        self._past_bias = np.concatenate([weights["key.bias"], weights["value.bias"]])
        self._recency = weights["recency"]
        mean, std = network.mean.numpy(), network.std.numpy()
        hidden, dense = weights["hidden.0.weight"].copy(), network.num_dense
        hidden[:, :dense] /= std
        self._hidden, self._hidden_bias = hidden.T, weights["hidden.0.bias"] - hidden[:, :dense] @ mean
        self._heads = np.concatenate([weights["relevance.weight"], weights["next.weight"]]).T
        self._head_biases = np.concatenate([weights["relevance.bias"], weights["next.bias"]])

    @torch.inference_mode()
    def __call__(
        self, history_BT: np.ndarray, lengths_B: np.ndarray, items_BK: np.ndarray, fused_BK: np.ndarray, log_probs_BKS: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """(B, K) float32 relevance and (B, K) float32 logits of being the next item; arguments as for `RankerNetwork.forward`."""
        arguments = (history_BT, lengths_B, items_BK, fused_BK, log_probs_BKS)
        parts = [
            self._some(*(values[first : first + AT_ONCE] for values in arguments)) for first in range(0, max(1, len(items_BK)), AT_ONCE)
        ]
        return tuple(np.concatenate(logits) if len(parts) > 1 else logits[0] for logits in zip(*parts, strict=True))  # type: ignore[return-value]

    def _some(
        self, history_BT: np.ndarray, lengths_B: np.ndarray, items_BK: np.ndarray, fused_BK: np.ndarray, log_probs_BKS: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        (B, K), T, S = items_BK.shape, history_BT.shape[1], log_probs_BKS.shape[2]
        A, dense = self._network.config.attention_width, self._network.num_dense
        vectors = self._network.item_vectors.numpy()
        history_BTD, items_BKD = vectors.take(history_BT, axis=0), vectors.take(items_BK, axis=0)
        past_BTA = history_BTD @ self._past + self._past_bias
        key_BTA, value_BTA = past_BTA[:, :, :A], past_BTA[:, :, A:]
        candidate = np.broadcast_to(self._weights["candidate.weight"], (B, A, vectors.shape[1]))
        products = items_BKD @ np.concatenate([history_BTD, key_BTA @ self._query, candidate], axis=1).transpose(0, 2, 1)
        similar_BKT, logits_BKT, crossed_BKA = products[:, :, :T], products[:, :, T : 2 * T], products[:, :, 2 * T :]
        places = np.arange(T)
        real_BT = places < lengths_B[:, None]
        ages = np.maximum(lengths_B[:, None] - 1 - places, 0)
        bias_BT = np.where(real_BT, key_BTA @ self._query_bias + self._recency.take(ages), NEVER)
        shares_BKT = torch.from_numpy(logits_BKT + bias_BT[:, None, :]).softmax(dim=2).numpy()
        features = np.empty((B, K, dense + 2 * A), np.float32)
        features[:, :, :S] = log_probs_BKS
        of_items = features[:, :, S:dense]
        of_items[:, :, 0] = fused_BK
        of_items[:, :, 1] = similar_BKT.sum(axis=2) / np.maximum(lengths_B, 1)[:, None]
        of_items[:, :, 2] = similar_BKT.max(axis=2, initial=0)
        of_items[:, :, 3] = np.take_along_axis(similar_BKT, np.maximum(lengths_B - 1, 0)[:, None, None], 2)[:, :, 0]
        of_items[:, :, 4] = self._network.popularity.numpy().take(items_BK)
        of_items[:, :, 5] = np.log1p(lengths_B)[:, None]
        of_items[:, :, 6] = self._content(history_BT, items_BK)
        attended_BKA = np.matmul(shares_BKT, value_BTA, out=features[:, :, dense : dense + A])
        np.multiply(crossed_BKA + self._weights["candidate.bias"], attended_BKA, out=features[:, :, dense + A :])
        hidden = F.gelu(torch.from_numpy(features @ self._hidden + self._hidden_bias)).numpy()
        heads = hidden @ self._heads + self._head_biases
        return heads[:, :, 0] + fused_BK, heads[:, :, 1] + self._weights["next_slope"] * fused_BK

    def _content(self, history_BT: np.ndarray, items_BK: np.ndarray) -> np.ndarray | float:
        vectors = self._network.content_vectors.numpy()
        if not vectors.shape[1]:
            return 0.0
        return (vectors.take(items_BK, axis=0) @ vectors.take(history_BT, axis=0).transpose(0, 2, 1)).max(axis=2, initial=0)


def freeze_ranker(ranker: Ranker) -> None:
    """Let a ranker on the CPU score by its frozen form from now on; one elsewhere stays as it is."""
    if ranker.network.popularity.device.type == "cpu":
        ranker.logits = FrozenRanker(ranker.network)
