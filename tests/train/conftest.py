import pytest
from accelerate.state import AcceleratorState


@pytest.fixture(autouse=True)
def own_accelerator_state():
    """Every test starts as a fresh process would."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def workplace(tmp_path, monkeypatch, digits):
    """An empty folder to run in, with the digits under data/ and a preset that takes seconds."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "digits").symlink_to(digits.root)
    monkeypatch.chdir(tmp_path)
    return tmp_path
