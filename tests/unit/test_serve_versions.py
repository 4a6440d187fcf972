"""Versions in a replica."""

import threading

from raysys.bundle import Bundle
from raysys.registry import Registry
from raysys.serve.metrics import Metrics
from raysys.serve.models import Compute, Models
from tests import planted


def test_a_version_that_is_being_loaded_does_not_hold_up_the_one_in_use(tmp_path, planted_bundle, monkeypatch):
    registry = Registry(tmp_path / "registry")
    in_use = registry.publish(planted_bundle).version
    models = Models(registry.uri, Compute(), Metrics())
    first = models.get(in_use)
    Bundle.open(planted_bundle).write(str(tmp_path / "next"), manifest=planted.manifest())
    following = registry.publish(str(tmp_path / "next")).version
    begun, go_on, really = threading.Event(), threading.Event(), Bundle.open

    def slowly(*arguments, **options):
        begun.set()
        assert go_on.wait(60)
        return really(*arguments, **options)

    monkeypatch.setattr(Bundle, "open", slowly)
    loading = threading.Thread(target=models.load_current, daemon=True)
    loading.start()
    assert begun.wait(60)
    found = []
    asking = threading.Thread(target=lambda: found.append(models.get(in_use)), daemon=True)
    asking.start()
    asking.join(20)
    assert found == [first]
    go_on.set()
    loading.join(60)
    assert models.get(following).bundle.version == following != in_use
