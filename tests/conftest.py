"""What several suites share: one small model on disk."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session")
def llama_directory(tmp_path_factory):
    """A Llama of transformers: 4 layers, 8 heads in 4 groups, 131 words, float32. Do not change it."""
    from tests.oracles import hf  # here: most suites do without transformers

    directory = tmp_path_factory.mktemp("llama") / "hf"
    hf.llama(directory)
    return directory
