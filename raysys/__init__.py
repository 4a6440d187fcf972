"""raysys: a real-time recommender that runs on Ray."""

__version__ = "0.1.0"
