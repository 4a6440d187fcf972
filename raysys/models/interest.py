"""The interest encoder: a causal transformer over a user's last events.

Its last state is the user's interest vector; retrieval is a dot product with
the tied item vectors. Knows nothing about training (`train/encoder.py`).

Legend: B sequences, T positions, N items, D dimension, H heads.
Source: Kang & McAuley, "Self-Attentive Sequential Recommendation", ICDM 2018; pre-norm blocks and full softmax as in
Klenitskiy & Vasilev, "Turning Dross Into Gold Loss", RecSys 2023; gated residuals as in Borisyuk et al., "From Features to
Transformers: Redefining Ranking for Scalable Impact" (LiGR), 2025; rotary positions as in Su et al., "RoFormer", 2021.
"""

import copy
import hashlib
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raysys.models.base import NO_EVIDENCE, Arrays, Meta
from raysys.models.remembered import Remembered
from raysys.queries import GAP_CODES, Queries

INIT_STD = 0.02
INIT_BLOCK = 8192
"""Rows of the item table that are drawn from one random generator."""


@dataclass(frozen=True)
class InterestConfig:
    """Shape of the encoder."""

    dim: int = 64
    """Width of item vectors and states."""
    num_layers: int = 2
    """Transformer blocks."""
    num_heads: int = 2
    """Attention heads; divides `dim`."""
    max_length: int = 50
    """Last events of a history that are looked at."""
    dropout: float = 0.2
    """On embeddings, and on what attention and feed-forward add to the residual stream."""
    ffn_multiplier: int = 1
    """Hidden width of the feed-forward layer, in units of `dim`."""
    gated: bool = False
    """What attention and feed-forward add passes a sigmoid gate of the stream that it is added to."""
    positions: Literal["learned", "rotary"] = "learned"
    """A vector for each place from the start of the window, or queries and keys turned by their place, so that only distances count."""
    time_gaps: bool = False
    """Learn a vector for how long an event came after the one before (powers of two of seconds); for data with real times."""
    recency: bool = False
    """Learn a vector for how long ago each event was when the next one came, and the last one when the answer is asked for; likewise."""
    temperature: float = 0.07
    """Logits are cosines of state and item vector divided by this, so that frequent items cannot win by length; 0 for dot products."""
    answer_length: int | None = None
    """Last events that an answer looks at, where that is less than it has learnt from; None for all `max_length`. The cost of an answer
    falls with it (`raysys compress` tries some)."""
    exclude_seen: bool = False
    """Learn and tell apart only items that the history does not hold, which is what answers are made of: states need not turn away from
    what the user likes. Items of the history get no evidence, so keep it off where answers may repeat them."""

    def __post_init__(self) -> None:
        if not 0 <= self.dropout < 1:
            raise ValueError(f"expected dropout in [0, 1), got {self.dropout}")
        for name in ("dim", "num_layers", "num_heads", "max_length", "ffn_multiplier"):
            if getattr(self, name) < 1:
                raise ValueError(f"expected {name} of at least 1, got {getattr(self, name)}")
        if self.answer_length is not None and not 1 <= self.answer_length <= self.max_length:
            raise ValueError(f"expected answer_length from 1 to max_length ({self.max_length}), or null, got {self.answer_length}")
        if self.temperature < 0:
            raise ValueError(f"expected temperature >= 0, got {self.temperature}")
        if self.dim % self.num_heads:
            raise ValueError(f"expected num_heads to divide dim, got dim={self.dim}, num_heads={self.num_heads}")
        if self.positions == "rotary" and self.dim // self.num_heads % 2:
            raise ValueError(f"expected an even width of heads for rotary positions, got dim={self.dim}, num_heads={self.num_heads}")

    @property
    def looked_at(self) -> int:
        """Last events that an answer looks at."""
        return self.answer_length or self.max_length


class Block(nn.Module):
    """Pre-norm attention and feed-forward with residuals, gated if configured."""

    def __init__(self, config: InterestConfig):
        super().__init__()
        self.num_heads = config.num_heads
        self.attention_norm = nn.LayerNorm(config.dim)
        self.qkv = nn.Linear(config.dim, 3 * config.dim)
        self.project = nn.Linear(config.dim, config.dim)
        self.ffn_norm = nn.LayerNorm(config.dim)
        self.ffn_in = nn.Linear(config.dim, config.ffn_multiplier * config.dim)
        self.ffn_out = nn.Linear(config.ffn_multiplier * config.dim, config.dim)
        self.attention_gate = nn.Linear(config.dim, config.dim) if config.gated else None
        self.ffn_gate = nn.Linear(config.dim, config.dim) if config.gated else None
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x_BTD: Tensor, turns: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """(B, T, D) -> (B, T, D).

        Args:
            x_BTD: the residual stream.
            turns: cosines and sines of `turns_of`, (T, D / H / 2) each, where positions are rotary.
        """
        B, T, D = x_BTD.shape
        qkv = self.qkv(self.attention_norm(x_BTD)).view(B, T, 3, self.num_heads, D // self.num_heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        if turns is not None:
            query, key = turned(query, *turns), turned(key, *turns)
        # Sequences are left-aligned, so the causal mask alone keeps real positions from seeing padding.
        # No dropout inside: on CPU it would leave the fast attention kernel.
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self._fed_forward(_added(x_BTD, self.dropout(self.project(attended.transpose(1, 2).reshape(B, T, D))), self.attention_gate))

    def last(self, x_BTD: Tensor, last_B: Tensor, turns: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """(B, D): what `forward` gives at one position of each sequence, without dropout, for the price of keys and values alone.

        Args:
            x_BTD: the residual stream.
            last_B: (B,) int64 the position.
            turns: as for `forward`.
        """
        B, T, D = x_BTD.shape
        rows, width = torch.arange(B, device=x_BTD.device), D // self.num_heads
        normed, weight, bias = self.attention_norm(x_BTD), self.qkv.weight, self.qkv.bias
        query = F.linear(normed[rows, last_B], weight[:D], bias[:D]).view(B, self.num_heads, 1, width)
        key, value = F.linear(normed, weight[D:], bias[D:]).view(B, T, 2, self.num_heads, width).permute(2, 0, 3, 1, 4)
        if turns is not None:
            cos, sin = turns
            query, key = turned(query, cos[last_B][:, None, None], sin[last_B][:, None, None]), turned(key, cos, sin)
        past = torch.arange(T, device=x_BTD.device) <= last_B[:, None]
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=past[:, None, None, :])
        return self._fed_forward(_added(x_BTD[rows, last_B], self.project(attended.reshape(B, D)), self.attention_gate))

    def _fed_forward(self, stream: Tensor) -> Tensor:
        return _added(stream, self.dropout(self.ffn_out(F.gelu(self.ffn_in(self.ffn_norm(stream))))), self.ffn_gate)


def _added(stream: Tensor, addend: Tensor, gate: nn.Linear | None) -> Tensor:
    return stream + (addend if gate is None else torch.sigmoid(gate(stream)) * addend)


def turns_of(length: int, width: int, longest: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the angles by which rotary positions turn pairs of coordinates.

    Wavelengths run from 2 pi to 2 pi times the longest history: a longer one could not be told from a constant.

    Args:
        length: T. width: D / H of a head. longest: positions of the longest window.

    Returns:
        Two (T, D / H / 2) float32.
    """
    frequencies = float(longest) ** (-torch.arange(0, width, 2) / width)
    angles = torch.arange(length)[:, None] * frequencies
    return angles.cos(), angles.sin()


def turned(x_BHTd: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """(B, H, T, D / H) queries or keys, turned; products of two of them then depend on the distance of their places."""
    first, second = x_BHTd.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x_BHTd.dtype)


class InterestEncoder(nn.Module):
    """Item rows and event codes in, one state a position out.

    Args:
        num_items: N; row N pads.
        num_event_types: event codes of the data; a single one (besides "other") carries no information and gets no embedding.
        config: shape.
        table: builds the item table from the seed of its rows; None for a whole one (`train/table.py` has one that is cut over workers).
    """

    items: Any

    def __init__(self, num_items: int, num_event_types: int, config: InterestConfig, table: Callable[[int], nn.Module] | None = None):
        super().__init__()
        self.num_items, self.num_event_types, self.config = num_items, num_event_types, config
        rows_seed = int(torch.randint(2**31, ()).item())
        self.items = table(rows_seed) if table is not None else whole_table(num_items, config.dim, rows_seed)
        is_learned = config.positions == "learned"
        self.positions = nn.Embedding(config.max_length, config.dim) if is_learned else None
        self.events = nn.Embedding(num_event_types, config.dim) if num_event_types > 2 else None
        self.gaps = nn.Embedding(GAP_CODES, config.dim) if config.time_gaps else None
        self.waits = nn.Embedding(GAP_CODES, config.dim) if config.recency else None
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(config.dim)
        self.dropout = nn.Dropout(config.dropout)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)) and module is not self.items:
                nn.init.trunc_normal_(module.weight, std=INIT_STD)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def forward(self, items_BT: Tensor, events_BT: Tensor, gaps_BT: Tensor, waits_BT: Tensor) -> Tensor:
        """States after each position.

        Args:
            items_BT: (B, T) int64, left-aligned, padded with N.
            events_BT: (B, T) int64 event codes, any value at padding.
            gaps_BT: (B, T) int64 codes of `gap_codes`, likewise.
            waits_BT: (B, T) int64 codes of `Queries.waits`, likewise.

        Returns:
            (B, T, D) float32.
        """
        x_BTD, turns = self._embedded(items_BT, events_BT, gaps_BT, waits_BT)
        for block in self.blocks:
            x_BTD = block(x_BTD, turns)
        return self._state(x_BTD)

    def last_states(self, items_BT: Tensor, events_BT: Tensor, gaps_BT: Tensor, waits_BT: Tensor, lengths_B: Tensor) -> Tensor:
        """(B, D) float32: `forward` at the last event alone; the top block is computed there only.

        Args:
            items_BT: as for `forward`.
            events_BT: likewise.
            gaps_BT: likewise.
            waits_BT: likewise.
            lengths_B: (B,) int64 events of each sequence, at least 1.
        """
        x_BTD, turns = self._embedded(items_BT, events_BT, gaps_BT, waits_BT)
        *below, top = self.blocks
        for block in below:
            x_BTD = block(x_BTD, turns)
        return self._state(cast(Block, top).last(x_BTD, lengths_B - 1, turns))

    def codes(self, queries: Queries) -> tuple[np.ndarray | None, np.ndarray | None, np.ndarray | None]:
        """(L,) event codes, gaps and waits of the events of queries, each None where the encoder does not look at it."""
        return (
            None if self.events is None else queries.events,
            None if self.gaps is None else queries.gaps,
            None if self.waits is None else queries.waits,
        )

    def _embedded(
        self, items_BT: Tensor, events_BT: Tensor, gaps_BT: Tensor, waits_BT: Tensor
    ) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        x_BTD, turns = self.items(items_BT) * self.config.dim**0.5, None
        if self.positions is not None:
            x_BTD = x_BTD + self.positions.weight[: items_BT.shape[1]]
        else:
            cos, sin = turns_of(items_BT.shape[1], self.config.dim // self.config.num_heads, self.config.max_length)
            turns = cos.to(x_BTD.device), sin.to(x_BTD.device)
        if self.events is not None:
            x_BTD = x_BTD + self.events(events_BT)
        if self.gaps is not None:
            x_BTD = x_BTD + self.gaps(gaps_BT)
        if self.waits is not None:
            x_BTD = x_BTD + self.waits(waits_BT)
        return self.dropout(x_BTD), turns

    def _state(self, stream: Tensor) -> Tensor:
        states = self.norm(stream)
        return F.normalize(states, dim=-1) / self.config.temperature if self.config.temperature else states

    def item_vectors(self, rows: Tensor | None = None, *, table: Tensor | None = None) -> Tensor:
        """Vectors whose dot product with a state is a logit; tied to the input embedding.

        Args:
            rows: (...,) int64 rows of the table; None for all items. Of a table that is cut over workers, its local rows.
            table: (N + 1, D) rows that are taken for those of the encoder; None for its own.

        Returns:
            (..., D) float32.
        """
        weight = self.items.weight if table is None else table
        vectors = weight[: self.num_items] if rows is None else F.embedding(rows, weight, sparse=self.items.sparse)
        return F.normalize(vectors, dim=-1) if self.config.temperature else vectors


def whole_table(num_items: int, dim: int, seed: int) -> nn.Embedding:
    """An untrained table of all items and the row of padding, which is zero."""
    rows = torch.cat([initial_rows(0, num_items, dim, seed), torch.zeros(1, dim)])
    return nn.Embedding.from_pretrained(rows, freeze=False, padding_idx=num_items)


def initial_rows(first: int, stop: int, dim: int, seed: int) -> Tensor:
    """(stop - first, D) float32 untrained rows, the same however the table is cut and whoever draws them."""
    rows = torch.empty(stop - first, dim)
    for block in range(first // INIT_BLOCK, -(-stop // INIT_BLOCK)):
        start = block * INIT_BLOCK
        generator = torch.Generator().manual_seed(seed * 1_000_003 + block)
        drawn = nn.init.trunc_normal_(torch.empty(INIT_BLOCK, dim), std=INIT_STD, generator=generator)
        low, high = max(first, start), min(stop, start + INIT_BLOCK)
        rows[low - first : high - first] = drawn[low - start : high - start]
    return rows


@torch.no_grad()
def user_states(encoder: InterestEncoder, queries: Queries, last_states: Callable[..., Tensor] | None = None) -> Tensor:
    """(B, D) float32 state after the last event, on the encoder's device; zero for an empty history.

    Args:
        encoder: for its shape and device.
        queries: B histories.
        last_states: what computes instead of the encoder's own, such as `FrozenEncoder.last_states`.
    """
    columns = ((queries.items, encoder.num_items), *((codes, 0) for codes in encoder.codes(queries)))
    matrices, lengths = left_aligned(queries, encoder.config.looked_at, *columns)
    filled = np.flatnonzero(lengths)
    if len(filled) < len(lengths):
        matrices, lengths = [matrix[filled] for matrix in matrices], lengths[filled]
    device, states = encoder.items.weight.device, last_states or encoder.last_states
    states_bD = states(*(torch.from_numpy(array).to(device) for array in (*matrices, lengths))) if len(filled) else None
    if states_bD is not None and len(filled) == len(queries):
        return states_bD
    states_BD = torch.zeros(len(queries), encoder.config.dim, device=device)
    if states_bD is not None:
        states_BD[torch.from_numpy(filled).to(device)] = states_bD
    return states_BD


class InterestRetriever:
    """A trained encoder as a retrieval source.

    Args:
        encoder: trained; copied to the CPU.
        warm: (N,) bool, items with at least one training interaction.
        owned: nobody else has the encoder, which is on the CPU: it is taken as it is.

    Attributes:
        last_states: what encodes in place of `InterestEncoder.last_states`; None for that.
    """

    name = "interest"

    def __init__(self, encoder: InterestEncoder, warm: np.ndarray, *, owned: bool = False):
        # A copy: moving or freezing the caller's encoder in the middle of its training would break it.
        self.encoder = (encoder if owned else copy.deepcopy(encoder).cpu()).eval()
        self.warm = warm.astype(bool)
        self.item_vectors = self.encoder.item_vectors().detach().numpy()
        self.last_states: Callable[..., Tensor] | None = None
        self._items: Tensor | None = None  # the item vectors on another device, where `to` moved them
        self._remembered: Remembered | None = None

    def remember(self, size: int, folder: str | None = None) -> None:
        """Keep vectors of the histories asked for, for a process that serves.

        Args:
            size: histories at most; 0 keeps none.
            folder: of the node, where all processes that name it share what they keep; None for this process alone.
        """
        if not size:
            self._remembered = None
            return
        dim, looked_at = self.item_vectors.shape[1], self.encoder.config.looked_at
        path = None if folder is None else os.path.join(folder, f"{dim}x{size}")
        model = hashlib.blake2b(str(looked_at).encode(), digest_size=32)
        for tensor in self.encoder.state_dict().values():
            model.update(np.ascontiguousarray(tensor.detach().cpu().numpy()).data)
        options = {"dim": dim, "size": size, "model": model.digest(), "path": path}
        self._remembered = Remembered(self._encode, looked_at, self.encoder.codes, **options)

    @classmethod
    def from_encoder(cls, encoder: InterestEncoder, item_counts: np.ndarray) -> "InterestRetriever":
        """Wrap a trained encoder; `item_counts` are (N,) training interactions."""
        return cls(encoder, np.asarray(item_counts) > 0)

    def to(self, device: str) -> None:
        """Compute on this device of torch from now on: the encoder, and the product with all items."""
        self.encoder.to(device)
        self.last_states = None
        self._items = None if device == "cpu" else torch.from_numpy(self.item_vectors).to(device)

    @property
    def evidence(self) -> np.ndarray | None:
        """(N,) bool, items with a training interaction; None where all have one."""
        return None if self.warm.all() else self.warm

    @property
    def excludes_history(self) -> bool:
        """Whether items of the history were left out while it learnt."""
        return self.encoder.config.exclude_seen

    def user_vectors(self, queries: Queries) -> np.ndarray:
        """(B, D) float32 state after the last event; zero for an empty history."""
        return self._encode(queries) if self._remembered is None or not len(queries) else self._remembered(queries)

    @torch.inference_mode()  # a third faster than without gradients alone
    def _encode(self, queries: Queries) -> np.ndarray:
        return user_states(self.encoder, queries, self.last_states).cpu().numpy()

    def scores(self, queries: Queries) -> np.ndarray:
        """(B, N) float32 logits; zero for an empty history, NO_EVIDENCE for items never interacted with and for seen ones if excluded."""
        if self._items is None:
            scores = self.user_vectors(queries) @ self.item_vectors.T
        else:
            scores = (user_states(self.encoder, queries, self.last_states) @ self._items.T).cpu().numpy()
        if self.evidence is not None:
            scores[:, ~self.warm] = NO_EVIDENCE
        if self.encoder.config.exclude_seen:
            scores[queries.rows, queries.items] = NO_EVIDENCE
        scores[queries.lengths == 0] = 0.0
        return scores

    def to_arrays(self) -> tuple[Arrays, Meta]:
        """Weights by parameter name, plus the warm mask."""
        arrays = {f"encoder.{name}": tensor.detach().cpu().numpy() for name, tensor in self.encoder.state_dict().items()}
        return {**arrays, "warm": self.warm.astype(np.uint8)}, {
            "num_items": self.encoder.num_items,
            "num_event_types": self.encoder.num_event_types,
            "config": asdict(self.encoder.config),
        }

    @classmethod
    def from_arrays(cls, arrays: Arrays, meta: Meta) -> "InterestRetriever":
        """The model back from `to_arrays`; it takes arrays that may be written to as they are, so who gives them keeps none."""
        own = {name: array if array.flags.writeable else array.copy() for name, array in arrays.items() if name != "warm"}
        weights = {name.removeprefix("encoder."): torch.from_numpy(array) for name, array in own.items()}

        def table(_: int) -> nn.Module:
            # As it is: drawing a large one at random first takes minutes, and a mapped one is shared by all replicas of a node.
            return nn.Embedding.from_pretrained(weights["items.weight"], freeze=False, padding_idx=meta["num_items"])

        encoder = InterestEncoder(meta["num_items"], meta["num_event_types"], InterestConfig(**meta["config"]), table)
        encoder.load_state_dict(weights, assign=True)
        return cls(encoder, arrays["warm"], owned=True)


def left_aligned(queries: Queries, max_length: int, *columns: tuple[np.ndarray | None, int]) -> tuple[list[np.ndarray], np.ndarray]:
    """Ragged histories as padded matrices, cut to their last `max_length` events.

    Args:
        queries: B histories with L events.
        max_length: events kept.
        columns: (L,) values of the events, None for none, and what pads them.

    Returns:
        A (B, T) int64 matrix a column, and lengths (B,) int64; T is the longest length.
    """
    lengths = np.minimum(queries.lengths, max_length)
    T = int(lengths.max(initial=0))
    places = np.arange(T)
    real = places[None, :] < lengths[:, None]
    taken = ((queries.indptr[1:] - lengths)[:, None] + places[None, :])[real]
    matrices = []
    for values, padding in columns:
        matrix = np.full(real.shape, padding, np.int64)
        if values is not None:
            matrix[real] = values[taken]
        matrices.append(matrix)
    return matrices, lengths
