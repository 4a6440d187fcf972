"""The environment that makes Serve fast. Imports nothing, because it must be set before Ray is imported."""

FAST_SETTINGS = {
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    # Lines of HAProxy's configuration: Ray writes the value into it as it stands, and has no setting for the others. HAProxy sends a
    # request again only if it had all of it when it sent it first, and many clients send headers and body apart. It waits for
    # that, or for its buffer (16 KB) to fill, at most 10 s. Idle connections would be closed after those too; the last line keeps them.
    "RAY_SERVE_HAPROXY_RETRY_ON": (
        "conn-failure empty-response\n    option http-buffer-request\n    timeout http-request 10s\n    timeout http-keep-alive 1h"
    ),
    # HAProxy takes a server for dead after three refused connections; with its own three tries the first request would use them all up.
    "RAY_SERVE_HAPROXY_RETRIES": "10",
}
"""Environment of the process that starts Ray and Serve; measured in docs/serving.md."""
