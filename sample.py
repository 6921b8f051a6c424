"""Sample from a trained GPT: python sample.py --out_dir=out-shakespeare-char --start="ROMEO:"

From Python: `Sampler("out-shakespeare-char")`, then its `generate` and `stream` as often as needed.
"""

import logging
import sys

from configurator import configure
from distrogpt.settings import SampleConfig

if __name__ == "__main__":
    CONFIG = configure(SampleConfig)  # before torch is loaded, so that --help and mistakes answer at once

from configurator import unescape
from distrogpt.audio.speech import check_wav, load_voice, speak
from distrogpt.errors import UserError, cli_errors, warn
from distrogpt.inference.detokenizer import form_of, legend, shown
from distrogpt.inference.interactive import prompt_mode
from distrogpt.inference.sampler import Sampler, read_prompt, read_text
from distrogpt.runtime import progress_bar

SEPARATOR = "---------------"

log = logging.getLogger("distrogpt")


def read_prompts(config: SampleConfig) -> dict[str, str]:
    """The prompts, `start` or a file's lines, by how mistakes in them are told. Raises UserError."""
    if config.prompts is None:
        return {"the prompt": read_prompt(config.start)}
    place = "stdin" if config.prompts == "-" else config.prompts
    lines = enumerate(read_text(config.prompts).split("\n"), 1)
    prompts = {f"{place}, line {number}": unescape(line) for number, line in lines if line}
    if not prompts:
        raise UserError(f"{place} has no prompts; write one a line")
    return prompts


def main(config: SampleConfig) -> None:
    """Print samples, and speak them; or talk with someone who gives prompts. Raises UserError."""
    prompts = read_prompts(config)
    if config.speak:  # what it needs is told before the model is loaded
        check_wav(config.speak)
        voice = load_voice(config.voice)
    where = (config.device, config.dtype, config.compile, config.int8)
    sampler = Sampler(config.out_dir, config.init_from, *where)
    warn(f"{sampler.source} ({sampler.runtime.describe()})")
    if config.interactive:
        prompt_mode(sampler, config)
        return
    texts = print_samples(sampler, prompts, config)
    if config.speak:
        warn(f"{config.speak}: {speak(texts, voice, config.speak):.1f} seconds, spoken by {voice.name}")


def print_samples(sampler: Sampler, prompts: dict[str, str], config: SampleConfig) -> list[str]:
    """A single sample as it is made, several when they are done; all texts. Raises UserError, at first."""
    ids = [sampler.ids_of(prompt, name) for name, prompt in prompts.items()]
    form = form_of(config.show_probs)
    heard = [prompt if config.echo else "" for prompt in prompts.values()]
    begins = ["" if form == "lines" else prompt for prompt in heard]
    end = "" if form == "lines" else "\n"  # each of the lines has one
    if form == "colours":
        print(legend())
    if config.prompts is None and config.num_samples == 1:
        print(begins[0], end="", flush=True)
        for writer in sampler.live(ids[0], config):
            print(shown(writer, form), end="", flush=True)
        print(end=end, flush=True)
        return [heard[0] + writer.text]
    total = len(ids) * config.num_samples * config.best_of * config.max_new_tokens
    texts = []
    with progress_bar(0, total, sampler.runtime, " tokens") as advance:
        for number, writer in enumerate(sampler.samples(ids, config, advance)):
            log.info(f"{begins[number // config.num_samples]}{shown(writer, form)}{end}{SEPARATOR}")
            texts.append(heard[number // config.num_samples] + writer.text)
    return texts


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # a terminal that lacks a character shows a question mark
    with cli_errors("lower --batch_size or --max_new_tokens"):
        main(CONFIG)
