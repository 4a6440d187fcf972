"""Who teaches the student: the bundle's own encoder, or the mean of it and those of other bundles."""

from raysys.bundle import Bundle
from raysys.errors import ConfigError
from raysys.models.interest import InterestEncoder
from raysys.models.mean_encoder import MeanEncoder


def teacher_of(bundle: Bundle, others: list[str]) -> InterestEncoder | MeanEncoder:
    """What teaches the student: the bundle's encoder, or the mean of it and those of other bundles.

    Args:
        bundle: with an interest encoder.
        others: URIs of bundles that were trained on the same prepared set.

    Raises:
        ConfigError: one has no encoder, other items, other event types, a shorter memory, or treats seen items differently.
    """
    encoder = bundle.models["interest"].encoder
    if not others:
        return encoder
    encoders = [encoder]
    for uri in others:
        other = Bundle.open(uri)
        if "interest" not in other.models:
            raise ConfigError(f"teachers: {uri} has no interest encoder")
        if other.items["item_id"].to_pylist() != bundle.items["item_id"].to_pylist() or other.events != bundle.events:
            raise ConfigError(f"teachers: expected bundles of the same prepared set, {uri} has other items or event types; train it again")
        found = other.models["interest"].encoder
        for name in ("max_length", "exclude_seen"):
            mine, theirs = getattr(encoder.config, name), getattr(found.config, name)
            if mine != theirs:
                raise ConfigError(f"teachers: expected interest.{name} {mine} as in the bundle itself, {uri} has {theirs}")
        encoders.append(found)
    return MeanEncoder(encoders).eval()
