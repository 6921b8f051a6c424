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
from distrogpt.files import read_text
from distrogpt.inference.display import colour_legend, format_sample, output_style, print_stream
from distrogpt.inference.interactive import prompt_loop
from distrogpt.inference.sampler import Sampler, read_prompt
from distrogpt.runtime import progress_bar

SEPARATOR = "---------------"

log = logging.getLogger("distrogpt")


def read_prompts(config: SampleConfig) -> dict[str, str]:
    """The prompts, by their names in error messages: `start`, or the lines of a file. Raises UserError."""
    if config.prompts is None:
        return {"the prompt": read_prompt(config.start)}
    source = "stdin" if config.prompts == "-" else config.prompts
    lines = enumerate(read_text(config.prompts, f"the prompt file {config.prompts}").split("\n"), 1)
    prompts = {f"{source}, line {number}": unescape(line) for number, line in lines if line}
    if not prompts:
        raise UserError(f"{source} has no prompts; write one per line")
    return prompts


def main(config: SampleConfig) -> None:
    """Print samples, and speak them if `speak` is set; or read prompts from the keyboard with `interactive`.
    Raises UserError."""
    prompts = read_prompts(config)
    if config.speak:  # mistakes are reported before the model is loaded
        check_wav(config.speak)
        voice = load_voice(config.voice)
    hardware = (config.device, config.dtype, config.compile, config.int8)
    sampler = Sampler(config.out_dir, config.init_from, *hardware, dataset=config.dataset)
    warn(f"{sampler.source} ({sampler.runtime.describe()})")
    if config.interactive:
        prompt_loop(sampler, config)
        return
    texts = print_samples(sampler, prompts, config)
    if config.speak:
        warn(f"{config.speak}: {speak(texts, voice, config.speak):.1f} s of speech, spoken by {voice.name}")


def print_samples(sampler: Sampler, prompts: dict[str, str], config: SampleConfig) -> list[str]:
    """Print the samples and return their texts. A single sample is streamed; several are printed when each
    is finished."""
    ids = sampler.prompt_ids(prompts)
    echoed = [prompt if config.echo else "" for prompt in prompts.values()]
    style, texts = output_style(config.show_probs), []
    if style == "colours":
        print(colour_legend())
    if config.prompts is None and config.num_samples == 1:
        return [echoed[0] + print_stream(sampler.stream_sample(ids[0], config), echoed[0], style)]
    total = len(ids) * config.num_samples * config.best_of * config.max_new_tokens
    with progress_bar(0, total, sampler.runtime, " tokens") as advance:
        for number, sample in enumerate(sampler.samples(ids, config, advance)):
            prompt = echoed[number // config.num_samples]
            log.info(format_sample(sample, prompt, style) + SEPARATOR)
            texts.append(prompt + sample.text)
    return texts


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # a terminal that lacks a character shows a question mark
    with cli_errors("lower --batch_size or --max_new_tokens"):
        main(CONFIG)
