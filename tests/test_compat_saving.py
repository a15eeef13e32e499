"""Copies of checkpoints, where it is not the disk that refuses."""
import pytest
from fairseq.file_io import PathManager

from fairseq_earm import compat, compat_saving

compat.apply()


def outcome(copy, *args):
    """What it returned, or raised."""
    try:
        return copy(*args)
    except OSError as error:
        return type(error), str(error)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("source", ["missing", "folder"])
def test_what_cannot_be_read_is_not_taken_for_a_full_disk(tmp_path, monkeypatch, source, overwrite):
    monkeypatch.setattr(compat_saving.time, "sleep", lambda _: pytest.fail("tried again"))
    (tmp_path / "folder").mkdir()
    (tmp_path / "kept").write_text("former")
    args = (str(tmp_path / source), str(tmp_path / "kept"), overwrite)
    assert outcome(PathManager.copy, *args) == outcome(PathManager.copy.__wrapped__, *args)
    assert (tmp_path / "kept").read_text() == "former" and len(list(tmp_path.iterdir())) == 2


def test_a_copy_that_may_not_overwrite_is_fairseqs(tmp_path):
    """With iopath it answers False and leaves the file as it is."""
    (tmp_path / "source").write_text("new")
    (tmp_path / "kept").write_text("former")
    copy = compat_saving._copied(lambda source, target, overwrite: overwrite)
    assert copy(str(tmp_path / "source"), str(tmp_path / "kept")) is False
    assert (tmp_path / "kept").read_text() == "former"
