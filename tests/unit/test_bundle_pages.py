"""A bundle in memory is the pages of its files: the processes of a node share them, and whoever writes has a copy."""

from pathlib import Path

import numpy as np
import pytest
import torch

from raysys.bundle import Bundle, verify


def is_page_of(array: np.ndarray, path: Path) -> bool:
    """Whether an array lies in pages of a file that this process has mapped."""
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    ranges = [line[0].split("-") for line in lines if line[-1] == str(path)]
    address = array.__array_interface__["data"][0]
    return any(int(first, 16) <= address < int(stop, 16) for first, stop in ranges)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="expected /proc, to see what is mapped")
def test_what_grows_with_the_catalogue_is_mapped(planted_bundle):
    folder = Path(planted_bundle)
    models = Bundle.open(planted_bundle).models  # content and ranker are kept in half precision, and read into memory
    assert is_page_of(models["interest"].encoder.items.weight.detach().numpy(), folder / "interest.safetensors")
    assert is_page_of(models["covisit"]._counts.data, folder / "covisit.safetensors")


def test_who_writes_changes_neither_the_file_nor_another_reader(planted_bundle):
    mine, other = Bundle.open(planted_bundle), Bundle.open(planted_bundle)
    table = mine.models["interest"].encoder.items.weight
    before = table.detach().clone()
    with torch.no_grad():
        table += 1.0
    assert not torch.equal(table, before)
    torch.testing.assert_close(other.models["interest"].encoder.items.weight.detach(), before, rtol=0, atol=0)
    verify(planted_bundle)
