"""An encoder that learns from a larger one or from several: the lower layers of the bundle's own, taught the teacher's distributions.

Source: Hinton et al., "Distilling the Knowledge in a Neural Network", 2015; starting from the teacher's own layers as in
Sanh et al., "DistilBERT", 2019.
"""

import dataclasses
import math

import torch

from raysys.bundle import Bundle
from raysys.compress.config import CompressConfig
from raysys.compress.teachers import teacher_of
from raysys.compress.thinned import Thinned
from raysys.models.interest import InterestEncoder, InterestRetriever
from raysys.prepare.dataset import Prepared
from raysys.train.config import TrainConfig, with_data_defaults
from raysys.train.encoder import train_encoder
from raysys.train.evidence import Evidence
from raysys.train.validation import validation


def distilled(bundle: Bundle, prepared: Prepared, settings: CompressConfig, say=print) -> Bundle | None:
    """The bundle with a student in place of its encoder; None where there is nothing to take away.

    Args:
        bundle: with an interest encoder.
        prepared: what the bundle was trained on; its training part teaches, its validation part ends the training.
        settings: see `CompressConfig`.
        say: told each epoch.
    """
    retriever = bundle.models.get("interest")
    if retriever is None:
        return None
    encoder = retriever.encoder
    layers = max(1, math.ceil(settings.student_layers * encoder.config.num_layers))
    if layers >= encoder.config.num_layers and not settings.teachers:
        return None
    torch.manual_seed(settings.seed)
    shape = dataclasses.replace(encoder.config, num_layers=layers)
    learning = dataclasses.replace(shape, dropout=settings.distil_dropout)
    student = InterestEncoder(encoder.num_items, encoder.num_event_types, learning)
    mine = student.state_dict()
    student.load_state_dict({name: tensor for name, tensor in encoder.state_dict().items() if name in mine})
    evidence = Evidence(prepared, TrainConfig(seed=settings.seed), None)
    lengths, num_items, repeats = evidence.statistics
    usual = with_data_defaults(TrainConfig(), frozenset(), lengths, num_items, repeats).encoder
    # Size of a step and weight decay as the data want them, like the teachers'.
    schedule = dataclasses.replace(
        usual, loss="softmax", epochs=settings.distil_epochs, lr=settings.distil_lr, validate_every=1, warmup_steps=50
    )
    train_encoder(
        student,
        Thinned(evidence.piece(0).of("refit"), settings.distil_thinned),
        schedule,
        seed=settings.seed,
        validate=validation(evidence),
        teacher=teacher_of(bundle, settings.teachers),
        teacher_share=settings.distil_share,
        on_epoch=lambda entry: say(f"student: epoch {entry['epoch']}, ndcg@10 {entry['validation']:.4f}, {entry['seconds']:.0f} s"),
    )
    student.config = shape
    models = {**bundle.models, "interest": InterestRetriever(student, retriever.warm)}
    return dataclasses.replace(bundle, models=models)
