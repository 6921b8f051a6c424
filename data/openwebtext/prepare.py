"""OpenWebText, 8 million web pages, in GPT-2's byte-pair encoding: about 9 billion tokens, 18 GB, as shards.

The text is streamed from the hub and tokenized on all cores; only the shards are stored. Each document ends
with <|endoftext|>. The first shard, 10^8 tokens, is val. If interrupted, the same command resumes.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from distrogpt.data.preparation.hub import prepare_shards

if __name__ == "__main__":
    prepare_shards(__doc__, "Skylion007/openwebtext")
