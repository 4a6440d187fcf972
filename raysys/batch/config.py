"""Settings of batch inference."""

from dataclasses import dataclass


@dataclass(frozen=True)
class BatchConfig:
    """Where batch inference runs and in what portions; none but `pools_from` changes an answer."""

    actors: int | None = None
    """Workers side by side, each with the bundle in memory; None gives as many as the cluster has room for now."""
    cpus_per_actor: int = 1
    """CPUs, and threads, of each worker."""
    gpus_per_actor: float = 0.0
    """GPUs of each worker, fractions allowed; stage `interest` then multiplies on the GPU where torch can use one."""
    users_per_part: int = 20_000
    """Users of an output file, the unit that a resumed run keeps or repeats; a prepared set has its own parts."""
    batch_size: int = 256
    """Users scored at once, at most; fewer where the catalogue is large."""

    pools_from: int = 50_000
    """Items from which retrieval looks at the best of each source, by an index, instead of all, as serving does; 0: never. Lists may
    then differ in their last places."""

    def __post_init__(self) -> None:
        for name in ("actors", "cpus_per_actor", "users_per_part", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"expected {name} of at least 1, got {value}")
        if self.gpus_per_actor < 0:
            raise ValueError(f"expected gpus_per_actor >= 0, got {self.gpus_per_actor}")
