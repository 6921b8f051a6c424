"""Settings: defaults, config files, flags, in this order; --help; every mistake in one line."""

import re
import subprocess
import sys
from dataclasses import dataclass, replace

import pytest
from conftest import COMMANDS, REPO, assert_user_error, run, run_here

from configurator import Settings, configure, help_text, read_settings, setting
from distrogpt.errors import UserError
from distrogpt.settings import (
    AblateConfig,
    BenchConfig,
    EvalConfig,
    ExportConfig,
    PlotConfig,
    SampleConfig,
    ServeConfig,
    TrainConfig,
)


def settings_of(*argv: str) -> TrainConfig:
    return read_settings(TrainConfig, list(argv))


def test_defaults_are_nanogpts():
    config = settings_of()
    assert (config.n_layer, config.n_head, config.n_embd, config.block_size) == (12, 12, 768, 1024)
    assert (config.batch_size, config.gradient_accumulation_steps) == (12, 40)
    assert (config.learning_rate, config.weight_decay, config.beta2, config.grad_clip) == (
        6e-4,
        0.1,
        0.95,
        1.0,
    )


def test_files_come_first_then_flags_left_to_right(tmp_path):
    (tmp_path / "a.py").write_text("batch_size = 3\nblock_size = 4\nn_layer = 5\n")
    (tmp_path / "b.py").write_text("block_size = 6\n")
    config = settings_of("--n_layer=7", str(tmp_path / "a.py"), "--n_layer=8", str(tmp_path / "b.py"))
    assert (config.batch_size, config.block_size, config.n_layer) == (3, 6, 8)


def test_config_file_is_python_with_the_settings_as_globals(tmp_path):
    """The kind of file that nanoGPT's users have: imports, helpers, values computed from settings."""
    (tmp_path / "c.py").write_text(
        "import time\n"
        "from math import sqrt\n"
        "def half(x):\n    return x // 2\n"
        "_share = 4\n"
        "out_dir = 'out-' + str(len(time.ctime()) // 100)\n"
        "batch_size = half(batch_size)\n"
        "max_iters = 5e3\n"
        "lr_decay_iters = max_iters\n"
        "learning_rate = 1\n"
        "gradient_accumulation_steps = _share * 8\n"
        "compile = False\n"
        "min_lr = learning_rate / sqrt(100)\n"
    )
    config = settings_of(str(tmp_path / "c.py"))
    assert config.out_dir == "out-0"
    assert config.batch_size == 6
    assert config.max_iters == 5000 and type(config.max_iters) is int
    assert config.lr_decay_iters == 5000
    assert config.learning_rate == 1.0 and type(config.learning_rate) is float
    assert config.gradient_accumulation_steps == 32
    assert config.compile is False
    assert config.min_lr == 0.1


def test_a_config_can_begin_with_another_one(tmp_path):
    (tmp_path / "mine.py").write_text("from config.modern import *\nmuon_lr = 2 * muon_lr\n")
    (tmp_path / "other.py").write_text("from config.modern import *\nfrom os.path import sep\n")
    config, recipe = settings_of(str(tmp_path / "mine.py")), settings_of("modern")
    assert recipe.optimizer == "muon" and recipe.rotary and not recipe.tied
    assert config == replace(recipe, muon_lr=2 * recipe.muon_lr)
    with pytest.raises(
        UserError, match=r"other.py: unknown setting sep; --help .* of your own begins with _"
    ):
        settings_of(str(tmp_path / "other.py"))


@pytest.mark.parametrize("name", ["eval_gpt2_xl", "config/eval_gpt2_xl.py"])
def test_bare_name_and_path_from_any_folder(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert settings_of(name).eval_only is True


def test_every_config_is_valid():
    for path in (REPO / "config").glob("*.py"):
        settings_of(str(path))


def test_every_config_trains_into_a_folder_of_its_own():
    """Else one resumes the other's run, or moves its files aside."""
    configs = {path.stem: read_settings(TrainConfig, [str(path)]) for path in REPO.glob("config/train_*.py")}
    configs |= {path.stem: read_settings(TrainConfig, [str(path)]) for path in REPO.glob("config/fine*.py")}
    folders = [config.out_dir for config in configs.values()]
    assert len(folders) > 10 and len(set(folders)) == len(folders), configs


@pytest.mark.parametrize(
    ("flag", "name", "value"),
    [
        ("--learning_rate=1", "learning_rate", 1.0),
        ("--learning_rate=1e-3", "learning_rate", 0.001),
        ("--max_iters=1e3", "max_iters", 1000),
        ("--max_iters=2_000", "max_iters", 2000),
        ("--bias=true", "bias", True),
        ("--bias=0", "bias", False),
        ("--compile=1", "compile", True),
        ("--compile=auto", "compile", "auto"),
        ("--min_lr=None", "min_lr", None),
        ("--min_lr=0", "min_lr", 0.0),
        ("--wandb_run_name=a=b, c", "wandb_run_name", "a=b, c"),
        ("--wandb_run_name=5", "wandb_run_name", "5"),
        ("--wandb_run_name=", "wandb_run_name", ""),
    ],
)
def test_text_becomes_the_annotated_type(flag, name, value):
    setting = getattr(settings_of(flag), name)
    assert setting == value and type(setting) is type(value)


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--batch_sise=3", "did you mean batch_size?"),
        ("--batch-size=3", "did you mean batch_size?"),
        ("--zzz=3", "--help"),
        ("--batch_size=many", "whole number"),
        ("--batch_size=1.5", "whole number"),
        ("--batch_size=", "whole number"),
        ("--batch_size=0", "at least 1"),
        ("--block_size=-4", "at least 1"),
        ("--n_layer=0", "at least 1"),
        ("--n_layer=True", "whole number"),
        ("--bias=maybe", "True or False"),
        ("--bias=2", "True or False"),
        ("--learning_rate=fast", "a number"),
        ("--batch_size=9223372036854775807", "below 2147483648"),
        (f"--batch_size={'9' * 400}", "below 2147483648"),
        (f"--learning_rate={'9' * 400}", "a number"),
        (f"--dataset={'x' * 5000}", "no dataset xxx"),
        ("x" * 5000, "no config file xxx"),
        ("--learning_rate=nan", "finite"),
        ("--learning_rate=inf", "finite"),
        ("--learning_rate=0", "above 0"),
        ("--dropout=1", "below 1"),
        ("--dropout=-0.1", "at least 0"),
        ("--beta2=1.5", "below 1"),
        ("--max_iters=-1", "at least 0"),
        ("--dtype=float8", "one of auto, float32, bfloat16, float16"),
        ("--compile=perhaps", "one of auto, True, False"),
        ("--eval_only", "--eval_only=True"),
        ("config/nothing.py", "no config file config/nothing.py"),
        ("n_layer=3", "for the setting, write --n_layer=3"),
        ("--", "unknown setting ''; --help lists all"),
        ("config/train_gtp2.py", "did you mean config/train_gpt2.py?"),
    ],
)
def test_mistakes_in_one_line(flag, message):
    result = run("train.py", flag)
    assert_user_error(result, message)
    assert result.stdout == "" and len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--n_embd=100", "n_embd=100 is not divisible by n_head=12; change one"),
        ("--n_kv_head=5", "n_kv_head=5 does not divide n_head=12; change one"),
        (
            "--n_embd=36 --rotary=True",
            "rotary and key_offset need an even n_embd/n_head, which is 3; change one",
        ),
    ],
)
def test_a_network_that_cannot_be_built_is_refused_in_one_line(flag, message, dataset, tmp_path):
    out_dir = tmp_path / "out"
    flags = [*flag.split(), f"--dataset={dataset}", f"--out_dir={out_dir}"]
    assert_user_error(run_here("train.py", *flags), message)
    assert not out_dir.exists()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("batchsize = 3", "did you mean batch_size?"),
        ("batch_size = '3'", "batch_size='3' is not valid"),
        ("batch_size = None", "batch_size=None"),
        ("batch_size = len", "batch_size="),
        ("dropout = 2", "below 1"),
        ("x = = 1", "line 2: SyntaxError"),
        ("batch_size = undefined", "line 2: NameError"),
        ("batch_size = 1 / 0", "line 2: ZeroDivisionError"),
        ("import sys; sys.exit()", "line 2: SystemExit"),
        ("batch_size = 10**5000", "batch_size=<int>"),
        ("learning_rate = 10**400", "is not valid; give a number"),
        ("out_dir = 'a\\0b'", "it must be a path"),
        ("out_dir = '\\ud800'", "it must be a path"),
        ("class E(Exception):\n    def __str__(self): 1 / 0\nraise E", "line 4: E: <E>"),
        ("globals()[5] = 1; batchsize = 3", "did you mean batch_size?"),
    ],
)
def test_mistakes_in_a_config_file_name_the_file(line, message, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(f"# a comment\n{line}\n")
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        settings_of(str(path))
    assert str(path) in str(caught.value)


def test_settings_made_in_python_are_checked_too():
    assert TrainConfig(learning_rate=1).learning_rate == 1.0
    with pytest.raises(ValueError, match="batch_size=0"):
        TrainConfig(batch_size=0)


@pytest.mark.parametrize(
    ("script", "cls"),
    [
        ("train.py", TrainConfig),
        ("sample.py", SampleConfig),
        ("bench.py", BenchConfig),
        ("eval.py", EvalConfig),
        ("plot.py", PlotConfig),
    ],
)
def test_help_lists_every_setting_with_its_type_and_loads_nothing_heavy(script, cls):
    code = (
        "import runpy, sys\n"
        "try:\n    runpy.run_path(sys.argv[1], run_name='__main__')\n"
        "finally:\n"
        "    heavy = {'torch', 'numpy', 'transformers', 'tiktoken', 'datasets', 'wandb', 'matplotlib'}\n"
        "    heavy &= set(sys.modules)\n"
        "    print('loaded:', heavy or 'nothing')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(REPO / script), "--help"], capture_output=True, text=True, cwd=REPO
    )
    assert done.returncode == 0, done.stderr
    assert "loaded: nothing" in done.stdout
    for name in cls.__dataclass_fields__.keys() - cls.never_used():
        lines = re.search(rf"^  --{name}=.*\n(    .*\n)*", done.stdout, re.M)
        assert lines and lines[0].endswith("]\n")  # ... its type


def test_configure_ends_the_process_with_status_2(capsys):
    with pytest.raises(SystemExit) as caught:
        configure(SampleConfig, ["--temprature=1"])
    assert caught.value.code == 2
    assert capsys.readouterr().err == "error: unknown setting temprature; did you mean temperature?\n"


@pytest.mark.parametrize(
    ("cls", "names"),
    [
        (SampleConfig, "version checkpoint restart model_path weights file text port name eval"),
        (ServeConfig, "version report max_minutes reload workers timeout"),
        (PlotConfig, "dataset eval_hellaswag title input file format"),
        (TrainConfig, "version hidden_size vocab_size temperature top_k port scheduler_type start int8"),
        (AblateConfig, "out_dirs initfrom log_intervall"),  # which train.py has, not this
    ],
)
def test_only_a_typing_error_is_taken_for_another_name(cls, names):
    for name in names.split():
        with pytest.raises(UserError, match=f"unknown setting {name}; --help lists all$"):
            read_settings(cls, [f"--{name}=1"])


@pytest.mark.parametrize(
    ("word", "near"),
    [
        ("Batch-Size", "batch_size"),
        ("lerning_rate", "learning_rate"),
        ("epochs", "max_epochs"),
        ("n_layers", "n_layer"),
    ],
)
def test_a_typing_error_is_told_with_the_name(word, near):
    with pytest.raises(UserError, match=rf"did you mean {near}\?"):
        settings_of(f"--{word}=1")


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home folder, of no user."""
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


def test_the_home_folder_stands_for_a_tilde_in_every_path(home):
    (home / "a b" / "c").mkdir(parents=True)
    (home / "a b" / "c" / "model.py").touch()  # against is the folder of a nanoGPT
    for cls in (TrainConfig, BenchConfig, AblateConfig, PlotConfig, SampleConfig, ServeConfig, EvalConfig):
        for field in cls.__dataclass_fields__.values():
            if "path" in field.metadata:
                needed = ["--speak=x.wav"] if (cls, field.name) == (SampleConfig, "voice") else []
                config = read_settings(cls, [f"--{field.name}=~/a b/c", *needed])
                assert getattr(config, field.name) == f"{home}/a b/c", field.name
    assert read_settings(ExportConfig, ["--to=~"]).to == str(home)
    (home / "mine.py").write_text(
        "from pathlib import Path\nout_dir = Path('~/runs')\ndataset = '~/d:1,x:2, ~/e:3'\n"
    )
    config = settings_of("~/mine.py")
    assert (config.out_dir, config.dataset) == (f"{home}/runs", f"{home}/d:1,x:2, {home}/e:3")
    assert settings_of("--init_from=auto:~/a").init_from == f"auto:{home}/a"
    assert TrainConfig(out_dir="~/a").out_dir == f"{home}/a"
    assert SampleConfig(start="FILE:~/a").start == f"FILE:{home}/a"
    assert ServeConfig(api_key="FILE:~/a").api_key == f"FILE:{home}/a"


def test_a_tilde_elsewhere_is_a_tilde(home):
    assert SampleConfig(start="~/a FILE:~/a").start == "~/a FILE:~/a" and SampleConfig(stop="~/").stop == (
        "~/",
    )
    for name in ("a~", "./~", "a/~/b", "a:~/b", "~nobody-here/a", "~~"):
        assert TrainConfig(out_dir=name).out_dir == name


@pytest.mark.parametrize(
    ("cls", "flags", "message"),
    [
        (AblateConfig, "--eval_iters=5", "a study evaluates the whole val split"),
        (AblateConfig, "--out_dir=x", "a study keeps only the val losses of its runs"),
        (AblateConfig, "--init_from=gpt2", "trains each variant from scratch"),
        (BenchConfig, "--eval_iters=5", "bench.py does not read it"),
        (BenchConfig, "--gpu=h100", "timing a training step does not use it (only plan)"),
        (BenchConfig, "--generate=True --bench_steps=3", "generate does not use it"),
        (BenchConfig, "--serve=True --n_layer=3", "serve does not use it"),
        (BenchConfig, "--report=True config/train_gpt2.py", "a config file has no effect"),
        (BenchConfig, "--check=network --n_layer=3", "check does not use it"),
        (SampleConfig, "--interactive=True --num_samples=2", "one sample per prompt"),
        (EvalConfig, "--start=x", "tasks=loss,accuracy does not use it"),
        (EvalConfig, "--tasks=next --stride=2", "tasks=next does not use it"),
    ],
)
def test_a_flag_without_effect_is_refused(cls, flags, message, capsys):
    with pytest.raises(SystemExit) as caught:
        configure(cls, flags.split())
    error = capsys.readouterr().err
    assert caught.value.code == 2 and "has no effect: " in error and message in error
    assert error.rstrip().endswith("; leave it out")


@pytest.mark.parametrize(
    ("flags", "note"),
    [
        ("--hellaswag_input=x", "hellaswag_input has no effect without eval_hellaswag=True"),
        ("--sample_start=x", "sample_start has no effect without eval_samples"),
        ("--wandb_project=x", "wandb_project has no effect without wandb_log=True"),
        ("--muon_lr=0.1", "muon_lr has no effect without optimizer=muon"),
        ("--head_lr=0.1", "head_lr has no effect on a tied lm_head"),
        ("--head_lr=0.1 --init_from=out-untied", ""),
        ("--muon_lr=0.1 --init_from=resume", ""),
        ("--wandb_project=x --wandb_log=True", ""),
        ("--compile=False --eval_iters=20 --log_interval=1 --min_lr=1e-4 --decay_lr=False", ""),
    ],
)
def test_a_flag_that_another_setting_leaves_idle_is_noted(flags, note, capsys):
    configure(TrainConfig, flags.split())
    printed = capsys.readouterr().err
    assert note in printed if note else printed == ""


def test_a_config_that_sets_nothing_is_noted(tmp_path, capsys):
    (tmp_path / "c.py").write_text('{"n_layer": 1}')
    read_settings(TrainConfig, [str(tmp_path / "c.py")])
    assert f"{tmp_path / 'c.py'} sets nothing; a setting is a line" in capsys.readouterr().err


def test_a_flag_with_an_effect_and_configs_are_not_refused(tmp_path):
    (tmp_path / "c.py").write_text("eval_iters = 3\nout_dir = 'x'\nmuon_lr = 0.1\n")
    for cls in (AblateConfig, BenchConfig, TrainConfig):
        configure(cls, [str(tmp_path / "c.py")])
    configure(TrainConfig, ["--muon_lr=0.1", "--init_from=resume"])  # the checkpoint may be Muon's
    configure(TrainConfig, ["--eval_hellaswag=True", "--hellaswag_input=x"])
    configure(BenchConfig, ["--plan=True", "--gpu=h100", "--lr_decay_iters=5"])
    configure(EvalConfig, ["--tasks=loss, next", "--stride=2", "--start=x"])
    configure(SampleConfig, ["--out_dir=x", "--num_samples=2"])


def names_by_heading(text: str) -> dict[str, list[str]]:
    """The settings that a text of --help lists, by heading."""
    parts = [part for part in text.split("\n\n") if "\n  --" in part]
    return {part.partition("\n")[0]: re.findall(r"^  --(\w+)=", part, re.M) for part in parts}


@pytest.mark.parametrize("cls", COMMANDS.values())
def test_help_has_each_setting_once_under_a_heading_after_the_most_used(cls):
    text = help_text(cls)
    groups = names_by_heading(text)
    most_used = groups.pop("most used", [])
    assert most_used == cls.most_used.split() and len(set(most_used)) == len(most_used) <= 10
    listed = [name for names in groups.values() for name in names]
    assert sorted(listed) == sorted(cls.__dataclass_fields__.keys() - cls.never_used())
    assert len(listed) <= 20 or (most_used and len(groups) > 3)
    assert max(map(len, text.splitlines())) <= 100 and text.isascii()
    assert text.index("usage: python ") < text.index(most_used[0] if most_used else listed[0])
    assert text.splitlines()[-1].startswith("--help=WORD ")


def test_help_groups_the_settings_of_training():
    groups = names_by_heading(help_text(TrainConfig))
    expected = "most used,data,model,optimizer,schedule,evaluation,checkpoints,logging,machine"
    assert list(groups) == expected.split(",")
    examples = "data:block_size model:n_kv_head optimizer:beta2 schedule:min_lr evaluation:eval_iters"
    for example in f"{examples} checkpoints:init_from logging:wandb_log machine:shard".split():
        heading, _, name = example.partition(":")
        assert name in groups[heading]
    assert next(iter(names_by_heading(help_text(AblateConfig)).values())) == AblateConfig.most_used.split()
    assert list(names_by_heading(help_text(AblateConfig)))[1] == "study"  # its own, before train.py's


@pytest.mark.parametrize(
    ("cls", "search", "found"),
    [
        (TrainConfig, "patience", {"schedule": ["patience"]}),
        (TrainConfig, "n_kv_head", {"model": ["n_kv_head"]}),
        (TrainConfig, "--Weight-Decay", {"optimizer": ["weight_decay"]}),
        (TrainConfig, "rope", {"model": ["rotary"]}),
        (TrainConfig, "early stopping", {"schedule": ["patience"]}),
        (TrainConfig, "wandb name", {"logging": ["wandb_project", "wandb_run_name"]}),
        (SampleConfig, "nucleus", {"sampling": ["top_p"]}),
        (SampleConfig, "speech", {"output": ["speak"]}),
        (ServeConfig, "float16", {"machine": ["dtype"]}),
        (PlotConfig, "axis", {"settings": ["by"]}),
    ],
)
def test_help_finds_settings_by_a_word(cls, search, found, capsys):
    with pytest.raises(SystemExit) as caught:
        configure(cls, ["config/none.py", f"--help={search}"])
    assert caught.value.code == 0
    assert names_by_heading("\n\n" + capsys.readouterr().out) == found


def test_help_finds_a_group_by_its_heading():
    groups = names_by_heading(help_text(TrainConfig))
    assert names_by_heading(help_text(TrainConfig, "checkpoints"))["checkpoints"] == groups["checkpoints"]
    assert help_text(TrainConfig, " ") == help_text(TrainConfig)


@pytest.mark.parametrize(
    ("cls", "search", "says"),
    [
        (TrainConfig, "lerning_rate", "did you mean --help=learning_rate?"),
        (TrainConfig, "optimiser", "did you mean --help=optimizer?"),
        (TrainConfig, "?", "no setting of this command has '?'"),  # not all of them
        (TrainConfig, "zebra crossing", "no setting of this command has 'zebra crossing'"),
        (AblateConfig, "wandb", "or --help for all settings"),  # which has no effect there
    ],
)
def test_help_about_nothing_is_a_mistake(cls, search, says, capsys):
    with pytest.raises(SystemExit) as caught:
        configure(cls, [f"--help={search}"])
    printed = capsys.readouterr()
    assert caught.value.code == 2 and printed.out == ""
    assert printed.err.startswith("error: ") and printed.err.count("\n") == 1 and says in printed.err


def test_headings_follow_the_order_of_the_fields():
    @dataclass
    class Base(Settings):
        a: int = setting(1, "one", heading="first")
        b: int = setting(2, "two", heading="second")
        c: int = setting(3, "three")

    @dataclass
    class Derived(Base):
        c: int = setting(4, "four")
        d: int = setting(5, "five", heading="own")

    groups = {"first": ["a"], "second": ["b", "c"]}
    assert names_by_heading(help_text(Base)) == groups
    assert names_by_heading(help_text(Derived)) == {"own": ["d"]} | groups
    assert list(names_by_heading(help_text(Derived))) == ["own", "first", "second"]


def test_help_leaves_out_what_has_no_effect():
    for cls, gone, there in (
        (AblateConfig, "eval_iters out_dir wandb_log eval_hellaswag", "seeds json max_iters seed device"),
        (BenchConfig, "eval_iters log_interval min_lr backend", "n_layer gpu out_dir against wandb_log"),
    ):
        text = help_text(cls)
        assert not [name for name in gone.split() if f"--{name}=" in text]
        assert all(f"--{name}=" in text for name in there.split())


def test_a_value_after_a_space_and_a_single_dash():
    with pytest.raises(UserError, match="--max_iters has no value; write --max_iters=VALUE"):
        read_settings(TrainConfig, ["--max_iters", "1"])
    with pytest.raises(UserError, match="unknown setting -max_iters; did you mean max_iters"):
        read_settings(TrainConfig, ["-max_iters=1"])


def test_a_setting_of_several_values(tmp_path):
    def stop_of(*argv: str) -> tuple[str, ...]:
        return read_settings(SampleConfig, list(argv)).stop

    (tmp_path / "c.py").write_text("stop = ['a', 'b\\n']\n")
    (tmp_path / "d.py").write_text("stop = [*stop, 'c']\n")
    files = [str(tmp_path / "c.py"), str(tmp_path / "d.py")]
    assert stop_of() == ()
    assert stop_of("--stop=x", "--seed=3", "--stop=y=z") == ("x", "y=z")
    assert stop_of(*files) == ("a", "b\n", "c")
    assert stop_of(*files, "--stop=x", "--stop=x") == ("x", "x")  # flags override files
    assert stop_of(*files, "--stop=") == () and stop_of("--stop=x", "--stop=", "--stop=y") == ("y",)
    assert stop_of(r"--stop=\n\tx\y", "--stop= ", "--stop=None") == ("\n\tx\\y", " ", "None")
    assert SampleConfig(stop="x").stop == ("x",) and SampleConfig(stop=["x", "\\n"]).stop == ("x", "\\n")
    for wrong in (5, None, [5], [""], {"x": 1}):
        with pytest.raises(ValueError, match="give a list of texts"):
            SampleConfig(stop=wrong)
