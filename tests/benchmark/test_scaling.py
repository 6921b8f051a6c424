"""ablate.py --scaling=True: the fit of the law, its table and plot, and that a study is resumed."""

import json

import numpy as np
import pytest
from conftest import assert_user_error, prepare_here, run_here

from configurator import configure
from distrogpt.benchmark.scaling_study import CONSTANTS, PUBLISHED_WEIGHT, Run, choices_of, fit_law, table
from distrogpt.scaling import LAW, SIZES, Text, loss_by_law, parse_size, relative_loss
from distrogpt.settings import AblateConfig
from distrogpt.training.minutes import Chooser

TEXTS = {
    "small": Text(1_000_000, 100_000, 65, 1.0, 2.3),
    "large": Text(60_000_000, 3_000_000, 97, 1.0, 2.0),
    "tokens": Text(3_000_000, 100_000, 2000, 3.1, 1.7),
}
TINY_STUDY = ["--scaling=True", "--device=cpu", "--dtype=float32", "--compile=False", "--block_size=16"]
TINY_STUDY += ["--sizes=1/2/32,1/1/16", "--scaling_minutes=0.02"]


def runs_of(law: dict[str, float], scales: dict[str, float]) -> list[Run]:
    """Runs whose losses are those of a law, times a factor for each text."""
    runs = []
    for name, text in TEXTS.items():
        for size in SIZES[:6] if name in scales else ():
            for minutes in (0.3, 1.0, 3.0, 10.0, 30.0):
                tokens = 3e12 * minutes / size.flops_per_token(65, 256)
                bits = scales[name] * text.difficulty * relative_loss(size, text, tokens, law)
                runs.append(Run(name, str(size), minutes, int(tokens), 1, 1, 1, bits, 1.0, {}))
    return runs


def seconds_per_step(_chooser: Chooser, config: AblateConfig) -> float:
    return 1e-5 * config.n_embd * config.batch_size * config.block_size


@pytest.fixture
def dataset(tmp_path, monkeypatch, text):
    """A small dataset, on a machine of a known speed: measuring takes half a second for each size."""
    monkeypatch.setattr(Chooser, "seconds_per_step", seconds_per_step)
    (tmp_path / "text.txt").write_text(text[:20_000], encoding="utf-8")
    words = ("--input", tmp_path / "text.txt", "--output", tmp_path / "a set")
    assert prepare_here("data/shakespeare_char/prepare.py", *words).returncode == 0
    return tmp_path / "a set"


@pytest.fixture
def folder(tmp_path):
    """An empty folder."""
    (tmp_path / "here").mkdir()
    return tmp_path / "here"


def test_the_fit_finds_the_constants_of_a_law(monkeypatch):
    monkeypatch.setattr("distrogpt.benchmark.scaling_study.PUBLISHED_WEIGHT", 0.0)
    law = {"size": 0.25, "size_power": 0.36, "data": 0.6, "data_power": 0.34, "power": 0.4, "passes": 8.0}
    scales = {"small": 1.03, "large": 0.95, "tokens": 1 / (1.03 * 0.95)}
    fit = fit_law(TEXTS, runs_of(LAW | law, scales))
    assert {name: fit.law[name] for name in law} == pytest.approx(law, rel=0.15)
    assert fit.law["floor"] == LAW["floor"]
    assert fit.scales == pytest.approx(scales, abs=0.003)
    assert max(abs(errors).max() for errors in fit.errors.values()) < 0.002
    assert fit.law["error"] == pytest.approx(1.645 * 0.0436, rel=0.03)  # the standard deviation of the scales


def test_a_text_whose_losses_fall_faster_changes_no_best_size():
    runs = runs_of(LAW, dict.fromkeys(TEXTS, 1.0))
    steep = [
        run._replace(bits_per_byte=2.0 * (run.bits_per_byte / 2.0) ** 1.5) if run.text == "large" else run
        for run in runs
    ]
    fit = fit_law(TEXTS, steep)
    assert max(abs(errors).max() for errors in fit.errors.values()) < 0.01
    for name, text in TEXTS.items():
        own = [run for run in steep if run.text == name]
        assert choices_of(fit.law, text, own) == choices_of(LAW, text, own)
    level = relative_loss(SIZES[3], TEXTS["small"], 1e7, fit.law) / relative_loss(
        SIZES[3], TEXTS["small"], 1e7
    )
    assert 0.8 < level < 1.1
    alone = fit_law(TEXTS, [run for run in steep if run.text == "large"])
    assert alone.scales == {"large": 1.0} and abs(alone.errors["large"]).max() < 0.02


def test_odd_runs_hardly_change_the_fit():
    runs = runs_of(LAW, dict.fromkeys(TEXTS, 1.0))
    factors = [1.15 if number % 10 == 3 else 1.0 for number in range(len(runs))]
    odd = [
        run._replace(bits_per_byte=factor * run.bits_per_byte)
        for factor, run in zip(factors, runs, strict=True)
    ]
    fit = fit_law(TEXTS, odd)  # with least squares, constants are up to 27 % off
    assert {name: fit.law[name] for name in CONSTANTS} == pytest.approx(
        {name: LAW[name] for name in CONSTANTS}, rel=0.05
    )


def test_published_runs_decide_about_large_models_alone(monkeypatch):
    true = LAW | {"size_power": 0.3, "data_power": 0.5}
    runs = [run for run in runs_of(true, {"small": 1.3}) if run.minutes < 3]
    millions, best = np.geomspace(1, 10_000, 1000), {}
    for weight in (PUBLISHED_WEIGHT, 0.0):
        monkeypatch.setattr("distrogpt.benchmark.scaling_study.PUBLISHED_WEIGHT", weight)
        fit = fit_law(TEXTS, runs)
        losses = loss_by_law(
            millions, 4.7 * 1e19 / 6e12 / millions, fit.law
        )  # with 1e19 FLOPs, 4.7 bytes a token
        best[weight] = millions[losses.argmin()]
        assert abs(fit.errors["small"]).max() < 0.01
    assert 300 < best[PUBLISHED_WEIGHT] < 480  # nanochat: 382
    assert not 300 < best[0.0] < 480


def test_constants_that_the_runs_do_not_determine_stay_as_they_are():
    law = LAW | {"size": 1.1 * LAW["size"], "passes": 3.0}
    ones = dict.fromkeys(TEXTS, 1.0)
    runs = [run for run in runs_of(law, ones) if run.text == "large" and run.tokens < 60e6]
    fit = fit_law(TEXTS, runs)
    assert fit.law["passes"] == LAW["passes"] and fit.law["error"] == LAW["error"]
    assert fit.scales == {"large": 1.0} and abs(fit.errors["large"]).max() < 0.005
    repeated = fit_law(TEXTS, runs_of(law, ones))
    assert repeated.law["passes"] == pytest.approx(3.0, rel=0.2)


def test_the_table_marks_the_best_size_and_has_the_rules_choice():
    runs = [
        Run("small", size, minutes, int(minutes * 1e6), 9, 9, seed, bits, 1.0, {})
        for minutes, size, seed, bits in (
            (1.0, "2/2/64", 1, 2.0), (1.0, "2/2/64", 2, 2.2), (1.0, "4/4/128", 1, 2.5),
            (10.0, "4/4/128", 1, 1.5), (10.0, "2/2/64", 1, 1.6),
        )
    ]  # fmt: skip
    only_size = LAW | {"data": 0.0}  # chooses the largest
    head, *lines = (line.split() for line in table("small", TEXTS["small"], runs, {"rule": only_size}))
    assert head == ["small", "1", "min", "10", "min"]
    assert lines[0] == ["2/2/64", "2.1000*", "1.6000"] and lines[1] == ["4/4/128", "2.5000", "1.5000*"]
    assert lines[2] == ["rule", "4/4/128", "+19.0", "%", "4/4/128", "+0.0", "%"]


def test_a_study_is_printed_drawn_kept_and_resumed(dataset, folder):
    flags = ["ablate.py", *TINY_STUDY, f"--dataset={dataset}"]
    first = run_here(*flags, cwd=folder)
    assert first.returncode == 0, first.stderr
    assert first.stdout.count("bits per byte,") == 2
    study = json.loads((folder / "scaling_runs.json").read_text())
    speeds, runs = study["texts"][dataset.name]["seconds_per_token"], study["runs"]
    assert list(speeds) == ["1/1/16", "1/2/32"] and [run["size"] for run in runs] == list(speeds)
    for run in runs:
        assert run["tokens"] == run["steps"] * run["batch"] and run["settings"]["block_size"] == 16
        planned = 0.9 * 0.02 * 60 / speeds[run["size"]]
        assert abs(run["tokens"] - planned) <= run["batch"] and 1 < run["bits_per_byte"] < 8

    flags += ["--scaling_minutes=0.02,0.004", "--constants=law.json"]
    done = run_here(*flags, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("0.004 minutes (") == 2 and "0.02 minutes (" not in done.stdout
    again = json.loads((folder / "scaling_runs.json").read_text())
    assert again["texts"] == study["texts"] and again["runs"][:2] == runs and len(again["runs"]) == 4
    for run in again["runs"]:
        assert f"{run['bits_per_byte']:.4f}" in done.stdout
    assert "a set: 2 of 4 runs to train, 0.008 minutes" in done.stdout
    assert "rule of train.py" in done.stdout
    law = json.loads((folder / "law.json").read_text())["law"]
    assert law.keys() == LAW.keys() and all(value > 0 for value in law.values())
    assert (folder / "scaling_runs.png").read_bytes()[:4] == b"\x89PNG"
    names = ["law.json", "scaling_runs.json", "scaling_runs.png"]
    assert sorted(path.name for path in folder.iterdir()) == names

    changed = run_here(*flags, "--weight_decay=0.3", cwd=folder)
    assert_user_error(changed, "a study with different weight_decay", "--json")
    repeated = run_here(*flags, "--plot=all.svg", cwd=folder)
    assert "minutes (" not in repeated.stdout and (folder / "all.svg").is_file()


def test_mistakes_of_a_scaling_study(dataset, folder, capsys):
    (folder / "other.json").write_text('{"settings": {}, "runs": {"recipe": []}}')
    flags = [*TINY_STUDY, f"--dataset={dataset}"]
    for more, says in {
        "--sizes=4/4": ("sizes=4/4 is not valid", "such as 4/4/128"),
        "--sizes=4/3/128": ("heads must divide width",),
        "--scaling_minutes=1,x": ("scaling_minutes=1,x is not valid", "such as 1,3,10"),
        "--scaling_minutes=0,1": ("give minutes above 0",),
        "--json=other.json": ("other.json is not a study of ablate.py --scaling=True", "another --json"),
        "--constants=scaling_runs.png": ("is the name of json or plot too",),
        "--constants=no/law.json": ("no/law.json cannot be written",),
        "--dataset=nowhere": ("nowhere",),
        "--scaling_minutes=1e-9": ("no run has a loss", "give more --scaling_minutes"),
    }.items():
        assert_user_error(run_here("ablate.py", *flags, more, cwd=folder), *says)
    for words, says in {
        "--scaling=True --n_layer=3": "n_layer has no effect: a scaling study trains the sizes of --sizes",
        "--scaling=True --max_iters=3": "max_iters has no effect",
        "--sizes=4/4/128": "sizes has no effect: it needs scaling=True",
    }.items():
        with pytest.raises(SystemExit, match="2"):
            configure(AblateConfig, words.split())
        assert says in capsys.readouterr().err


def test_sizes_are_read_as_they_are_written():
    assert [parse_size(str(size)) for size in SIZES] == SIZES
