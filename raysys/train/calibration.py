"""From logits to probabilities that come true, and how well they do."""

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss, roc_auc_score


def platt(logits: np.ndarray, truth: np.ndarray) -> tuple[float, float] | None:
    """Slope and intercept of the logit (Platt, 1999); None without both classes.

    Args:
        logits: (Q,) float. truth: (Q,) bool.
    """
    if not len(truth) or truth.all() or not truth.any():
        return None
    model = LogisticRegression(C=1e6).fit(logits[:, None], truth)
    slope = float(model.coef_[0, 0])
    # A negative slope would turn the order round: the head has learnt nothing, the base rate is the honest answer.
    if slope <= 0:
        return 0.0, float(np.log(truth.mean() / (1 - truth.mean())))
    return slope, float(model.intercept_[0])


def figures(calibration: tuple[float, float] | None, logits: np.ndarray, truth: np.ndarray) -> dict[str, float | None]:
    """AUC, log loss and expected calibration error (15 bins of equal mass) of calibrated logits; None without a calibration."""
    if calibration is None:
        return {"auc": None, "logloss": None, "ece": None}
    slope, intercept = calibration
    probabilities = 1 / (1 + np.exp(-(slope * logits + intercept)))
    bins = np.array_split(np.argsort(probabilities, kind="stable"), 15)
    gaps = [abs(probabilities[b].mean() - truth[b].mean()) * len(b) for b in bins if len(b)]
    return {
        "auc": float(roc_auc_score(truth, logits)),
        "logloss": float(log_loss(truth, probabilities)),
        "ece": float(sum(gaps) / len(truth)),
    }
