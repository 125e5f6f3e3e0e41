"""llmjax.files: whole or not at all, and one-line errors."""

import os
import subprocess
import sys

import pytest

from llmjax import files
from llmjax.errors import UserError


def test_json_round_trip_makes_folders_and_leaves_no_temporary(tmp_path):
    path = tmp_path / "a" / "b.json"
    files.write_json_atomic(path, {"x": [1, 2.5, "é"]})
    files.write_json_atomic(path, {"x": 2})
    assert files.read_json(path) == {"x": 2}
    assert os.listdir(path.parent) == ["b.json"]


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.txt"
    files.write_text_atomic(path, "old")
    with pytest.raises(UnicodeEncodeError):
        files.write_text_atomic(path, "new \ud800")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_place_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/x\.json: cannot be written \(.*\)"):
        files.write_json_atomic(tmp_path / "file" / "x.json", 1)


def test_reading_names_file_and_line(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{"a": 1,\n"b" 2}')
    with pytest.raises(UserError, match=r"a\.json:2: not JSON"):
        files.read_json(path)
    with pytest.raises(UserError, match=r"b\.json: no such file"):
        files.read_json(tmp_path / "b.json")
    path.write_bytes(b"\xff")
    with pytest.raises(UserError, match=r"a\.json: not UTF-8"):
        files.read_json(path)


HOLDER = """
import sys, time
from llmjax.files import locked
with locked(sys.argv[1]):
    print("locked", flush=True)
    time.sleep(600)
"""


def test_a_folder_is_locked_by_one_process_as_long_as_it_lives(tmp_path):
    folder = tmp_path / "run"
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(folder)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "locked\n"
        with pytest.raises(UserError, match=rf"run: in use by process {holder.pid} on \S+; wait for it, or use another"):
            with files.locked(folder):
                pytest.fail("two holders")
    finally:
        holder.kill()
        holder.communicate()
    assert os.listdir(folder) == [".lock"]  # the dead holder's, which holds nothing
    for _ in range(2):
        with files.locked(folder):
            assert str(os.getpid()) in (folder / ".lock").read_text()
        assert os.listdir(folder) == []


def test_a_place_that_cannot_be_locked_is_one_line(tmp_path):
    (tmp_path / "file").write_text("x")
    folder = tmp_path / "file" / "run"
    with pytest.raises(UserError, match=r"file/run: cannot be locked \(Not a directory\)"), files.locked(folder):
        pytest.fail("locked")


def test_a_file_that_cannot_be_read_is_damage(tmp_path, monkeypatch):
    (tmp_path / "numbers").write_text("1 2 3")
    files.seal(tmp_path)
    assert files.damage(tmp_path) == ""

    def broken(path):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(files, "_digest", broken)
    assert files.damage(tmp_path) == "numbers cannot be read: Input/output error"


def test_a_lock_goes_with_an_error(tmp_path):
    with pytest.raises(ZeroDivisionError), files.locked(tmp_path):
        raise ZeroDivisionError
    assert os.listdir(tmp_path) == []
