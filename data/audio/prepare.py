"""Speech as a dataset of text: python data/audio/prepare.py --input recordings/ --name mybook

Whisper (arXiv 2212.04356) transcribes each recording, by faster-whisper; then goes the road of data/text.
Transcripts stay in data/NAME/transcripts, each under the checksum of what it was made of: another call
transcribes only what is new. All of them together, in order, are data/NAME/transcripts.txt.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from distrogpt.audio.transcription import main
from distrogpt.errors import cli_errors

if __name__ == "__main__":
    with cli_errors("choose a smaller --model, or --compute_type int8"):
        main(__doc__.splitlines()[0])
