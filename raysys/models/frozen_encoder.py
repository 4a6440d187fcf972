"""The interest encoder for answering: the last states of a finished encoder in fewer operations.

A request's history is short, so that on a CPU calling modules and small operations costs as much as arithmetic. Here pairs of
coordinates that rotary positions turn stand side by side, one complex product turns queries and keys together, and weights are at hand
instead of in modules.

Legend: B sequences, T positions, D dimension, H heads, d = D / H.
"""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from raysys.models.interest import Block, InterestEncoder, InterestRetriever, turns_of


class FrozenEncoder:
    """What `InterestEncoder.last_states` gives, but for rounding.

    Args:
        encoder: finished, on its device; changes of its transformer are not seen, those of its item table are.
    """

    def __init__(self, encoder: InterestEncoder):
        config = encoder.config
        self._encoder, self._heads, self._width = encoder, config.num_heads, config.dim // config.num_heads
        device = encoder.items.weight.device
        self._turns: Tensor | None = None
        if encoder.positions is None:
            cos, sin = turns_of(config.max_length, self._width, config.max_length)
            self._turns = torch.complex(cos, sin).to(device)[:, None, None, :]
        order = self._side_by_side() if self._turns is not None else slice(None)
        self._blocks = [_weights(cast(Block, block), order) for block in encoder.blocks]

    @torch.inference_mode()
    def last_states(self, items_BT: Tensor, events_BT: Tensor, gaps_BT: Tensor, waits_BT: Tensor, lengths_B: Tensor) -> Tensor:
        """(B, D) float32; arguments as for `InterestEncoder.last_states`."""
        encoder = self._encoder
        x_BTD = F.embedding(items_BT, encoder.items.weight) * encoder.config.dim**0.5
        if encoder.positions is not None:
            x_BTD = x_BTD + encoder.positions.weight[: items_BT.shape[1]]
        for table, codes in ((encoder.events, events_BT), (encoder.gaps, gaps_BT), (encoder.waits, waits_BT)):
            if table is not None:
                x_BTD = x_BTD + F.embedding(codes, table.weight)
        *below, top = self._blocks
        for block in below:
            x_BTD = self._passed(x_BTD, block)
        return encoder._state(self._passed_last(x_BTD, lengths_B - 1, top))

    def _passed(self, x_BTD: Tensor, block: dict[str, Tensor]) -> Tensor:
        B, T, D = x_BTD.shape
        qkv = F.linear(self._normed(x_BTD, block, "attention_norm"), block["qkv.weight"], block["qkv.bias"])
        qkv = qkv.view(B, T, 3, self._heads, self._width)
        query, key = self._turned(qkv[:, :, :2]).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(query, key, qkv[:, :, 2].transpose(1, 2), is_causal=True)
        return self._added(x_BTD, attended.transpose(1, 2).reshape(B, T, D), block)

    def _passed_last(self, x_BTD: Tensor, last_B: Tensor, block: dict[str, Tensor]) -> Tensor:
        B, T, D = x_BTD.shape
        weight, bias, rows = block["qkv.weight"], block["qkv.bias"], torch.arange(B, device=x_BTD.device)
        normed = self._normed(x_BTD, block, "attention_norm")
        query = F.linear(normed[rows, last_B], weight[:D], bias[:D]).view(B, 1, 1, self._heads, self._width)
        kv = F.linear(normed, weight[D:], bias[D:]).view(B, T, 2, self._heads, self._width)
        key = self._turned(kv[:, :, :1])
        query = self._turned(query, last_B)
        past = None
        if B > 1:
            past = (torch.arange(T, device=x_BTD.device) <= last_B[:, None])[:, None, None, :]
        attended = F.scaled_dot_product_attention(
            query[:, :, 0].transpose(1, 2), key[:, :, 0].transpose(1, 2), kv[:, :, 1].transpose(1, 2), attn_mask=past
        )
        return self._added(x_BTD[rows, last_B], attended.reshape(B, D), block)

    def _added(self, stream: Tensor, attended: Tensor, block: dict[str, Tensor]) -> Tensor:
        stream = _gated(stream, F.linear(attended, block["project.weight"], block["project.bias"]), block, "attention_gate")
        inner = F.gelu(F.linear(self._normed(stream, block, "ffn_norm"), block["ffn_in.weight"], block["ffn_in.bias"]))
        return _gated(stream, F.linear(inner, block["ffn_out.weight"], block["ffn_out.bias"]), block, "ffn_gate")

    def _normed(self, values: Tensor, block: dict[str, Tensor], name: str) -> Tensor:
        return F.layer_norm(values, values.shape[-1:], block[f"{name}.weight"], block[f"{name}.bias"])

    def _turned(self, x_BTnHd: Tensor, places_B: Tensor | None = None) -> Tensor:
        """(B, T, n, H, d) turned by its place, or by the one of its sequence where T is 1."""
        if self._turns is None:
            return x_BTnHd
        turns = self._turns[: x_BTnHd.shape[1]] if places_B is None else self._turns[places_B][:, None]
        pairs = torch.view_as_complex(x_BTnHd.unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * turns).flatten(-2)

    def _side_by_side(self) -> Tensor:
        """(3 D,) rows of the product for queries, keys and values: those that are turned as a pair next to each other.

        Queries and keys are permuted alike, which changes none of their products.
        """
        d, D = self._width, self._heads * self._width
        pairs = torch.arange(d).view(2, -1).T.flatten()
        heads = torch.arange(0, 2 * D, d)[:, None] + pairs
        return torch.cat([heads.flatten(), torch.arange(2 * D, 3 * D)])


def freeze_encoder(retriever: InterestRetriever) -> None:
    """Let a source encode by its frozen encoder from now on; once it is on its device."""
    retriever.last_states = FrozenEncoder(retriever.encoder).last_states


def _weights(block: Block, order: Tensor | slice) -> dict[str, Tensor]:
    weights = {name: parameter.detach() for name, parameter in block.named_parameters()}
    return weights | {name: weights[name][order] for name in ("qkv.weight", "qkv.bias")}


def _gated(stream: Tensor, addend: Tensor, block: dict[str, Tensor], name: str) -> Tensor:
    if f"{name}.weight" not in block:
        return stream + addend
    return torch.addcmul(stream, torch.sigmoid(F.linear(stream, block[f"{name}.weight"], block[f"{name}.bias"])), addend)
