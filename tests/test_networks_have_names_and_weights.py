"""Any timm network by its short name, its own input spec, and weights that fit or are refused by name."""

import pickle
import time

import huggingface_hub
import pytest
import safetensors.torch
import torch
from sklearn.datasets import load_sample_images

from edgedistill.errors import ModelError, UsageError
from edgedistill.training import models
from edgedistill.training.models import Weights, create_model, input_spec_for, load_weights, locate_weights

TINY = "test_efficientnet"


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_every_short_name_is_a_network():
    timm = models.import_timm()
    assert all(timm.is_model(models.resolve_name(short)) for short in models.SHORT_NAMES)
    assert models.resolve_name("mbv3s") == "mobilenetv3_small_100"
    assert models.resolve_name("resnet34") == "resnet34"


def test_an_unknown_name_gets_close_matches():
    with pytest.raises(UsageError, match=r"did you mean .*mobilenetv3_small_100"):
        models.resolve_name("mobilenet_v3_smal")
    with pytest.raises(UsageError, match="short names: effb0"):
        models.resolve_name("zzzqqq")


def test_each_network_keeps_its_own_mean_and_deviation():
    assert input_spec_for("mbv3s", 96).mean == pytest.approx((123.675, 116.28, 103.53))
    lite = input_spec_for("efflite0", 160)
    assert lite.mean == lite.std == (127.5, 127.5, 127.5)
    assert (lite.height, lite.width) == (160, 160)


def test_an_unreachable_hub_costs_one_warning_and_no_time(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "https://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    start = time.monotonic()
    assert locate_weights("mbv3s", "auto", flag="--student-weights") is None
    assert time.monotonic() - start < 10
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert "warning" in lines[0]
    assert "--student-weights FILE" in lines[0]
    assert "random initialisation" in lines[0]


def test_none_and_missing_files_are_what_they_say(capsys):
    assert locate_weights("mbv3s", "none", flag="--student-weights") is None
    assert capsys.readouterr().err == ""
    with pytest.raises(UsageError, match=r"--student-weights nowhere.pth: no such file"):
        locate_weights("mbv3s", "nowhere.pth", flag="--student-weights")
    with pytest.raises(ModelError, match="holds tf_efficientnet_lite0, not mobilenetv3_small_100"):
        locate_weights("mbv3s", "packaged:efficientnet_lite0", flag="--student-weights")
    with pytest.raises(UsageError, match="known: efficientnet_lite0, efficientnet_lite1, efficientnet_lite2"):
        locate_weights("efflite0", "packaged:nothing", flag="--teacher-weights")


@pytest.mark.parametrize(("name", "tensors"), [("lite0", 296), ("lite1", 386), ("lite2", 386)])
def test_packaged_weights_fill_every_tensor_in_order(name, tensors):
    weights = locate_weights(f"eff{name}", f"packaged:efficientnet_{name}", flag="--teacher-weights")
    saved = list(torch.load(weights.path, weights_only=True).values())
    network = create_model(f"eff{name}", class_count=1000, pretrained=weights)
    whole = network.state_dict()
    assert len(whole) == len(saved) == tensors
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(whole.values(), saved, strict=True))
    temple = load_sample_images().images[0][:, 106:533]  # a Chinese one, 427 x 427
    with torch.inference_mode():
        seen = network.eval()((torch.tensor(temple).permute(2, 0, 1)[None] / 255 - 0.5) / 0.5)
    assert seen.argmax().item() == 698  # ImageNet's palace
    two = create_model(f"eff{name}", class_count=2, pretrained=weights).state_dict()
    different = [name for name in two if not torch.equal(two[name], whole[name])]
    assert different == ["classifier.weight", "classifier.bias"]


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_state_dict_file_fits_and_only_the_classifier_may_differ(tmp_path, suffix):
    source = create_model(TINY, class_count=5)
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pth":
        torch.save({"state_dict": {f"module.{key}": value for key, value in source.state_dict().items()}}, path)
    else:
        safetensors.torch.save_file({key: value.contiguous() for key, value in source.state_dict().items()}, path)
    same = create_model(TINY, class_count=5, pretrained=path).state_dict()
    assert all(torch.equal(same[key], value) for key, value in source.state_dict().items())
    other = create_model(TINY, class_count=3, pretrained=path).state_dict()
    assert other["classifier.weight"].shape[0] == 3
    assert torch.equal(other["conv_stem.weight"], source.state_dict()["conv_stem.weight"])
    with pytest.raises(ModelError, match=r"classifier.weight has shape \(5, 256\), expected \(3, 256\)"):
        load_weights(create_model(TINY, class_count=3), TINY, Weights(path), replace_classifier=False)


def test_weights_of_another_network_are_refused_by_tensor(tmp_path):
    path = tmp_path / "weights.pth"
    torch.save(create_model("test_byobnet", class_count=2).state_dict(), path)
    with pytest.raises(ModelError, match=r"not the weights of test_efficientnet: conv_stem.weight is missing.*more"):
        create_model(TINY, class_count=2, pretrained=path)


def test_a_pickle_is_refused_and_not_executed(tmp_path):
    witness = tmp_path / "executed"

    class Hostile:
        def __reduce__(self):
            return open, (str(witness), "w")

    path = tmp_path / "weights.pth"
    torch.save({"state_dict": Hostile()}, path)
    plain = tmp_path / "plain.pth"
    plain.write_bytes(pickle.dumps(Hostile()))
    truncated = tmp_path / "truncated.pth"
    truncated.write_bytes(path.read_bytes()[:200])
    for file in (path, plain, truncated):
        with pytest.raises(ModelError, match=file.name):
            create_model(TINY, class_count=2, pretrained=file)
    assert not witness.exists()


def test_a_network_of_fixed_size_is_built_for_the_size_asked():
    kwargs = models.model_kwargs_for("swint", class_count=4, image_size=96, drop_path_rate=0.1)
    assert kwargs == {"num_classes": 4, "drop_path_rate": 0.1, "img_size": 96}
    assert "img_size" not in models.model_kwargs_for("mbv3s", class_count=4, image_size=96)
