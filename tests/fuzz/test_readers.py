"""Random input for every reader: it is read, or a ValueError says what is wrong with it. Seeded; past faults first.

benchmarks/fuzz.py does the same for longer, and adds what it finds to corpus/READER/.
"""

import tempfile
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from readers import READERS

CORPUS = Path(__file__).parent / "corpus"
EXAMPLES = {"slow": 300, "quick": 10}


def try_one(name, data):
    """Read one input in an empty folder. Raises whatever the reader raises, but for ValueError."""
    with tempfile.TemporaryDirectory() as folder, suppress(ValueError):
        return READERS[name].read(data, Path(folder))


def past_faults():
    return sorted((path.parent.name, path) for path in CORPUS.glob("*/*"))


@pytest.mark.timeout(30)
@pytest.mark.parametrize(("name", "file"), past_faults(), ids=lambda value: getattr(value, "name", value))
def test_a_past_fault_stays_mended(name, file):
    try_one(name, file.read_bytes())


@pytest.mark.parametrize("name", [name for name, reader in READERS.items() if reader.good is not None])
def test_a_reader_accepts_what_is_right(name, tmp_path):
    """Or it would pass by refusing everything. The index of weights names a file that is not there."""
    if name in ("weights_index", "cache_file", "adapter_config"):
        pytest.skip("needs more files than one: its own tests have them")

    assert READERS[name].read(READERS[name].good, tmp_path) is not None


def fuzz(name, examples):
    @settings(
        max_examples=examples, derandomize=True, deadline=10_000, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(data=READERS[name].data)
    def run(data):
        try_one(name, data)

    run()


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", READERS)
def test_random_input_is_read_or_refused(name):
    fuzz(name, EXAMPLES["quick"])


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.parametrize("name", READERS)
def test_more_random_input_is_read_or_refused(name):
    fuzz(name, EXAMPLES["slow"])
