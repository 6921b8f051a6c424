"""The study: its variants, its table and plot, and that it resumes where it was interrupted."""

import json

from conftest import TINY, assert_user_error, run_here, run_warm

from ablate import table, variants
from configurator import read_settings
from distrogpt.settings import AblateConfig

IGNORED = [f"--{name}=" for name in AblateConfig.never_used()]  # train.py's, which a study refuses
STUDY = [flag for flag in TINY if not flag.startswith(tuple(IGNORED))]
STUDY += ["--max_iters=4", "--eval_interval=2", "--seeds=2", "--rotary=True", "--optimizer=muon"]


def test_each_ingredient_is_taken_from_the_recipe_and_added_to_gpt2():
    config = read_settings(AblateConfig, [*STUDY, "--norm=rmsnorm"])
    study = variants(config)
    plain = {name: value for name, value in study["GPT-2"].items() if name in ("rotary", "optimizer", "norm")}
    assert plain == {"rotary": False, "optimizer": "adamw", "norm": "layernorm"}
    assert study["recipe"] == {}
    assert study["recipe without rotary=True"] == {"rotary": False}
    assert study["recipe without optimizer=muon"] == {"optimizer": "adamw"}
    assert study["GPT-2 with norm=rmsnorm"] == {**study["GPT-2"], "norm": "rmsnorm"}
    assert len(study) == 2 + 3 + 3


def test_the_table_has_medians_and_their_changes():
    runs = {
        "recipe": [{"seed": i, "val": val, "seconds": 10.0} for i, val in enumerate((1.5, 1.4, 1.45))],
        "recipe without x=1": [{"seed": 0, "val": 1.6, "seconds": 8.0}],
        "GPT-2": [{"seed": 0, "val": 2.0, "seconds": 5.0}],
        "GPT-2 with x=1": [{"seed": 0, "val": 1.9, "seconds": 10.0}],
    }
    lines = [line.split() for line in table(runs)[1:]]
    assert lines[0][1:] == ["1.4500", "(1.4000", "to", "1.5000)", "+0.0000", "10.0", "1.00"]
    assert lines[1][-3:] == ["+0.1500", "8.0", "0.80"] and lines[3][-3:] == ["-0.1000", "10.0", "2.00"]


def test_a_study_is_printed_drawn_kept_and_resumed(dataset, tmp_path):
    flags = ["ablate.py", *STUDY, f"--dataset={dataset}"]
    first = run_warm(*flags, "--seeds=1", cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    assert first.stdout.count("seed 1337: val loss") == 6
    done = run_here(*flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("seed 1338: val loss") == 6 and "seed 1337: val loss" not in done.stdout
    runs = json.loads((tmp_path / "ablate.json").read_text())["runs"]
    assert (
        all([run["seed"] for run in variant] == [1337, 1338] for variant in runs.values()) and len(runs) == 6
    )
    losses = [run["val"] for variant in runs.values() for run in variant]
    assert len(set(losses)) == 8 and all(2 < loss < 5 for loss in losses)
    for name, variant in runs.items():
        assert any(
            line.startswith(name) and f"{variant[0]['val']:.4f}" in line for line in done.stdout.splitlines()
        )
    assert (tmp_path / "ablate.png").read_bytes()[:4] == b"\x89PNG"
    # the checkpoints of a study are of no use
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ablate.json", "ablate.png"]

    results = (tmp_path / "ablate.json").read_bytes()
    other = run_here(*flags, "--seeds=1", "--learning_rate=0.02", cwd=tmp_path)
    assert_user_error(other, "different learning_rate", "--json")
    (tmp_path / "text.json").write_text("no study")
    assert_user_error(run_here(*flags, "--json=text.json", cwd=tmp_path), "is not a study")
    assert (tmp_path / "ablate.json").read_bytes() == results
    repeated = run_here(*flags, "--plot=other.png", cwd=tmp_path)  # the same study
    assert "seed 1337: val loss" not in repeated.stdout and (tmp_path / "other.png").is_file()
    picture = (tmp_path / "ablate.png").read_bytes()
    (tmp_path / "second.v2.json").write_bytes(results)
    run_here(*flags, "--json=second.v2.json", "--seeds=1", cwd=tmp_path)
    assert (tmp_path / "second.v2.png").is_file() and (tmp_path / "ablate.png").read_bytes() == picture
    assert_user_error(run_here(*flags, "--json=a.png", cwd=tmp_path), "json=a.png is the name of the plot")


def test_a_variant_that_diverges_is_reported_and_the_others_are_trained(dataset, tmp_path):
    flags = [*TINY, "--max_iters=4", "--seeds=1", "--qk_norm=True", "--optimizer=sgd", f"--dataset={dataset}"]
    done = run_here(
        "ablate.py", *flags, "--learning_rate=1e30", "--decay_lr=False", "--grad_clip=0", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "recipe, seed 1337: val loss inf" in done.stdout and "ablate.png" in done.stdout
    assert "GPT-2, seed 1337: val loss" in done.stdout


def test_mistakes_of_a_study(dataset, tmp_path):
    assert_user_error(run_here("ablate.py", *TINY, f"--dataset={dataset}"), "the recipe is GPT-2's")
    assert_user_error(run_here("ablate.py", *STUDY, f"--json={tmp_path}/no/x.json"), "cannot be written")
    assert_user_error(
        run_here("ablate.py", *STUDY, "--dataset=nowhere", f"--json={tmp_path}/x.json"), "nowhere"
    )
