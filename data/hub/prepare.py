"""Any text dataset of the Hugging Face hub (--dataset=Salesforce/wikitext --config=wikitext-103-raw-v1).

It is written to data/salesforce_wikitext_wikitext_103_raw_v1 (or --output) in shards, as by data/fineweb_edu:
streamed, and tokenized on all cores. The first shard, or the first tenth of a small text, is val. If
interrupted, the same command resumes.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from distrogpt.data.preparation.hub import prepare_shards

if __name__ == "__main__":
    prepare_shards(__doc__)
