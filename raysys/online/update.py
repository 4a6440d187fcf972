"""What a round makes of a bundle: events counted, the encoder fine-tuned, the mixture refitted. Judges nothing.

There are two updates in a round: a candidate that has learnt from the older events,
for the gate to judge on the newest, and the final one that has learnt from all. In a
young change of tastes both are made more boldly. The encoder takes larger steps,
on nothing but what followed the change, and its item vectors are left alone: items
are still what they were, what follows them is not. And the mixture is fitted to
what the candidate's sources say about events they have not seen, because what the
serving ones say is about tastes that are no more.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from raysys.bundle import Bundle
from raysys.models.fusion import Fusion, choose_fusion
from raysys.models.interest import InterestRetriever
from raysys.online.change import Change, counted_along, counted_in
from raysys.online.config import OnlineConfig
from raysys.online.feed import Fresh, learnable_since
from raysys.online.mixture import Evidence
from raysys.pipeline import seen_mask
from raysys.prepare.dataset import Sequences
from raysys.train.batches import InMemory
from raysys.train.encoder import EncoderTrainConfig, train_encoder

YOUNG_DOUBT = 1.0
"""Standard errors by which a source must help in a young change to be used beside the encoder, or instead of it."""
YOUNG_CALM = (1.0, 1.4, 2.0, 2.8, 4.0)
"""Factors of temperature, because bold steps on few events make an encoder surer than it should be."""
YOUNG_EMA = 0.9
"""Decay a step of the average of the weights in a young change; in other rounds it would keep the old weights and learn next to nothing."""
YOUNG_HOLDOUT = 0.4
"""Newest part of a round that fits and judges a candidate in a young change, as a share."""
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

    @property
    def judged_from(self) -> int:
        """Place in the round from which on the candidate knows nothing of an event; the number of events where there is none to judge."""
        count = self.fresh.num_events
        if self.config.holdout_share == 0:
            return count
        # In a young change the older half of what is held out has told the mixture.
        return count - int(YOUNG_HOLDOUT / 2 * count) if self.young else self.cut

    @property
    def young(self) -> bool:
        """Whether tastes have changed within the last `young_events`."""
        return self._age < 1

    def candidate(self) -> Bundle:
        """The bundle when the older events of the round have been learnt; manifest and histories stay."""
        return dataclasses.replace(self.older, fusion=self._mixed(self.judged_from))

    def final(self) -> Bundle:
        """The bundle when all of them have been."""
        count = self.fresh.num_events
        return dataclasses.replace(self._learnt(count), fusion=self._mixed(count))

    @property
    def _age(self) -> float:
        """Of the change, as a share of what counts as young; infinite without."""
        return np.inf if self.change is None else self.change.events / self.config.young_events

    @property
    def cut(self) -> int:
        """Events of the round that the candidate's models learn from."""
        share = YOUNG_HOLDOUT if self.young else self.config.holdout_share
        return self.fresh.num_events - int(share * self.fresh.num_events)

    @cached_property
    def older(self) -> Bundle:
        """The bundle with the models of the candidate, in the mixture of before."""
        return self._learnt(self.cut)

    def _learnt(self, events: int) -> Bundle:
        """The models when the round's first `events` events have been learnt, in the mixture of before."""
        upto = self.fresh.arrival < events
        sequences, new = self.fresh.sequences.where(upto), self.fresh.arrival[upto] >= 0
        models = counted_in(self.bundle.models, sequences, new)
        if "interest" in models and self.config.epochs > 0:
            models["interest"] = self._fine_tuned(models["interest"], sequences, new)
        if "ranker" in models:
            models["ranker"] = models["ranker"].counted(sequences, new)
        return dataclasses.replace(self.bundle, models=models)

    def _fine_tuned(self, retriever: InterestRetriever, sequences: Sequences, new: np.ndarray) -> InterestRetriever:
        """The encoder after a few steps on the users with new events; others are replayed, so that it does not forget them."""
        clone, config = InterestRetriever(retriever.encoder, retriever.warm), self.config
        learnt = together(sequences, self.replay)
        if self.change is not None:
            learnt = learnable_since(learnt, self.change.since)
        if self.young:
            sizes: dict[str, Any] = {"epochs": config.young_epochs, "batch_size": config.young_batch_size, "lr": config.young_lr}
            settings = EncoderTrainConfig(**sizes, table_lr=0.0, ema=YOUNG_EMA, warmup_steps=0, weight_decay=0.0)
        else:
            settings = EncoderTrainConfig(epochs=config.epochs, batch_size=config.batch_size, lr=config.lr, ema=0.0, warmup_steps=0)
        train_encoder(clone.encoder, InMemory(learnt), settings, seed=self.seed)
        warm = clone.warm.copy()
        warm[sequences.items[new]] = True
        return InterestRetriever(clone.encoder, warm)

    def _mixed(self, events: int) -> dict[str, Any]:
        """`Bundle.fusion` with the mixture that the first `events` events speak for.

        Tastes that stand still ask for a step from the present mixture, in log loss, which a few hundred events can tell. After a change
        there is nothing to start from, and log loss misleads: it flattens the source that is right until it hardly counts.
        """
        if self._told is None:
            return self.bundle.fusion
        sources, positions, allowed = self._told
        first = int((self.fresh.arrival[positions] < events).sum())
        if not self.young:
            fusion = self._evidence.refitted(prior_events=self.config.mixture_prior, first=first)
        elif first:
            targets = self.fresh.sequences.items[positions[:first]].astype(np.int64)
            # Once the change has a mixture, another one is not chosen anew from a few events in every round: that was mostly luck.
            present = Fusion.from_dict(self.bundle.fusion["mixture"]) if self.change is not None and self.change.events else None
            fusion, _ = choose_fusion(sources, targets, allowed, doubt=YOUNG_DOUBT, calm=YOUNG_CALM, present=present)
        else:
            return self.bundle.fusion
        return {**self.bundle.fusion, "mixture": fusion.to_dict()}

    @cached_property
    def _evidence(self) -> Evidence:
        assert self._told is not None
        sources, positions, allowed = self._told
        # The ranker has learnt from its sources' probabilities at these temperatures, so those stay.
        fixed = self.bundle.models["ranker"].sources if "ranker" in self.bundle.models else ()
        present = Fusion.from_dict(self.bundle.fusion["mixture"])
        return Evidence(present, sources, self.fresh.sequences.items[positions].astype(np.int64), allowed, fixed=fixed)

    @cached_property
    def _told(self) -> tuple[Mapping[str, Callable[[slice], np.ndarray]], np.ndarray, Callable[[slice], np.ndarray]] | None:
        """What the sources said about the newest events, the (V,) positions of these, and what could be answered; None without any.

        In a young change the candidate's sources, of what they have not learnt: what the serving ones say is about tastes that are no more.
        The events are gone through in a few parts: a part is scored first and then counted, so that what the newest events say about
        a source that counts is not a round old. An event after an empty history says nothing: popularity alone answers there.
        """
        sequences, arrival = self.fresh.sequences, self.fresh.arrival
        num_items = self.bundle.items.num_rows
        positions = self.judged[-min(self.config.mixture_events, max(16, MAX_MIXED_SCORES // num_items)) :]
        positions = positions[positions > sequences.indptr[sequences.rows[positions]]]
        if self.young:
            positions = positions[arrival[positions] >= self.cut]
        if self.config.mixture_prior <= 0 or not len(positions):
            return None
        names = [name for name in self.bundle.models if name != "ranker"]
        scores: dict[str, list[np.ndarray]] = {name: [] for name in names}
        models, counted = (self.older.models, self.cut) if self.young else (self.bundle.models, 0)
        for part, scoring in counted_along({name: models[name] for name in names}, sequences, arrival, positions, counted=counted):
            part_queries = sequences.queries_before(part)
            for name in names:
                scores[name].append(scoring[name].scores(part_queries))
        queries = sequences.queries_before(positions)
        found = {name: np.concatenate(parts) for name, parts in scores.items()}
        return {name: values.__getitem__ for name, values in found.items()}, positions, lambda rows: seen_mask(queries[rows], num_items)


def together(first: Sequences, second: Sequences) -> Sequences:
    """The users of both, one after the other."""
    indptr = np.concatenate([first.indptr, first.indptr[-1] + second.indptr[1:]])
    names = ("items", "events", "times", "values", "positive", "split")
    flat = [np.concatenate([getattr(first, name), getattr(second, name)]) for name in names]
    return Sequences(np.arange(len(indptr) - 1, dtype=np.int32), indptr, *flat)
