"""What happens inside the training workers, stage by stage, each resumable from the last checkpoint.

    fit       encoder on every user's training events minus the last ones (the held-out positions)
    rank      worker 0: other sources on the same part; the ranker learns on the held-out positions
    refit     encoder continues on the whole training part
    choose    worker 0: sources on the whole training part; fusion and the ranker's weight chosen on validation

Without a validation part the choice is made on held-out training positions, so
it comes before the refit, which would have seen them.
No model ever learns from a position that a model before it was trained on and
that it is then judged by: see `Parts`, which `Evidence` gives, and the `leakage` entry of the manifest.
"""

import os
import tempfile
from functools import cached_property
from typing import Any

import numpy as np
import ray
import ray.train
import torch
from safetensors.numpy import save as save_arrays

from raysys import storage
from raysys.bundle import load_model
from raysys.models.fusion import NOT_JUDGED, Fusion, choose_fusion, judge_fusion
from raysys.models.grading import Grading
from raysys.models.interest import InterestEncoder
from raysys.models.opinions import Opinions
from raysys.pipeline import Pipeline
from raysys.train.checkpoint import Saved
from raysys.train.choice import MAX_WEIGHT_QUERIES, choose_ranker_weight, fusion_arguments, learn_ranker, max_fusion_queries, max_judged
from raysys.train.encoder import TrainResult
from raysys.train.encoder_stages import EncoderStages
from raysys.train.judge import calibrate
from raysys.train.sources import Sources
from raysys.train.validation import validation
from raysys.train.worker import Worker

PARTS = "parts.json"


def run_stages(loop: dict) -> None:
    """The function every Ray Train worker runs."""
    plan, board = loop["plan"], loop["board"]
    context = ray.train.get_context()
    worker = Worker(plan, context.get_world_rank(), context.get_world_size(), lambda line: ray.get(board.post.remote(line)))
    Stages(worker).run()


class Stages:
    """One worker's walk through the stages."""

    def __init__(self, worker: Worker):
        self.worker, self.plan, self.settings = worker, worker.plan, worker.settings
        self.prepared, self.evidence = worker.prepared, worker.evidence
        self.encoder = EncoderStages(worker)
        self.sources = Sources(self.prepared, self.settings)
        self.has_validation = self.evidence.has_validation

    @property
    def state(self) -> dict[str, Any]:
        """What the stages keep, JSON-ready."""
        return self.worker.state

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
        worker = self.worker
        budget = worker.share(0.6)
        worker.say(f"encoder: fitting on {self.prepared.manifest['counts']['train']:,} training events, {worker.num_items:,} items")
        if "linear" in self.settings.sources and worker.num_items > self.settings.linear.max_items:
            worker.say(f"linear: left out, more than linear.max_items ({self.settings.linear.max_items:,}) items")
        result = self.encoder.train("fit", deadline=budget, validate=validation(self.evidence, worker.parallel))
        worker.say(f"encoder: best ndcg@10 on validation {result.best_validation or 0:.4f} in epoch {result.best_epoch}")
        self.state.update({"stage": "rank", "fit_report": _report(result)})
        worker.save()

    def _rank(self) -> None:
        self.state["ranker"] = None
        encoder = self.encoder.whole()
        if encoder is not None:
            pipeline = self.sources.pipeline(self.sources.fit(self.evidence, "fit", encoder))
            if self.evidence.num_held("choice"):
                # Once and for all: the ranker reads the mixture's probabilities, so serving must mix as its training did.
                pipeline.use(choose_fusion(*self._fusion_arguments(pipeline))[0])
            self.state["fusion"] = pipeline.fusion.to_dict()
            if self.evidence.num_held("heldout"):
                self._rank_by(pipeline)
        self.state["stage"] = "refit" if self.has_validation else "choose"
        self.worker.save()

    def _rank_by(self, pipeline: Pipeline) -> None:
        ranker, figures = learn_ranker(pipeline, self.evidence, self._grading, self.settings)
        arrays, meta = ranker.to_arrays()
        self.worker.saved.dense |= {f"ranker/{name}": torch.from_numpy(np.array(array)) for name, array in arrays.items()}
        self.state["ranker"] = {"meta": meta, "report": figures}
        self.worker.say(f"ranker: {figures['queries']:,} held-out positions, target retrieved in {figures['recall']:.0%}")

    def _refit(self) -> None:
        if self.settings.refit_epochs > 0:
            self.worker.say(f"encoder: refit on {self.prepared.manifest['counts']['train']:,} events")
            schedule = self.encoder.refit_schedule(self.settings.refit_epochs)
            self.encoder.train("refit", schedule=schedule, deadline=self.worker.share(0.7))
        self.state["stage"] = "choose"
        self.worker.save()

    def _choose(self) -> None:
        folder = tempfile.mkdtemp(prefix="raysys-parts-")
        encoder = self.encoder.whole()
        if encoder is not None:
            self._choose_by(encoder, folder)
        if self.plan.fit == "train+valid" or not self.has_validation:
            self._final_refit(folder)
        # A checkpoint that says "choose" and holds the finished parts: a run that is started again from it only chooses again.
        self.worker.save(folder=folder)

    def _choose_by(self, encoder: InterestEncoder, folder: str) -> None:
        learnt_from = "refit" if self.has_validation else "fit"
        pipeline = self.sources.pipeline(self.sources.fit(self.evidence, learnt_from, encoder))
        pipeline.use(Fusion.from_dict(self.state["fusion"]))
        report = judge_fusion(pipeline.fusion, *self._fusion_arguments(pipeline)) if self.evidence.num_held("choice") else NOT_JUDGED
        ranker_report: dict = {}
        weight = 0.0
        by_weight: dict[float, float] = {}
        if self.state["ranker"] is not None:
            pipeline.ranker = self._load_ranker()
            pipeline.use(pipeline.fusion)  # the ranker's sources are computed too, with weight or without
            ranker_report = {**self.state["ranker"]["report"], **self._judge_anew(pipeline, learnt_from)}
            weight, by_weight = choose_ranker_weight(pipeline, self.evidence.held("choice", MAX_WEIGHT_QUERIES))
        shares = ", ".join(f"{name} {share:.2f}" for name, share in pipeline.fusion.weights.items())
        self.worker.say(f"fusion: {shares}; ranker weight {weight:g}")
        models = dict(pipeline.bundle.models)
        if pipeline.ranker is not None:
            models["ranker"] = pipeline.ranker
        metas = {name: _write_model(folder, name, model) for name, model in models.items()}
        validated = {**report["alone"], "fused": report["fused"]}
        if by_weight:
            validated["final"] = by_weight[weight]
        parts = {
            "metas": metas,
            "fusion": {
                "mixture": pipeline.fusion.to_dict(),
                "num_candidates": pipeline.num_candidates,
                "ranker_weight": weight,
                "ranker_sources": list(models["ranker"].sources) if "ranker" in models else [],
            },
            "metrics": {
                "validation": validated,
                "left_out": report["left_out"],
                "ranker": ranker_report,
                "ranker_weights": {str(key): value for key, value in by_weight.items()},
                "encoder": self.state["fit_report"],
            },
            "leakage": {
                "retrieval_for_ranker": "fit: training part minus each user's last positions",
                "ranker_learns_on": f"{self.evidence.num_held('heldout')} held-out training positions",
                "chosen_on": "validation part" if self.has_validation else "held-out training positions of every other user",
                "retrieval_served": "refit: " + ("training part" if self.plan.fit == "train" else "training and validation part"),
            },
        }
        storage.write_json(os.path.join(folder, PARTS), parts)

    def _judge_anew(self, pipeline: Pipeline, stage: str) -> dict:
        """Opinions from all that the sources learnt from, and a calibration of what will be served; figures where it was made."""
        ranker = pipeline.ranker
        assert ranker is not None
        if ranker.judge is None:
            return {}
        seed, about = self.settings.seed, ranker.judge.opinions
        of_stage = self.evidence.sample(stage)
        opinions = Opinions.fit(of_stage, self.worker.num_items, about.grading, about.config, ordinal_time=about.ordinal_time, seed=seed)
        choice = self.evidence.held("choice", max_judged(pipeline.num_items))
        judge, figures = calibrate(ranker.judge.with_opinions(opinions), pipeline, choice)
        pipeline.ranker = ranker.judged_by(judge)
        auc = "" if figures["auc"] is None else f", AUC {figures['auc']:.3f}"
        self.worker.say(f"judge: calibrated on {figures['positions']:,} positions{auc}")
        return figures

    @cached_property
    def _grading(self) -> Grading:
        return Grading.of(self.evidence.sample("fit"), self.prepared.events, self.prepared.manifest["event_types"])

    def _final_refit(self, folder: str) -> None:
        """Sources once more on all that may be learnt from, with everything chosen left as it is."""
        # With a validation part the encoder has been refitted on the training part already.
        epochs = max(1, self.settings.refit_epochs // 2) if self.has_validation else self.settings.refit_epochs
        worker = self.worker
        before = worker.saved
        worker.saved = Saved(dict(before.state), dict(before.dense), dict(before.rows))
        worker.say("encoder: last refit on everything before the test part")
        self.encoder.train("last refit", schedule=self.encoder.refit_schedule(epochs), deadline=self.plan.deadline, report=False)
        encoder = self.encoder.whole()
        worker.saved = before
        if encoder is not None:
            parts = storage.read_json(os.path.join(folder, PARTS))
            for name, model in self.sources.fit(self.evidence, "last refit", encoder).items():
                parts["metas"][name] = _write_model(folder, name, model)
            storage.write_json(os.path.join(folder, PARTS), parts)

    def _fusion_arguments(self, pipeline: Pipeline) -> tuple:
        return fusion_arguments(pipeline, self.evidence.held("choice", max_fusion_queries(self.worker.num_items)))

    def _load_ranker(self) -> Any:
        arrays = {name: tensor.numpy() for name, tensor in self.worker.saved.under("ranker/")[0].items()}
        return load_model("ranker", arrays, self.state["ranker"]["meta"])


def _write_model(folder: str, name: str, model: Any) -> dict:
    """Write a model's arrays beside the other parts, and return what else describes it."""
    arrays, meta = model.to_arrays()
    tensors = save_arrays({key: np.ascontiguousarray(array) for key, array in arrays.items()})
    storage.write_bytes(os.path.join(folder, f"{name}.safetensors"), tensors)
    return meta


def _report(result: TrainResult) -> dict:
    return {"best_epoch": result.best_epoch, "best_validation": result.best_validation, "epochs": len(result.history)}
