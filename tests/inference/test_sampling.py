"""Sampling: limits, several prompts, where samples end, best_of and probabilities."""

import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import groupby

import pytest
import torch
from conftest import assert_user_error, sample_here

from distrogpt.data.tokenizer import END_OF_TEXT, ByteTokenizer, CharTokenizer, Tokenizer, train_bpe
from distrogpt.errors import UserError
from distrogpt.inference.decoder import optimize_for_inference, stream
from distrogpt.inference.display import colour, output_style
from distrogpt.inference.sampler import sample_config
from distrogpt.inference.sampling import SamplingParams, sample_token, uniform_noise
from distrogpt.runtime import start_runtime
from model import GPT, GPTConfig
from sample import SEPARATOR, Sampler

CHARS = "\n abcdefghij."


def sampler_of(tokenizer: Tokenizer, dtype: str = "float32", **more) -> Sampler:
    """A Sampler of a model with random weights, large enough that some tokens are much more likely."""
    torch.manual_seed(0)
    shape = {"block_size": 32, "n_layer": 2, "n_head": 2, "n_embd": 32, "vocab_size": tokenizer.vocab_size}
    model = GPT(GPTConfig(**shape | more))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4 if parameter.dim() == 2 else 1)
    sampler = Sampler.__new__(Sampler)
    sampler.runtime, sampler.tokenizer = start_runtime("cpu", dtype), tokenizer
    sampler.model = optimize_for_inference(model, sampler.runtime.dtype)
    return sampler


@contextmanager
def logits_sizes(sampler: Sampler) -> Iterator[list[int]]:
    """Collects the batch size of each computation of logits: prefills have a row for each prompt."""
    sizes = []
    hook = sampler.model.transformer.wte.register_forward_hook(lambda layer, ids, x: sizes.append(len(x)))
    try:
        yield sizes
    finally:
        hook.remove()


@pytest.fixture(scope="module")
def chars() -> Sampler:
    return sampler_of(CharTokenizer(CHARS))


@pytest.fixture(scope="module")
def by_bytes() -> Sampler:
    return sampler_of(ByteTokenizer())


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(0.7),
        SamplingParams(1.3, top_k=3),
        SamplingParams(1.3, top_p=0.7),
        SamplingParams(0.9, min_p=0.2),
        SamplingParams(1.0, repetition_penalty=1.7),
        SamplingParams(1.0, repetition_penalty=0.6),
        SamplingParams(1.4, 8, 0.85, 0.1, 1.4),
        SamplingParams(2.0, 5, 0.4, 0.01, 3.0),
        SamplingParams(1.0, top_p=1e-6),
        SamplingParams(1.0, top_k=9, top_p=1e-320),  # 0 in fp32
        SamplingParams(1.0, min_p=1.0),
    ],
)
def test_probabilities_equal_those_of_transformers(params):
    from transformers.generation import logits_process as theirs

    torch.manual_seed(1)
    logits, text = 2 * torch.randn(5, 12), torch.randint(12, (5, 4))
    scores = theirs.RepetitionPenaltyLogitsProcessor(params.repetition_penalty)(text, logits.clone())
    scores = theirs.TemperatureLogitsWarper(params.temperature)(text, scores)
    if params.top_k:
        scores = theirs.TopKLogitsWarper(params.top_k)(text, scores)
    if params.top_p < 1:
        scores = theirs.TopPLogitsWarper(params.top_p)(text, scores)
    if params.min_p:
        scores = theirs.MinPLogitsWarper(params.min_p)(text, scores)
    expected = scores.softmax(-1)
    count = 1000
    uniforms = ((torch.arange(count) + 0.5) / count)[
        :, None
    ]  # evenly spaced: frequencies are exact to 1/count
    for row, probs in enumerate(expected):
        seen = torch.zeros(1, 12, dtype=torch.bool)
        seen[0, text[row]] = True
        seen = None if params.repetition_penalty == 1 else seen.expand(count, 12)
        ids = sample_token(logits[row].expand(count, 12), params, uniforms, seen)
        frequencies = ids.flatten().bincount(minlength=12) / count
        assert (frequencies - probs).abs().max() < 2 / count
        assert not frequencies[probs == 0].any()


@pytest.mark.parametrize("top_p", [0.5, 0.97])
def test_top_p_of_a_large_vocabulary_equals_sorting_all_of_it(top_p):
    """Of 5,000 tokens the first 1,024 are enough in some rows, and not in others; alone and in a batch."""
    torch.manual_seed(2)
    scale = torch.tensor([0.05, 6.0, 1.0, 3.0])[:, None]
    logits, uniforms = scale * torch.randn(4, 5000), torch.tensor([0.1, 0.5, 0.9, 0.999]).repeat(4, 1)
    params = SamplingParams(1.0, top_p=top_p)
    probs, order = logits.double().softmax(-1).sort(dim=-1, descending=True)
    probs = probs.masked_fill(probs.cumsum(-1) - probs >= top_p, 0.0)
    sums, widths = probs.cumsum(-1), (probs > 0).sum(-1)
    assert widths.min() < 1024 < widths.max()
    for column in uniforms.T:
        ids = sample_token(logits, params, column[:, None])
        alone = [sample_token(logits[n : n + 1], params, column[n : n + 1, None]) for n in range(4)]
        assert torch.equal(ids, torch.cat(alone))
        expected = (sums <= column[:, None] * sums[:, -1:]).sum(-1, keepdim=True)  # indices into order
        indices = (order == ids).nonzero()[:, 1:]
        assert (indices - expected).abs().max() <= 1 and bool((indices < widths[:, None]).all())


SETTINGS = [
    {},
    {"top_p": 0.8, "min_p": 0.02, "repetition_penalty": 1.3, "temperature": 1.1},
    {"best_of": 3, "top_k": 5},
    {"stop": ["a", "jb"]},
]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("changes", SETTINGS)
def test_a_prompt_gets_the_same_texts_alone_and_in_a_batch(changes, dtype):
    """45 tokens after prompts of 1 to 32, in a block of 32."""
    sampler = sampler_of(CharTokenizer(CHARS), dtype)
    prompts = ["a", "", "abc def\n", "ij" * 16, ".bcd"]
    settings = {"num_samples": 2, "max_new_tokens": 45, "seed": 5, **changes}
    alone = [text for prompt in prompts for text in sampler.generate(prompt, **settings)]
    assert len(set(alone)) == 10
    for batch_size in (3, 64):
        assert sampler.generate(prompts, batch_size=batch_size, **settings) == alone
    more = sampler.generate(prompts, **settings | {"num_samples": 3})
    assert [more[3 * n + m] for n in range(5) for m in range(2)] == alone  # a third sample changes no others
    assert "".join(
        sampler.stream(prompts[2], **{k: v for k, v in settings.items() if k != "num_samples"})
    ) == (alone[4].removeprefix(prompts[2]))


def test_generate_passes_all_limits_and_keeps_to_the_batch_size(chars):
    limits = {"temperature": 1.1, "top_k": 9, "top_p": 0.8, "min_p": 0.03, "repetition_penalty": 1.4}
    with logits_sizes(chars) as sizes:
        texts = chars.generate(["abc", "j"], 5, 20, seed=8, batch_size=3, echo=False, **limits)
        assert [size for size, _ in groupby(sizes)] == [1, 3, 1, 2, 1, 3, 1, 2]
        sizes.clear()
        chars.generate(["a"] * 5, 2, 20, batch_size=7)
        assert [size for size, _ in groupby(sizes)] == [3, 6, 2, 4]
    for number, prompt in enumerate(("abc", "j")):
        uniforms, idx = uniform_noise(8, 5, 20), torch.tensor([chars.ids_of(prompt)])
        steps = stream(chars.model, idx, SamplingParams(**limits), uniforms)
        rows = torch.cat([ids for ids, _ in steps], 1).tolist()
        assert texts[5 * number : 5 * number + 5] == [chars.tokenizer.decode(row) for row in rows]


def test_the_interval_between_updates_does_not_change_the_texts(chars):
    """GPUs are waited for every 16 tokens."""
    config = sample_config(50, 0.8, None, 3, stop=["ab", "c"], num_samples=2)
    uniforms, texts = torch.rand(2, 50), []
    for interval in (1, 16):
        *_, samples = chars.sample_batch([[1, 2], [3]], uniforms, config, interval)
        texts.append([sample.text for sample in samples])
    assert texts[0] == texts[1] and len(set(map(len, texts[0]))) > 1


def test_stop_strings_are_not_searched_in_the_prompt(chars):
    texts = chars.generate("ab.", 3, max_new_tokens=60)
    for stop in (".", "ab", "\n", texts[0][20:23]):
        cut = [text[:3] + text[3:].split(stop)[0] for text in texts]
        assert chars.generate("ab.", 3, max_new_tokens=60, stop=stop) == cut
        assert chars.generate("ab.", 3, max_new_tokens=60, stop=["never", stop], echo=False) == [
            text[3:] for text in cut
        ]


@pytest.mark.parametrize("kind", ["char", "byte", "bpe"])
def test_a_sample_ends_with_its_document_and_the_batch_with_its_last_sample(kind, text):
    chars = CharTokenizer(CHARS, ends=True)
    tokenizer = {"char": chars, "byte": ByteTokenizer(), "bpe": train_bpe([text], 400)}[kind]
    sampler, settings = sampler_of(tokenizer), {"num_samples": 3, "temperature": 3.0, "top_k": None}
    with logits_sizes(sampler) as sizes:
        texts = sampler.generate("a", max_new_tokens=3000, echo=False, **settings)
    longest = len(sizes)
    assert longest < 3000
    settings |= {"stop_at_end": False, "echo": False}
    with logits_sizes(sampler) as sizes:
        longer = sampler.generate("a", max_new_tokens=longest + 5, **settings)
    assert len(sizes) == longest + 5
    assert texts == [text.split(END_OF_TEXT)[0] for text in longer]
    until_last = sampler.generate("a", max_new_tokens=longest, **settings)
    assert any(text.find(END_OF_TEXT) == len(text) - len(END_OF_TEXT) > 0 for text in until_last)


def plain_logprobs(sampler: Sampler, prompt: str, new: list[int]) -> list[float]:
    """Of each new token, without a cache."""
    ids, logprobs = sampler.ids_of(prompt), []
    for id in new:
        with torch.no_grad():
            logits = sampler.model(torch.tensor([ids]))[0][0, -1].float()
        logprobs.append(float(logits.log_softmax(-1)[id]))
        ids.append(id)
    return logprobs


@pytest.mark.parametrize("stop", ["", "e"])
def test_best_of_returns_the_most_likely_candidate(stop):
    """A candidate's score includes the token that ends it, and none after it."""
    sampler = sampler_of(CharTokenizer(CHARS, ends=True))
    settings = {"max_new_tokens": 20, "temperature": 1.5, "seed": 0, "echo": False}
    candidates, scores, without_end = [], [], []
    for text in sampler.generate("abc", 12, stop_at_end=False, **settings):
        ids = sampler.tokenizer.encode(text).tolist()
        ends = {sampler.tokenizer.end_of_text, *sampler.tokenizer.encode(stop)}
        end = next((n for n, id in enumerate(ids) if id in ends), len(ids))
        logprobs = plain_logprobs(sampler, "abc", ids[: end + 1])
        candidates.append(sampler.tokenizer.decode(ids[:end]))
        scores.append(sum(logprobs) / len(logprobs))
        without_end.append(sum(logprobs[:end]) / max(end, 1))
    best, other = (
        [max(range(n, n + 4), key=of.__getitem__) for n in (0, 4, 8)] for of in (scores, without_end)
    )
    assert best not in (other, [0, 4, 8])
    expected = [candidates[n] for n in best]
    stops = (stop,) if stop else ()
    for batch_size in (3, 64):
        assert (
            sampler.generate("abc", 3, best_of=4, batch_size=batch_size, stop=stops, **settings) == expected
        )
    assert "".join(sampler.stream("abc", best_of=4, stop=stops, **settings)) == expected[0]
    same = sampler.generate("abc", 1, best_of=3, temperature=0)
    assert same == sampler.generate("abc", 1, temperature=0)


def test_logprobs_are_those_of_the_model(chars):
    settings = {"max_new_tokens": 25, "temperature": 0.3, "top_k": 2, "repetition_penalty": 2.0, "seed": 9}
    tokens = list(chars.tokens("abc", **settings))
    text = "".join(chars.stream("abc", **settings))
    assert "".join(token.text for token in tokens) == text and len(tokens) == 25
    assert [token.id for token in tokens] == chars.tokenizer.encode(text).tolist()
    torch.testing.assert_close(
        torch.tensor([token.logprob for token in tokens]),
        torch.tensor(plain_logprobs(chars, "abc", [token.id for token in tokens])),
        atol=1e-4,
        rtol=1e-4,
    )


def test_a_character_of_several_tokens_is_the_text_of_the_last(by_bytes):
    tokens = list(by_bytes.tokens("日", max_new_tokens=40, temperature=1.5, seed=1))
    assert "".join(token.text for token in tokens) == by_bytes.tokenizer.decode([t.id for t in tokens])


def sampled(trained, *flags) -> list[str]:
    done = sample_here(f"--out_dir={trained}", "--device=cpu", "--max_new_tokens=12", *flags)
    assert done.returncode == 0, done.stderr
    return done.stdout.split(f"\n{SEPARATOR}\n")[:-1]


def test_prompts_of_a_file_and_of_stdin(trained, tmp_path, monkeypatch):
    (tmp_path / "prompts.txt").write_bytes(b"def \r\n\nx\\n y\n  \n")
    prompts = ["def ", "x\n y", "  "]
    expected = [
        text for prompt in prompts for text in sampled(trained, f"--start={prompt}", "--num_samples=2")
    ]
    assert sampled(trained, f"--prompts={tmp_path / 'prompts.txt'}", "--num_samples=2") == expected
    stdin = io.TextIOWrapper(io.BytesIO((tmp_path / "prompts.txt").read_bytes()))
    monkeypatch.setattr(sys, "stdin", stdin)
    some = sampled(trained, "--prompts=-", "--num_samples=2", "--batch_size=3", "--echo=False")
    assert some == [text.removeprefix(prompts[n // 2]) for n, text in enumerate(expected)]
    assert len(sampled(trained, f"--prompts={tmp_path / 'prompts.txt'}", "--num_samples=1")) == 3


def test_flags_reach_the_sample(trained):
    full = sampled(trained, "--start=def ", "--num_samples=3", "--max_new_tokens=80")
    stops = full[0][30:33], full[1][12]
    flags = [f"--stop={stop}".replace("\n", "\\n") for stop in stops]
    python = Sampler(str(trained), device="cpu").generate("def ", 3, 80, stop=stops)
    assert sampled(trained, "--start=def ", "--num_samples=3", "--max_new_tokens=80", *flags) == python
    assert python != full and all(map(str.startswith, full, python))
    best = sampled(trained, "--start=def ", "--num_samples=2", "--best_of=4", "--top_p=0.9", "--min_p=0.01")
    python = Sampler(str(trained), device="cpu").generate("def ", 2, 12, best_of=4, top_p=0.9, min_p=0.01)
    assert best == python


def test_probabilities_are_lines_in_a_pipe_and_colours_on_a_terminal(trained, monkeypatch):
    flags = ("--start=def ", "--num_samples=1", "--max_new_tokens=20", f"--out_dir={trained}", "--device=cpu")
    text = sample_here(*flags, "--echo=False").stdout[:-1]
    tokens = list(Sampler(str(trained), device="cpu").tokens("def ", 20))
    rows = [line.split(maxsplit=2) for line in sample_here(*flags, "--show_probs=True").stdout.splitlines()]
    for (prob, logprob, shown), token in zip(rows, tokens, strict=True):
        assert eval(shown) == token.text
        assert float(logprob) == pytest.approx(token.logprob, abs=1e-4)
        assert float(prob) == pytest.approx(2.718281828**token.logprob, abs=1e-6)
    several = sampled(trained, "--start=def ", "--num_samples=3", "--max_new_tokens=20", "--show_probs=True")
    assert [line.split(maxsplit=2) for line in several[0].splitlines()] == rows and len(several) == 3
    monkeypatch.delenv("NO_COLOR", raising=False)
    legend, shown = sample_here(*flags, "--show_probs=True", terminal=True).stdout.split("\n", 1)
    assert colour("0%", 0) in legend and colour("100%", 1) in legend
    assert shown == "def " + "".join(colour(t.text, 2.718281828**t.logprob) for t in tokens) + "\n"
    assert "".join(part.split("m", 1)[1] for part in shown.split("\x1b")[1:]) == text + "\n"
    monkeypatch.setenv("NO_COLOR", "1")
    assert sample_here(*flags, "--show_probs=True", terminal=True).stdout.startswith(f"{rows[0][0]} ")
    assert output_style(False) == "text"


def test_a_terminal_shows_a_progress_bar_for_several_samples(trained):
    flags = (f"--out_dir={trained}", "--device=cpu", "--max_new_tokens=30", "--num_samples=3")
    plain = sample_here(*flags)
    assert "tokens" not in plain.stderr
    shown = sample_here(*flags, terminal=True)
    assert "90/90" in shown.stderr and shown.stdout == plain.stdout
    assert "tokens" not in sample_here(*flags, "--num_samples=1", terminal=True).stderr


def test_mistakes(trained, tmp_path, chars):
    (tmp_path / "e.txt").write_text("def \né\n", encoding="utf-8")
    (tmp_path / "none.txt").write_text("\n\n")
    (tmp_path / "bytes.txt").write_bytes(b"caf\xe9")
    for flags, *says in (
        ([f"--prompts={tmp_path / 'e.txt'}"], "e.txt, line 2: character 'é' at position 0"),
        ([f"--prompts={tmp_path / 'none.txt'}"], "none.txt has no prompts"),
        ([f"--prompts={tmp_path / 'bytes.txt'}"], "not UTF-8 text"),
        ([f"--prompts={tmp_path / 'nowhere'}"], "nowhere", "No such file"),
        (["--prompts=-", "--start=x"], "give one of them"),
        (["--interactive=1", "--start=x"], "give one of them"),
        (["--top_p=0"], "above 0"),
        (["--top_p=1.1"], "at most 1"),
        (["--min_p=-0.1"], "at least 0"),
        (["--repetition_penalty=0"], "at least 0.01"),
        (["--best_of=0"], "at least 1"),
        (["--batch_size=0"], "at least 1"),
    ):
        done = sample_here(f"--out_dir={trained}", "--device=cpu", *flags)
        assert_user_error(done, *says)
        assert done.stdout == ""
    for wrong in ({"top_p": 0}, {"min_p": 2}, {"stop": [""]}, {"stop": 5}, {"best_of": 0}, {"batch_size": 0}):
        for call in (chars.generate, chars.stream, chars.tokens):
            with pytest.raises(UserError, match=next(iter(wrong))):
                call("a", max_new_tokens=3, **wrong)
    with pytest.raises(UserError, match="prompt 2: character 'é'"):
        chars.generate(["a", "é"])
    with pytest.raises(UserError, match="start=5 is not valid"):
        chars.generate(["a", 5])
    with pytest.raises(TypeError, match="device is not a sampling setting"):
        chars.generate("a", device="cuda")
    assert chars.generate([]) == []
