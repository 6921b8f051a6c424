"""FineWeb-Edu, educational web pages, in GPT-2's byte-pair encoding: 10 billion tokens, 20 GB, as shards.

--config=sample-100BT, sample-350BT or default (1.3 trillion) gives more tokens, --max_tokens=1e9 fewer. The
text is streamed from the hub and tokenized on all cores; only the shards are stored. The first one, 10^8
tokens, is val. If interrupted, the same command resumes. --shard 3/16 writes the third of sixteen parts.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from distrogpt.data.preparation.hub import prepare_shards

if __name__ == "__main__":
    prepare_shards(__doc__, "HuggingFaceFW/fineweb-edu", "sample-10BT")
