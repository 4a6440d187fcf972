"""The environment that makes Serve fast. Imports nothing, because it must be set before Ray is imported."""

FAST_SETTINGS = {
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_HAPROXY_RETRY_ON": "conn-failure empty-response",
}
"""Environment of the process that starts Ray and Serve; measured in docs/serving.md."""
