"""Every metric equals the reference library's, and intervals mean what they say."""

import math

import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from scipy.stats import binomtest, bootstrap
from sklearn import metrics as reference

from edgedistill import metrics
from edgedistill.errors import DataError


@pytest.fixture(params=[(2, 40, 0), (7, 500, 1), (30, 60, 2)], ids=lambda p: f"{p[0]} classes, {p[1]} images")
def case(request):
    classes, count, seed = request.param
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, count).astype(np.int32)
    logits = rng.normal(size=(count, classes)).astype(np.float32)
    logits[np.arange(count), labels] += 1.0
    return metrics.softmax(logits).astype(np.float32), labels, logits


def test_point_metrics_equal_sklearn(case):
    probabilities, labels, _ = case
    answers = probabilities.argmax(axis=1)
    every = list(range(probabilities.shape[1]))
    assert metrics.accuracy(probabilities, labels) == pytest.approx(reference.accuracy_score(labels, answers))
    expected = reference.f1_score(labels, answers, average="macro", zero_division=0)
    assert metrics.macro_f1(probabilities, labels) == pytest.approx(expected)
    rows = probabilities.astype(np.float64)
    rows /= rows.sum(axis=1, keepdims=True)
    assert metrics.log_loss(rows, labels) == pytest.approx(reference.log_loss(labels, rows, labels=every), abs=1e-12)
    expected = reference.confusion_matrix(labels, answers, labels=every)
    assert (metrics.confusion_matrix(probabilities, labels) == expected).all()


def test_rows_judged_in_parts_are_judged_as_a_whole(case):
    probabilities, labels, _ = case
    parts = [
        metrics.Judged.of(probabilities[rows], labels[rows]) for rows in (slice(0, 11), slice(11, 12), slice(12, 60))
    ]
    parts += [metrics.Judged.of(probabilities[60:], labels[60:])] if len(labels) > 60 else []
    whole = metrics.Judged.join(parts)
    assert whole.accuracy == metrics.accuracy(probabilities, labels)
    assert whole.macro_f1 == metrics.macro_f1(probabilities, labels)
    assert whole.log_loss == metrics.log_loss(probabilities, labels)
    assert whole.calibration_error() == metrics.expected_calibration_error(probabilities, labels)


def test_a_class_that_never_occurs_is_left_out_and_one_that_is_only_predicted_counts_zero():
    eye = np.eye(4)
    labels = np.array([0, 0, 1, 1])
    assert metrics.macro_f1(eye[[0, 0, 1, 1]], labels) == 1.0
    answers = np.array([0, 0, 1, 3])
    expected = reference.f1_score(labels, answers, average="macro", zero_division=0)
    assert metrics.macro_f1(eye[answers], labels) == pytest.approx(expected)


def test_log_loss_of_a_certain_and_wrong_answer_is_finite_as_in_sklearn():
    rows = np.array([[1.0, 0.0], [0.0, 1.0]])
    labels = np.array([1, 1])
    assert metrics.log_loss(rows, labels) == pytest.approx(reference.log_loss(labels, rows, labels=[0, 1]))


def test_calibration_error_equals_its_definition_bin_by_bin(case):
    probabilities, labels, _ = case
    confidence, answers = probabilities.max(axis=1).astype(float), probabilities.argmax(axis=1)
    total = 0.0
    for index in range(15):
        inside = (confidence > index / 15) & (confidence <= (index + 1) / 15)
        if inside.any():
            gap = abs((answers[inside] == labels[inside]).mean() - confidence[inside].mean())
            total += gap * inside.mean()
    assert metrics.expected_calibration_error(probabilities, labels) == pytest.approx(total)
    sure = np.eye(probabilities.shape[1])[labels]
    assert metrics.expected_calibration_error(sure, labels) == 0.0


def test_accuracy_interval_agrees_with_scipy_and_repeats_with_its_seed(case):
    probabilities, labels, _ = case
    hit = (probabilities.argmax(axis=1) == labels).astype(float)
    expected = bootstrap((hit,), np.mean, method="percentile", n_resamples=4000, rng=np.random.default_rng(5))
    low, high = metrics.bootstrap_interval("accuracy", probabilities, labels)
    step = 1.01 / len(labels)  # an accuracy moves in steps of one image
    assert low == pytest.approx(expected.confidence_interval.low, abs=max(0.01, step))
    assert high == pytest.approx(expected.confidence_interval.high, abs=max(0.01, step))
    assert (low, high) == metrics.bootstrap_interval("accuracy", probabilities, labels)


def test_every_macro_f1_resample_equals_sklearn_on_that_resample(case, monkeypatch):
    probabilities, labels, _ = case
    monkeypatch.setattr(metrics, "BLOCK", 3 * len(labels))  # several blocks
    answers = probabilities.argmax(axis=1)
    rng = np.random.default_rng(9)
    blocks = [rng.integers(0, len(labels), size=(min(3, 20 - start), len(labels))) for start in range(0, 20, 3)]
    expected = [
        reference.f1_score(labels[rows], answers[rows], average="macro", zero_division=0)
        for block in blocks
        for rows in block
    ]
    interval = metrics.bootstrap_interval("macro_f1", probabilities, labels, resamples=20, seed=9)
    assert interval == pytest.approx(tuple(np.quantile(expected, [0.025, 0.975])))


def test_paired_difference_has_the_sign_of_the_better_model_and_a_narrower_interval_than_unpaired(case):
    probabilities, labels, logits = case
    worse = logits.copy()
    worse[::4] = -worse[::4]
    worse_probabilities = metrics.softmax(worse)
    result = metrics.paired_bootstrap_difference("accuracy", probabilities, worse_probabilities, labels)
    both = metrics.accuracy(probabilities, labels) - metrics.accuracy(worse_probabilities, labels)
    assert result.difference == pytest.approx(both)
    assert result.ci95[0] <= result.difference <= result.ci95[1]
    same = metrics.paired_bootstrap_difference("macro_f1", probabilities, probabilities, labels)
    assert (same.difference, same.ci95, same.p_value) == (0.0, (0.0, 0.0), None)
    swapped = metrics.paired_bootstrap_difference("accuracy", worse_probabilities, probabilities, labels)
    assert swapped.difference == -result.difference
    assert swapped.p_value == result.p_value


@pytest.mark.parametrize(("only_a", "only_b"), [(0, 0), (3, 0), (5, 5), (12, 4), (700, 600), (3000, 2000)])
def test_mcnemar_equals_the_exact_binomial_test(only_a, only_b):
    eye = np.eye(2)
    labels = np.zeros(only_a + only_b + 10, np.int64)
    a, b = np.zeros(len(labels), int), np.zeros(len(labels), int)
    b[:only_a] = 1
    a[only_a : only_a + only_b] = 1
    expected = binomtest(only_a, only_a + only_b).pvalue if only_a + only_b else 1.0
    assert metrics.mcnemar_exact(eye[a], eye[b], labels) == pytest.approx(expected, rel=1e-9)


def test_temperature_is_the_minimum_that_scipy_finds(case):
    _, labels, logits = case
    wild = logits * 5

    def loss(log_t: float) -> float:
        return metrics.log_loss(metrics.softmax(wild, math.exp(log_t)), labels)

    bounds = tuple(math.log(bound) for bound in metrics.TEMPERATURE_BOUNDS)
    expected = minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": 1e-8})
    found = metrics.fit_temperature(wild, labels)
    assert found == pytest.approx(math.exp(expected.x), rel=1e-3)
    assert metrics.log_loss(metrics.softmax(wild, found), labels) < metrics.log_loss(metrics.softmax(wild), labels)


def test_temperature_stays_in_its_bounds_where_the_loss_has_no_minimum():
    low, high = metrics.TEMPERATURE_BOUNDS
    separated = np.eye(3)[[0, 1, 2, 0]] * 4
    assert metrics.fit_temperature(separated, np.array([0, 1, 2, 0])) == pytest.approx(low, rel=1e-4)
    assert metrics.fit_temperature(separated, np.array([1, 2, 0, 1])) == pytest.approx(high, rel=1e-4)


@pytest.mark.parametrize(
    ("scores", "labels", "message"),
    [
        (np.ones((3, 2)), np.array([0, 1]), "expected"),
        (np.ones((2, 2)), np.array([0, 2]), "0..1"),
        (np.ones((2, 2)), np.array([0.0, 1.0]), "integers"),
        (np.array([[0.5, np.nan], [1.0, 0.0]]), np.array([0, 1]), "row 0 are not finite"),
        (np.ones((0, 2)), np.array([], int), "N above 0"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(scores, labels, message):
    with pytest.raises(DataError, match=message):
        metrics.accuracy(scores, labels)
