"""Training of the judge on positions whose answer no feature has seen.

Every event of the training part is a position, asked with the history before it.
Its opinions come from a fold: items as the other users found them. What retrieval
says is known for the positions that were held out of the retrieval's fit, and
missing at the others, which it has seen. Early stopping looks at the positions
where settings are chosen.

Legend: Q positions, K candidates, F features.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.numpy import save as save_arrays

from raysys import storage
from raysys.models.base import Arrays, Candidates
from raysys.models.grading import Grading
from raysys.models.judge import Examples, Judge, JudgeConfig, JudgeNetwork, loss_of
from raysys.models.opinions import Opinions
from raysys.pipeline import Pipeline
from raysys.prepare.dataset import Sequences
from raysys.schema import UNKNOWN_ITEM
from raysys.train.calibration import figures, platt
from raysys.train.parts import Held, chunks

AT_ONCE = 512
"""Positions whose features are made together."""
MIN_CLASS = 20
"""Positive and other events that there must be, each, to learn from."""


@dataclass(frozen=True)
class Judged:
    """Positions with their answers: Q examples with one item each.

    Attributes:
        examples: K is 1. liked: (Q,) bool. grades: (Q,) float32, in standard deviations.
    """

    examples: Examples
    liked: np.ndarray
    grades: np.ndarray

    def __len__(self) -> int:
        return len(self.liked)

    @classmethod
    def stack(cls, parts: list["Judged"]) -> "Judged":
        """One after the other."""
        examples = Examples.stack([part.examples for part in parts])
        return cls(examples, *(np.concatenate([getattr(part, name) for part in parts]) for name in ("liked", "grades")))

    def to_arrays(self) -> Arrays:
        """For a file."""
        return {**self.examples.to_arrays(), "liked": self.liked, "grades": self.grades}

    @classmethod
    def from_arrays(cls, arrays: Arrays) -> "Judged":
        """Back from `to_arrays`."""
        return cls(Examples.from_arrays(arrays), arrays["liked"], arrays["grades"])

    def batch(self, rows: np.ndarray) -> tuple[Examples, torch.Tensor, torch.Tensor]:
        """Examples, liked and grades, as `loss_of` wants them."""
        liked, grades = torch.from_numpy(self.liked[rows].astype(np.float32)), torch.from_numpy(self.grades[rows])
        return self.examples.take(rows), liked, grades


def learn_judge(
    pipeline: Pipeline,
    sample: Sequences,
    held: Held,
    said: Candidates,
    choice: Held,
    *,
    grading: Grading,
    ordinal_time: bool,
    config: JudgeConfig,
    seed: int,
) -> Judge | None:
    """A judge, or None where nothing tells liked items from others.

    Args:
        pipeline: of sources that were fitted on what `sample` is drawn from, and on nothing of the others.
        sample: users, all of whose events in the fit may be learnt from.
        held: positions that were held out of the fit.
        said: (Q, 1) their targets with what the pipeline says of them; see `answers`.
        choice: positions where early stopping looks.
        grading: how events are read.
        ordinal_time: times carry order only.
        config: settings.
        seed: of factors, positions and networks.
    """
    if min(sample.positive.sum(), (~sample.positive).sum()) < MIN_CLASS or not (choice.targets != UNKNOWN_ITEM).any():
        return None
    models = pipeline.bundle.models
    vectors = models["interest"].item_vectors if "interest" in models else models["dot_product"].item_vectors
    content = models["content"].item_vectors if "content" in models else np.zeros((len(vectors), 0), np.float32)
    opinions = Opinions.fit(sample, pipeline.num_items, grading, config.opinions, ordinal_time=ordinal_time, seed=seed)
    judge = Judge(opinions, vectors, content, said.sources, [], config)
    learnt = Judged.stack([of_folds(judge, sample, ordinal_time=ordinal_time, seed=seed), of_held(judge, held, said)])
    watched = of_held(judge, choice, answers(pipeline, choice))
    if config.examples is not None:
        for name, judged in (("learnt", learnt), ("watched", watched)):
            storage.write_bytes(storage.join(config.examples, f"{name}.safetensors"), save_arrays(judged.to_arrays()))
    judge.networks = [train_member(judge, learnt, watched, seed=seed * 1000 + member) for member in range(config.members)]
    return judge


def answers(pipeline: Pipeline, held: Held) -> Candidates:
    """(Q, 1) the target of each position with what retrieval says of it; item 0 stands for targets without a row."""
    items = np.maximum(held.targets, 0)[:, None]
    return Candidates.stack([pipeline.candidates_of(held.queries[rows], items[rows]) for rows in chunks(len(held), AT_ONCE)])


def of_held(judge: Judge, held: Held, said: Candidates) -> Judged:
    """Positions that retrieval has not seen, with what it says; targets without a row are left out."""
    known = np.flatnonzero(held.targets != UNKNOWN_ITEM)
    held, said = held.take(known), said.take(known, np.zeros((len(known), 1), np.int64))
    parts = [judge.examples(held.queries[rows], said.items[rows], said[rows]) for rows in chunks(len(held), AT_ONCE)]
    return Judged(Examples.stack(parts), held.positive, judge.opinions.grading.grade(held.events, held.values))


def of_folds(judge: Judge, sample: Sequences, *, ordinal_time: bool, seed: int) -> Judged:
    """Positions that retrieval has seen, with opinions of other users only."""
    config, opinions = judge.config, judge.opinions
    rng = np.random.default_rng(seed)
    fold_of_user = rng.permutation(len(sample)) % config.folds
    wanted = np.arange(len(sample.items))
    if len(wanted) > config.max_positions:
        wanted = np.sort(rng.choice(wanted, config.max_positions, replace=False))
    parts, order = [], []
    for fold in range(config.folds):
        others = sample.where(fold_of_user[sample.rows] != fold)
        of_others = Opinions.fit(
            others, len(opinions.counts), opinions.grading, config.opinions, ordinal_time=ordinal_time, seed=seed + fold + 1
        )
        mine = wanted[fold_of_user[sample.rows[wanted]] == fold]
        for rows in chunks(len(mine), AT_ONCE):
            queries = sample.queries_before(mine[rows], max_events=config.opinions.window)
            parts.append(judge.examples(queries, sample.items[mine[rows]][:, None], None, opinions=of_others))
        order.append(mine)
    at = np.concatenate(order)
    return Judged(Examples.stack(parts), sample.positive[at], opinions.grading.grade(sample.events[at], sample.values[at]))


def train_member(judge: Judge, learnt: Judged, watched: Judged, *, seed: int) -> JudgeNetwork:
    """One network, as it was after the epoch with the least log loss on what is watched."""
    config = judge.config
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    network = JudgeNetwork(sum(table.shape[1] for table in judge.tables), learnt.examples.dense.shape[2], config)
    network.standardise(learnt.examples.dense)
    optimizer = torch.optim.AdamW(network.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    batches = -(-len(learnt) // config.batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.lr, total_steps=config.epochs * batches, pct_start=0.1)
    best, best_loss = network.state_dict(), np.inf
    for _ in range(config.epochs):
        network.train()
        for rows in np.array_split(rng.permutation(len(learnt)), batches):
            loss = loss_of(network, judge.tables, *learnt.batch(rows))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
        found = log_loss_of(network, judge, watched)
        if found < best_loss:
            best, best_loss = {name: tensor.clone() for name, tensor in network.state_dict().items()}, found
    network.load_state_dict(best)
    return network.eval()


def log_loss_of(network: JudgeNetwork, judge: Judge, watched: Judged) -> float:
    """Mean cross-entropy of liking, in nats."""
    network.eval()
    total = 0.0
    with torch.inference_mode():
        for rows in chunks(len(watched), 4 * AT_ONCE):
            examples, liked, _ = watched.batch(np.arange(rows.start, rows.stop))
            logits, _ = network(judge.tables, *examples.tensors())
            total += float(F.binary_cross_entropy_with_logits(logits[:, 0], liked, reduction="sum"))
    return total / max(1, len(watched))


def calibrate(judge: Judge, pipeline: Pipeline, choice: Held) -> tuple[Judge, dict]:
    """The judge calibrated on positions where settings are chosen, as the models that will be served answer them; figures there."""
    watched = of_held(judge, choice, answers(pipeline, choice))
    logits = np.concatenate([judge.logits(watched.examples.take(rows))[:, 0] for rows in chunks(len(watched), 4 * AT_ONCE)])
    calibration = platt(logits, watched.liked)
    return judge.calibrated(calibration), {"positions": len(watched), **figures(calibration, logits, watched.liked)}
