"""What is known of prepared sequences that are too many to be held: their fragments, and how long histories are.

A fragment is a row group. `prepare` deals users out to files by a hash of their
id, so a file is a random sample of them; inside it they stand by id.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from raysys import storage
from raysys.prepare.dataset import SEQUENCES, Prepared, Sequences, to_sequences
from raysys.schema import UNKNOWN_ITEM
from raysys.train.batches import num_windows
from raysys.train.config import ScalingConfig, TrainConfig
from raysys.train.parts import held_counts, held_out


@dataclass(frozen=True)
class Fragment:
    """A row group: file below the prepared set, number, events."""

    file: str
    group: int
    events: int


@dataclass(frozen=True)
class Survey:
    """What every worker has to know of the whole, from one pass over it.

    Attributes:
        fragments: all of them, in the order of files.
        train: (L+1,) users by number of training events. upto_valid: the same with the validation part.
        repeats: share of training events whose user had the item before.
    """

    fragments: list[Fragment]
    train: np.ndarray
    upto_valid: np.ndarray
    repeats: float

    @classmethod
    def of(cls, prepared: Prepared) -> "Survey":
        """Read all sequences once, a fragment at a time."""
        fragments = list_fragments(prepared)
        train, both = np.zeros(1, np.int64), np.zeros(1, np.int64)
        repeated, events = 0.0, 0
        for fragment in fragments:
            sequences = read_fragments(prepared.uri, [fragment])
            learnt = sequences.train()
            train = _added(train, np.diff(learnt.indptr))
            repeated, events = repeated + learnt.repeats * len(learnt.items), events + len(learnt.items)
            upto = sequences.upto("valid")
            both = _added(both, np.diff(upto.where(upto.items != UNKNOWN_ITEM).indptr))
        return cls(fragments, train, both, repeated / max(1, events))

    @property
    def lengths(self) -> np.ndarray:
        """(U,) training events of each user, in no order."""
        return np.repeat(np.arange(len(self.train)), self.train)

    def held_out(self, settings: TrainConfig) -> int:
        """See `parts.held_out`."""
        return held_out(int(self.train[2:].sum()), settings)

    def num_windows(self, stage: str, max_length: int, settings: TrainConfig) -> int:
        """Windows of an epoch of a stage."""
        users = self.upto_valid if stage == "last refit" else self.train
        lengths = np.arange(len(users))
        held = held_counts(lengths, self.held_out(settings)) if stage == "fit" else 0
        return num_windows(lengths - held, max_length, users)


def list_fragments(prepared: Prepared) -> list[Fragment]:
    """Row groups of the sequences, in the order of file names."""
    filesystem, path = storage.resolve(storage.join(prepared.uri, SEQUENCES))
    found = []
    for name in storage.list_dir(storage.join(prepared.uri, SEQUENCES)):
        if name.endswith(".parquet"):
            footer = pq.read_metadata(f"{path}/{name}", filesystem=filesystem)
            found += [Fragment(name, group, _events(footer, group)) for group in range(footer.num_row_groups)]
    return found


def _events(footer: pq.FileMetaData, group: int) -> int:
    columns = (footer.row_group(group).column(index) for index in range(footer.num_columns))
    return next(column.num_values for column in columns if column.path_in_schema.startswith("item_idx"))


def read_fragments(uri: str, fragments: list[Fragment]) -> Sequences:
    """The users of some fragments, as they lie there."""
    tables = []
    for fragment in fragments:
        filesystem, path = storage.resolve(storage.join(uri, SEQUENCES, fragment.file))
        with filesystem.open_input_file(path) as file:
            tables.append(pq.ParquetFile(file).read_row_group(fragment.group))
    return to_sequences(pa.concat_tables(tables).combine_chunks())


def survey_if_streamed(prepared: Prepared, scaling: ScalingConfig) -> Survey | None:
    """A survey of a set that is streamed; None of one that is held in memory."""
    return Survey.of(prepared) if scaling.streams(prepared.manifest["counts"]["train"]) else None


def grouped(fragments: Iterable[Fragment], max_events: int) -> list[list[Fragment]]:
    """Neighbours together, at most so many events a group; a fragment that has more is alone."""
    groups: list[list[Fragment]] = []
    events = 0
    for fragment in fragments:
        if not groups or events + fragment.events > max_events:
            groups.append([])
            events = 0
        groups[-1].append(fragment)
        events += fragment.events
    return groups


def _added(histogram: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    found = np.bincount(lengths, minlength=len(histogram))
    found[: len(histogram)] += histogram
    return found
