"""After a crash at any moment, a file or folder is the old one or the new one, and what was renamed was on disk."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from rlxf.core import files
from rlxf.core.files import (
    WholeLines,
    fsync,
    publish,
    recover,
    remove,
    remove_leftovers,
    replace_files,
    temporary_for,
    write_json,
    write_text,
)
from tests.crash import die_at, recorded
from tests.disks import disk_takes

NAMES = r"model|other"


def fill(folder: Path, content: str) -> Path:
    """A folder with files at two depths."""
    (folder / "inner").mkdir(parents=True)
    for name in ("a", "inner/b"):
        (folder / name).write_text(content)
    return folder


def content(folder: Path) -> str:
    """What ``fill`` wrote, in all files."""
    assert sorted(str(path.relative_to(folder)) for path in folder.rglob("*")) == ["a", "inner", "inner/b"]
    (found,) = {path.read_text() for path in folder.rglob("*") if path.is_file()}
    return found


def replace_model(root: Path) -> None:
    temporary = temporary_for(root / "model")
    fill(temporary / "whole", "new")
    publish(temporary / "whole", root / "model")


def test_a_crash_at_any_call_of_publish_leaves_the_old_folder_or_the_new_one(tmp_path: Path) -> None:
    seen = []
    for number in range(1, 100):
        root = tmp_path / str(number)
        fill(root / "model", "old")
        died = die_at(number, lambda root=root: replace_model(root))  # type: ignore[misc]
        remove_leftovers(root, NAMES)
        seen.append(content(root / "model"))
        assert [path.name for path in root.iterdir()] == ["model"]
        if not died:
            break
    else:
        pytest.fail("it never ended")
    assert len(seen) > 12
    assert seen == sorted(seen, reverse=True)  # old, ..., old, new, ..., new
    assert seen[-1] == "new"


def test_a_crash_while_it_is_put_right_does_no_more_harm(tmp_path: Path) -> None:
    for again in range(1, 60):
        root = tmp_path / str(again)
        fill(root / ".model.01234567.aside", "old")
        fill(root / ".model.89abcdef.tmp", "new")
        died = die_at(again, lambda root=root: remove_leftovers(root, NAMES))  # type: ignore[misc]
        remove_leftovers(root, NAMES)
        assert content(root / "model") == "old"
        if not died:
            return
    pytest.fail("it never ended")


def test_the_next_publish_puts_it_right_as_well(tmp_path: Path) -> None:
    aside = fill(tmp_path / ".model.01234567.aside", "old")
    temporary = fill(temporary_for(tmp_path / "model") / "whole", "new")
    publish(temporary, tmp_path / "model")
    assert content(tmp_path / "model") == "new"
    assert not aside.exists()


def test_a_failed_rename_leaves_the_old_folder(tmp_path: Path) -> None:
    fill(tmp_path / "model", "old")
    with pytest.raises(FileNotFoundError):
        publish_missing(tmp_path)
    assert content(tmp_path / "model") == "old"


def publish_missing(root: Path) -> None:
    """As if something had deleted the new folder after it was synced."""
    temporary = temporary_for(root / "model")
    rename = Path.rename
    with pytest.MonkeyPatch.context() as patch:

        def gone(self: Path, target: Path) -> Path:
            if self == temporary:
                temporary.rmdir()
            return rename(self, target)

        patch.setattr(Path, "rename", gone)
        publish(temporary, root / "model")


def test_files_are_on_disk_before_they_get_their_name_and_the_name_before_the_old_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path / "model", "old")
    temporary = fill(temporary_for(tmp_path / "model") / "whole", "new")
    calls = recorded(monkeypatch)
    publish(temporary, tmp_path / "model")
    aside = next(to for call, _, to in calls if call == "rename" and to.name.endswith(".aside"))
    synced = {path for call, path, _ in calls[: index(calls, "rename")] if call == "fsync"}
    assert synced == {temporary, *(temporary / name for name in ("a", "inner", "inner/b"))}
    assert [(call, path) for call, path, _ in calls[len(synced) : len(synced) + 3]] == [
        ("rename", tmp_path / "model"),
        ("rename", temporary),
        ("fsync", tmp_path),
    ]
    assert {call for call, _, _ in calls[len(synced) + 3 :]} == {"unlink", "rmdir"}
    assert aside.parent == tmp_path


def index(calls: list[tuple[str, Path, Path]], name: str) -> int:
    return next(number for number, (call, _, _) in enumerate(calls) if call == name)


def test_a_small_file_is_on_disk_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "new" / "state.json"
    calls = recorded(monkeypatch)
    write_json(path, {"step": 1})
    temporary = path.with_name(".state.json.tmp")
    assert [(call, about) for call, about, _ in calls] == [
        ("fsync", tmp_path),  # the new folder's name
        ("fsync", temporary),
        ("replace", temporary),
        ("fsync", path.parent),
    ]
    assert path.read_text() == '{\n  "step": 1\n}\n'


def test_a_crash_at_any_call_leaves_the_old_file_or_the_new_one(tmp_path: Path) -> None:
    path = tmp_path / "state"
    seen = []
    for number in range(1, 30):
        path.write_text("old")
        died = die_at(number, lambda: write_text(path, "new"))
        seen.append(path.read_text())
        if not died:
            break
    assert seen == sorted(seen, reverse=True)
    assert (seen[0], seen[-1]) == ("old", "new")


def test_several_files_are_all_on_disk_before_the_first_gets_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    renames = {tmp_path / f"{name}.tmp": tmp_path / name for name in ("data", "index")}
    for temporary in renames:
        temporary.write_text("x")
    calls = recorded(monkeypatch)
    replace_files(renames)
    assert [call for call, _, _ in calls] == ["fsync", "fsync", "replace", "replace", "fsync"]


def test_recovery_never_replaces_a_folder_that_is_there(tmp_path: Path) -> None:
    fill(tmp_path / "model", "new")
    fill(tmp_path / ".model.01234567.aside", "old")
    recover(tmp_path / "model")
    assert content(tmp_path / "model") == "new"


def test_leftovers_of_other_names_stay(tmp_path: Path) -> None:
    kept = [".model2.01234567.tmp", ".hidden", "model.01234567.tmp", ".model", ".mine.01234567.aside", ".model.mine"]
    for name in (*kept, ".model.01234567.tmp", ".other.01234567.old", ".model.4711", ".model.partial"):
        (tmp_path / name).mkdir()
    (tmp_path / ".model.lock").write_text("a file")
    (tmp_path / ".model.link.tmp").symlink_to(tmp_path / ".hidden")
    remove_leftovers(tmp_path, NAMES)
    assert {path.name for path in tmp_path.iterdir()} == {*kept, ".model.lock", ".model.link.tmp"}


def test_what_was_being_deleted_does_not_come_back(tmp_path: Path) -> None:
    for number in range(1, 30):
        root = tmp_path / str(number)
        fill(root / "model", "old")
        died = die_at(number, lambda root=root: remove(root / "model"))  # type: ignore[misc]
        remove_leftovers(root, NAMES)
        assert not (root / "model").exists() or content(root / "model") == "old"
        if not died:
            assert not any(root.iterdir())
            return
    pytest.fail("it never ended")


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP])
def test_a_file_system_that_cannot_sync_folders_is_good_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def refuse(descriptor: int) -> None:
        raise OSError(code, "cannot")

    monkeypatch.setattr(files.os, "fsync", refuse)
    fsync(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot"):
        fsync(tmp_path / "file")


def test_lines_are_whole_on_a_full_disk_and_after_a_crash(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    path.write_text('{"a": 1}\n{"b": ')  # a crash tore the second one
    lines = WholeLines(path)
    lines.add('{"c": "ü"}')
    assert path.read_text() == '{"a": 1}\n{"c": "ü"}\n'
    for room in (0, 5):
        with disk_takes(room, tmp_path):
            lines.add('{"d": 4}')
        assert path.read_text() == '{"a": 1}\n{"c": "ü"}\n'
    lines.add('{"e": 5}')
    assert path.read_text() == '{"a": 1}\n{"c": "ü"}\n{"d": 4}\n{"d": 4}\n{"e": 5}\n'


def test_a_line_that_is_the_first_and_torn_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text('{"a": ')
    WholeLines(path).add("{}")
    assert path.read_text() == "{}\n"
