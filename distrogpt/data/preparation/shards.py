"""A text of any size as shards of ids: val_000000.bin, then train_000001.bin, train_000002.bin, ...

If interrupted, the same command resumes at the first missing shard and writes the same bytes, since
progress.json has the position in the text at which each shard begins. Two locks keep other processes out:
prepare.lock of the folder while a part starts; progress.lock, or that of the part, while it writes shards.
"""

import json
import os
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from distrogpt.data.preparation import writer
from distrogpt.data.preparation.documents import Corpus, Piece
from distrogpt.data.tokenizer import TiktokenTokenizer, Tokenizer
from distrogpt.errors import UserError
from distrogpt.files import locked
from distrogpt.progress import show_wait


class Part(NamedTuple):
    """The part that one of several machines writes: `number` of `of`, counted from 1."""

    number: int = 1
    of: int = 1

    def range_of(self, count: int) -> tuple[int, int]:
        """Begin and end of this part of `count` items."""
        return count * (self.number - 1) // self.of, count * self.number // self.of

    def shard_name(self, shard: int) -> str:
        split = "val" if shard == 0 and self.number == 1 else "train"
        return f"{split}_{self.label()}{shard:06d}.bin"

    def progress_name(self, suffix: str = ".json") -> str:
        return f"progress_{self.label()}".rstrip("_") + suffix

    def label(self) -> str:
        return f"{self.number:05d}_" if self.of > 1 else ""


@dataclass
class ShardSettings:
    """How shards are written."""

    shard_tokens: int = 10**8  # of each file but the last
    max_tokens: int | None = None  # in all; by default all tokens of the text
    val_tokens: int | None = None  # by default one shard, or a tenth of a small text
    workers: int = 1
    part: Part = field(default_factory=Part)
    overwrite: bool = False
    about: str = ""  # the source of the text, for meta.json


def write_shards(folder: Path, source: Corpus, tokenizer: Tokenizer, settings: ShardSettings) -> None:
    """Write, or continue to write, the documents of a Corpus or a class with its methods, or a part of them.
    Raises UserError if the folder has another dataset, MachineError if the disk is full."""
    part = settings.part
    if part.of > len(source):
        count = f"the text has only {len(source)} files for {part.of} parts"
        raise UserError(f"{count}; give --shard I/N with N up to {len(source)}")
    with show_wait("looking at the files"):
        text = source.describe()
    identity = {
        "text": text,
        "tokenizer": zlib.crc32(json.dumps(tokenizer.describe()).encode()),
        "shard_tokens": settings.shard_tokens,
        "val_tokens": settings.val_tokens or default_val_tokens(source, tokenizer, settings),
        "max_tokens": settings.max_tokens,
        "parts": part.of,
    }
    first, width = part.range_of(len(source))[0], writer.id_dtype(tokenizer).itemsize
    kept = "finished shards are kept: free some space, then run the same command again"
    with ExitStack() as lock, writer.report_full_disk(folder, kept):
        with writer.lock_folder(folder, timeout=0.5 if part.of == 1 else 30):  # parts hold it for a moment
            lock.enter_context(locked(folder / part.progress_name(".lock"), writer.busy(folder)))
            progress = load_progress(folder, part, identity, settings.overwrite)
            if not progress:  # all shards will be of this text
                progress = {"settings": identity, "shards": [], "starts": [[first, 0, 0]]}
                writer.write_json(folder / part.progress_name(), progress)
        drop_damaged_shards(folder, part, progress, width)
        if len(progress["starts"]) == len(progress["shards"]) and is_complete(folder, width):
            print(f"{folder} is already complete; give --overwrite to write it again")
            return
        (folder / "meta.json").unlink(missing_ok=True)  # a shard is missing
        shards = ShardWriter(folder, part, progress)
        try:
            shards.write(source, tokenizer, settings.workers)
        finally:
            shards.file.close()
            shards.temporary.unlink(missing_ok=True)
        finish_dataset(folder, tokenizer, part, settings.about)


def default_val_tokens(source: Corpus, tokenizer: Tokenizer, settings: ShardSettings) -> int:
    """One shard, or a tenth of a smaller text, whose number of tokens is estimated from its bytes."""
    bytes_per_token = 4 if isinstance(tokenizer, TiktokenTokenizer) else 1  # of English
    guesses = [count for count in (settings.max_tokens, (source.size or 0) // bytes_per_token) if count]
    return max(1, min([settings.shard_tokens, *(count // 10 for count in guesses)]))


def load_progress(folder: Path, part: Part, identity: dict[str, Any], overwrite: bool) -> dict[str, Any]:
    """The progress of a part, {} if it has none: `settings`; for each finished shard, in `shards`, its tokens
    and their bytes of text, and in `checksums` the crc32 of its file (older versions did not write it); and
    in `starts` file, document and token at which each of them and the next one begin. Raises UserError."""
    files = writer.dataset_files(folder)  # first, as other machines may be starting to write progress
    existing = {path.name: writer.read_json(path) for path in folder.glob("progress*.json")}
    same_dataset = {name for name, progress in existing.items() if progress.get("settings") == identity}
    busy = writer.busy_parts(folder) - {part.progress_name("")}
    if any(f"{stem}.json" not in same_dataset for stem in busy):
        raise UserError(writer.busy(folder))
    if not overwrite:
        has_shards = any(path.suffix == ".bin" for path in files)
        if has_shards and (not existing or same_dataset != set(existing)):
            options = "give the same options, choose another --output, or give --overwrite"
            raise UserError(f"{folder} has another dataset, or one made with other options; {options}")
        if part.progress_name() in same_dataset:
            return existing[part.progress_name()]
    of_others = same_dataset - {part.progress_name()}  # other machines' parts of the same dataset
    for path in files:
        label = re.search(r"_\d{5}(?=[_.])", path.name)
        owner = f"progress{label[0] if label else ''}.json"
        if owner not in of_others and (overwrite or path.name.startswith("progress")):
            path.unlink(missing_ok=True)
    return {}


def drop_damaged_shards(folder: Path, part: Part, progress: dict[str, Any], width: int) -> None:
    """Remove from the progress all shards from the first missing or changed one; `width` bytes per id."""
    shards, checksums = progress["shards"], progress.setdefault("checksums", [])
    checksums[len(shards) :] = [None] * (len(shards) - len(checksums))
    paths, whole = [folder / part.shard_name(number) for number in range(len(shards))], 0
    with show_wait("checking the shards,", lambda: f"{whole} of {len(shards)}"):
        while whole < len(shards) and is_whole(paths[whole], shards[whole][0] * width, checksums[whole]):
            whole += 1
    if whole < len(shards):
        if paths[whole].exists():
            print(f"note: {paths[whole]} was changed or damaged; it is written again")
        del shards[whole:], checksums[whole:], progress["starts"][whole + 1 :]
        writer.write_json(folder / part.progress_name(), progress)


def is_whole(path: Path, size: int, checksum: int | None) -> bool:
    """Whether a file has `size` bytes, and this crc32 if it is known."""
    if not path.is_file() or path.stat().st_size != size:
        return False
    found = 0
    with open(path, "rb") as file:
        while checksum is not None and (block := file.read(1 << 20)):
            found = zlib.crc32(block, found)
    return checksum in (None, found)


def is_complete(folder: Path, width: int) -> bool:
    """Whether the files of a folder have all tokens that its meta.json counts; `width` bytes per id."""
    tokens = writer.read_json(folder / "meta.json").get("tokens", {})
    sizes = {split: sum(path.stat().st_size for path in folder.glob(f"{split}_*.bin")) for split in tokens}
    return bool(tokens) and all(sizes[split] == width * count for split, count in tokens.items())


class ShardWriter:
    """Writes the shards of a part that are missing. A shard appears when it is finished."""

    def __init__(self, folder: Path, part: Part, progress: dict[str, Any]) -> None:
        self.folder, self.part, self.progress = folder, part, progress
        self.shards, self.starts = progress["shards"], progress["starts"]
        begin, end = part.range_of(progress["settings"]["max_tokens"] or sys.maxsize)
        self.limit = end - begin
        self.left = self.limit - sum(tokens for tokens, _ in self.shards)
        self.temporary = folder / f"{part.label()}shard.tmp"
        self.open_shard()

    def open_shard(self) -> None:
        self.tokens = self.text = self.checksum = 0  # bytes of text
        self.file = open(self.temporary, "wb")

    def room(self) -> int:
        """The number of ids that still fit into the shard; 0 if the part has all of its tokens."""
        name = "val_tokens" if self.part.number == 1 and not self.shards else "shard_tokens"
        return min(self.progress["settings"][name] - self.tokens, self.left)

    def finish_shard(self, *next_start: list[int]) -> None:
        """Finish the shard, if it has any ids; `next_start` is the position at which the next one begins."""
        writer.sync(self.file)
        if self.tokens:
            os.replace(self.temporary, self.folder / self.part.shard_name(len(self.shards)))
            self.shards.append([self.tokens, self.text])
            self.progress["checksums"].append(self.checksum)
        self.starts[len(self.shards) :] = next_start
        writer.write_json(self.folder / self.part.progress_name(), self.progress)
        self.open_shard()

    def write(self, source: Corpus, tokenizer: Tokenizer, workers: int) -> None:
        """Write the shards from the first missing one on."""
        if len(self.starts) == len(self.shards):
            return
        file, document, skipped = self.starts[-1]
        token = 0  # within the document, at the beginning of a piece
        done_before = source.done()

        def done() -> float:
            return max((source.done() - done_before) * self.part.of, 1 - self.left / self.limit)

        with writer.token_progress(done) as advance, ExitStack() as stack:
            pieces = source.pieces(file, self.part.range_of(len(source))[1])
            encoding = writer.encode_in_order(skip_documents(pieces, document, advance), tokenizer, workers)
            for piece, ids in stack.enter_context(closing(encoding)):
                if piece.file != file:
                    file, document, token = piece.file, 0, 0
                at = min(skipped, len(ids))  # ids that an earlier shard has
                skipped -= at
                while at < len(ids) and (count := min(len(ids) - at, self.room())):
                    data = np.ascontiguousarray(ids[at : at + count]).data
                    self.file.write(data)
                    self.checksum = zlib.crc32(data, self.checksum)
                    self.tokens += count
                    self.left -= count
                    self.text += bytes_of(tokenizer, piece, ids, at, count)
                    at += count
                    advance(count)
                    if not self.room():
                        self.finish_shard([file, document, token + at])
                if not self.left:
                    break
                document, token = (document + 1, 0) if piece.ends else (document, token + len(ids))
        self.finish_shard()


def skip_documents(pieces: Iterable[Piece], count: int, advance: Callable[[int], None]) -> Iterator[Piece]:
    """The pieces after the first `count` documents; advance(0) updates the time left for each one skipped."""
    for piece in pieces:
        if count <= 0:
            yield piece
        else:
            advance(0)
        count -= piece.ends


def bytes_of(tokenizer: Tokenizer, piece: Piece, ids: np.ndarray, at: int, count: int) -> int:
    """The bytes of text of `count` ids of a piece from `at` on."""
    if count == len(ids):
        return writer.text_bytes(piece.text)
    some = ids[at : at + count]
    return len(tokenizer.decode_bytes(some[some != tokenizer.end_of_text].tolist()))


def finish_dataset(folder: Path, tokenizer: Tokenizer, part: Part, about: str) -> None:
    """Write meta.json if all parts are done. Raises UserError if the text is too short."""
    parts = [Part(number, part.of) for number in range(1, part.of + 1)]
    progress = [writer.read_json(folder / each.progress_name()) for each in parts]
    left = sum(not each or len(each["starts"]) > len(each["shards"]) for each in progress)
    if left:
        print(f"part {part.number} of {part.of} is done; {left} still to be written")
        return
    shards = [shard for each in progress for shard in each["shards"]]
    all_tokens, all_text = np.sum([[0, 0], *shards], axis=0).tolist()
    val_tokens, val_text = progress[0]["shards"][0] if progress[0]["shards"] else (0, 0)
    tokens = {"train": all_tokens - val_tokens, "val": val_tokens}
    for split, count in tokens.items():
        if not count:
            advice = "give a smaller --val_tokens, or more text, with --overwrite"
            raise UserError(f"of {all_tokens:,} tokens, none is left for {split}; {advice}")
    text = {"train": all_text - val_text, "val": val_text}
    writer.write_meta(folder / "meta.json", tokenizer, tokens, text, source=about)
    for split, count in tokens.items():
        files = len(list(folder.glob(f"{split}_*.bin")))
        print(f"{folder}: {count:,} {split} tokens in {files} file{'s' if files > 1 else ''}")
