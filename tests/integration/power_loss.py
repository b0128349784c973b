"""What a disk may hold after a power failure: a model of a file system that keeps only what was flushed.

An action runs on a real folder while every state of it is recorded, and every `fsync`. Then all states are made that a
power failure may leave: a file that was not flushed is empty, torn or complete; a change of names in a folder that was
not flushed has happened or not, in any order. Flushes can be left out of the record, to show what each one is for.
"""

import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import NamedTuple

from every_write import is_change

Entries = dict[str, int]  # Name -> number of a file or folder


@dataclass
class State:
    "Files and folders by number; numbers are never used again, as inodes are."

    files: dict[int, bytes] = field(default_factory=dict)
    folders: dict[int, Entries] = field(default_factory=dict)


class Flush(NamedTuple):
    "A call of `fsync`."

    number: int  # Of the file or folder
    place: tuple[str, str]  # The function that flushed, and whether a "file" or a "folder"


class Recorder:
    "Records states and flushes of a folder, which has the number 0."

    def __init__(self, root: Path):
        self.root, self.numbers, self.fresh, self.active = root, {}, count(), True
        self.steps: list[tuple[State, Flush | None]] = []
        self.record()

    def record(self, flushed: int | None = None, place: tuple[str, str] | None = None) -> None:
        "Record what is there now; `flushed`: the inode that has just been flushed."
        self.active, state, seen = False, State(), {}
        self._visit(str(self.root), state, seen)
        self.numbers = seen
        flush = Flush(seen[flushed], place) if flushed in seen else None
        self.steps.append((state, flush))
        self.active = True

    def _visit(self, path: str, state: State, seen: dict[int, int]) -> int:
        "Record a file or folder, and return its number."
        inode = os.lstat(path).st_ino
        known = inode in seen
        number = seen.setdefault(inode, self.numbers.get(inode, -1))
        if number < 0:
            number = seen[inode] = next(self.fresh)
        if os.path.isdir(path):
            state.folders[number] = {
                name: self._visit(f"{path}/{name}", state, seen) for name in sorted(os.listdir(path))
            }
        elif not known:
            with open(path, "rb") as stream:
                state.files[number] = stream.read()
        return number

    def hook(self, event: str, arguments: tuple) -> None:
        "Record the state before a change."
        if self.active and is_change(event, arguments, str(self.root)):
            self.record()

    def fsync(self, descriptor: int, flush: Callable[[int], None] = os.fsync) -> None:
        "Flush, and record it."
        flush(descriptor)
        known = os.fstat(descriptor)
        caller = sys._getframe(2).f_code.co_name  # Of `_fsync`
        self.record(known.st_ino, (caller, "folder" if os.path.stat.S_ISDIR(known.st_mode) else "file"))


def record(action: Callable[[Path], None], folder: Path) -> list[tuple[State, Flush | None]]:
    "Run an action, and return every state of a folder with the flush that led to it; the process is of no more use."
    recorder = Recorder(folder)
    sys.addaudithook(recorder.hook)
    os.fsync = recorder.fsync
    action(folder)
    recorder.record()
    recorder.active = False
    return recorder.steps


# What remains


@dataclass
class Disk:
    "What is certainly on the disk, and the changes that may be."

    files: dict[int, bytes]
    folders: dict[int, Entries]
    pending: list[tuple[int, dict[str, int | None]]] = field(default_factory=list)  # Folder; names -> numbers or None

    def follow(self, before: State, after: State, flush: Flush | None) -> None:
        "Apply a step."
        for number, entries in after.folders.items():
            old = before.folders.get(number, {})
            changed = {name: entries.get(name) for name in {*old, *entries} if old.get(name) != entries.get(name)}
            if changed:
                self.pending.append((number, changed))
        if flush and flush.number in after.files:
            self.files[flush.number] = after.files[flush.number]
        elif flush:
            self.folders[flush.number] = after.folders[flush.number]
            self.pending = [change for change in self.pending if change[0] != flush.number]

    def survivors(self, state: State) -> Iterator[tuple[dict[int, bytes], dict[int, Entries]]]:
        "Make the states that a power failure may leave."
        size = len(self.pending)
        chosen = [range(first) for first in range(size + 1)]  # In order, up to some moment
        chosen += [[index for index in range(size) if index != left_out] for left_out in range(size)]
        chosen += [[index] for index in range(size)]
        empty = {number: self.files.get(number, b"") for number in {*self.files, *state.files}}
        torn = {number: self.files.get(number, content[: len(content) // 2]) for number, content in state.files.items()}
        for indices in chosen:
            folders = {number: dict(entries) for number, entries in self.folders.items()}
            for index in indices:
                number, changed = self.pending[index]
                folders.setdefault(number, {}).update(changed)
            for files in (empty, empty | torn, self.files | state.files):
                yield files, folders


def tree(files: dict[int, bytes], folders: dict[int, Entries], number: int = 0) -> tuple | bytes:
    "What can be reached from a folder, as nested tuples."
    if number not in folders and number in files:
        return files[number]
    entries = sorted(folders.get(number, {}).items())
    return tuple((name, tree(files, folders, other)) for name, other in entries if other is not None)


def write_tree(content: tuple | bytes, path: Path) -> None:
    "Write nested tuples as a folder."
    if isinstance(content, bytes):
        path.write_bytes(content)
        return
    path.mkdir()
    for name, inner in content:
        write_tree(inner, path / name)


def crash_states(
    steps: list[tuple[State, Flush | None]], without: tuple[str, str] | None = None
) -> tuple[set[tuple], set[tuple]]:
    "Return all states that a power failure may leave at any time, and those after the end; `without`: no such flush."
    first = steps[0][0]
    disk = Disk(dict(first.files), {number: dict(entries) for number, entries in first.folders.items()})
    found: set[tuple] = set()
    for (before, _), (after, flush) in zip(steps, steps[1:]):
        disk.follow(before, after, flush if flush and flush.place != without else None)
        found |= (last := {tree(*survivor) for survivor in disk.survivors(after)})
    return found, last
