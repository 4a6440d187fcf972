"""The retrieval sources of a bundle, fitted on a part of the data, and joined to a pipeline. Runs in one process, without Ray.

Co-visitation, the linear model and popularity count, so they are fitted piece by piece;
the dot product learns from a sample of the users. What they hold grows with the
catalogue, not with the events.
"""

from functools import cached_property
from typing import Any

import numpy as np

from raysys.bundle import HISTORY_SCHEMA, Bundle, Histories
from raysys.features.text import catalogue_vectors
from raysys.models.content import ContentNeighbours
from raysys.models.covisit import Covisitation
from raysys.models.dot_product import DotProduct
from raysys.models.fusion import Fusion
from raysys.models.interest import InterestEncoder, InterestRetriever
from raysys.models.linear import Linear
from raysys.models.newcomers import placed
from raysys.models.popularity import Popularity
from raysys.pipeline import Pipeline
from raysys.prepare.dataset import Prepared
from raysys.train.config import TrainConfig
from raysys.train.evidence import Evidence


class Sources:
    """Fits what the settings ask for.

    Args:
        prepared: the prepared set; of it only items and meanings of events are used here.
        settings: of the training.
    """

    def __init__(self, prepared: Prepared, settings: TrainConfig):
        self.prepared, self.settings = prepared, settings
        self.event_weights = [prepared.manifest["event_types"].get(name, {}).get("weight", 1.0) for name in prepared.events]

    def fit(self, evidence: Evidence, stage: str, encoder: InterestEncoder) -> dict[str, Any]:
        """Every configured source by name, fitted on what a stage may learn from and nothing else.

        Args:
            evidence: of all users.
            stage: see `Parts.of`.
            encoder: a trained one, with its whole table.
        """
        settings, num_items, wanted = self.settings, self.prepared.num_items, self.settings.sources
        meaning: dict[str, Any] = {"event_weights": self.event_weights, "ordinal_time": self.prepared.ordinal_time}
        counts = np.zeros(num_items, np.int64)
        covisit = Covisitation.empty(num_items, settings.covisit, **meaning)
        popularity = Popularity.empty(num_items, settings.popularity, **meaning)
        for sequences in evidence.of(stage):
            counts += np.bincount(sequences.items, minlength=num_items)
            popularity = popularity.update(sequences.items, sequences.events, sequences.times)
            if "covisit" in wanted:
                covisit = covisit.update(sequences, np.ones(len(sequences.items), bool))
        models: dict[str, Any] = {}
        if "interest" in wanted:
            models["interest"] = InterestRetriever.from_encoder(encoder, counts)
        if "covisit" in wanted:
            models["covisit"] = covisit
        if "linear" in wanted and num_items <= settings.linear.max_items:
            models["linear"] = Linear.fit(evidence.of(stage), num_items, settings.linear, event_weights=self.event_weights)
        if "content" in wanted and (vectors := self._text_vectors) is not None:
            models["content"] = ContentNeighbours.fit(vectors, settings.content)
            if "interest" in models:
                models["interest"] = placed(models["interest"], models["content"].item_vectors)
        # Popularity is always there: it answers where nothing else can.
        models["popularity"] = popularity
        if "dot_product" in wanted:
            models["dot_product"] = DotProduct.fit(evidence.sample(stage), num_items, settings.dot_product, seed=settings.seed)
        return models

    def pipeline(self, models: dict[str, Any]) -> Pipeline:
        """The sources with even weights, and no ranker yet."""
        even = {name: 1.0 for name in models}
        fusion = {"mixture": Fusion.of(even, even).to_dict(), "ranker_weight": 0.0}
        nobody = Histories(HISTORY_SCHEMA.empty_table(), max_events=1)
        return Pipeline(Bundle(self.prepared.items(), models, fusion, nobody), num_candidates=self.settings.num_candidates)

    @cached_property
    def _text_vectors(self) -> np.ndarray | None:
        return catalogue_vectors(self.prepared.items())
