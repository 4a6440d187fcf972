"""The data sets of the quality benchmark, their bars, and what others have published on the same files.

Leave-one-out, masked, all items ranked, test part. Published figures were not run here: they are quoted as found.
"""

from dataclasses import dataclass, field

Figures = tuple[float | None, float | None]
"""(recall@10, ndcg@10); None where it was not found."""


@dataclass(frozen=True)
class DataSet:
    """One data set.

    Attributes:
        title: for people. folder: its place under --data.
        recall, ndcg: least recall@10 and ndcg@10 of the whole pipeline. minutes: longest training on two cores.
        published: who -> figures.
    """

    title: str
    folder: str
    recall: float
    ndcg: float
    minutes: float
    published: dict[str, Figures] = field(default_factory=dict)


SETS = {
    "beauty": DataSet(
        "Amazon Beauty, 5-core",
        "s3rec_Beauty",
        0.107,
        0.0645,
        45,
        {
            "item-kNN, directional": (0.0848, 0.0529),
            "SASRec, 1-negative BCE": (0.0591, 0.0312),
            "SASRec, full softmax": (0.0859, 0.0503),
            "SASRec, 256 sampled negatives": (0.0921, 0.0531),
            "eSASRec": (0.0928, 0.0523),
            "TIGER": (0.0648, 0.0384),
            "ActionPiece": (0.0775, 0.0424),
            "HSTU": (0.0788, 0.0439),
            "ICSRec": (0.0959, 0.0578),
            "BSARec (settings chosen on test)": (0.1008, 0.0611),
            "WEARec (settings chosen on test)": (0.1041, 0.0614),
        },
    ),
    "toys": DataSet(
        "Amazon Toys and Games, 5-core",
        "s3rec_Toys_and_Games",
        0.111,
        0.069,
        45,
        {
            "item-kNN, directional": (0.0985, 0.0645),
            "SASRec, 1-negative BCE": (0.0721, 0.0402),
            "SASRec, 256 sampled negatives": (0.0970, 0.0580),
            "eSASRec": (0.0939, 0.0538),
            "TIGER": (0.0712, 0.0432),
            "HSTU": (0.0778, 0.0450),
            "ICSRec": (0.1055, 0.0657),
        },
    ),
    "ml1m": DataSet(
        "MovieLens-1M, sequences",
        "ml1m_seq",
        0.34,
        0.205,
        120,
        {
            "SASRec, 1-negative BCE": (0.2500, 0.1341),
            "SASRec, full softmax": (0.3152, 0.1821),
            "SASRec, 256 sampled negatives": (0.2929, 0.1684),
            "eSASRec": (0.3133, 0.1772),
            "HSTU": (0.3097, 0.1720),
            "HSTU-large": (0.3294, 0.1893),
            "ICSRec": (0.3369, 0.2007),
            "WEARec (settings chosen on test)": (0.3286, 0.1917),
        },
    ),
}
