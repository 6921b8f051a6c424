"""OpenWebText, 8 million web pages, in GPT-2's byte-pair encoding: about 9.04 billion train tokens (17 GB).

Through Hugging Face datasets, tokenized in parallel. Each document ends with <|endoftext|>; one in 2,000 is
held out for validation. It takes 100 GB of disk and more while it works.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from data.source import argument_parser
from data.tokenizer import GPT2Tokenizer
from data.writer import write_dataset
from errors import UserError, one_line_errors

HUB_NAME = "Skylion007/openwebtext"
READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".txt": "text"}
HELD_OUT, SPLIT_SEED = 0.0005, 1337


def load_documents(given: Path | None) -> object:
    """A datasets.Dataset with a text column: from the hub, or from a file or folder. Raises UserError."""
    from datasets import load_dataset

    if given is None:
        try:
            return load_dataset(HUB_NAME, split="train", num_proc=os.cpu_count())
        except Exception as error:  # the hub's client raises many kinds
            url = f"https://huggingface.co/datasets/{HUB_NAME}"
            reason = f"no download of {HUB_NAME} ({type(error).__name__})"
            raise UserError(f"{reason}; fetch {url} (its parquet files) and give --input PATH") from None
    files = sorted(path for path in given.rglob("*") if path.suffix in READERS) if given.is_dir() else [given]
    kinds = {READERS.get(path.suffix) for path in files if path.is_file()}
    if len(kinds) != 1 or None in kinds:
        raise UserError(
            f"--input {given} has no files of one kind among {', '.join(READERS)}; give such a file or folder"
        )
    try:
        documents = load_dataset(kinds.pop(), data_files=[str(path) for path in files], split="train")
    except Exception as error:
        raise UserError(f"--input {given} cannot be read ({type(error).__name__}); check the files") from None
    if "text" not in documents.column_names:
        raise UserError(
            f"--input {given} has no field 'text', only {', '.join(documents.column_names)}; rename one"
        )
    if documents.features["text"].dtype not in ("string", "large_string"):
        raise UserError(f"--input {given}: its field 'text' is no text; convert it")
    return documents


def tokenize(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
    """A batch of documents as ids, each ended by <|endoftext|>."""
    tokenizer = GPT2Tokenizer()
    return {"ids": [tokenizer.encode_document(text or "") for text in batch["text"]]}


def main() -> None:
    parser = argument_parser(
        sys.argv[0],
        __doc__.splitlines()[0],
        "a .parquet, .jsonl or .txt (a document a line) file, or a folder",
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count(), metavar="N", help="default: all cores")
    args = parser.parse_args()
    tokenizer = GPT2Tokenizer()
    documents = load_documents(args.input)
    if len(documents) < 2:
        raise UserError(f"--input {args.input} has {len(documents)} documents; give two or more")
    splits = documents.train_test_split(
        test_size=max(HELD_OUT, 1 / len(documents)), seed=SPLIT_SEED, shuffle=True
    )
    workers = max(1, min(args.workers, len(documents) // 1000))
    source = HUB_NAME if args.input is None else str(args.input)
    from tqdm import tqdm

    with write_dataset(args.output, tokenizer, source=source) as add:
        for split, documents in (("train", splits["train"]), ("val", splits["test"])):
            encoded = documents.map(
                tokenize,
                batched=True,
                remove_columns=documents.column_names,
                num_proc=workers if workers > 1 else None,
                desc=f"{split}: tokenizes",
            )
            for document in tqdm(encoded, desc=f"{split}: writes"):
                add(split, document["ids"])


if __name__ == "__main__":
    with one_line_errors():
        main()
