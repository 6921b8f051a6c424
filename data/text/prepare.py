"""Your own text as a dataset: python data/text/prepare.py --input notes/ --name mybook

--input takes files, folders and globs of .txt, .md, .jsonl, .json, .csv, .tsv and .parquet, all but the last
also as .gz or .zst; - is stdin. Each text file is a document, or several with <|endoftext|> between them;
each row of the others is a document. Writes data/mybook and prints the next two commands.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from distrogpt.data.preparation.own_text import main

if __name__ == "__main__":
    main(__doc__.splitlines()[0])
