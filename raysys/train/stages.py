"""What happens inside the training workers, stage by stage, each resumable from the last checkpoint.

    fit       encoder on every user's training events minus the last ones (the held-out positions)
    rank      worker 0: other sources on the same part; the ranker learns on the held-out positions
    refit     encoder continues on the whole training part
    choose    worker 0: sources on the whole training part; fusion and the ranker's weight chosen on validation

Without a validation part the choice is made on held-out training positions, so
it comes before the refit, which would have seen them.
No model ever learns from a position that a model before it was trained on and
that it is then judged by: see `Parts` and the `leakage` entry of the manifest.
"""

import dataclasses
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import ray
import ray.train
import ray.train.torch
import torch
from ray.train import CheckpointUploadMode
from safetensors.numpy import save as save_arrays

from raysys import storage
from raysys.bundle import Bundle, Histories, load_model
from raysys.features.text import TextEncoder, item_text
from raysys.models.base import Candidates
from raysys.models.content import ContentNeighbours
from raysys.models.covisit import Covisitation
from raysys.models.dot_product import DotProduct
from raysys.models.fusion import NOT_JUDGED, Fusion, choose_fusion, judge_fusion
from raysys.models.interest import InterestEncoder, InterestRetriever
from raysys.models.linear import Linear
from raysys.models.popularity import Popularity
from raysys.pipeline import Pipeline, mix_scores, seen_mask
from raysys.prepare.dataset import Prepared, Sequences
from raysys.queries import Queries
from raysys.train.batches import InMemory, Source
from raysys.train.checkpoint import Saved, read_rows, read_state, write_rows, write_state
from raysys.train.config import TrainConfig
from raysys.train.encoder import EncoderTrainConfig, EncoderTraining, TrainResult, TrainState
from raysys.train.metrics_log import MetricsLog
from raysys.train.parallel import Parallel, whole
from raysys.train.parts import MAX_HISTORY, Judged, Parts, chunks, new_encoder, sample, validation
from raysys.train.ranker import Logged, train_ranker
from raysys.train.stream import Streamed, Survey, streamed_judged
from raysys.train.table import ShardedTable, gathered

PARTS = "parts.json"
RANKER_WEIGHTS = (0.0, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0)
MAX_CHOICE_SCORES = 40_000_000
"""Validation queries times items looked at when fusion is chosen; bounds memory."""


@dataclass(frozen=True)
class Plan:
    """What the driver asks of the workers.

    Attributes:
        prepared_uri: the prepared set.
        settings: complete ones.
        fit: "train" or "train+valid".
        threads: of torch, in each worker.
        deadline: `time.time()` by which to be done, or None.
        run: name of the run, for logs.
        survey: of the sequences where they are streamed; None where every worker reads them.
    """

    prepared_uri: str
    settings: TrainConfig
    fit: str
    threads: int
    deadline: float | None
    run: str
    survey: Survey | None


def run_stages(loop: dict) -> None:
    """The function every Ray Train worker runs."""
    plan, board = loop["plan"], loop["board"]
    context = ray.train.get_context()
    worker = Worker(plan, context.get_world_rank(), context.get_world_size(), lambda line: ray.get(board.post.remote(line)))
    worker.run()


class Worker:
    """One worker's walk through the stages.

    Args:
        plan: what to do.
        rank: this worker.
        world_size: number of workers.
        say: prints a line where the run was started.
    """

    def __init__(self, plan: Plan, rank: int, world_size: int, say: Callable[[str], Any]):
        torch.set_num_threads(plan.threads)
        self.plan, self.settings, self.rank = plan, plan.settings, rank
        scaling = plan.settings.scaling
        self.parallel = Parallel(rank, world_size, scaling.strategy, scaling.shard_items)
        self.say = say if rank == 0 else lambda line: None
        self.started = time.time()
        self.prepared = Prepared.open(plan.prepared_uri)
        self.num_items = self.prepared.num_items
        self.has_validation = self.prepared.manifest["counts"]["valid"] > 0
        self.event_weights = [self.prepared.manifest["event_types"].get(name, {}).get("weight", 1.0) for name in self.prepared.events]
        self.device = ray.train.torch.get_device()
        if self.device.type == "cuda" and not torch.cuda.is_available():
            self.say("the node has a GPU, but torch cannot use it: training on the CPU; install torch with CUDA there")
            self.device = torch.device("cpu")
        self.saved = Saved({"stage": "fit"}, {}, {})
        checkpoint = ray.train.get_checkpoint()
        if checkpoint is not None:
            with checkpoint.as_directory() as folder:
                self.saved = Saved(*read_state(folder), read_rows(folder, *self.parallel.rows(self.num_items)))
            self.say(f"continuing from a checkpoint in stage {self.state['stage']}")

    @property
    def state(self) -> dict[str, Any]:
        """What the stages keep, JSON-ready."""
        return self.saved.state

    @cached_property
    def parts(self) -> Parts:
        """All sequences; where they are streamed only rank 0 asks for them, in the stages that it runs alone."""
        return Parts(self.prepared.sequences(), self.settings)

    def run(self) -> None:
        """All stages that are left."""
        if self.state["stage"] == "fit":
            self._fit()
        if self.state["stage"] == "rank":
            self._rank()
        if self.state["stage"] == "refit":
            self._refit()
        if self.state["stage"] == "choose":
            self._choose()

    def _fit(self) -> None:
        budget = self._share(0.6)
        self.say(f"encoder: fitting on {self.prepared.manifest['counts']['train']:,} training events, {self.num_items:,} items")
        if self.plan.survey is not None:
            judged = streamed_judged(self.prepared, self.plan.survey, self.settings)
        else:
            judged = Judged.of(self.parts, self.settings, self.num_items)
        result = self._train("fit", deadline=budget, validate=validation(judged, self.parallel))
        self.say(f"encoder: best ndcg@10 on validation {result.best_validation or 0:.4f} in epoch {result.best_epoch}")
        self.state.update({"stage": "rank", "fit_report": _report(result)})
        self._save()

    def _rank(self) -> None:
        self.state["ranker"] = None
        encoder = self._whole_encoder()
        if encoder is not None:
            pipeline = self._pipeline(self._sources(self.parts.fit, encoder))
            if len(self.parts.choice):
                # Once and for all: the ranker reads the mixture's probabilities, so serving must mix as its training did.
                pipeline.use(choose_fusion(*self._judged(pipeline))[0])
            self.state["fusion"] = pipeline.fusion.to_dict()
            if len(self.parts.heldout):
                self._rank_by(pipeline)
        self.state["stage"] = "refit" if self.has_validation else "choose"
        self._save()

    def _rank_by(self, pipeline: Pipeline) -> None:
        positions = sample(self.parts.heldout, self.settings.max_ranker_queries, self.settings.seed)
        ranker, figures = self._train_ranker(pipeline, positions)
        arrays, meta = ranker.to_arrays()
        self.saved.dense |= {f"ranker/{name}": torch.from_numpy(np.array(array)) for name, array in arrays.items()}
        self.state["ranker"] = {"meta": meta, "report": figures}
        auc = "" if figures["auc"] is None else f", AUC {figures['auc']:.3f}"
        self.say(f"ranker: {figures['queries']:,} held-out positions, target retrieved in {figures['recall']:.0%}{auc}")

    def _refit(self) -> None:
        if self.settings.refit_epochs > 0:
            self.say(f"encoder: refit on {self.prepared.manifest['counts']['train']:,} events")
            self._train("refit", schedule=self._refit_schedule(self.settings.refit_epochs), deadline=self._share(0.7))
        self.state["stage"] = "choose"
        self._save()

    def _choose(self) -> None:
        folder = tempfile.mkdtemp(prefix="raysys-parts-")
        encoder = self._whole_encoder()
        if encoder is not None:
            learnt_from = self.parts.train if self.has_validation else self.parts.fit
            pipeline = self._pipeline(self._sources(learnt_from, encoder))
            pipeline.use(Fusion.from_dict(self.state["fusion"]))
            report = judge_fusion(pipeline.fusion, *self._judged(pipeline)) if len(self.parts.choice) else NOT_JUDGED
            ranker_report: dict = {}
            weight = 0.0
            by_weight: dict[float, float] = {}
            if self.state["ranker"] is not None:
                ranker_report = self.state["ranker"]["report"]
                pipeline.ranker = self._load_ranker()
                pipeline.use(pipeline.fusion)  # the ranker's sources are computed too, with weight or without
                weight, by_weight = self._choose_ranker_weight(pipeline)
            self.say(
                f"fusion: {', '.join(f'{name} {share:.2f}' for name, share in pipeline.fusion.weights.items())}; ranker weight {weight:g}"
            )
            validation = {**report["alone"], "fused": report["fused"]}
            if by_weight:
                validation["final"] = by_weight[weight]
            models = dict(pipeline.bundle.models)
            if pipeline.ranker is not None:
                models["ranker"] = pipeline.ranker
            self._write_parts(folder, models, pipeline.fusion, weight, validation, report, ranker_report, by_weight)
        if self.plan.fit == "train+valid" or not self.has_validation:
            self._final_refit(folder)
        # A checkpoint that says "choose" and holds the finished parts: a run that is started again from it only chooses again.
        self._save(folder=folder)

    def _final_refit(self, folder: str) -> None:
        """Sources once more on all that may be learnt from, with everything chosen left as it is."""
        # With a validation part the encoder has been refitted on the training part already.
        epochs = max(1, self.settings.refit_epochs // 2) if self.has_validation else self.settings.refit_epochs
        before = self.saved
        self.saved = Saved(dict(before.state), dict(before.dense), dict(before.rows))
        self.say("encoder: last refit on everything before the test part")
        self._train("last refit", schedule=self._refit_schedule(epochs), deadline=self.plan.deadline, report=False)
        encoder = self._whole_encoder()
        self.saved = before
        if encoder is not None:
            parts = storage.read_json(os.path.join(folder, PARTS))
            for name, model in self._sources(self.parts.upto_valid, encoder).items():
                arrays, parts["metas"][name] = model.to_arrays()
                storage.write_bytes(os.path.join(folder, f"{name}.safetensors"), _tensor_bytes(arrays))
            storage.write_json(os.path.join(folder, PARTS), parts)

    def _write_parts(
        self,
        folder: str,
        models: dict,
        fusion: Fusion,
        weight: float,
        validation: dict,
        report: dict,
        ranker_report: dict,
        by_weight: dict[float, float],
    ) -> None:
        metas = {}
        for name, model in models.items():
            arrays, metas[name] = model.to_arrays()
            storage.write_bytes(os.path.join(folder, f"{name}.safetensors"), _tensor_bytes(arrays))
        parts = {
            "metas": metas,
            "fusion": {
                "mixture": fusion.to_dict(),
                "ranker_weight": weight,
                "ranker_sources": list(models["ranker"].sources) if "ranker" in models else [],
            },
            "metrics": {
                "validation": validation,
                "left_out": report["left_out"],
                "ranker": ranker_report,
                "ranker_weights": {str(key): value for key, value in by_weight.items()},
                "encoder": self.state["fit_report"],
            },
            "leakage": {
                "retrieval_for_ranker": "fit: training part minus each user's last positions",
                "ranker_learns_on": f"{len(self.parts.heldout)} held-out training positions",
                "chosen_on": "validation part" if self.has_validation else "held-out training positions of every other user",
                "retrieval_served": "refit: " + ("training part" if self.plan.fit == "train" else "training and validation part"),
            },
        }
        storage.write_json(os.path.join(folder, PARTS), parts)

    def _refit_schedule(self, epochs: int) -> EncoderTrainConfig:
        config = self.settings.encoder
        return dataclasses.replace(config, epochs=epochs, lr=config.lr * self.settings.refit_lr_factor)

    def _table(self) -> Callable[[int], ShardedTable] | None:
        """Builds the item table of the training where it is cut over several workers; None for a whole one."""
        if not self.parallel.shard_items or self.parallel.world_size == 1:
            return None
        return lambda seed: ShardedTable(self.num_items, self.settings.interest.dim, seed, self.parallel)

    def _whole_encoder(self) -> InterestEncoder | None:
        """The encoder of the last training with its whole table, on rank 0; None on the others. Every rank must call."""
        table = gathered(self.saved.rows["encoder"], self.num_items, self.parallel)
        if table is None:
            return None
        encoder = new_encoder(self.prepared, self.settings)
        self._fill(encoder, table)
        return encoder.eval()

    @torch.no_grad()
    def _fill(self, encoder: InterestEncoder, rows: torch.Tensor) -> None:
        encoder.items.weight[: len(rows)] = rows
        for name, parameter in encoder.named_parameters():
            if name != "items.weight":
                parameter.copy_(self.saved.dense[f"encoder/{name}"])

    def _source(self, stage: str) -> Source:
        if self.plan.survey is not None:
            return Streamed(self.plan.prepared_uri, self.plan.survey, self.settings, stage)
        return InMemory(self.parts.of(stage))

    def _train(
        self,
        stage: str,
        *,
        schedule: EncoderTrainConfig | None = None,
        deadline: float | None = None,
        validate: Callable | None = None,
        report: bool = True,
    ) -> TrainResult:
        """Train the encoder of the stage before, or a new one, or go on where the checkpoint stopped."""
        encoder = new_encoder(self.prepared, self.settings, self._table())
        first, stop = self.parallel.rows(self.num_items)
        resume = None
        if self.state.get("training", {}).get("stage") == stage:
            resume = TrainState(self.state["training"]["progress"], *self.saved.under("training/"), first, stop)
        elif "encoder" in self.saved.rows:
            self._fill(encoder, self.saved.rows["encoder"])
        self.saved.drop("encoder", "training/", "encoder/")
        source = self._source(stage)
        log = MetricsLog(self.settings.logging, self.plan.run, stage, self.rank)
        training: EncoderTraining

        def on_epoch(entry: dict) -> None:
            figure = "" if entry["validation"] is None else f", ndcg@10 {entry['validation']:.4f}"
            self.say(f"encoder: {stage} epoch {entry['epoch']}, loss {entry['loss']:.4f}{figure}, {entry['seconds']:.1f} s")
            log.epoch(entry, training.step)

        def on_checkpoint(state: TrainState) -> None:
            self.state["training"] = {"stage": stage, "progress": state.progress}
            self.saved.put("training/", state.dense, state.rows)
            # Inside an epoch the training does not wait for the storage; after one, the checkpoint counts when this returns.
            self._save(wait=state.progress["batch"] == 0)
            self.saved.drop("training/")

        training = EncoderTraining(
            encoder,
            source,
            schedule or self.settings.encoder,
            seed=self.settings.seed,
            parallel=self.parallel,
            device=self.device,
            deadline=deadline,
            validate=validate,
            on_epoch=on_epoch,
            on_checkpoint=on_checkpoint if report else None,
            on_step=log.step,
        )
        if resume is not None:
            training.resume(resume)
        result = training.run()
        source.close()
        log.close()
        self.state.pop("training", None)
        dense = {name: whole(value.detach()).cpu() for name, value in encoder.named_parameters() if name != "items.weight"}
        self.saved.put("encoder/", dense, {})
        self.saved.rows["encoder"] = encoder.items.weight.detach()[: stop - first].cpu()
        return result

    def _sources(self, sequences: Sequences, encoder: InterestEncoder) -> dict[str, Any]:
        """Every configured source, fitted on the given events and nothing else."""
        ordinal, wanted, settings = self.prepared.ordinal_time, self.settings.sources, self.settings
        counts = np.bincount(sequences.items, minlength=self.num_items)
        models: dict[str, Any] = {}
        if "interest" in wanted:
            models["interest"] = InterestRetriever.from_encoder(encoder, counts)
        if "covisit" in wanted:
            models["covisit"] = Covisitation.fit(
                sequences, self.num_items, settings.covisit, event_weights=self.event_weights, ordinal_time=ordinal
            )
        if "linear" in wanted and self.num_items > settings.linear.max_items:
            self.say(f"linear: left out, {self.num_items:,} items are more than linear.max_items ({settings.linear.max_items:,})")
        elif "linear" in wanted:
            models["linear"] = Linear.fit(sequences, self.num_items, settings.linear, event_weights=self.event_weights)
        if "content" in wanted and (vectors := self._text_vectors()) is not None:
            models["content"] = ContentNeighbours.fit(vectors, settings.content)
        # Popularity is always there: it answers where nothing else can.
        models["popularity"] = Popularity.fit(
            sequences, self.num_items, settings.popularity, event_weights=self.event_weights, ordinal_time=ordinal
        )
        if "dot_product" in wanted:
            models["dot_product"] = DotProduct.fit(sequences, self.num_items, settings.dot_product, seed=settings.seed)
        return models

    def _text_vectors(self) -> np.ndarray | None:
        if not hasattr(self, "_vectors"):
            items = self.prepared.items()
            blank = [None] * items.num_rows
            columns = [items[name].to_pylist() if name in items.column_names else blank for name in ("title", "text", "categories")]
            texts = [item_text(*row) for row in zip(*columns, strict=True)]
            self._vectors = TextEncoder().encode(texts) if any(texts) else None
        return self._vectors

    def _pipeline(self, models: dict[str, Any]) -> Pipeline:
        even = {name: 1.0 for name in models}
        fusion = {"mixture": Fusion.of(even, even).to_dict(), "ranker_weight": 0.0}
        nobody = Histories.build(self.parts.all.where(np.zeros(len(self.parts.all.items), bool)), [], max_events=1)
        return Pipeline(Bundle(self.prepared.items(), models, fusion, nobody), num_candidates=self.settings.num_candidates)

    def _judged(self, pipeline: Pipeline) -> tuple[dict[str, Callable], np.ndarray, Callable]:
        """Scores of each source, targets and masks of the positions where settings are chosen; arguments of `fusion.py`."""
        positions = sample(self.parts.choice, max(200, MAX_CHOICE_SCORES // self.num_items), self.settings.seed)
        queries = self.parts.all.queries_before(positions, max_events=MAX_HISTORY)
        scorers: dict[str, Callable] = {name: partial(_scores_of, model, queries) for name, model in pipeline.bundle.models.items()}
        return scorers, self.parts.all.items[positions].astype(np.int64), lambda rows: seen_mask(queries[rows], self.num_items)

    def _train_ranker(self, pipeline: Pipeline, positions: np.ndarray) -> tuple[Any, dict]:
        sequences = self.parts.all
        queries = sequences.queries_before(positions, max_events=MAX_HISTORY)
        targets = sequences.items[positions].astype(np.int64)
        kept, singles = [], []
        for rows in chunks(len(positions), 256):
            query = queries[rows]
            log_probs = pipeline.source_log_probs(query)
            retrieved = pipeline.retrieve(query, allowed=seen_mask(query, self.num_items), log_probs=log_probs)
            kept.append(retrieved.candidates)
            singles.append(pipeline.candidates_of(query, targets[rows][:, None], log_probs=log_probs))
        positive = sequences.positive[positions]
        logged = Logged(_concatenate(singles), positive) if positive.any() and not positive.all() else None
        models = pipeline.bundle.models
        vectors = models["interest"].item_vectors if "interest" in models else models["dot_product"].item_vectors
        return train_ranker(
            queries,
            _concatenate(kept),
            targets,
            logged,
            item_vectors=vectors,
            content_vectors=models["content"].item_vectors if "content" in models else None,
            item_counts=np.bincount(self.parts.fit.items, minlength=self.num_items),
            config=self.settings.ranker,
            seed=self.settings.seed,
        )

    def _load_ranker(self) -> Any:
        arrays = {name: tensor.numpy() for name, tensor in self.saved.under("ranker/")[0].items()}
        return load_model("ranker", arrays, self.state["ranker"]["meta"])

    def _choose_ranker_weight(self, pipeline: Pipeline) -> tuple[float, dict[float, float]]:
        """The ranker's weight in the final score, 0 where it does not help on validation."""
        positions = sample(self.parts.choice, 4000, self.settings.seed)
        queries = self.parts.all.queries_before(positions, max_events=MAX_HISTORY)
        targets = self.parts.all.items[positions]
        gains: dict[float, list[np.ndarray]] = {weight: [] for weight in RANKER_WEIGHTS}
        for rows in chunks(len(positions), 256):
            query = queries[rows]
            candidates = pipeline.retrieve(query, allowed=seen_mask(query, self.num_items)).candidates
            assert pipeline.ranker is not None
            logits, _ = pipeline.ranker.score(query, candidates)
            hit = candidates.items == targets[rows][:, None]
            for weight in RANKER_WEIGHTS:
                scores = mix_scores(candidates.fused, logits, weight)
                of_target = np.where(hit, scores, -np.inf).max(axis=1, keepdims=True)
                ranks = (scores > of_target).sum(axis=1)
                gains[weight].append(np.where(hit.any(axis=1) & (ranks < 10), 1 / np.log2(ranks + 2.0), 0.0))
        means = {weight: float(np.concatenate(values).mean()) for weight, values in gains.items()}
        best = np.concatenate(gains[max(means, key=lambda weight: means[weight])])

        def is_as_good(weight: float) -> bool:
            behind = best - np.concatenate(gains[weight])
            return behind.mean() <= behind.std() / np.sqrt(len(behind))

        # The least weight within one standard error of the best one: more than that is fitted to the sample.
        return next(weight for weight in RANKER_WEIGHTS if is_as_good(weight)), means

    def _share(self, share: float) -> float | None:
        """The moment when a share of what is left of the time budget is used up."""
        if self.plan.deadline is None:
            return None
        return time.time() + share * max(0.0, self.plan.deadline - time.time())

    def _save(self, *, folder: str | None = None, wait: bool = True) -> None:
        """Report to Ray Train; each worker brings what only it has to the checkpoint.

        Args:
            folder: where other files of the checkpoint are already; a temporary one by default. It is removed.
            wait: until the checkpoint is in the run's storage; else it is copied there while the training goes on.
        """
        folder = folder or tempfile.mkdtemp(prefix="raysys-checkpoint-")
        if self.rank == 0:
            write_state(folder, self.state, self.saved.dense)
        if self.rank == 0 or self.parallel.shard_items:
            write_rows(folder, self.saved.rows, *self.parallel.rows(self.num_items))
        is_empty = not os.listdir(folder)
        ray.train.report(
            {"stage": self.state["stage"]},
            checkpoint=None if is_empty else ray.train.Checkpoint.from_directory(folder),
            checkpoint_upload_mode=CheckpointUploadMode.SYNC if wait else CheckpointUploadMode.ASYNC,
            delete_local_checkpoint_after_upload=True,
        )
        if is_empty:
            storage.remove(folder)


def _concatenate(parts: list[Candidates]) -> Candidates:
    items, fused, log_probs = (np.concatenate([getattr(part, name) for part in parts]) for name in ("items", "fused", "log_probs"))
    return Candidates(items, fused, log_probs, parts[0].sources)


def _tensor_bytes(arrays: dict[str, np.ndarray]) -> bytes:
    return save_arrays({name: np.ascontiguousarray(array) for name, array in arrays.items()})


def _report(result: TrainResult) -> dict:
    return {"best_epoch": result.best_epoch, "best_validation": result.best_validation, "epochs": len(result.history)}


def _scores_of(model: Any, queries: Queries, rows: slice) -> np.ndarray:
    return model.scores(queries[rows])
