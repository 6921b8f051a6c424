"""Any text dataset of the Hugging Face hub: --dataset=Salesforce/wikitext --config=wikitext-103-raw-v1

It becomes data/salesforce_wikitext_wikitext_103_raw_v1 (or --output) in shards, as data/fineweb_edu does:
streamed, tokenized on all cores; the first shard, or the first tenth of a small text, is val; if
interrupted, the same command resumes.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from distrogpt.data.preparation.hub import prepare_shards

if __name__ == "__main__":
    prepare_shards(__doc__)
