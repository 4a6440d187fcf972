"""What a round makes of a bundle: events counted, the encoder fine-tuned, the mixture refitted. Judges nothing.

An update is asked for by a place in the round, because the gate judges one that
has learnt from the older events only. In a young change of tastes the same three
are done more boldly: the encoder takes larger steps, on nothing but what followed the change and with its
item vectors left alone (items are still what they were, what follows them is
not), and the mixture starts from nothing.
"""

import dataclasses
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from raysys.bundle import Bundle
from raysys.models.fusion import Fusion
from raysys.models.interest import InterestRetriever
from raysys.online.change import Change, counted_along, counted_in
from raysys.online.config import OnlineConfig
from raysys.online.feed import Fresh, learnable_since
from raysys.online.mixture import Evidence
from raysys.pipeline import seen_mask
from raysys.prepare.dataset import Sequences
from raysys.train.batches import InMemory
from raysys.train.encoder import EncoderTrainConfig, train_encoder

LEAST_PRIOR = 0.05
"""Share of `mixture_prior` that the mixture counts for just after a change."""
YOUNG_EMA = 0.9
"""Decay a step of the average of the weights in a young change; in other rounds it would keep the old weights and learn next to nothing."""
MAX_MIXED_SCORES = 1 << 23
"""Scores of one source that a mixture is refitted on."""


@dataclass(frozen=True)
class Update:
    """How one round learns.

    Attributes:
        bundle: what it starts from; not changed.
        fresh: the round's events.
        judged: (V,) flat positions of the newest of them, in time order.
        replay: users without news.
        change: the last one of this lineage; None without.
        config: settings.
        seed: of order and dropout.
    """

    bundle: Bundle
    fresh: Fresh
    judged: np.ndarray
    replay: Sequences
    change: Change | None
    config: OnlineConfig
    seed: int

    def after(self, events: int) -> Bundle:
        """The bundle when the round's first `events` events have been learnt; manifest and histories stay."""
        upto = self.fresh.arrival < events
        sequences, new = self.fresh.sequences.where(upto), self.fresh.arrival[upto] >= 0
        models = counted_in(self.bundle.models, sequences, new)
        if "interest" in models and self.config.epochs > 0:
            models["interest"] = self._fine_tuned(models["interest"], sequences, new)
        if "ranker" in models:
            models["ranker"] = models["ranker"].counted(sequences, new)
        return dataclasses.replace(self.bundle, models=models, fusion=self._mixed(events))

    @property
    def _age(self) -> float:
        """Of the change, as a share of what counts as young; infinite without."""
        return np.inf if self.change is None else self.change.events / self.config.young_events

    def _fine_tuned(self, retriever: InterestRetriever, sequences: Sequences, new: np.ndarray) -> InterestRetriever:
        """The encoder after a few steps on the users with new events; others are replayed, so that it does not forget them."""
        clone, config = InterestRetriever.from_arrays(*retriever.to_arrays()), self.config
        learnt = together(sequences, self.replay)
        if self.change is not None:
            learnt = learnable_since(learnt, self.change.since)
        if self._age < 1:
            sizes: dict[str, Any] = {"epochs": config.young_epochs, "batch_size": config.young_batch_size, "lr": config.young_lr}
            settings = EncoderTrainConfig(**sizes, table_lr=0.0, ema=YOUNG_EMA, warmup_steps=0, weight_decay=0.0)
        else:
            settings = EncoderTrainConfig(epochs=config.epochs, batch_size=config.batch_size, lr=config.lr, ema=0.0, warmup_steps=0)
        train_encoder(clone.encoder, InMemory(learnt), settings, seed=self.seed)
        warm = clone.warm.copy()
        warm[sequences.items[new]] = True
        return InterestRetriever(clone.encoder, warm)

    def _mixed(self, events: int) -> dict[str, Any]:
        """`Bundle.fusion` with the mixture that the first `events` events speak for."""
        if self._evidence is None:
            return self.bundle.fusion
        evidence, positions = self._evidence
        # The present mixture counts for no more than what it has been learnt from.
        prior = self.config.mixture_prior * min(1.0, max(LEAST_PRIOR, self._age))
        fusion = evidence.refitted(prior_events=prior, first=int((self.fresh.arrival[positions] < events).sum()))
        return {**self.bundle.fusion, "mixture": fusion.to_dict()}

    @cached_property
    def _evidence(self) -> tuple[Evidence, np.ndarray] | None:
        """What the sources say about the newest events, and the positions of these; None where the mixture stays as it is.

        The round is gone through in a few parts: a part is scored first and then counted, so that what the newest events say about
        a source that counts is not a round old. An event after an empty history says nothing: popularity alone answers there.
        """
        bundle, sequences = self.bundle, self.fresh.sequences
        count = min(self.config.mixture_events, max(16, MAX_MIXED_SCORES // bundle.items.num_rows))
        positions = self.judged[-count:]
        positions = positions[positions > sequences.indptr[sequences.rows[positions]]]
        if self.config.mixture_prior <= 0 or not len(positions):
            return None
        names = [name for name in bundle.models if name != "ranker"]
        scores: dict[str, list[np.ndarray]] = {name: [] for name in names}
        for part, models in counted_along({name: bundle.models[name] for name in names}, sequences, self.fresh.arrival, positions):
            queries = sequences.queries_before(part)
            for name in names:
                scores[name].append(models[name].scores(queries))
        found = {name: np.concatenate(parts) for name, parts in scores.items()}
        queries = sequences.queries_before(positions)
        # At a change all sources start alike: the present mixture is that of other tastes.
        start = Fusion(dict.fromkeys(names, 1 / len(names)), {}) if self._age == 0 else Fusion.from_dict(bundle.fusion["mixture"])
        evidence = Evidence(
            start,
            {name: values.__getitem__ for name, values in found.items()},
            sequences.items[positions].astype(np.int64),
            lambda rows: seen_mask(queries[rows], bundle.items.num_rows),
            # The ranker has learnt from its sources' probabilities at these temperatures, so those stay.
            fixed=bundle.models["ranker"].sources if "ranker" in bundle.models else (),
        )
        return evidence, positions


def together(first: Sequences, second: Sequences) -> Sequences:
    """The users of both, one after the other."""
    indptr = np.concatenate([first.indptr, first.indptr[-1] + second.indptr[1:]])
    names = ("items", "events", "times", "values", "positive", "split")
    flat = [np.concatenate([getattr(first, name), getattr(second, name)]) for name in names]
    return Sequences(np.arange(len(indptr) - 1, dtype=np.int32), indptr, *flat)
