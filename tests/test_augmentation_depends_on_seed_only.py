"""An augmented image is a function of the image and the seed: no process, thread or order of calls changes it."""

import hashlib
import multiprocessing
import pickle
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import pytest

from edgedistill.data.augment import Augment, AugmentSettings
from edgedistill.errors import ImageError, UsageError

RECIPES = {
    "none": AugmentSettings(strength="none"),
    "light": AugmentSettings(),
    "any way up": AugmentSettings(any_way_up=True),
    "jitter": AugmentSettings(color_jitter=0.3),
    "standard": AugmentSettings(strength="standard", any_way_up=True),
    "autoaugment": AugmentSettings(auto_augment="autoaugment"),
    "randaugment": AugmentSettings(auto_augment="randaugment", grayscale=0.5),
    "augmix": AugmentSettings(auto_augment="augmix-m5-w2-d2", cutout=0.5),
    "erasing": AugmentSettings(gridmask=0.5, cutout=0.5, coarse_dropout=0.5),
}


@pytest.fixture
def image():
    small = np.random.default_rng(0).integers(0, 255, (9, 11, 3), dtype=np.uint8)
    return cv2.resize(small, (74, 72), interpolation=cv2.INTER_CUBIC)


def digest(image: np.ndarray) -> str:
    return hashlib.sha256(image.tobytes()).hexdigest()


def augmented(augment: Augment, image: np.ndarray, seeds: range) -> list[str]:
    return [digest(augment(image, seed)) for seed in seeds]


@pytest.mark.parametrize("name", RECIPES)
def test_order_threads_pickles_and_processes_change_nothing(name, image):
    augment = Augment(RECIPES[name], 64, 64)
    expected = augmented(augment, image, range(24))
    assert augmented(augment, image, range(23, -1, -1)) == expected[::-1]
    assert augmented(Augment(RECIPES[name], 64, 64), image, range(24)) == expected
    assert augmented(pickle.loads(pickle.dumps(augment)), image, range(24)) == expected
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda seed: digest(augment(image, seed)), range(24))) == expected
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=lambda: sender.send(augmented(augment, image, range(24))))
    child.start()
    assert receiver.poll(60)
    assert receiver.recv() == expected
    child.join()
    assert len(set(expected)) == 1 if name == "none" else len(set(expected)) > 15


@pytest.mark.parametrize("name", RECIPES)
def test_what_comes_out_is_a_contiguous_copy_of_the_size_asked_for(name, image):
    before = image.copy()
    for height, width in ((64, 64), (40, 70), (72, 74)):
        result = Augment(RECIPES[name], height, width)(image, 3)
        assert (result.shape, result.dtype, result.flags["C_CONTIGUOUS"]) == ((height, width, 3), np.uint8, True)
        result[:] = 0
        assert (image == before).all()


def test_the_contest_recipe_is_a_crop_that_is_mirrored_half_of_the_time(image):
    augment = Augment(AugmentSettings(crop_min=0.875, crop_max=0.875), 63, 65)
    crops = {image[y : y + 63, x : x + 65].tobytes(): False for y in range(10) for x in range(10)}
    crops |= {image[y : y + 63, x : x + 65][:, ::-1].tobytes(): True for y in range(10) for x in range(10)}
    mirrored = [crops[augment(image, seed).tobytes()] for seed in range(1000)]
    assert 0.44 < np.mean(mirrored) < 0.56
    assert len({augment(image, seed).tobytes() for seed in range(1000)}) > 0.98 * len(crops)
    plain = Augment(AugmentSettings(crop_min=0.875, crop_max=0.875, horizontal_flip=False), 63, 65)
    assert not any(crops[plain(image, seed).tobytes()] for seed in range(100))


def test_crops_keep_seven_eighths_to_all_of_the_image_at_the_size_at_which_it_will_be_seen():
    ramp = np.repeat(np.linspace(0, 250, 256).astype(np.uint8)[None, :, None], 256, axis=0).repeat(3, axis=2)
    augment = Augment(AugmentSettings(horizontal_flip=False), 224, 224)
    kept = np.array([np.ptp(augment(ramp, seed).astype(float)) / 250 for seed in range(400)])
    assert 0.86 < kept.min() < 0.885
    assert 0.985 < kept.max() <= 1.0
    assert 0.93 < kept.mean() < 0.945
    lefts = [int(augment(ramp, seed).min()) for seed in range(400)]
    assert min(lefts) == 0 and max(lefts) > 20


def test_a_subject_without_an_up_side_is_seen_all_eight_ways_and_only_as_rotations_without_the_flip():
    image = np.arange(64 * 64 * 3, dtype=np.uint32).astype(np.uint8).reshape(64, 64, 3)
    turned = [np.rot90(image, turns) for turns in range(4)]
    rotations = {np.ascontiguousarray(view).tobytes() for view in turned}
    both = rotations | {np.ascontiguousarray(view[:, ::-1]).tobytes() for view in turned}
    seen = {Augment(AugmentSettings(any_way_up=True, crop_min=1), 64, 64)(image, seed).tobytes() for seed in range(200)}
    assert seen == both
    rigid = AugmentSettings(any_way_up=True, horizontal_flip=False, crop_min=1)
    assert {Augment(rigid, 64, 64)(image, seed).tobytes() for seed in range(200)} == rotations


def test_none_shows_the_whole_image(image):
    result = Augment(AugmentSettings(strength="none"), 36, 37)(image, 5)
    assert (result == cv2.resize(image, (37, 36), interpolation=cv2.INTER_LINEAR)).all()


def test_color_jitter_leaves_grey_images_grey():
    grey = np.repeat(np.random.default_rng(0).integers(0, 255, (64, 64, 1), dtype=np.uint8), 3, axis=2)
    augment = Augment(AugmentSettings(strength="standard", color_jitter=0.5), 64, 64)
    results = [augment(grey, seed) for seed in range(20)]
    assert all(np.ptp(result.astype(int), axis=2).max() <= 2 for result in results)
    assert len({digest(result) for result in results}) > 10


def test_an_image_that_is_too_small_and_settings_out_of_range_are_refused(image):
    with pytest.raises(ImageError, match="prepare it at 256/224"):
        Augment(AugmentSettings(), 80, 64)(image, 0)
    with pytest.raises(ImageError, match="float32"):
        Augment(AugmentSettings(), 64, 64)(image.astype(np.float32), 0)
    with pytest.raises(UsageError, match="strength 'heavy'"):
        AugmentSettings(strength="heavy")
    for least, most in ((0.0, 1.0), (0.9, 0.8), (0.9, 1.1), (float("nan"), 1.0)):
        with pytest.raises(UsageError, match="expected 0 < crop_min <= crop_max <= 1"):
            AugmentSettings(crop_min=least, crop_max=most)
    with pytest.raises(UsageError, match="color jitter 2"):
        AugmentSettings(color_jitter=2.0)


def test_erasing_covers_what_it_says_and_leaves_the_rest_alone():
    image = np.full((64, 64, 3), 7, np.uint8)
    areas = {"gridmask": (0.1, 0.45), "cutout": (0.05, 0.26), "coarse_dropout": (0.003, 0.13)}
    for name, (least, most) in areas.items():
        always = Augment(AugmentSettings(strength="none", **{name: 1.0}), 64, 64)
        erased = [always(image, seed) for seed in range(60)]
        for result in erased:
            changed = (result != 7).any(axis=2)
            assert least <= changed.mean() <= most, name
            assert (result[changed] == (104, 116, 124)).all()
        assert len({result.tobytes() for result in erased}) > 40
        half = Augment(AugmentSettings(strength="none", **{name: 0.5}), 64, 64)
        assert 0.4 < np.mean([(half(image, seed) != 7).any() for seed in range(300)]) < 0.6


def test_grey_images_have_three_equal_channels(image):
    grey = Augment(AugmentSettings(strength="none", grayscale=1.0), 72, 74)(image, 0)
    assert (grey[..., 0] == grey[..., 1]).all() and (grey[..., 0] == grey[..., 2]).all()
    assert np.abs(grey[..., 0].astype(int) - cv2.cvtColor(image, cv2.COLOR_BGR2GRAY)).max() == 0


def test_policies_leave_the_chance_of_others_alone(image):
    import random

    policy = Augment(AugmentSettings(auto_augment="augmix"), 64, 64)
    random.seed(5)
    np.random.seed(5)  # noqa: NPY002
    expected = random.random(), np.random.random()  # noqa: NPY002
    random.seed(5)
    np.random.seed(5)  # noqa: NPY002
    policy(image, 1)
    assert (random.random(), np.random.random()) == expected  # noqa: NPY002


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"auto_augment": "wild"}, "auto_augment 'wild': expected none, autoaugment, randaugment, augmix"),
        ({"auto_augment": "rand-q7"}, "auto_augment 'rand-q7'"),
        ({"gridmask": 1.5}, "gridmask 1.5, expected a probability"),
        ({"grayscale": -0.1}, "grayscale -0.1"),
    ],
)
def test_extras_that_cannot_be_are_refused(wrong, message):
    with pytest.raises(UsageError, match=message):
        AugmentSettings(**wrong)
