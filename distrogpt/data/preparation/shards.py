"""A text of any size as shards of ids: val_000000.bin, then train_000001.bin, train_000002.bin, ...

Interrupted and started again, it goes on at the first missing shard and ends with the same bytes, since
progress.json tells where in the text each shard begins.
"""

import json
import os
import re
import sys
import zlib
from collections.abc import Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from distrogpt.data.meta import read_meta
from distrogpt.data.preparation.documents import Piece
from distrogpt.data.preparation.writer import (
    dataset_files,
    encode_in_order,
    id_dtype,
    make_folder,
    read_json,
    report_full_disk,
    text_bytes,
    token_progress,
    write_json,
    write_meta,
)
from distrogpt.data.tokenizer import TiktokenTokenizer, Tokenizer
from distrogpt.errors import UserError

KEPT = "the shards so far are kept: free some space, and the same command goes on"


class Source(Protocol):
    """Documents in files: see documents.Corpus."""

    size: int | None

    def __len__(self) -> int: ...
    def pieces(self, first: int = 0, end: int | None = None) -> Iterator[Piece]: ...
    def done(self) -> float: ...
    def describe(self) -> dict[str, Any]: ...


class Part(NamedTuple):
    """What one of several machines does: part `number` of `of`, counted from 1."""

    number: int = 1
    of: int = 1

    def label(self) -> str:
        return f"{self.number:05d}_" if self.of > 1 else ""

    def name(self, shard: int) -> str:
        """The file of a shard."""
        split = "val" if shard == 0 and self.number == 1 else "train"
        return f"{split}_{self.label()}{shard:06d}.bin"

    def progress(self) -> str:
        """The file of its progress."""
        return f"progress_{self.label()}".rstrip("_") + ".json"


def write_shards(
    folder: Path,
    source: Source,
    tokenizer: Tokenizer,
    shard_tokens: int = 10**8,
    max_tokens: int | None = None,
    val_tokens: int | None = None,
    workers: int = 1,
    part: Part = Part(),  # noqa: B008, which is immutable
    overwrite: bool = False,
    about: str = "",
) -> None:
    """Write the documents of a source, or one part of them, or go on with that.

    Shards have `shard_tokens` ids each, the last one what is left; the first is val, with `val_tokens`: by
    default as many, or a tenth of a small text, as far as its bytes tell. `about` tells meta.json where the
    text came from. Raises UserError where the folder has another dataset, MachineError where it takes no
    more.
    """
    if part.of > len(source):
        raise UserError(
            f"the text has {len(source)} files, which {part.of} machines cannot share; give --shard i/n with "
            f"n up to {len(source)}"
        )
    settings = {
        "text": source.describe(),
        "tokenizer": zlib.crc32(json.dumps(tokenizer.describe()).encode()),
        "shard_tokens": shard_tokens,
        "val_tokens": val_tokens or usual_val_tokens(source, tokenizer, shard_tokens, max_tokens),
        "max_tokens": max_tokens,
        "parts": part.of,
    }
    make_folder(folder)
    progress = begin_or_go_on(folder, part, settings, overwrite, share(len(source), part)[0])
    if complete(folder):
        print(f"{folder} is complete; --overwrite writes it anew")
        return
    with report_full_disk(folder, KEPT):
        (folder / "meta.json").unlink(missing_ok=True)  # a shard is missing
        check_shards(folder, part, progress, id_dtype(tokenizer).itemsize)
        write_json(folder / part.progress(), progress)  # the shards to come are this text's
        if len(progress["starts"]) > len(progress["shards"]):
            write_part(folder, source, tokenizer, part, progress, workers)
        finish(folder, tokenizer, part, about)


def usual_val_tokens(source: Source, tokenizer: Tokenizer, shard_tokens: int, max_tokens: int | None) -> int:
    """A shard, or a tenth of the text, by guess, where that is less: it is known before the text is read."""
    bytes_per_token = 4 if isinstance(tokenizer, TiktokenTokenizer) else 1  # of English
    guesses = [count for count in (max_tokens, (source.size or 0) // bytes_per_token) if count]
    return max(1, min([shard_tokens, *(count // 10 for count in guesses)]))


def share(count: int, part: Part) -> tuple[int, int]:
    """Where a part of `count` things begins and ends."""
    return count * (part.number - 1) // part.of, count * part.number // part.of


def begin_or_go_on(
    folder: Path, part: Part, settings: dict[str, Any], overwrite: bool, first_file: int
) -> dict[str, Any]:
    """The progress of a part: its settings; of each finished shard its tokens and their bytes of text; and
    file, document and token where each of them starts, and the next, where there is one. Raises UserError."""
    files = dataset_files(folder)  # before their progress is read: what another machine adds now is not in it
    begun = {path: read_json(path) for path in folder.glob("progress*.json")}
    same = [path.name for path, progress in begun.items() if progress.get("settings") == settings]
    shards = [path for path in files if path.suffix == ".bin"]
    if overwrite:
        others = {name.removeprefix("progress") for name in same if name != part.progress()}
        for path in files:
            label = "".join(re.findall(r"_\d{5}(?=[_.])", path.name))
            if f"{label}.json" not in others:  # those are other machines' parts of the same
                path.unlink(missing_ok=True)
    elif shards and (not begun or len(same) < len(begun)):
        raise UserError(
            f"{folder} has another dataset, or one made with other options; go on with those, choose another "
            "--output, or give --overwrite"
        )
    elif part.progress() in same:
        return begun[folder / part.progress()]
    else:
        for path in begun:  # what came to nothing
            if path.name not in same:
                path.unlink(missing_ok=True)
    return {"settings": settings, "shards": [], "starts": [[first_file, 0, 0]]}


def complete(folder: Path) -> bool:
    """Whether the files of a folder have what its meta.json promises."""
    if not (folder / "meta.json").is_file():
        return False
    meta = read_meta(folder)
    width = np.dtype(meta["dtype"]).itemsize
    sizes = {
        split: sum(path.stat().st_size for path in folder.glob(f"{split}_*.bin")) for split in meta["tokens"]
    }
    return all(sizes[split] == width * tokens for split, tokens in meta["tokens"].items())


def check_shards(folder: Path, part: Part, progress: dict[str, Any], width: int) -> None:
    """Set the progress back to the first shard that is missing or not whole."""
    for number, (tokens, _) in enumerate(progress["shards"]):
        path = folder / part.name(number)
        if not path.is_file() or path.stat().st_size != tokens * width:
            progress["shards"], progress["starts"] = (
                progress["shards"][:number],
                progress["starts"][: number + 1],
            )
            return


class ShardWriter:
    """Appends ids to the shard at hand. A finished one appears whole, and then stands in progress.json."""

    def __init__(self, folder: Path, part: Part, progress: dict[str, Any]) -> None:
        self.folder, self.part, self.progress = folder, part, progress
        self.temporary = folder / f"{part.label()}shard.tmp"
        self.begin()

    def begin(self) -> None:
        self.tokens = self.text = 0
        self.file = open(self.temporary, "wb")

    def room(self) -> int:
        """How many ids the shard still takes."""
        is_val = self.part.number == 1 and not self.progress["shards"]
        return self.progress["settings"]["val_tokens" if is_val else "shard_tokens"] - self.tokens

    def add(self, ids: np.ndarray, text: int) -> None:
        """Append ids that stand for so many bytes of text."""
        self.file.write(np.ascontiguousarray(ids).data)
        self.tokens += len(ids)
        self.text += text

    def end(self, *next_start: list[int]) -> None:
        """Finish the shard, if there is anything in it; where the next one starts, if there is one."""
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        if self.tokens:
            os.replace(self.temporary, self.folder / self.part.name(len(self.progress["shards"])))
            self.progress["shards"].append([self.tokens, self.text])
        done = len(self.progress["shards"])
        self.progress["starts"] = [*self.progress["starts"][:done], *next_start]
        write_json(self.folder / self.part.progress(), self.progress)

    def close(self) -> None:
        self.file.close()
        self.temporary.unlink(missing_ok=True)


def write_part(
    folder: Path, source: Source, tokenizer: Tokenizer, part: Part, progress: dict[str, Any], workers: int
) -> None:
    """Write the shards of a part from the first missing one on."""
    max_tokens = progress["settings"]["max_tokens"] or sys.maxsize
    limit = share(max_tokens, part)[1] - share(max_tokens, part)[0]
    left = limit - sum(tokens for tokens, _ in progress["shards"])
    file, document, skipped = progress["starts"][-1]
    token = 0  # where in its document the next piece begins
    pieces = from_document(source.pieces(file, share(len(source), part)[1]), document)
    before = source.done()

    def share_done() -> float:
        return max((source.done() - before) * part.of, 1 - left / limit)

    out = ShardWriter(folder, part, progress)
    try:
        encoding = closing(encode_in_order(pieces, tokenizer, workers))
        with token_progress(share_done) as advance, encoding as encoded:
            for piece, ids in encoded:
                if piece.file != file:
                    file, document, token = piece.file, 0, 0
                at = min(skipped, len(ids))  # so much of it is in the shard before
                skipped -= at
                while at < len(ids) and left:
                    count = min(len(ids) - at, out.room(), left)
                    out.add(ids[at : at + count], bytes_of(tokenizer, piece, ids, at, count))
                    at, left = at + count, left - count
                    advance(count)
                    if not out.room():
                        out.end([file, document, token + at])
                        out.begin()
                if not left:
                    break
                document, token = (document + 1, 0) if piece.ends else (document, token + len(ids))
        out.end()
    finally:
        out.close()


def from_document(pieces: Iterable[Piece], document: int) -> Iterator[Piece]:
    """The pieces without those of the first documents."""
    for piece in pieces:
        if document <= 0:
            yield piece
        document -= piece.ends


def bytes_of(tokenizer: Tokenizer, piece: Piece, ids: np.ndarray, at: int, count: int) -> int:
    """The bytes of text in `count` ids of a piece from `at` on."""
    if count == len(ids):
        return text_bytes(piece.text)
    some = ids[at : at + count]
    return len(tokenizer.decode_bytes(some[some != tokenizer.end_of_text].tolist()))


def finish(folder: Path, tokenizer: Tokenizer, part: Part, about: str) -> None:
    """Write meta.json where all parts are done. Raises UserError where the text is too short."""
    parts = [Part(number, part.of) for number in range(1, part.of + 1)]
    progress = [read_json(folder / each.progress()) for each in parts]
    left = sum(not each or len(each["starts"]) > len(each["shards"]) for each in progress)
    if left:
        print(f"part {part.number} of {part.of} is done; {left} to go")
        return
    shards = [shard for each in progress for shard in each["shards"]]
    val = progress[0]["shards"][0] if progress[0]["shards"] else [0, 0]
    all_tokens, all_text = (sum(column) for column in zip([0, 0], *shards, strict=True))
    tokens = {"train": all_tokens - val[0], "val": val[0]}
    for split, count in tokens.items():
        if not count:
            raise UserError(
                f"nothing of {all_tokens:,} tokens is left for {split}; give a smaller --val_tokens, or more "
                "text, with --overwrite"
            )
    write_meta(folder, tokenizer, tokens, {"train": all_text - val[1], "val": val[1]}, source=about)
    for split, count in tokens.items():
        files = len(list(folder.glob(f"{split}_*.bin")))
        print(f"{folder}: {count:,} tokens of {split} in {files} file{'s' if files > 1 else ''}")
