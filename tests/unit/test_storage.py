"""Names on local paths and URIs."""

import pytest

from raysys import storage
from raysys.errors import ConfigError

OPTIONS = "?endpoint_override=127.0.0.1:5000&scheme=http&region=us-east-1"


@pytest.mark.parametrize(
    "uri, joined, beside",
    [
        ("/data/x", "/data/x/a/b", "/data/x.work"),
        ("/data/x/", "/data/x/a/b", "/data/x.work"),
        ("/data/what?", "/data/what?/a/b", "/data/what?.work"),
        ("s3://bucket/x", "s3://bucket/x/a/b", "s3://bucket/x.work"),
        (f"s3://bucket/x/{OPTIONS}", f"s3://bucket/x/a/b{OPTIONS}", f"s3://bucket/x.work{OPTIONS}"),
    ],
)
def test_options_of_a_uri_stay_at_its_end(uri, joined, beside):
    assert storage.join(uri, "a", "b") == joined
    assert storage.beside(uri, ".work") == beside


def test_one_client_serves_all_paths_of_a_bucket_and_its_options():
    first, path = storage.resolve(f"s3://bucket/x/y{OPTIONS}")
    second, other = storage.resolve(f"s3://bucket/z{OPTIONS}")
    third, _ = storage.resolve(f"s3://bucket/z{OPTIONS.replace('5000', '5001')}")
    assert (path, other) == ("bucket/x/y", "bucket/z")
    assert first is second and first is not third


@pytest.mark.parametrize("uri", ["nowhere://x/y", f"s3://{OPTIONS}"])
def test_a_wrong_uri_is_one_clear_error(uri):
    with pytest.raises(ConfigError, match="expected a local path or a"):
        storage.resolve(uri)
