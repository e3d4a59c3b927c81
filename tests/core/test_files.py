import errno
import os
import stat

import pytest

from ditopt import files
from ditopt.errors import FileError


def test_text_is_written_and_read_back(tmp_path):
    target = tmp_path / "plan.yaml"
    files.write_text(target, "größe\n")
    assert files.read_text(target) == "größe\n"
    assert [path.name for path in tmp_path.iterdir()] == ["plan.yaml"]


def test_permissions_are_those_of_a_plain_write(tmp_path):
    (tmp_path / "plain").write_text("")
    files.write_text(tmp_path / "ours", "")
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("plain", "ours")]
    assert modes[0] == modes[1]


def test_a_full_disk_leaves_the_old_file_and_no_rest(tmp_path):
    target = tmp_path / "plan.yaml"
    target.write_text("old")

    def write_half():
        with files.atomic_path(target) as temporary:
            temporary.write_text("half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(FileError, match=r"No space left.*Nothing was overwritten"):
        write_half()
    assert target.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["plan.yaml"]


def test_an_interrupted_write_leaves_the_old_file(tmp_path):
    target = tmp_path / "plan.yaml"
    target.write_text("old")

    def interrupted():
        with files.atomic_path(target) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert target.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["plan.yaml"]


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(FileError, match=r"cannot write .*nowhere.*No such file or directory"):
        files.write_text(tmp_path / "nowhere" / "plan.yaml", "")


def test_unreadable_files_are_named(tmp_path):
    with pytest.raises(FileError, match=r"cannot read .*plan\.yaml.*No such file"):
        files.read_text(tmp_path / "plan.yaml")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(FileError, match="not a UTF-8 text file"):
        files.read_text(tmp_path / "binary")


def test_json_refuses_nan_and_keeps_the_old_file(tmp_path):
    target = tmp_path / "out.json"
    target.write_text("old")
    with pytest.raises(ValueError, match="not JSON compliant"):
        files.write_json(target, {"psnr_db": float("nan")})
    assert target.read_text() == "old"


def test_targets_are_checked_before_the_work(tmp_path):
    files.check_writable(tmp_path / "out.json")
    files.check_writable("out.json")
    assert not list(tmp_path.iterdir())
    with pytest.raises(FileError, match="it is a folder"):
        files.check_writable(tmp_path)
    with pytest.raises(FileError, match="its folder does not exist"):
        files.check_writable(tmp_path / "nowhere" / "out.json")


def test_folders_are_made_with_their_parents(tmp_path):
    made = files.make_folder(tmp_path / "a" / "b")
    assert made.is_dir()
    assert files.make_folder(made) == made
    (tmp_path / "file").write_text("")
    with pytest.raises(FileError, match=r"cannot make the folder .*Not a directory"):
        files.make_folder(tmp_path / "file" / "c")
