"Atomic folders, JSON files, manifests and locks: everything is complete, or it does not exist, and damage is noticed."

import errno
import fcntl
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from itertools import count
from pathlib import Path
from unittest.mock import patch

import pytest

from langmlm.disk import (
    LOCK,
    MANIFEST,
    atomic_folder,
    check_replaceable,
    clean_up_interrupted,
    disk_error,
    file_entry,
    find_damage,
    find_overlaps,
    hash_file,
    hash_json,
    is_intact,
    link_or_copy,
    lock_folder,
    name_in_errors,
    read_json,
    read_manifest,
    remove_folder,
    unlisted_files,
    write_json,
    write_manifest,
)

HANG = 600  # Seconds: catches hangs only
FULL = OSError(errno.ENOSPC, "No space left on device")
_nanoseconds = count(10**18, 10**9)


def rewrite(file: Path, content: bytes) -> None:
    "Write a file with a modification time of its own: some kernels give the same time to writes within milliseconds."
    file.write_bytes(content)
    moment = next(_nanoseconds)
    os.utime(file, ns=(moment, moment))


def names(folder: Path) -> list[str]:
    "The entries of a folder, hidden ones included."
    return sorted(path.name for path in folder.iterdir())


def write_result(target: Path, text: str) -> None:
    "Write a folder with one file and its manifest."
    with atomic_folder(target) as partial:
        (partial / "weights").write_text(text)
        write_manifest(partial, "checkpoint")


def fail_at(call: int, function: Callable, error: BaseException) -> Callable:
    "Wrap a function so that one of its calls, counted from 1, raises an error instead."
    calls = count(1)

    def wrapped(*arguments, **options):
        if next(calls) == call:
            raise error
        return function(*arguments, **options)

    return wrapped


def run_python(script: str, folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    "Run a script in a process of its own."
    command = [sys.executable, "-c", script, *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=HANG, check=False)


# Atomic folders


def test_a_new_folder_replaces_the_old_one(tmp_path: Path):
    "Nothing of the old folder remains, and no temporary folder; missing parents are created."
    with atomic_folder(tmp_path / "a" / "result") as partial:
        assert partial.parent == tmp_path / "a" and names(partial) == []
        (partial / "weights").write_text("old")
        (partial / "nested").mkdir()
        (partial / "nested" / "vocabulary").write_text("old")
        write_manifest(partial, "checkpoint")
    write_result(tmp_path / "a" / "result", "new")
    assert names(tmp_path / "a") == ["result"] and names(tmp_path / "a" / "result") == [MANIFEST, "weights"]


def test_a_private_folder_stays_private(tmp_path: Path):
    "Whether it has a result or is empty."
    for name in ("empty", "result"):
        folder = tmp_path / name
        if name == "result":
            write_result(folder, "old")
        folder.mkdir(exist_ok=True)
        folder.chmod(0o2750)
        write_result(folder, "new")
        assert folder.stat().st_mode & 0o7777 == 0o2750


CALLS = {
    "os.fsync": os.fsync,
    "os.open": os.open,
    "os.rename": os.rename,
    "os.replace": os.replace,
    "os.mkdir": os.mkdir,
}


@pytest.mark.parametrize("error", [FULL, KeyboardInterrupt()], ids=["error", "Ctrl-C"])
@pytest.mark.parametrize("function", CALLS)
def test_errors_at_every_call(tmp_path: Path, function: str, error: BaseException):
    "The target is what it was before, and nothing else is left, unless the new one is complete."
    write_result(tmp_path / "replaced", "old")
    for target in (tmp_path / "replaced", tmp_path / "created"):
        for call in count(1):
            try:
                with patch(function, fail_at(call, CALLS[function], error)):
                    write_result(target, "new")
                break
            except type(error):
                if (tmp_path / "replaced" / "weights").read_text() == "new":  # Stopped while it deleted the old one
                    assert isinstance(error, KeyboardInterrupt) and is_intact(tmp_path / "replaced")
                    write_result(tmp_path / "replaced", "old")
                assert names(tmp_path) == ["replaced"] and (tmp_path / "replaced" / "weights").read_text() == "old"
        assert call > 1 and (target / "weights").read_text() == "new"
        shutil.rmtree(target)
        write_result(tmp_path / "replaced", "old")


def test_errors_while_writing(tmp_path: Path):
    "An error of the caller, too."
    write_result(tmp_path / "result", "old")
    with pytest.raises(KeyboardInterrupt), atomic_folder(tmp_path / "result") as partial:
        (partial / "weights").write_text("ne")
        raise KeyboardInterrupt
    assert names(tmp_path) == ["result"] and (tmp_path / "result" / "weights").read_text() == "old"


def test_files_of_others_are_never_replaced(tmp_path: Path):
    "A folder is checked again after the work: a note that came in the meantime stays, and so does the old result."
    write_result(tmp_path / "result", "old")
    for foreign in ("notes.txt", ".env", "logs/notes.txt"):
        file = tmp_path / "result" / foreign
        with (
            pytest.raises(FileExistsError, match="not part of a checkpoint"),
            atomic_folder(tmp_path / "result") as new,
        ):
            write_manifest(new, "checkpoint")
            file.parent.mkdir(exist_ok=True)
            file.write_text("mine")
        assert file.read_text() == "mine" and is_intact(tmp_path / "result") and names(tmp_path) == ["result"]
        shutil.rmtree(file.parent) if "/" in foreign else file.unlink()
    for kind in ("dataset", None):  # Another kind, and a folder without a manifest
        with pytest.raises(FileExistsError), atomic_folder(tmp_path / "result") as new:
            kind and write_manifest(new, kind)
    assert (tmp_path / "result" / "weights").read_text() == "old"


def test_links_as_targets(tmp_path: Path):
    "A link stays a link; the folder that it points to is replaced, by a folder beside it."
    (tmp_path / "big").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "big" / "result")
    with pytest.raises(FileExistsError, match="is a symbolic link to nothing"):
        check_replaceable(tmp_path / "link", "checkpoint", "output_dir")
    write_result(tmp_path / "big" / "result", "old")
    with atomic_folder(tmp_path / "link") as partial:
        assert partial.parent == tmp_path / "big"
        write_manifest(partial, "checkpoint", {"step": 1})
    write_result(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "big" / "result" / "weights").read_text() == "new"
    assert names(tmp_path / "big") == ["result"] and names(tmp_path) == ["big", "link"]


def test_a_name_that_is_being_written(tmp_path: Path):
    "A second writer gets an error, a clean-up leaves the first one alone, and no lock remains."
    with atomic_folder(tmp_path / "result") as partial:
        (partial / "weights").write_text("new")
        with pytest.raises(RuntimeError, match="is being written by another process"):
            write_result(tmp_path / "result", "second")
        assert clean_up_interrupted(tmp_path, "result") == [] and (partial / "weights").exists()
    assert names(tmp_path) == ["result"] and names(tmp_path / "result") == ["weights"]


def test_a_lock_that_was_deleted_meanwhile(tmp_path: Path):
    "Whoever waits for a lock file that its holder deletes gets a new one: there are never two writers."
    flock, lock = fcntl.flock, tmp_path / ".result.writing"
    first = []

    def delete_and_lock(descriptor: int, operation: int) -> None:
        if not first:
            first.append(lock.unlink())
        flock(descriptor, operation)

    with patch("fcntl.flock", delete_and_lock), atomic_folder(tmp_path / "result"):
        with pytest.raises(RuntimeError, match="is being written"):
            write_result(tmp_path / "result", "second")
    assert first and names(tmp_path) == ["result"]


def test_old_folder_that_cannot_be_deleted(tmp_path: Path):
    "The new folder counts; what is left of the old one is deleted by the next clean-up."
    write_result(tmp_path / "result", "old")
    with patch("shutil.rmtree", lambda folder, ignore_errors=False: None):
        write_result(tmp_path / "result", "new")
    assert (tmp_path / "result" / "weights").read_text() == "new" and len(names(tmp_path)) == 2
    (action,) = clean_up_interrupted(tmp_path, "result")
    assert "deleted an unfinished result" in action and names(tmp_path) == ["result"]


KILLED = """
import os, signal, sys
from pathlib import Path
from langmlm.disk import atomic_folder, remove_folder, write_json, write_manifest
die = lambda *ignored, **options: os.kill(os.getpid(), signal.SIGKILL)
moment, rename, calls = sys.argv[1], Path.rename, []
if moment == "removing":
    import shutil
    shutil.rmtree = die
    remove_folder(Path("result"))
if moment == "json":
    Path.replace = die
    write_json(Path("facts.json"), {"step": 2})
if moment == "replacing":
    Path.rename = lambda path, target: die() if calls else calls.append(rename(path, target))
with atomic_folder(Path("result")) as partial:
    (partial / "weights").write_text("new")
    write_manifest(partial, "checkpoint")
    die() if moment == "writing" else None
"""


def test_killed_and_cleaned_up(tmp_path: Path):
    "A process killed at any moment leaves the old result, which a clean-up restores, and nothing of others is deleted."
    write_result(tmp_path / "result", "old")
    write_json(tmp_path / "facts.json", {"step": 1})
    (tmp_path / ".holidays.0a1b2c3d.partial").touch()  # Of somebody else
    (tmp_path / ".result.0a1b2c3d.backup").touch()
    (tmp_path / ".result.partial").touch()
    before = names(tmp_path)
    expected = {
        "writing": ["deleted an unfinished result"],
        "json": ["deleted an unfinished facts.json"],
        "replacing": ["deleted an unfinished result", "restored result"],
        "removing": ["deleted an unfinished result"],
    }
    for moment, actions in expected.items():
        assert run_python(KILLED, tmp_path, moment).returncode == -signal.SIGKILL
        assert ("result" in names(tmp_path)) == (moment in ("writing", "json"))
        done = clean_up_interrupted(tmp_path, owned=r"result|facts\.json")
        assert sorted(action.partition(" of a")[0].partition(":")[0] for action in done) == actions
        assert all("killed" in action for action in done)
        if moment != "removing":
            assert (tmp_path / "result" / "weights").read_text() == "old" and names(tmp_path) == before
        assert read_json(tmp_path / "facts.json") == {"step": 1}
    assert names(tmp_path) == [name for name in before if name != "result"]


def test_restores_only_what_is_missing(tmp_path: Path):
    "With a new result in place, the one that it replaced is deleted; only owned names are touched."
    write_result(tmp_path / "result", "new")
    for leftover in (".result.0a1b2c3d.replaced", ".final.0a1b2c3d.replaced", ".others.0a1b2c3d.replaced"):
        (tmp_path / leftover).mkdir()
    done = clean_up_interrupted(tmp_path, "result|final")
    assert done == [
        "restored final: a process was killed while replacing it",
        "deleted an unfinished result of a process that was killed",
    ]
    assert names(tmp_path) == [".others.0a1b2c3d.replaced", "final", "result"]
    assert (tmp_path / "result" / "weights").read_text() == "new" and clean_up_interrupted(tmp_path, "result") == []


def test_remove_folder(tmp_path: Path):
    "No part of a folder remains under its name, even if it cannot be deleted; a missing one is an error."
    write_result(tmp_path / "result", "old")
    with patch("shutil.rmtree", side_effect=PermissionError), pytest.raises(PermissionError):
        remove_folder(tmp_path / "result")
    assert not (tmp_path / "result").exists()
    assert len(clean_up_interrupted(tmp_path, "result")) == 1 and names(tmp_path) == []
    write_result(tmp_path / "result", "old")
    (tmp_path / "result" / "notes").write_text("mine")
    with pytest.raises(FileExistsError, match="notes"):
        remove_folder(tmp_path / "result")
    assert (tmp_path / "result" / "notes").read_text() == "mine" and names(tmp_path) == ["result"]


def test_links_are_removed_but_not_what_they_point_to(tmp_path: Path):
    "As results, and as leftovers."
    write_result(tmp_path / "result", "old")
    (tmp_path / "link").symlink_to(tmp_path / "result")
    (tmp_path / ".link.0a1b2c3d.outdated").symlink_to(tmp_path / "result")
    assert len(clean_up_interrupted(tmp_path, "link")) == 1
    remove_folder(tmp_path / "link")
    assert names(tmp_path) == ["result"] and is_intact(tmp_path / "result")


# JSON files


def test_json_round_trip(tmp_path: Path):
    "UTF-8, one fact per line, in the order given."
    facts = {"step": 3, "name": "größer", "losses": [1.5, None, True]}
    write_json(tmp_path / "facts.json", facts)
    assert read_json(tmp_path / "facts.json") == facts
    expected = json.dumps(facts, indent=2, ensure_ascii=False) + "\n"
    assert (tmp_path / "facts.json").read_bytes() == expected.encode() and "größer" in expected


def fail_json(moment: str, file: Path) -> None:
    "Write a JSON file with an error at some moment."
    if moment == "content":
        write_json(file, {"step": object()})
    elif moment == "fsync":
        with patch("os.fsync", side_effect=FULL):
            write_json(file, {"step": 2})
    else:
        with patch.object(Path, {"write": "write_bytes", "replace": "replace"}[moment], side_effect=FULL):
            write_json(file, {"step": 2})


@pytest.mark.parametrize("moment", ["content", "write", "fsync", "replace"])
def test_json_that_cannot_be_written(tmp_path: Path, moment: str):
    "The file is what it was before, and no temporary file remains."
    for before in ([], ["facts.json"]):
        with pytest.raises((TypeError, OSError), match="not JSON serializable|No space left"):
            fail_json(moment, tmp_path / "facts.json")
        assert names(tmp_path) == before
        write_json(tmp_path / "facts.json", {"step": 1})
    assert read_json(tmp_path / "facts.json") == {"step": 1}


@pytest.mark.parametrize("content", [b'{"step": 3, "na', b"", b"\xff{}", pickle.dumps({}), b"[" * 100_000])
def test_damaged_json(tmp_path: Path, content: bytes):
    "The error names the file; a missing file is another error."
    (tmp_path / "torn.json").write_bytes(content)
    with pytest.raises(ValueError, match="torn.json is damaged: "):
        read_json(tmp_path / "torn.json")
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "missing.json")


# Digests


def test_known_digests(tmp_path: Path):
    "The digest is XXH3 with 128 bits: the value for no bytes is that of its specification."
    (tmp_path / "empty").touch()
    assert hash_file(tmp_path / "empty") == "99aa06d3014798d86001c324468d497f"
    (tmp_path / "long").write_bytes(bytes(range(256)) * 10_000)  # More than a block
    assert file_entry(tmp_path / "long") == {"bytes": 2_560_000, "xxh3": hash_file(tmp_path / "long")}
    shutil.copy(tmp_path / "long", tmp_path / "copy")
    assert hash_file(tmp_path / "copy") == hash_file(tmp_path / "long")
    assert hash_json({"a": 1, "b": [2]}) == hash_json({"b": [2], "a": 1}) != hash_json({"a": 1, "b": [3]})
    assert len(hash_json(None)) == 32


def test_cached_digests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    "A file that was not touched is not read again; one with other content of the same size is."
    monkeypatch.setattr("langmlm.disk._TICK", -1.0)
    rewrite(tmp_path / "two", b"something more")
    digest = hash_file(tmp_path / "two")
    with patch("langmlm.disk.xxh3_128", side_effect=AssertionError("a file is read")):
        assert hash_file(tmp_path / "two") == digest
        with pytest.raises(AssertionError, match="a file is read"):
            hash_file(Path(__file__))
    rewrite(tmp_path / "two", b"something else")
    assert hash_file(tmp_path / "two") != digest
    rewrite(tmp_path / "two", b"something more")
    assert hash_file(tmp_path / "two") == digest


def test_unreadable_folder(papers: Path):
    "What cannot be listed may hold files of others: the folder is neither replaced nor deleted."
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("train"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    with patch("os.scandir", refuse):
        for action in (lambda: check_replaceable(papers, "dataset", "path_to_save_dataset"), lambda: remove_folder(papers)):
            with pytest.raises(PermissionError, match="train"):
                action()
    assert is_intact(papers)


def test_cached_digests_of_a_forged_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    "The same size and the same modification time do not hide that a file was written: the time of change differs."
    monkeypatch.setattr("langmlm.disk._TICK", -1.0)  # Otherwise, the digest of a new file is not kept at all
    file = tmp_path / "two"
    rewrite(file, b"something more")
    digest, known = hash_file(file), file.stat()
    while file.stat().st_ctime_ns == known.st_ctime_ns:  # Until the clock of the kernel has moved
        file.write_bytes(b"something less")
        os.utime(file, ns=(known.st_atime_ns, known.st_mtime_ns))
    assert file.stat().st_mtime_ns == known.st_mtime_ns and hash_file(file) != digest
    other = tmp_path / "other"  # Moved over it: another inode
    other.write_bytes(b"something new!")
    os.utime(other, ns=(known.st_atime_ns, known.st_mtime_ns))
    other.replace(file)
    assert hash_file(file) not in (digest, None) and file.stat().st_size == known.st_size


def test_a_second_write_within_a_tick(tmp_path: Path):
    "Nothing but the content tells two writes of the same size at the same time apart: what is new is not cached."
    file = tmp_path / "two"
    file.write_bytes(b"something more")
    with patch("os.fstat", lambda descriptor, times=file.stat(): times):  # A clock that stands still
        digest = hash_file(file)
        file.write_bytes(b"something less")
        assert hash_file(file) != digest


# Manifests


@pytest.fixture
def papers(tmp_path: Path) -> Path:
    "A folder with three files, one of them nested, and a manifest."
    folder = tmp_path / "papers"
    (folder / "train").mkdir(parents=True)
    for name, text in (("one", "something"), ("two", "something more"), ("train/data-0.arrow", "text")):
        (folder / name).write_text(text)
    write_manifest(folder, "dataset", {"step": 100})
    return folder


def forge(folder: Path, files: object, **facts) -> None:
    "Write a manifest whose digest is right, whatever it lists."
    forged = {"kind": "dataset", **facts, "files": files}
    write_json(folder / MANIFEST, forged | {"digest": hash_json(forged)})


def test_manifest(papers: Path):
    "Kind, facts and files, with sizes and digests, by POSIX names; the manifest itself is not among them."
    manifest = read_manifest(papers)
    assert (manifest["kind"], manifest["step"]) == ("dataset", 100)
    assert manifest["files"] == {name: file_entry(papers / name) for name in ("one", "train/data-0.arrow", "two")}
    assert manifest == write_manifest(papers, "dataset", {"step": 100}) and is_intact(papers)
    assert read_manifest(papers / "train") is None and find_damage(papers / "train") == [f"{MANIFEST} is missing"]
    assert read_manifest(papers / "one") is None  # A file, not a folder
    assert find_damage(papers / "nowhere") == [f"{MANIFEST} is missing"]


def test_moved_folder(papers: Path, tmp_path: Path):
    "A folder may be moved, or copied."
    shutil.copytree(papers, tmp_path / "copy")
    papers.rename(tmp_path / "moved")
    assert is_intact(tmp_path / "copy") and is_intact(tmp_path / "moved")


def test_each_difference_is_described(papers: Path):
    "Other content, another size, a missing file and an extra one are told apart."
    rewrite(papers / "one", b"s0mething")
    (papers / "two").write_text("something less or more")
    (papers / "train" / "data-0.arrow").unlink()
    (papers / "pytorch_model.bin").touch()
    (papers / "more").mkdir()
    (papers / "train" / "cache.arrow").touch()
    sizes = ["train/data-0.arrow is missing", "two has 22 bytes instead of 14"]
    assert find_damage(papers) == ["one has other content than was written", *sizes]
    assert find_damage(papers, digests=False) == sizes and not is_intact(papers)
    assert unlisted_files(papers) == ["more", "pytorch_model.bin", "train/cache.arrow"]


def test_extra_files_are_no_damage(papers: Path):
    "At any depth, hidden, and as links; but a folder with them is neither replaced nor deleted."
    for extra in ("notes.txt", ".env", "train/notes.txt", "train/more/notes.txt"):
        (papers / extra).parent.mkdir(exist_ok=True)
        (papers / extra).write_text("mine")
        assert is_intact(papers) and unlisted_files(papers) == [extra]
        with pytest.raises(FileExistsError, match=extra):
            check_replaceable(papers, "dataset", "path_to_save_dataset")
        (papers / extra).unlink()
    (papers / "train" / "more").rmdir()
    (papers / "train" / "link").symlink_to(papers.parent)
    assert is_intact(papers) and unlisted_files(papers) == ["train/link"]


def test_names_of_files(papers: Path):
    "Hidden names, spaces and any script are fine; what cannot be read back is not written."
    for name in (".gitattributes", "a name with spaces", "größe-数据.json", "train/.hidden", "..."):
        (papers / name).write_text(name)
    assert set(write_manifest(papers, "dataset")["files"]) > {".gitattributes", "a name with spaces", "train/.hidden"}
    assert is_intact(papers) and unlisted_files(papers) == []
    for name in (b"line\nbreak", b"back\\slash", b"\xff"):
        file = papers / os.fsdecode(name)
        file.touch()
        with pytest.raises(ValueError, match="names that a manifest cannot hold"):
            write_manifest(papers, "dataset")
        file.unlink()


def test_links_out_of_a_folder(papers: Path, tmp_path: Path):
    "A file that is a link to one outside, or in a folder that is such a link, is damage, whatever its content."
    (papers / "one").rename(tmp_path / "secret")
    (papers / "one").symlink_to(tmp_path / "secret")
    assert find_damage(papers) == [
        "one is a symbolic link that leads out of the folder: put a copy of the file in its place"
    ]
    (papers / "one").unlink()
    (papers / "one").symlink_to("copy")  # Inside, a link does no harm
    (tmp_path / "secret").rename(papers / "copy")
    assert find_damage(papers) == []
    (papers / "train").rename(tmp_path / "elsewhere")
    (papers / "train").symlink_to(tmp_path / "elsewhere")
    assert "train/data-0.arrow is a symbolic link that leads out of" in find_damage(papers, digests=False)[0]
    assert unlisted_files(papers) == ["copy", "train"]


def test_manifest_that_is_no_file(papers: Path):
    "A pipe would be waited for, and a device has no end."
    (papers / MANIFEST).unlink()
    os.mkfifo(papers / MANIFEST)
    assert find_damage(papers)[0].endswith(f"{MANIFEST} is damaged")
    (papers / MANIFEST).unlink()
    (papers / MANIFEST).symlink_to("/dev/zero")
    assert find_damage(papers)[0].endswith(f"{MANIFEST} is damaged")
    (papers / MANIFEST).unlink()
    with open(papers / MANIFEST, "wb") as stream:
        stream.truncate(2**40)  # Takes no space, and would take all memory
    assert find_damage(papers)[0].endswith(f"{MANIFEST} is damaged")


def all_damages(content: bytes) -> list[bytes | None]:
    "Every single bit flip of the lowest bit, truncations, additions, another format, and no file at all (None)."
    flips = [content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :] for place in range(len(content))]
    cuts = [content[:size] for size in (0, 1, len(content) // 2, len(content) - 1)]
    return [*flips, *cuts, content + b"\n", b"\n" + content, pickle.dumps({"files": {}}), None]


@pytest.mark.parametrize("name", ["one", "two", "train/data-0.arrow", MANIFEST])
def test_every_damage_is_noticed(papers: Path, name: str):
    "The first sentence names the file."
    file = papers / name
    content = file.read_bytes()
    for damaged in all_damages(content):
        file.unlink() if damaged is None else rewrite(file, damaged)
        assert name in find_damage(papers)[0], damaged
        assert not is_intact(papers)
    rewrite(file, content)
    assert find_damage(papers) == []


@pytest.mark.parametrize(
    "name", ["../../etc/passwd", "/etc/passwd", "..", "a\\b", "", "a/../../b", "a//b", "a/", ".", "./a", "a\nb", "a\0b"]
)
def test_hostile_names(papers: Path, name: str):
    "A manifest never leads out of its folder, even if its digest is right."
    forge(papers, {name: {"bytes": 1, "xxh3": "5f3a"}})
    (damage,) = find_damage(papers)
    assert damage.endswith(f"{MANIFEST} names files outside the folder: {ascii(name)[1:-1]}")
    with pytest.raises(ValueError, match="names files outside the folder"):
        read_manifest(papers)


@pytest.mark.parametrize("files", [["ab"], [], "one", None, 3])
def test_manifest_without_a_table_of_files(papers: Path, files: object):
    "Its digest is right, and its structure is not."
    forge(papers, files)
    assert [damage.endswith(f"{MANIFEST} is damaged") for damage in find_damage(papers)] == [True]


@pytest.mark.parametrize(
    "entry",
    ["5f3a", None, {}, {"bytes": 9}, [], *({"bytes": size, "xxh3": "5f3a"} for size in ("9", -1, 1.0, True, 10**4000))],
)
def test_manifest_without_digests(papers: Path, entry: object):
    "An entry needs a size and a digest."
    forge(papers, {"one": entry, "two": file_entry(papers / "two"), "train/data-0.arrow": {"bytes": 4, "xxh3": "5f3a"}})
    damage = find_damage(papers)
    assert f"{MANIFEST} has no size and digest of one" in damage[0]
    assert damage[1:] == ["train/data-0.arrow has other content than was written"]


@pytest.mark.parametrize("content", [b"[]", b"null", b"3", b'"files"', b"{}", b"[" * 100_000, b"\xff", b""])
def test_manifest_that_is_none(papers: Path, content: bytes):
    "Other JSON, JSON that is too deep, and no JSON."
    (papers / MANIFEST).write_bytes(content)
    (damage,) = find_damage(papers)
    assert damage.endswith(f"{MANIFEST} is damaged")
    with pytest.raises(FileExistsError, match="is damaged: name another folder"):
        check_replaceable(papers, "dataset", "path_to_save_dataset")


def test_manifest_in_other_words(papers: Path):
    "The same facts in another form do not count: what was written is compared byte by byte."
    manifest = read_json(papers / MANIFEST)
    (papers / MANIFEST).write_text(json.dumps(manifest))
    assert len(find_damage(papers)) == 1
    write_json(papers / MANIFEST, manifest | {"step": 101})
    assert len(find_damage(papers)) == 1
    write_json(papers / MANIFEST, manifest)
    assert is_intact(papers)


def test_hidden_files(papers: Path):
    "Locks and the files of file browsers may appear in an intact folder."
    (papers / LOCK).touch()
    (papers / "train" / ".DS_Store").touch()
    (papers / "._one").touch()
    assert is_intact(papers)
    check_replaceable(papers, "dataset", "path_to_save_dataset")


def test_unreadable_file(papers: Path):
    "What the operating system says about a file is repeated."
    with patch("langmlm.disk.hash_file", side_effect=OSError(errno.EIO, "Input/output error")):
        assert find_damage(papers)[0] == "one cannot be read: Input/output error"
    with patch.object(Path, "read_bytes", side_effect=PermissionError(errno.EACCES, "Permission denied")):
        assert "Permission denied" in find_damage(papers)[0]


# Results that may be replaced


def test_what_may_be_replaced(papers: Path, tmp_path: Path):
    "An older result of the same kind, even a damaged one; an empty folder, or a lock only; and nothing at all."
    check_replaceable(tmp_path / "missing", "tokenizer", "path_to_save_tokenizer")
    (tmp_path / "empty").mkdir()
    check_replaceable(tmp_path / "empty", "tokenizer", "path_to_save_tokenizer")
    (tmp_path / "empty" / LOCK).touch()
    check_replaceable(tmp_path / "empty", "tokenizer", "path_to_save_tokenizer")
    check_replaceable(papers, "dataset", "path_to_save_dataset")
    (papers / "two").unlink()
    rewrite(papers / "one", b"s0mething")
    check_replaceable(papers, "dataset", "path_to_save_dataset")
    (tmp_path / "link").symlink_to(papers)
    check_replaceable(tmp_path / "link", "dataset", "path_to_save_dataset")


def test_what_may_not_be_replaced(papers: Path, tmp_path: Path):
    "Other kinds, files of others beside a result or alone, and files in place of a folder."

    def message(target: Path, kind: str = "dataset") -> str:
        with pytest.raises(FileExistsError) as caught:
            check_replaceable(target, kind, "path_to_save_dataset")
        assert f"path_to_save_dataset={str(target)!r}" in str(caught.value)
        return str(caught.value)

    assert "not part of a tokenizer written by langmlm (manifest.json, one, train, two)" in message(papers, "tokenizer")
    (papers / "notes").touch()
    assert "not part of a dataset written by langmlm (notes): name another folder" in message(papers)
    assert "is a file: name a folder" in message(papers / "notes")
    (tmp_path / "link").symlink_to(papers)
    (tmp_path / "file").symlink_to(papers / "notes")
    assert "(notes)" in message(tmp_path / "link") and "is a file" in message(tmp_path / "file")
    (papers / MANIFEST).unlink()
    assert "(notes, one, train, two)" in message(papers)
    for number in range(7):
        (papers / f"a{number}").touch()
    assert "(a0, a1, a2, a3, a4, ...)" in message(papers)
    assert "cannot be created" in message(papers / "notes" / "dataset") and "is a file" in message(
        papers / "notes" / "x"
    )


def test_what_can_never_be_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    "The working directory, what contains it, and a mount point would fail or hurt at the end of the work only."
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for target in (".", "..", tmp_path, "/"):
        with pytest.raises(FileExistsError, match="is the working directory, contains it, or is a mount point"):
            check_replaceable(target, "dataset", "path_to_save_dataset")
    monkeypatch.setattr("os.path.ismount", lambda path: path == tmp_path / "mounted")
    (tmp_path / "mounted").mkdir()
    with pytest.raises(FileExistsError, match="is a mount point"):
        check_replaceable(tmp_path / "mounted", "dataset", "path_to_save_dataset")
    monkeypatch.setattr("os.access", lambda path, mode, effective_ids: False)
    with pytest.raises(PermissionError, match="you may not create files in .*here"):
        check_replaceable("data", "dataset", "path_to_save_dataset")


# Paths of one job


@pytest.fixture
def job(tmp_path: Path) -> Path:
    "A folder with a result, text, and links to both."
    for folder in ("result/part", "text/more"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "text" / "more" / "a.txt").write_text("text")
    (tmp_path / "b.txt").write_text("text")
    (tmp_path / "link").symlink_to("result")
    (tmp_path / "above").symlink_to(".")
    (tmp_path / "result" / "c.txt").symlink_to("../b.txt")
    return tmp_path


@pytest.mark.parametrize(
    ("written", "read", "relation"),
    [
        ("result", "result", "is the same folder as"),
        ("result", "link", "is the same folder as"),
        ("link", "result", "is the same folder as"),
        ("new", "above/new", "is the same folder as"),
        ("text/../new", "new", "is the same folder as"),
        ("result/part", "result", "is inside"),
        ("link/new/deep", "result", "is inside"),
        ("new/deep", "new", "is inside"),
        ("result", "link/part", "contains"),
        ("text", "text/more/a.txt", "contains"),
        ("above/text", "text/more/a.txt", "contains"),
        (".", "b.txt", "contains"),
        ("text", "b.txt", None),
        ("new", "b.txt", None),
        ("new", "newer", None),
        ("result", "result/c.txt", None),  # A link: the text is outside
        ("result", "text", None),
    ],
)
def test_overlaps(job: Path, written: str, read: str, relation: str | None):
    "In both directions, through links, for folders that do not exist yet, and for files in a folder."
    found = find_overlaps({"path_to_save_dataset": job / written}, {"data_path": [job / read]})
    expected = (
        f"path_to_save_dataset={str(job / written)!r} {relation} data_path={str(job / read)!r}: name another folder"
    )
    assert found == ([expected] if relation else [])
    if not read.endswith(".txt"):  # Two outputs
        both = {"path_to_save_dataset": job / written, "path_to_save_tokenizer": job / read}
        assert len(find_overlaps(both)) == bool(relation)


def test_all_overlaps_are_reported(job: Path):
    "One sentence for each pair of options; two inputs may be the same folder; many files are one folder."
    many = [job / "text" / "more" / "a.txt"] * 3
    written = {"dataset": job / "text", "tokenizer": job / "text" / "more"}
    assert len(find_overlaps(written, {"data_path": many})) == 3
    assert find_overlaps({"output_dir": job / "run"}, {"tokenizer": [job / "result"], "model": [job / "result"]}) == []


def test_folders_with_two_names(job: Path):
    "Folders are compared by inode: a file system may know one under several names."
    same = lambda path, other: {path.name, other.name} == {"RESULT", "result"} or path.name == other.name  # noqa: E731
    exists = Path.exists
    with (
        patch.object(Path, "samefile", same),
        patch.object(Path, "exists", lambda path: path.name == "RESULT" or exists(path)),
    ):
        assert len(find_overlaps({"dataset": job / "RESULT"}, {"data_path": [job / "result"]})) == 1


# Locks, links and errors

def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    "Such as Lustre without `-o flock`: an error at once, not at the first save."

    def flock(*_) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", flock)
    with pytest.raises(OSError, match="output_dir=.*run' cannot be written to: .*Function not implemented"):
        lock_folder(tmp_path / "run", "output_dir")


LOCK_AND = "from pathlib import Path; from langmlm.disk import lock_folder; lock_folder(Path('run'), 'output_dir')"


def test_lock_of_another_process(tmp_path: Path):
    "A second process gets an error; the lock of a dead one does not count."
    held = lock_folder(tmp_path / "run", "output_dir")
    second = run_python(LOCK_AND, tmp_path)
    assert second.returncode == 1 and "output_dir='run' is in use by another run: wait until it ends" in second.stderr
    held.close()
    assert run_python(LOCK_AND, tmp_path).returncode == 0
    assert run_python(f"{LOCK_AND}; import os; os.kill(os.getpid(), 9)", tmp_path).returncode == -signal.SIGKILL
    lock_folder(tmp_path / "run", "output_dir").close()
    assert names(tmp_path / "run") == [LOCK]


def test_lock_in_one_process(tmp_path: Path):
    "Two locks of one process exclude each other too."
    held = lock_folder(tmp_path / "run", "output_dir")
    with pytest.raises(RuntimeError, match="is in use by another run"):
        lock_folder(tmp_path / "run", "output_dir")
    held.close()
    lock_folder(tmp_path / "run", "output_dir").close()


def test_folders_that_cannot_be_locked(tmp_path: Path):
    "The error has the kind that the operating system gave it, and names the option."
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="output_dir='.*file' cannot be written to: "):
        lock_folder(tmp_path / "file", "output_dir")
    with pytest.raises(OSError, match="output_dir='.*below' cannot be written to: "):
        lock_folder(tmp_path / "file" / "below", "output_dir")
    error = PermissionError(errno.EACCES, "Permission denied")
    with patch.object(Path, "mkdir", side_effect=error):
        with pytest.raises(PermissionError, match="output_dir='.*new' cannot be written to: .*Permission denied"):
            lock_folder(tmp_path / "new", "output_dir")


def test_link_or_copy(tmp_path: Path):
    "A second name for the same file, or a copy where there are no hard links."
    (tmp_path / "one").write_text("something")
    link_or_copy(tmp_path / "one", tmp_path / "two")
    assert (tmp_path / "two").samefile(tmp_path / "one")
    with patch("os.link", side_effect=OSError(errno.EPERM, "Operation not permitted")):
        link_or_copy(tmp_path / "one", tmp_path / "three")
    assert (tmp_path / "three").read_text() == "something" and not (tmp_path / "three").samefile(tmp_path / "one")


@pytest.mark.parametrize(
    "text",
    [
        "I/O error: No space left on device (os error 28)",
        'Error while serializing: IoError(Os { code: 28, kind: StorageFull, message: "No space left on device" })',
    ],
)
def test_disk_error(text: str):
    "Errors of the operating system, also those that reach Python through Rust; others are None."
    rust = Exception(text)
    assert (disk_error(rust).errno, disk_error(rust).strerror) == (errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert disk_error(FULL) is FULL
    with pytest.raises(OSError, match="No space left on device: 'some folder'"), name_in_errors("some folder"):
        raise rust
    assert disk_error(TypeError("not JSON serializable")) is None is disk_error(ValueError("os error"))
