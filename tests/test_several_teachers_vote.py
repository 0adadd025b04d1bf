"""Several architectures label as one: weights that never saw the labels they mix, votes, overrides, views."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from edgedistill.artifacts import RunDir, read_json
from edgedistill.data.deal import SplitSettings
from edgedistill.errors import DataError, UsageError
from edgedistill.metrics import log_loss, softmax
from edgedistill.pipeline import DataSettings, TeachSettings, parse_teachers, teach
from edgedistill.tasks import Head, Task
from edgedistill.teacher import BlendSettings, Ensemble, NamedTeacher, TeacherSettings, read_blend
from edgedistill.teacher.ensemble import Blend, blend_folds, blend_from_dict, fit_blend, mixture_weights
from edgedistill.training.checkpoints import read_model
from edgedistill.training.evaluation import evaluate_test
from edgedistill.training.heads import scores_from
from edgedistill.training.predict import predict_logits
from edgedistill.training.soft_labels import FoldResult
from edgedistill.training.views import View, predict_probabilities, views_of


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def answers(rng, truth, skill, classes=3):
    """Probabilities [N, C] of a network that is right the more often the larger ``skill`` is."""
    logits = rng.normal(size=(len(truth), classes))
    logits[np.arange(len(truth)), truth] += skill
    return softmax(logits)


def folds_of(probabilities, name, folds=3):
    return [
        FoldResult(
            fold=fold,
            ids=np.array([f"im{row:03d}" for row in range(fold, len(probabilities), folds)]),
            log_probs=np.log(probabilities[fold::folds]).astype(np.float32),
            trained_on="x",
            epochs_planned=1,
            epochs_done=1,
            architecture=name,
            model_sha256=name,
        )
        for fold in range(folds)
    ]


def test_fitted_weights_have_the_least_log_loss():
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 3, 600)
    members = [answers(rng, truth, 2.0), answers(rng, truth, 1.5), answers(rng, truth, 0.0)]
    likelihoods = np.stack([member[np.arange(600), truth] for member in members])
    weights = mixture_weights(likelihoods)
    assert weights.sum() == pytest.approx(1.0)
    assert weights[2] < 0.1 < weights[1] < weights[0]

    def loss(values):
        return -np.log(values @ likelihoods).mean()

    grid = [(a, b, 1 - a - b) for a in np.linspace(0, 1, 41) for b in np.linspace(0, 1, 41) if a + b <= 1]
    assert loss(weights) <= min(loss(np.array(point)) for point in grid) + 1e-6


def test_the_weights_of_a_fold_do_not_know_its_labels():
    rng = np.random.default_rng(1)
    truth = rng.integers(0, 3, 90)
    results = {name: folds_of(answers(rng, truth, skill), name) for name, skill in (("a", 2.0), ("b", 1.0))}
    label_of = {f"im{row:03d}": int(label) for row, label in enumerate(truth)}
    before = blend_folds(BlendSettings(), results, label_of)
    changed = label_of | {name: (label_of[name] + 1) % 3 for name in results["a"][1].ids.tolist()}
    after = blend_folds(BlendSettings(), results, changed)
    assert np.array_equal(before.folds[1].log_probs[:], after.folds[1].log_probs[:])
    assert before.fold_blends[0].weights != after.fold_blends[0].weights
    # Joined by id: an architecture whose images lie in another order votes the same.
    turned = [dataclasses.replace(r, ids=r.ids[::-1], log_probs=r.log_probs[::-1]) for r in results["b"]]
    again = blend_folds(BlendSettings(), results | {"b": turned}, label_of)
    assert np.allclose(again.folds[2].log_probs[:], before.folds[2].log_probs[:])
    with pytest.raises(DataError, match="teachers a and b labelled different images in fold 0"):
        blend_folds(BlendSettings(), results | {"b": folds_of(np.full((87, 3), 1 / 3), "b")}, label_of)


def test_votes_and_overrides_are_what_they_say():
    first = np.array([[0.6, 0.4, 0.0], [0.2, 0.5, 0.3], [0.0, 0.05, 0.95]])
    second = np.array([[0.1, 0.8, 0.1], [0.1, 0.6, 0.3], [0.9, 0.1, 0.0]])
    assert np.allclose(Blend((0.25, 0.75), "soft")([first, second]), 0.25 * first + 0.75 * second)
    hard = Blend((0.25, 0.75), "hard")([first, second])
    assert np.allclose(hard, [[0.25, 0.75, 0], [0, 1, 0], [0.75, 0, 0.25]], atol=1e-3)
    assert np.allclose(hard.sum(axis=1), 1) and hard.min() > 0
    sure = Blend((0.25, 0.75), "soft", override=(0, 0.9))([first, second])
    assert np.array_equal(sure[2], first[2])
    assert np.allclose(sure[:2], (0.25 * first + 0.75 * second)[:2])
    truth = np.array([0, 1, 2])
    assert fit_blend(BlendSettings(weights="1,3"), "ab", [first, second], truth).weights == (0.25, 0.75)
    assert fit_blend(BlendSettings(weights="equal"), "ab", [first, second], truth).weights == (0.5, 0.5)
    scored = fit_blend(BlendSettings(weights="score", override="b:0.5"), "ab", [first, second], truth)
    assert scored.weights == pytest.approx((0.75, 0.25))
    assert scored.override == (1, 0.5)


def test_a_name_alone_overrides_where_it_is_surer_than_the_others():
    votes = np.array([[0.6, 0.4, 0.0], [0.1, 0.7, 0.2], [0.3, 0.3, 0.4]])
    third = np.array([[0.0, 0.39, 0.61], [0.69, 0.31, 0.0], [0.2, 0.4, 0.4]])
    blend = fit_blend(BlendSettings(weights="1,0", override="b"), "ab", [votes, third], np.zeros(3, np.int64))
    assert blend.override == (1, None)
    assert np.array_equal(blend([votes, third]), [third[0], votes[1], votes[2]])
    # With a weight of its own it is part of what it has to exceed; hard votes are overridden by shares of votes.
    mixed = Blend((0.5, 0.5), "soft", (1, None))([votes, third])
    assert np.array_equal(mixed[0], third[0]) and np.array_equal(mixed[1], third[1])
    assert np.allclose(mixed[2], (votes + third)[2] / 2)  # 0.4 and 0.4: not surer
    hard = Blend((0.5, 0.5), "hard", (1, None))([votes, third])
    assert hard[0].argmax() == 2 and hard[0].max() > 0.99
    assert np.allclose(hard[2], [0, 0.5, 0.5], atol=1e-3)  # 0.4 is less than either's half
    assert np.allclose(hard[1], Blend((0.0, 1.0), "hard")([votes, third])[1])  # 0.69 beats one vote of two


# ---- several heads ----

TASK = Task(
    (
        Head("color", "softmax", ("blue", "green", "red")),
        Head("labels", "sigmoid", ("a", "b")),
        Head("size", "regression", mean=10.0, std=4.0),
    )
)
FIRST = np.array([[0.6, 0.4, 0.0, 0.9, 0.4, 10.0], [0.2, 0.5, 0.3, 0.2, 0.1, 20.0]])
SECOND = np.array([[0.1, 0.8, 0.1, 0.3, 0.45, 14.0], [0.1, 0.6, 0.3, 0.7, 0.95, 12.0]])


def test_each_head_votes_for_itself():
    soft = Blend((0.25, 0.75), "soft", task=TASK)([FIRST, SECOND])
    assert np.allclose(soft, 0.25 * FIRST + 0.75 * SECOND)
    hard = Blend((0.25, 0.75), "hard", task=TASK)([FIRST, SECOND])
    assert np.allclose(hard[:, :3], [[0.25, 0.75, 0], [0, 1, 0]], atol=1e-3)
    assert np.allclose(hard[:, 3:5], [[0.25, 0], [0.75, 0.75]], atol=1e-3)
    assert np.allclose(hard[:, 5], [13.0, 14.0])  # a value has no first choice: the mean
    assert np.allclose(hard[:, :3].sum(axis=1), 1) and hard[:, :5].min() > 0 and hard[:, 3:5].max() < 1


def test_each_head_is_overridden_for_itself():
    plain = Blend((0.25, 0.75), "soft", task=TASK)([FIRST, SECOND])
    sure = Blend((0.25, 0.75), "soft", (0, 0.9), TASK)([FIRST, SECOND])
    expected = plain.copy()
    expected[0, 3], expected[1, 4] = 0.9, 0.1  # a label that surely does not apply is a sure answer too
    assert np.allclose(sure, expected)
    surer = Blend((0.25, 0.75), "soft", (0, None), TASK)([FIRST, SECOND])
    expected = plain.copy()
    expected[0, 3:5] = FIRST[0, 3:5]  # 0.9 against 0.45, 0.4 against 0.4375
    expected[1, 3:5] = FIRST[1, 3:5]  # 0.2 against 0.575, 0.1 against 0.7375
    assert np.allclose(surer, expected)
    both = Blend((0.9, 0.1), "soft", (1, None), TASK)([FIRST, SECOND])
    assert np.array_equal(both[:, :3], SECOND[:, :3])  # 0.8 against 0.55, 0.6 against 0.51
    assert np.allclose(both[:, 5], [10.4, 19.2])


def heads_of(rng, values, skill):
    """Probabilities [N, D] of TASK that are right the more often the larger ``skill`` is."""
    logits = rng.normal(size=(len(values), 6))
    known = ~np.isnan(values[:, 0])
    logits[np.flatnonzero(known), values[known, 0].astype(int)] += skill
    logits[:, 3:5] += skill * (2 * np.nan_to_num(values[:, 1:3], nan=0.5) - 1)
    logits[:, 5] = (values[:, 3] - 10) / 4 + rng.normal(size=len(values)) / (1 + skill)
    return TASK.probabilities(logits)


def known_values(rng, count):
    values = np.column_stack([rng.integers(0, 3, count), rng.integers(0, 2, (count, 2)), rng.normal(10, 4, count)])
    values = values.astype(np.float32)
    values[::7, 0], values[1::5, 2] = np.nan, np.nan
    values[2::6, 1] = 0.7
    return values


def test_weights_of_heads_have_the_least_loss_summed_over_them():
    rng = np.random.default_rng(0)
    values = known_values(rng, 500)
    members = [heads_of(rng, values, 1.6), heads_of(rng, values, 1.5), heads_of(rng, values, 0.0)]
    weights = fit_blend(BlendSettings(), "abc", members, values, task=TASK).weights
    assert sum(weights) == pytest.approx(1.0)
    assert weights[2] < 0.1 < min(weights[:2])
    known = ~np.isnan(values[:, 0])

    def loss(point):
        mixed = np.tensordot(point, np.stack(members), 1)
        color = -np.log(mixed[known, values[known, 0].astype(int)]).sum()
        coins = values[:, 1:3] * np.log(mixed[:, 3:5]) + (1 - values[:, 1:3]) * np.log(1 - mixed[:, 3:5])
        return color - np.nansum(coins)

    grid = [(a, b, 1 - a - b) for a in np.linspace(0, 1, 21) for b in np.linspace(0, 1, 21) if a + b <= 1]
    assert loss(weights) <= min(loss(point) for point in grid) + 1e-4
    scores = fit_blend(BlendSettings(weights="score"), "abc", members, values, task=TASK).weights
    truth, shares = values[:, 1:3], []
    for member in members:
        right = (member[:, :3].argmax(1) == values[:, 0])[known].mean()
        coins = ((member[:, 3:5] >= 0.5) == (truth >= 0.5))[~np.isnan(truth)].mean()
        shares.append((right + coins) / 2)
    assert scores == pytest.approx(np.array(shares) / sum(shares))
    unknown = np.full_like(values, np.nan)
    for settings in (BlendSettings(), BlendSettings(weights="score")):
        assert fit_blend(settings, "abc", members, unknown, task=TASK).weights == pytest.approx([1 / 3] * 3)


def test_weights_of_a_folds_heads_do_not_know_its_labels():
    rng = np.random.default_rng(1)
    values = known_values(rng, 90)
    own = {name: heads_of(rng, values, skill) for name, skill in (("a", 2.0), ("b", 1.0))}
    results = {
        name: [
            dataclasses.replace(fold, log_probs=scores_from(TASK, own[name][fold.fold :: 3]))
            for fold in folds_of(np.full((90, 3), 1 / 3), name)
        ]
        for name in own
    }
    values_of = {f"im{row:03d}": row_values for row, row_values in enumerate(values)}
    settings = BlendSettings(override="b:0.95")
    before = blend_folds(settings, results, values_of, task=TASK)
    flipped = {name: np.append((values_of[name][:3] + 1) % 2, 0.0) for name in results["a"][1].ids.tolist()}
    after = blend_folds(settings, results, values_of | flipped, task=TASK)
    assert np.array_equal(before.folds[1].log_probs[:], after.folds[1].log_probs[:])
    assert before.fold_blends[0].weights != after.fold_blends[0].weights
    expected = before.fold_blends[1]([own["a"][1::3], own["b"][1::3]])
    assert np.allclose(TASK.probabilities(before.folds[1].log_probs[:]), expected, atol=1e-5)
    written = json.loads(json.dumps(before.to_dict(settings, ["a", "b"])))
    assert blend_from_dict(written) == before.overall and before.overall.task == TASK


@pytest.mark.parametrize(
    ("names", "blend", "message"),
    [
        ("a,b", {"weights": "best"}, "expected oof, score, equal, or numbers such as 0.45,0.55"),
        ("a,b", {"weights": "0,0"}, "one of them above 0"),
        ("a,b", {"weights": "0.5,nan"}, "expected numbers of 0 or more"),
        ("a,b", {"weights": "1,1,1"}, "3 numbers for 2 teachers"),
        ("a,b", {"vote": "loud"}, "--teacher-vote loud: expected soft or hard"),
        ("a,b", {"override": "b:"}, "expected NAME, such as swinb, or NAME:THRESHOLD"),
        ("a,b", {"override": ":0.5"}, "expected NAME, such as swinb, or NAME:THRESHOLD"),
        ("a,b", {"override": "b:1.5"}, "or NAME:THRESHOLD with a threshold above 0 to 1"),
        ("a,b", {"override": "c:0.9"}, "c is none of the teachers"),
        ("a,b", {"override": "c"}, "c is none of the teachers"),
        ("a", {"vote": "hard"}, "need several teachers"),
        ("a,a", {}, "--teacher names a twice"),
        ("a,b@x", {}, "expected NAME or NAME@SIZE"),
        (" , ", {}, "expected networks with commas between"),
    ],
)
def test_wrong_combinations_are_usage_errors(names, blend, message):
    with pytest.raises(UsageError, match=message):
        parse_teachers(names, "none", TeacherSettings(), blend=BlendSettings(**blend))


def test_names_sizes_and_weights_are_read():
    first, ensemble = parse_teachers("effb4,swinb@384", "none,auto", TeacherSettings(), blend=BlendSettings())
    assert (first.name, first.weights, first.image_size) == ("effb4", "none", 224)
    (other,) = ensemble.others
    assert (other.label, other.settings.name, other.settings.image_size) == ("swinb-384", "swinb", 384)
    assert ensemble.labels == ("effb4", "swinb-384")


def test_views_are_named_and_each_counted_once():
    assert views_of("") == (View(),)
    assert views_of("flip") == (View(), View(flip=True))
    assert len(views_of("five-crop")) == 6
    assert len(views_of("five-crop,scales")) == 7  # the centre at 8/7 belongs to both
    assert len(views_of("scales, five-crop, flip")) == 14
    with pytest.raises(UsageError, match="--tta ten-crop: unknown; expected flip, five-crop, scales"):
        views_of("flip,ten-crop")
    with pytest.raises(UsageError, match="no flip where training never flips"):
        TeacherSettings(tta="flip", horizontal_flip=False)


@pytest.fixture(scope="module")
def run(photos, tmp_path_factory, cli, tiny_options):
    """Two architectures, one at a size of its own, and a student: trained by the command line."""
    out = tmp_path_factory.mktemp("voting") / "run"
    options = [option.replace("mbv3s050", "mbv3s050,test_efficientnet@40", 1) for option in tiny_options[:2]]
    options += [*tiny_options[2:], "--tta", "flip", "--teacher-override", "test_efficientnet-40:0.99"]
    cli("distill", "--data", photos, "--out", out, *options, "--no-baseline")
    return RunDir(out), ("--data", photos, "--out", out, *options, "--no-baseline", "--resume")


def test_each_architecture_and_their_combination_are_recorded(run):
    folder = run[0]
    quality = read_json(folder.root / "teacher" / "oof.json", format="edgedistill-oof")
    assert [item["label"] for item in quality["architectures"]] == ["mbv3s050", "test_efficientnet-40"]
    assert quality["blend"]["settings"] == {"weights": "oof", "vote": "soft", "override": "test_efficientnet-40:0.99"}
    assert len(quality["blend"]["fold_weights"]) == 2
    assert (folder.teacher(0) / "model.pt").exists()
    assert folder.teacher(1, "test_efficientnet-40") == folder.root / "teacher/test_efficientnet-40/fold-1"
    assert read_model(folder.teacher(1, "test_efficientnet-40") / "model.pt").input_spec.height == 40
    meta = read_json(folder.soft_labels / "meta.json", format="edgedistill-soft-labels")
    assert [(teacher["label"], teacher["fold"]) for teacher in meta["teachers"]] == [
        ("mbv3s050", 0),
        ("mbv3s050", 1),
        ("test_efficientnet-40", 0),
        ("test_efficientnet-40", 1),
    ]
    evaluation = read_json(folder.evaluation / "evaluation.json", format="edgedistill-evaluation")
    assert {"teacher", "teacher-mbv3s050", "teacher-test_efficientnet-40", "student"} <= evaluation["models"].keys()
    own = [np.load(folder.evaluation / f"teacher-{name}.probs.npy") for name in ("mbv3s050", "test_efficientnet-40")]
    assert np.allclose(np.load(folder.evaluation / "teacher.probs.npy"), read_blend(folder)(own), atol=1e-6)
    config = json.loads(folder.config.read_text())
    assert config["settings"]["ensemble"]["others"][0]["settings"]["tta"] == "flip"


def test_the_stored_labels_are_the_blend_of_the_views(run):
    from edgedistill.data.manifest import read_dataset
    from edgedistill.training.soft_labels import read_soft_labels

    folder = run[0]
    dataset = read_dataset(folder.dataset)
    quality = read_json(folder.root / "teacher" / "oof.json", format="edgedistill-oof")
    held_out = np.flatnonzero(dataset.folds == 1)
    members = []
    for label in ("", "test_efficientnet-40"):
        loaded = read_model(folder.teacher(1, label) / "model.pt")
        paths = dataset.paths[held_out]
        members.append(predict_probabilities(loaded.model, paths, loaded.input_spec, views=views_of("flip")))
        plain = predict_probabilities(loaded.model, paths, loaded.input_spec, views=views_of(""))
        assert np.allclose(plain, softmax(predict_logits(loaded.model, paths, loaded.input_spec)), atol=1e-6)
    blend = dataclasses.replace(read_blend(folder), weights=tuple(quality["blend"]["fold_weights"][1]))
    stored = read_soft_labels(folder.soft_labels, dataset)
    assert np.allclose(np.exp(stored[held_out]), blend(members), atol=1e-4)
    train = dataset.rows("train")
    assert quality["all"]["log_loss"] == pytest.approx(log_loss(np.exp(stored[train]), dataset.labels[train]), abs=1e-5)


def test_a_finished_run_resumes_and_other_views_are_refused(run, cli):
    folder, arguments = run
    before = {path: path.stat().st_mtime_ns for path in folder.root.rglob("model.pt")}
    cli("distill", *arguments)
    assert {path: path.stat().st_mtime_ns for path in folder.root.rglob("model.pt")} == before
    result = cli("distill", *arguments, "--tta", "scales", check=False)
    assert result.returncode == 1
    assert "fold.json: made with tta='flip' (now 'scales')" in result.stderr
    page = cli("report", folder.root)
    assert page.returncode == 0
    html = folder.report.read_text(encoding="utf-8")
    assert "Each architecture out of fold" in html
    assert "test_efficientnet-40 fold 1" in html
    assert "could not be understood" not in html


def test_an_unknown_second_teacher_is_told_before_any_work(photos, tmp_path):
    first, ensemble = parse_teachers("mbv3s050,nonsense", "none", TeacherSettings(), blend=BlendSettings())
    data = DataSettings(str(photos), SplitSettings())
    with pytest.raises(UsageError, match="no network called 'nonsense'"):
        teach(TeachSettings(data=data, out=tmp_path / "x", teacher=first, ensemble=ensemble), resume=False)
    assert not (tmp_path / "x").exists()


def test_names_are_checked_without_the_command_line():
    other = NamedTeacher("teacher", TeacherSettings())
    with pytest.raises(UsageError, match="names teacher twice"):
        Ensemble(others=(other,))


def test_evaluation_takes_the_models_own_views(run, tmp_path):
    from edgedistill.data.manifest import read_dataset

    folder = run[0]
    dataset = read_dataset(folder.dataset)
    path = folder.teacher(0) / "model.pt"
    evaluate_test(RunDir(tmp_path), dataset, {"teacher": [path]}, device="cpu")
    loaded = read_model(path)
    paths = dataset.paths[dataset.rows("test")]
    expected = predict_probabilities(loaded.model, paths, loaded.input_spec, views=views_of("flip"))
    assert np.allclose(np.load(tmp_path / "evaluation" / "teacher.probs.npy"), expected, atol=1e-6)


def test_a_combination_is_read_a_few_rows_at_a_time(monkeypatch):
    """Of a million images and a thousand classes nothing may ask for all rows: what is read and fitted comes in blocks."""
    from edgedistill.data import soft_label_store
    from edgedistill.training import soft_labels

    rng = np.random.default_rng(5)
    truth = rng.integers(0, 3, 90)
    results = {name: folds_of(answers(rng, truth, 1.5), name) for name in "ab"}
    label_of = {f"im{row:03d}": int(label) for row, label in enumerate(truth)}
    whole = blend_folds(BlendSettings(override="b:0.9"), results, label_of)
    asked = []

    class Told:
        """A table that tells how much is read of it."""

        def __init__(self, table):
            self.table, self.shape = table, table.shape

        def __len__(self):
            return len(self.table)

        def __getitem__(self, rows):
            found = self.table[rows]
            asked.append(len(found))
            return found

    told = {
        name: [dataclasses.replace(fold, log_probs=Told(fold.log_probs)) for fold in folds]
        for name, folds in results.items()
    }
    monkeypatch.setattr(soft_label_store, "BLOCK_VALUES", 12)
    monkeypatch.setattr(soft_labels, "BLOCK_ROWS", 4)
    blended = blend_folds(BlendSettings(override="b:0.9"), told, label_of)
    assert blended.overall == whole.overall and blended.fold_blends == whole.fold_blends
    order = np.concatenate([np.flatnonzero(np.arange(90) % 3 == fold) for fold in range(3)]).argsort()
    blocks = list(soft_labels._gathered([fold.log_probs for fold in blended.folds], order))
    expected = np.concatenate([fold.log_probs[:] for fold in whole.folds])[order]
    assert np.allclose(np.concatenate(blocks), expected, atol=1e-6) and max(asked) <= 4
