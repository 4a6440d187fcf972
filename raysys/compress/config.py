"""Settings of compression."""

from dataclasses import dataclass, field

STEPS = ("unused", "weak", "distil", "shorten", "narrow", "prune", "few", "quantize")


@dataclass(frozen=True)
class CompressConfig:
    """What may be tried, and how much it may cost."""

    steps: list[str] = field(default_factory=lambda: list(STEPS))
    """Tried in this order, each on what the ones before left: `unused` drops sources that no answer looks at, `weak` those with little
    weight, `distil` teaches an encoder of fewer layers, `shorten` answers from fewer events, `narrow` leaves content vectors fewer
    dimensions, `prune` shortens the rows of sparse sources, `few` ranks fewer candidates, `quantize` writes int8."""
    max_loss: float = 0.01
    """NDCG@10 that all steps together may lose on the validation part, relative; a step that would exceed it is left out."""
    max_queries: int = 4000
    """Validation events that judge, sampled when there are more."""
    weak_share: float = 0.1
    """Sources with less than this share of the mixture are weak."""
    student_layers: float = 0.5
    """Layers of the student, as a share of the teacher's, rounded up."""
    teachers: list[str] = field(default_factory=list)
    """URIs of further bundles trained on the same prepared set, with other seeds for instance: the student learns from the mean of all
    encoders. With `student_layers` 1 it costs what the bundle's own does."""
    distil_epochs: int = 8
    """Passes over the training part at most."""
    distil_lr: float = 2e-3
    """Peak learning rate of the student, which starts as the teacher's lower layers."""
    distil_share: float = 1.0
    """Weight of the teacher's distribution in what the student learns; the rest is the event that came."""
    distil_dropout: float = 0.0
    """Dropout of the student while it learns: whole distributions over ever other histories leave it nothing to learn by heart."""
    distil_thinned: float = 0.3
    """Share of the events that are left out of the histories that the student learns on, others in every epoch: its teachers do not know
    by heart what follows there."""
    lengths: list[float] = field(default_factory=lambda: [0.25, 0.375, 0.5, 0.75])
    """Shares of the events that the encoder has learnt from which `shorten` tries, the fewest first."""
    widths: list[int] = field(default_factory=lambda: [64, 128, 192])
    """Dimensions of content vectors that `narrow` tries, the fewest first."""
    neighbours: list[int] = field(default_factory=lambda: [32, 64, 128, 256])
    """Entries a row of the sparse sources that pruning tries, the fewest first."""
    candidates: list[int] = field(default_factory=lambda: [50, 75, 100])
    """Candidates to rank that `few` tries, the fewest first."""
    seed: int = 0
    """Of samples and of the student's training."""

    def __post_init__(self) -> None:
        unknown = [step for step in self.steps if step not in STEPS]
        if unknown or not self.steps:
            raise ValueError(f"expected steps out of {', '.join(STEPS)}, got {', '.join(unknown) or 'none'}")
        for name in ("max_loss", "weak_share", "student_layers", "distil_share", "distil_thinned"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"expected {name} in [0, 1], got {getattr(self, name)}")
        if not 0 <= self.distil_dropout < 1:
            raise ValueError(f"expected distil_dropout in [0, 1), got {self.distil_dropout}")
        if not all(0 < share < 1 for share in self.lengths):
            raise ValueError(f"expected lengths between 0 and 1, got {self.lengths}")
        if self.max_queries < 1 or self.distil_epochs < 1 or any(n < 1 for n in (*self.neighbours, *self.widths, *self.candidates)):
            raise ValueError("expected max_queries, distil_epochs, widths, neighbours and candidates of at least 1")
