"""Speech as a dataset of text: python data/audio/prepare.py --input recordings/ --name mybook

Whisper (arXiv 2212.04356) transcribes each recording with faster-whisper; the rest is as in data/text.
Transcripts are kept in data/NAME/transcripts, by a checksum of the recording and the options: the next call
transcribes only new recordings. data/NAME/transcripts.txt has all of them in order.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from distrogpt.audio.transcription import main
from distrogpt.errors import cli_errors

if __name__ == "__main__":
    with cli_errors("choose a smaller --model, or --compute_type int8"):
        main(__doc__.splitlines()[0])
