"""What is drawn and when it ends: limits, stop strings, several prompts, candidates, chances."""

import io
import random
import sys

import pytest
import torch
from conftest import assert_user_error, sample_here

from distrogpt.data.tokenizer import END_OF_TEXT, ByteTokenizer, CharTokenizer, Tokenizer, train_bpe
from distrogpt.errors import UserError
from distrogpt.inference import decoder as decoding
from distrogpt.inference import sampler as sample
from distrogpt.inference.decoder import optimize_for_inference
from distrogpt.inference.detokenizer import Detokenizer, coloured, form_of
from distrogpt.inference.sampling import SamplingParams, sample_token, uniform_noise
from distrogpt.runtime import start_runtime
from model import GPT, GPTConfig
from sample import SEPARATOR, Sampler

CHARS = "\n abcdefghij."


def sampler_of(tokenizer: Tokenizer, dtype: str = "float32", **more) -> Sampler:
    """A Sampler of a network with random weights, which are large enough that it is sure of some tokens."""
    torch.manual_seed(0)
    shape = {"block_size": 32, "n_layer": 2, "n_head": 2, "n_embd": 32, "vocab_size": tokenizer.vocab_size}
    model = GPT(GPTConfig(**shape | more))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4 if parameter.dim() == 2 else 1)
    made = Sampler.__new__(Sampler)
    made.runtime, made.tokenizer, made.config, made.source = start_runtime("cpu", dtype), tokenizer, {}, "-"
    made.model = optimize_for_inference(model, made.runtime.dtype)
    return made


@pytest.fixture(scope="module")
def chars() -> Sampler:
    return sampler_of(CharTokenizer(CHARS))


@pytest.fixture(scope="module")
def by_bytes() -> Sampler:
    return sampler_of(ByteTokenizer())


@pytest.fixture(scope="module")
def bpe(text) -> Tokenizer:
    return train_bpe([text], 400)


# what is drawn


@pytest.mark.parametrize(
    "choice",
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
        SamplingParams(1.0, min_p=1.0),
    ],
)
def test_tokens_are_drawn_from_what_transformers_makes_of_the_scores(choice):
    from transformers.generation import logits_process as theirs

    torch.manual_seed(1)
    logits, text = 2 * torch.randn(5, 12), torch.randint(12, (5, 4))
    scores = theirs.RepetitionPenaltyLogitsProcessor(choice.repetition_penalty)(text, logits.clone())
    scores = theirs.TemperatureLogitsWarper(choice.temperature)(text, scores)
    if choice.top_k:
        scores = theirs.TopKLogitsWarper(choice.top_k)(text, scores)
    if choice.top_p < 1:
        scores = theirs.TopPLogitsWarper(choice.top_p)(text, scores)
    if choice.min_p:
        scores = theirs.MinPLogitsWarper(choice.min_p)(text, scores)
    expected = scores.softmax(-1)
    count = 1000  # draws, evenly spaced: shares are exact to 1/count
    draws = ((torch.arange(count) + 0.5) / count)[:, None]
    for row, chances in enumerate(expected):
        seen = torch.zeros(1, 12, dtype=torch.bool)
        seen[0, text[row]] = True
        seen = None if choice.repetition_penalty == 1 else seen.expand(count, 12)
        ids = sample_token(logits[row].expand(count, 12), choice, draws, seen)
        shares = ids.flatten().bincount(minlength=12) / count
        assert (shares - chances).abs().max() < 2 / count
        assert not shares[chances == 0].any()


@pytest.mark.parametrize("top_p", [0.5, 0.97])
def test_top_p_of_a_large_vocabulary_is_that_of_all_of_it_sorted(top_p):
    """Of 5,000 tokens the first 1,024 are enough in some rows, and not in others; alone and together."""
    torch.manual_seed(2)
    spread = torch.tensor([0.05, 6.0, 1.0, 3.0])[:, None]
    logits, draws = spread * torch.randn(4, 5000), torch.tensor([0.1, 0.5, 0.9, 0.999]).repeat(4, 1)
    choice = SamplingParams(1.0, top_p=top_p)
    chances, order = logits.double().softmax(-1).sort(dim=-1, descending=True)
    before = chances.cumsum(-1) - chances
    kept = chances.masked_fill(before >= top_p, 0.0)
    sums = kept.cumsum(-1)
    widths = (kept > 0).sum(-1)
    assert widths.min() < 1024 < widths.max()
    for column in draws.T:
        together = sample_token(logits, choice, column[:, None])
        alone = [sample_token(logits[n : n + 1], choice, column[n : n + 1, None]) for n in range(4)]
        assert torch.equal(together, torch.cat(alone))
        place = (sums <= column[:, None] * sums[:, -1:]).sum(-1, keepdim=True)
        found = (order == together).nonzero()[:, 1:]  # where each stands in the order
        assert (found - place).abs().max() <= 1 and bool((found < widths[:, None]).all())


CONTROLS = [
    {},
    {"top_p": 0.8, "min_p": 0.02, "repetition_penalty": 1.3, "temperature": 1.1},
    {"best_of": 3, "top_k": 5},
    {"stop": ["a", "jb"]},
]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("controls", CONTROLS)
def test_a_prompt_gets_the_same_texts_alone_and_beside_others(controls, dtype):
    """45 tokens after prompts of 1 to 32, in a block of 32."""
    sampler = sampler_of(CharTokenizer(CHARS), dtype)
    prompts = ["a", "", "abc def\n", "ij" * 16, ".bcd"]
    how = {"num_samples": 2, "max_new_tokens": 45, "seed": 5, **controls}
    alone = [text for prompt in prompts for text in sampler.generate(prompt, **how)]
    assert len(set(alone)) == 10
    for batch_size in (3, 64):
        assert sampler.generate(prompts, batch_size=batch_size, **how) == alone
    more = sampler.generate(prompts, **how | {"num_samples": 3})
    assert [more[3 * n + m] for n in range(5) for m in range(2)] == alone  # a third changes no others
    assert "".join(sampler.stream(prompts[2], **{k: v for k, v in how.items() if k != "num_samples"})) == (
        alone[4].removeprefix(prompts[2])
    )


def test_all_limits_reach_the_choice_and_no_more_sequences_are_made_at_once_than_asked(chars, monkeypatch):
    sizes = []

    def watched(model, prompts, params, uniforms, vocab_size):
        sizes.append(len(uniforms))
        return decoding.stream(model, prompts, params, uniforms, vocab_size)

    monkeypatch.setattr(sample, "stream", watched)
    limits = {"temperature": 1.1, "top_k": 9, "top_p": 0.8, "min_p": 0.03, "repetition_penalty": 1.4}
    found = chars.generate(["abc", "j"], 5, 20, seed=8, batch_size=3, echo=False, **limits)
    assert sizes == [3, 2, 3, 2]
    chars.generate(["a"] * 5, 2, 20, batch_size=7)
    assert sizes[4:] == [6, 4]
    for number, prompt in enumerate(("abc", "j")):
        uniforms, idx = uniform_noise(8, 5, 20), torch.tensor([chars.ids_of(prompt)])
        drawn = decoding.stream(chars.model, idx, SamplingParams(**limits), uniforms)
        rows = torch.cat([ids for ids, _ in drawn], 1).tolist()
        assert found[5 * number : 5 * number + 5] == [chars.tokenizer.decode(row) for row in rows]


def test_what_ended_is_looked_at_now_and_then_where_that_costs(chars):
    """GPUs are waited for every 16 tokens; the text is that of every token."""
    asked = sample.asked_for(50, 0.8, None, 3, stop=["ab", "c"], num_samples=2)
    draws = torch.rand(2, 50)
    found = []
    for every in (1, 16):
        *_, writers = chars.steps([[1, 2], [3]], draws, asked, every)
        found.append([writer.text for writer in writers])
    assert found[0] == found[1] and len(set(map(len, found[0]))) > 1


# where it ends

TEXT = "def f(x):\n    return x\n\nclass A: # 日本 😀\n    pass\n\nEND of it"
STOPS = ["\n\n", "END", "class", "s", "本 😀", "😀\n", ")", "d", "return x\n\nclas", "never"]


@pytest.mark.parametrize("kind", ["char", "byte", "bpe"])
def test_text_ends_before_a_stop_string_and_no_more_is_held_back_than_may_begin_one(kind, bpe):
    tokenizer = {"char": CharTokenizer("".join(sorted(set(TEXT)))), "byte": ByteTokenizer(), "bpe": bpe}[kind]
    ids = tokenizer.encode(TEXT).tolist()
    known = [len(tokenizer.decode_bytes(ids[:n]).decode("utf-8", "ignore")) for n in range(len(ids) + 1)]
    some = [("return", "ur"), *((stop,) for stop in STOPS)] + [
        tuple(random.Random(n).sample(STOPS, 3)) for n in range(20)
    ]
    for stops in some:
        ends = [(TEXT.index(stop) + len(stop), TEXT.index(stop)) for stop in stops if stop in TEXT]
        expected = TEXT[: min(ends)[1]] if ends else TEXT
        writer, out, tokens = Detokenizer(tokenizer, stops), "", []
        for number, id in enumerate(ids, 1):
            writer.add(id, -float(number))
            out += writer.take_text()
            tokens += writer.take_tokens()
            if not writer.ended:
                held = TEXT[len(out) : known[number]]
                assert out + held == TEXT[: known[number]]
                assert not held or any(stop.startswith(held) for stop in stops), (stops, held)
                waits = any(stop.startswith(TEXT[n : known[number]]) for stop in stops for n in [len(out)])
                assert waits or not held
        writer.close()
        tokens += writer.take_tokens()
        assert out + writer.take_text() == writer.text == expected
        assert "".join(token.text for token in tokens) == expected
        assert [token.id for token in tokens] == ids[: len(tokens)]
        assert not tokens or tokens[-1].text  # not the begin of a character that the text lacks
        assert [token.logprob for token in tokens] == [-float(n + 1) for n in range(len(tokens))]


def test_stop_strings_count_in_what_is_new_alone(chars):
    whole = chars.generate("ab.", 3, max_new_tokens=60)
    for stop in (".", "ab", "\n", whole[0][20:23]):
        cut = [text[:3] + text[3:].split(stop)[0] for text in whole]
        assert chars.generate("ab.", 3, max_new_tokens=60, stop=stop) == cut
        assert chars.generate("ab.", 3, max_new_tokens=60, stop=["never", stop], echo=False) == [
            text[3:] for text in cut
        ]


@pytest.mark.parametrize("kind", ["char", "byte", "bpe"])
def test_a_sample_ends_with_its_document_and_the_batch_with_its_last(kind, bpe, monkeypatch):
    sampler = sampler_of({"char": CharTokenizer(CHARS, ends=True), "byte": ByteTokenizer(), "bpe": bpe}[kind])
    how = {"num_samples": 3, "max_new_tokens": 3000, "temperature": 3.0, "top_k": None, "echo": False}
    made = 0

    def counting(*args, **more):
        nonlocal made
        made = 0
        for drawn in original(*args, **more):
            made += 1
            yield drawn

    original = sample.stream
    monkeypatch.setattr(sample, "stream", counting)
    ended = sampler.generate("a", **how)
    longest = made
    whole = sampler.generate("a", **how | {"stop_at_end": False, "max_new_tokens": longest + 5})
    assert made == longest + 5 and longest < 3000
    assert ended == [text.split(END_OF_TEXT)[0] for text in whole]
    until = sampler.generate("a", **how | {"stop_at_end": False, "max_new_tokens": longest})
    assert any(text.find(END_OF_TEXT) == len(text) - len(END_OF_TEXT) > 0 for text in until)


# candidates and chances


def plain_logprobs(sampler: Sampler, prompt: str, new: list[int]) -> list[float]:
    """Of each new token, from a network that reads all before it anew."""
    ids, found = sampler.ids_of(prompt), []
    for id in new:
        with torch.no_grad():
            logits = sampler.model(torch.tensor([ids]))[0][0, -1].float()
        found.append(float(logits.log_softmax(-1)[id]))
        ids.append(id)
    return found


@pytest.mark.parametrize("stop", ["", "e"])
def test_the_best_of_some_is_the_likeliest_of_them(stop):
    """The tokens that end a sample count, those after them do not."""
    sampler = sampler_of(CharTokenizer(CHARS, ends=True))
    how = {"max_new_tokens": 20, "temperature": 1.5, "seed": 0, "echo": False}
    candidates, scores, without_end = [], [], []
    for text in sampler.generate("abc", 12, stop_at_end=False, **how):
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
        assert sampler.generate("abc", 3, best_of=4, batch_size=batch_size, stop=stops, **how) == expected
    assert "".join(sampler.stream("abc", best_of=4, stop=stops, **how)) == expected[0]
    same = sampler.generate("abc", 1, best_of=3, temperature=0)
    assert same == sampler.generate("abc", 1, temperature=0)


def test_chances_are_the_networks_own(chars):
    how = {"max_new_tokens": 25, "temperature": 0.3, "top_k": 2, "repetition_penalty": 2.0, "seed": 9}
    tokens = list(chars.tokens("abc", **how))
    text = "".join(chars.stream("abc", **how))
    assert "".join(token.text for token in tokens) == text and len(tokens) == 25
    assert [token.id for token in tokens] == chars.tokenizer.encode(text).tolist()
    torch.testing.assert_close(
        torch.tensor([token.logprob for token in tokens]),
        torch.tensor(plain_logprobs(chars, "abc", [token.id for token in tokens])),
        atol=1e-4,
        rtol=1e-4,
    )


def test_characters_of_several_tokens_come_with_the_last(by_bytes):
    tokens = list(by_bytes.tokens("日", max_new_tokens=40, temperature=1.5, seed=1))
    assert "".join(token.text for token in tokens) == by_bytes.tokenizer.decode([t.id for t in tokens])


# the command


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
    whole = sampled(trained, "--start=def ", "--num_samples=3", "--max_new_tokens=80")
    stops = whole[0][30:33], whole[1][12]
    flags = [f"--stop={stop}".replace("\n", "\\n") for stop in stops]
    python = Sampler(str(trained), device="cpu").generate("def ", 3, 80, stop=stops)
    assert sampled(trained, "--start=def ", "--num_samples=3", "--max_new_tokens=80", *flags) == python
    assert python != whole and all(map(str.startswith, whole, python))
    best = sampled(trained, "--start=def ", "--num_samples=2", "--best_of=4", "--top_p=0.9", "--min_p=0.01")
    python = Sampler(str(trained), device="cpu").generate("def ", 2, 12, best_of=4, top_p=0.9, min_p=0.01)
    assert best == python


def test_lines_of_chances_in_a_pipe_and_colours_on_a_terminal(trained, monkeypatch):
    flags = ("--start=def ", "--num_samples=1", "--max_new_tokens=20", f"--out_dir={trained}", "--device=cpu")
    text = sample_here(*flags, "--echo=False").stdout[:-1]
    tokens = list(Sampler(str(trained), device="cpu").tokens("def ", 20))
    rows = [line.split(maxsplit=2) for line in sample_here(*flags, "--show_probs=True").stdout.splitlines()]
    for (chance, logprob, shown), token in zip(rows, tokens, strict=True):
        assert eval(shown) == token.text
        assert float(logprob) == pytest.approx(token.logprob, abs=1e-4)
        assert float(chance) == pytest.approx(2.718281828**token.logprob, abs=1e-6)
    several = sampled(trained, "--start=def ", "--num_samples=3", "--max_new_tokens=20", "--show_probs=True")
    assert [line.split(maxsplit=2) for line in several[0].splitlines()] == rows and len(several) == 3
    monkeypatch.delenv("NO_COLOR", raising=False)
    legend, shown = sample_here(*flags, "--show_probs=True", terminal=True).stdout.split("\n", 1)
    assert coloured("0%", 0) in legend and coloured("100%", 1) in legend
    assert shown == "def " + "".join(coloured(t.text, 2.718281828**t.logprob) for t in tokens) + "\n"
    assert "".join(part.split("m", 1)[1] for part in shown.split("\x1b")[1:]) == text + "\n"
    monkeypatch.setenv("NO_COLOR", "1")
    assert sample_here(*flags, "--show_probs=True", terminal=True).stdout.startswith(f"{rows[0][0]} ")
    assert form_of(False) == "text"


def test_a_bar_shows_on_a_terminal_how_far_several_samples_are(trained):
    flags = (f"--out_dir={trained}", "--device=cpu", "--max_new_tokens=30", "--num_samples=3")
    plain = sample_here(*flags)
    assert "tokens" not in plain.stderr
    shown = sample_here(*flags, terminal=True)
    assert "90/90" in shown.stderr and shown.stdout == plain.stdout
    assert "tokens" not in sample_here(*flags, "--num_samples=1", terminal=True).stderr


def test_mistakes(trained, tmp_path, chars):
    (tmp_path / "p.txt").write_text(f"def \n\n{'a' * 17}\n")
    (tmp_path / "e.txt").write_text("def \né\n", encoding="utf-8")
    (tmp_path / "none.txt").write_text("\n\n")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe")
    for flags, *says in (
        ([f"--prompts={tmp_path / 'p.txt'}"], "p.txt, line 3 has 17 tokens, the model reads 16; shorten it"),
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
    with pytest.raises(UserError, match="prompt 2 has 33 tokens"):
        chars.generate(["a", "b" * 33])
    with pytest.raises(UserError, match="start=5 does not fit"):
        chars.generate(["a", 5])
    with pytest.raises(TypeError, match="device is no setting of a sample"):
        chars.generate("a", device="cuda")
    assert chars.generate([]) == []
