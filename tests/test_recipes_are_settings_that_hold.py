"""Every recipe builds settings without a contradiction, flags override it, and typing errors are told."""

import dataclasses
import json
from pathlib import Path

import pytest

from edgedistill import cli, pipeline
from edgedistill.benchmarks.distillation import read_protocol
from edgedistill.errors import ModelError, UsageError
from edgedistill.recipes import read_recipe, recipe_names
from edgedistill.teacher import BlendSettings
from edgedistill.training import fixres
from edgedistill.training.models import input_spec_for

SYSTEMS = {"clothing-2nd-place", "gender-status", "mask-gender-age", "eye-disease", "binary-contest"}


@pytest.fixture
def settings_of(monkeypatch):
    """What a command would run, caught before it runs."""

    def build(*arguments, command="distill"):
        caught = []

        def catch(settings, **_):
            caught.append(settings)
            raise UsageError("caught")

        monkeypatch.setattr(pipeline, "distill", catch)
        monkeypatch.setattr(pipeline, "teach", catch)
        with pytest.raises(UsageError, match=r"^caught$"):
            cli.app([command, "--data", "x", "--out", "y", *arguments], standalone_mode=False)
        return caught[0]

    return build


def test_every_system_of_the_table_has_a_recipe():
    assert set(recipe_names()) >= SYSTEMS | {"fast-start", "few-labels", "best", "function-matching"}


def test_recipes_say_what_their_systems_did(settings_of):
    """Row by row of the table of systems: what was used there and is an option here."""
    clothing = settings_of("--recipe", "clothing-2nd-place")
    assert (clothing.teacher.name, clothing.data.split.folds, clothing.student.name) == ("effb4", 5, "mbv3s")
    assert (clothing.student.epochs, clothing.student.extra_epochs, clothing.student.batch_size) == (20, 4, 256)
    assert (clothing.student.soft_weight, clothing.student.cutmix_probability) == (0.2, 0.5)
    assert (clothing.student.optimizer, clothing.student.schedule) == ("radam", "cosine")
    gender = settings_of("--recipe", "gender-status")
    for network in (gender.teacher, gender.student):
        assert (network.optimizer, network.lr, network.pool) == ("adam", 0.001, "gem")
        assert (network.hard_loss, network.focal_gamma, network.focal_alpha) == ("focal", 2.0, 1.0)
        assert network.mixup_probability > 0 and network.warmup_epochs > 0 and network.schedule == "cosine"
    assert (gender.teacher.image_size, gender.teacher.epochs) == (256, 65) and gender.teacher.swa_start == 0.75
    assert gender.teacher.sample_power > 0 and len(gender.ensemble.others) == 2
    mask = settings_of("--recipe", "mask-gender-age")
    assert (mask.teacher.name, mask.teacher.classifier_dropout, mask.teacher.lr) == ("effb3", 0.7, 0.0001)
    assert mask.teacher.hidden_units and (mask.teacher.lr_decay, mask.teacher.schedule) == (0.995, "exponential")
    assert (mask.teacher.class_weights, mask.student.class_weights) == ("inverse", "inverse")
    eye = settings_of("--recipe", "eye-disease")
    assert [eye.teacher.name, *(other.settings.name for other in eye.ensemble.others)] == [
        "swinb",
        "seresnext101",
        "effv2s",
    ]
    assert (eye.teacher.hard_loss, eye.student.hard_loss, eye.teacher.image_size) == ("bce", "bce", 384)
    assert eye.teacher.label_smoothing > 0
    binary = settings_of("--recipe", "binary-contest")
    assert (binary.teacher.epochs - binary.teacher.plain_epochs, binary.teacher.mixup_probability) == (30, 1.0)
    assert (binary.teacher.image_size, binary.teacher.test_size) == (224, 288) and len(binary.ensemble.others) == 5


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_is_valid_for_both_commands_as_early_as_a_run_can_tell(name, settings_of, capsys):
    settings = settings_of("--recipe", name)
    others = [other.settings for other in settings.ensemble.others]
    pipeline.refuse_early([settings.student, settings.teacher, *others])
    assert ("warning" in capsys.readouterr().err) == (name in ("few-labels", "best"))  # which ask for photographs
    for network in (settings.student, settings.teacher, *others):
        fixres.deployed_spec(network, input_spec_for(network.name, network.image_size))
    hard = dataclasses.replace(settings.student, distillation=False)  # the baseline that distill trains beside it
    assert hard.epochs == settings.student.epochs
    alone = settings_of("--recipe", name, command="teach")
    assert (alone.teacher, alone.ensemble) == (settings.teacher, settings.ensemble)
    text = read_recipe(name, known=cli._recipe_options()).text
    assert len(text.splitlines()) < 40 and "# Add:" not in text


def test_a_classifier_that_a_network_cannot_take_is_told_before_teachers_are_trained(settings_of):
    settings = settings_of("--student", "test_vit", "--image-size", "160", "--pool", "gem")
    with pytest.raises(ModelError, match="use --pool avg"):
        pipeline.refuse_early([settings.student])


def test_flags_override_a_recipe_and_it_overrides_the_defaults(settings_of):
    plain, recipe = settings_of(), settings_of("--recipe", "gender-status")
    assert (plain.student.hard_loss, recipe.student.hard_loss, recipe.teacher.hard_loss) == ("ce", "focal", "focal")
    assert (plain.teacher.pool, recipe.teacher.pool, recipe.teacher.swa_start) == ("avg", "gem", 0.75)
    own = settings_of("--recipe", "gender-status", "--hard-loss", "ce", "--no-balanced", "--teacher-pool", "avg")
    assert (own.student.hard_loss, own.teacher.hard_loss, own.teacher.pool) == ("ce", "ce", "avg")
    assert recipe.student.balanced_sampling and not own.student.balanced_sampling
    assert not settings_of("--recipe", "fast-start").student.balanced_sampling
    assert settings_of("--recipe", "fast-start", "--balanced").student.balanced_sampling


@pytest.mark.parametrize(
    ("options", "said", "wanted"),
    [
        ('baselines = "all"', ["--no-baseline"], "none"),
        ('baselines = "all"', ["--baseline"], "all"),
        ('baselines = "all"', [], "all"),
        ('baselines = "none"', ["--baseline"], "first"),
        ("baseline = false", ["--baselines", "all"], "all"),
        ("baseline = false", [], "none"),
    ],
)
def test_the_command_line_decides_on_baselines_whatever_a_recipe_says(options, said, wanted, settings_of, tmp_path):
    (tmp_path / "own.toml").write_text(f'summary = "own"\n[options]\n{options}\n')
    assert settings_of("--recipe", str(tmp_path / "own.toml"), *said).baselines == wanted


def test_of_one_origin_baselines_do_not_contradict_each_other(tmp_path):
    (tmp_path / "own.toml").write_text('summary = "own"\n[options]\nbaselines = "all"\nbaseline = false\n')
    for words in (["--no-baseline", "--baselines", "all"], ["--recipe", str(tmp_path / "own.toml")]):
        with pytest.raises(UsageError, match="--no-baseline and --baselines all contradict each other"):
            cli.app(["distill", "--data", "x", "--out", "y", *words], standalone_mode=False)


def test_a_recipes_vote_is_for_its_own_teachers(settings_of):
    recipe = settings_of("--recipe", "gender-status").ensemble.blend
    assert (recipe.weights, recipe.override) == ("0.45,0.55,0", "densenet121")
    for teachers in ("effb0", "effb0,swinb"):
        other = settings_of("--recipe", "gender-status", "--teacher", teachers)
        assert other.ensemble.blend == BlendSettings() and other.teacher.pool == "gem"
        assert settings_of("--recipe", "gender-status", "--teacher", teachers, command="teach").teacher == other.teacher
    said = ("--teacher", "effb0,swinb", "--teacher-override", "swinb")
    assert settings_of("--recipe", "gender-status", *said).ensemble.blend == BlendSettings(override="swinb")


MEASURED = ["gender-status", "mask-gender-age", "eye-disease", "binary-contest"]
ELSEWHERE = {"name", "image_size", "test_size", "epochs", "batch_size", "distillation", "warmup_epochs", "plain_epochs",
             "any_way_up", "extra_epochs", "weights", "crop_max"}  # fmt: skip


@pytest.mark.parametrize("name", MEASURED)
def test_the_figures_of_a_recipe_are_of_its_own_losses_samplers_and_mixing(name, settings_of):
    protocol = read_protocol(Path("benchmarks/protocols/distillation-elpv-4class.toml"))
    words = " ".join([protocol.data_options, protocol.student_options, protocol.arms[name]]).split()
    measured, recipe = settings_of(*words).student, settings_of("--recipe", name).student
    different = {
        each.name for each in dataclasses.fields(recipe) if getattr(measured, each.name) != getattr(recipe, each.name)
    }
    assert different <= ELSEWHERE


def test_what_is_said_to_teach_reaches_all_teachers_whatever_a_recipe_says(settings_of):
    recipe = settings_of("--recipe", "binary-contest", command="teach").teacher
    own = settings_of("--recipe", "binary-contest", "--optimizer", "adamw", command="teach").teacher
    assert recipe.optimizer != "adamw" and own == dataclasses.replace(recipe, optimizer="adamw")
    both = ("--weight-decay", "0.2", "--teacher-weight-decay", "0.3")
    assert settings_of("--recipe", "eye-disease", *both, command="teach").teacher.weight_decay == 0.3
    assert settings_of("--recipe", "eye-disease", "--weight-decay", "0.2", command="teach").teacher.weight_decay == 0.2


def test_a_recipe_for_photographs_without_labels_says_when_there_are_none(settings_of):
    for name in ("few-labels", "best"):
        (doubt,) = settings_of("--recipe", name).student.doubts()
        assert doubt.startswith("--unlabelled-share, --unlabelled-min-confidence change nothing without")
    assert settings_of("--recipe", "few-labels", "--unlabelled", "photos").student.doubts() == []
    assert settings_of("--recipe", "few-labels", "--no-distillation").student.doubts() == []


def test_without_a_recipe_the_defaults_are_the_settings_own(settings_of):
    from edgedistill.student import StudentSettings
    from edgedistill.teacher import TeacherSettings

    settings = settings_of()
    assert settings.student == StudentSettings()
    assert settings.teacher == TeacherSettings()
    assert settings_of(command="teach").teacher == TeacherSettings()


def test_the_clothing_recipe_is_the_default(settings_of):
    assert settings_of("--recipe", "clothing-2nd-place") == settings_of()


def test_teachers_can_differ_and_lists_arrive(settings_of):
    settings = settings_of(
        *("--no-balanced", "--oversample", "a=2", "--oversample", "b=3", "--teacher-optimizer", "lamb"),
        *("--teacher-mixup", "0.5", "--no-horizontal-flip", "--teacher-horizontal-flip"),
    )
    assert settings.student.oversample == ("a=2", "b=3") and settings.teacher.oversample == ()
    assert (settings.student.optimizer, settings.teacher.optimizer) == ("radam", "lamb")
    assert (settings.student.mixup_probability, settings.teacher.mixup_probability) == (0.0, 0.5)
    assert not settings.student.horizontal_flip and settings.teacher.horizontal_flip


def test_mistakes_in_recipes_are_told(tmp_path):
    known = cli._recipe_options()
    with pytest.raises(UsageError, match=r"no recipe called 'clothing'; did you mean clothing-2nd-place"):
        read_recipe("clothing", known=known)
    (tmp_path / "mine.toml").write_text('summary = "mine"\n[options]\nsoft-wait = 0.5\n')
    with pytest.raises(UsageError, match=r"mine.toml: no option soft-wait; did you mean soft-weight"):
        read_recipe(str(tmp_path / "mine.toml"), known=known)
    for text in ("summary = \n", "[options]\nepochs = 3\n", 'summary = "x"\noptions = 3\n'):
        (tmp_path / "broken.toml").write_text(text)
        with pytest.raises(UsageError, match=r"broken.toml: not a recipe"):
            read_recipe(str(tmp_path / "broken.toml"), known=known)
    with pytest.raises(UsageError, match=r"absent.toml: cannot be read"):
        read_recipe(str(tmp_path / "absent.toml"), known=known)


def test_a_file_of_ones_own_works_like_a_name(tmp_path, settings_of):
    (tmp_path / "mine.toml").write_text(
        'summary = "mine"\n[options]\nteacher-epochs = 3\noversample = ["a=2"]\nbalanced = false\n'
    )
    settings = settings_of("--recipe", str(tmp_path / "mine.toml"))
    assert settings.teacher.epochs == 3 and settings.student.oversample == ("a=2",)


def test_recipes_are_listed_and_printed(capsys):
    cli.app(["distill", "--recipe", "list"], standalone_mode=False)
    listed = capsys.readouterr().out
    assert all(name in listed for name in recipe_names())
    cli.app(["recipes", "function-matching"], standalone_mode=False)
    assert "soft-temperature = 2.0" in capsys.readouterr().out
    cli.app(["recipes", "--json"], standalone_mode=False)
    assert json.loads(capsys.readouterr().out)["function-matching"]["options"]["loss"] == "kl"
