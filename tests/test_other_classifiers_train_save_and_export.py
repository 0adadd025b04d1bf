"""GeM, an extra layer, dropout samples, cosines and our own networks: trained, saved, read back, exported alike."""

import math

import numpy as np
import openvino as ov
import pytest
import torch
import torch.nn.functional as F

from edgedistill.errors import ArtifactError, ModelError, UsageError
from edgedistill.export import ir
from edgedistill.export.fusion import fuse
from edgedistill.export.network import load_network
from edgedistill.export.onnx_file import write_onnx
from edgedistill.images import InputSpec
from edgedistill.teacher import TeacherSettings
from edgedistill.timm_import import import_timm
from edgedistill.training.checkpoints import read_model, write_model
from edgedistill.training.classifier import ClassifierSettings, GeM, classifier_of, equip
from edgedistill.training.models import SHORT_NAMES, create_model, input_spec_for, model_kwargs_for, resolve_name

SETTINGS = {
    "gem": ClassifierSettings(pool="gem"),
    "layer": ClassifierSettings(hidden_units=24, dropout=0.7),
    "samples": ClassifierSettings(dropout=0.5, dropout_samples=4),
    "cosine": ClassifierSettings(classifier="cosine"),
    "all": ClassifierSettings("gem", 16, 0.3, 3, "cosine"),
}


@pytest.fixture(autouse=True)
def seeded():
    torch.set_num_threads(1)
    torch.manual_seed(0)


def save(path, model, name, classifier, *, size=32):
    network = {"class_count": 3, "image_size": size, "classifier": classifier}
    write_model(
        path,
        model,
        architecture=resolve_name(name),
        model_kwargs=model_kwargs_for(name, **network),
        classes=("a", "b", "c"),
        input_spec=InputSpec(size, size),
        dataset_hash="",
        settings={},
    )


@pytest.mark.parametrize("kind", SETTINGS)
@pytest.mark.parametrize("name", ["mbv3s050", "test_resnet", "shufflenetv2_050"])
def test_what_was_written_is_read_back_with_its_logits(name, kind, tmp_path):
    model = create_model(name, class_count=3, classifier=SETTINGS[kind]).eval()
    images = torch.randn(2, 3, 32, 32)
    save(tmp_path / "model.pt", model, name, SETTINGS[kind])
    loaded = read_model(tmp_path / "model.pt")
    assert classifier_of(loaded.model) == SETTINGS[kind]
    with torch.no_grad():
        assert torch.equal(loaded.model(images), model(images))
    saved = torch.load(tmp_path / "model.pt", weights_only=True)
    by_hand = import_timm().create_model(saved["architecture"], **saved["model_kwargs"])
    equip(by_hand, ClassifierSettings(**saved["classifier"]))
    by_hand.load_state_dict(saved["state_dict"])


def test_a_plain_model_stays_plain_and_a_strange_classifier_is_refused(tmp_path):
    save(tmp_path / "plain.pt", create_model("test_resnet", class_count=3), "test_resnet", ClassifierSettings())
    saved = torch.load(tmp_path / "plain.pt", weights_only=True)
    assert "classifier" not in saved
    for change, message in (
        ({"future": 1}, "unknown future"),
        ({"pool": "max"}, "pool='max', expected avg or gem"),
        ({"hidden_units": -3}, "hidden_units=-3"),
        ({"pool": "gem"}, "weights and its architecture do not fit"),
    ):
        torch.save(saved | {"classifier": change}, tmp_path / "strange.pt")
        with pytest.raises(ArtifactError, match=message):
            read_model(tmp_path / "strange.pt")


@pytest.mark.parametrize(
    ("name", "kind"), [("mbv3s050", "gem"), ("mbv3s050", "all"), ("fcanet18", "gem"), ("shufflenetv2_050", "gem")]
)
def test_fusion_and_openvino_keep_every_logit(name, kind, tmp_path):
    model = create_model(name, class_count=3, classifier=SETTINGS[kind])
    for _ in range(3):  # statistics and weights that are not those of a fresh network
        model.train()(torch.randn(8, 3, 64, 64))
    for parameter in model.parameters():
        parameter.data.add_(0.02 * torch.randn_like(parameter))
    save(tmp_path / "model.pt", model.eval(), name, SETTINGS[kind], size=64)
    network = load_network(tmp_path / "model.pt", image_size=None)
    images = np.random.default_rng(0).standard_normal((4, 3, 64, 64), dtype=np.float32)
    with torch.no_grad():
        expected = model(torch.from_numpy(images)).numpy()
    fused, _ = fuse(network.module, images, image_kind="random")
    write_onnx(fused, tmp_path / "model.onnx", network)
    converted, _ = ir.convert(fused, network.spec, onnx_file=tmp_path / "model.onnx")
    sources = [converted, *([ov.Core().read_model(tmp_path / "model.onnx")] if kind == "all" else [])]
    for source in sources:
        compiled = ov.compile_model(source, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        answers = np.concatenate([compiled(image[None])[0] for image in images])
        assert np.abs(answers - expected).max() < 1e-3 * max(1.0, np.abs(expected).max())


def test_gem_is_its_formula_in_both_layouts():
    x = torch.rand(2, 5, 4, 3)
    gem = GeM(flatten=True)
    assert torch.allclose(gem(x), (x**3).mean((2, 3)) ** (1 / 3), atol=1e-6)
    gem.exponent.data.fill_(1.0)
    assert torch.allclose(gem(x), x.mean((2, 3)), atol=1e-6)
    last = GeM(flatten=False, channels_last=True)
    assert last(x).shape == (2, 1, 1, 3)
    last(x).sum().backward()
    assert last.exponent.grad is not None and last.exponent.grad.item() != 0


def test_gem_fits_networks_of_every_kind():
    for name in ("test_efficientnet", "test_byobnet", "test_convnext", "swint"):
        model = create_model(name, class_count=3, image_size=64, classifier=SETTINGS["gem"]).eval()
        assert any(isinstance(module, GeM) for module in model.modules())
        assert model(torch.randn(1, 3, 64, 64)).shape == (1, 3), name
    with pytest.raises(ModelError, match="no global average pooling that GeM could replace; use --pool avg"):
        create_model("test_vit", class_count=3, image_size=160, classifier=SETTINGS["gem"])


@torch.no_grad()
def test_samples_are_averaged_and_nothing_is_dropped_in_the_end():
    model = create_model("test_resnet", class_count=3, classifier=SETTINGS["samples"])
    head = model.get_classifier()
    head.final.weight.data.normal_()
    features = torch.randn(1, head.final.in_features)
    one = ClassifierSettings(dropout=0.5)
    single = create_model("test_resnet", class_count=3, classifier=one).get_classifier()
    single.load_state_dict(head.state_dict())
    spread = {name: torch.stack([h.train()(features) for _ in range(400)]).var(0).mean() for name, h in
              (("four", head), ("one", single))}  # fmt: skip
    assert spread["one"] / spread["four"] == pytest.approx(4, rel=0.4)
    assert torch.equal(head.eval()(features), head.final(features))


def test_cosines_are_scaled_and_blind_to_length():
    head = create_model("test_resnet", class_count=3, classifier=SETTINGS["cosine"]).get_classifier().eval()
    features = torch.randn(4, head.final.in_features)
    expected = 30 * F.cosine_similarity(features[:, None], head.final.weight[None], dim=2)
    assert torch.allclose(head(features), expected, atol=1e-4)
    assert torch.allclose(head(5 * features), expected, atol=1e-4)


def test_frequency_zero_is_the_mean_and_frequencies_are_orthogonal():
    from edgedistill.training.networks import FREQUENCIES, FrequencyAttention, dct_filters

    filters = dct_filters(7, 7, 16)
    assert torch.allclose(filters[0], torch.full((7, 7), 1 / 7))
    assert torch.allclose(filters.flatten(1) @ filters.flatten(1).T, torch.eye(16), atol=1e-5)
    v, u = FREQUENCIES[6]
    wide = dct_filters(14, 28, 32)[13]
    value = math.cos(math.pi * v * 3.5 / 7) * math.cos(math.pi * u * 5.5 / 7) * 2 / math.sqrt(14 * 28)
    assert wide[3, 5].item() == pytest.approx(value, abs=1e-6)
    x = torch.randn(2, 32, 5, 9)
    attention = FrequencyAttention(32)
    squeezed = (x * dct_filters(5, 9, 32)).sum((2, 3))
    gate = torch.sigmoid(attention.fc2(F.relu(attention.fc1(squeezed))))
    assert torch.allclose(attention(x), x * gate[:, :, None, None])
    model = create_model("fcanet18", class_count=2)
    assert sum(isinstance(module, FrequencyAttention) for module in model.modules()) == 8


def test_shufflenet_is_torchvisions():
    import_timm()
    from torchvision.models import shufflenet_v2_x0_5

    theirs = shufflenet_v2_x0_5(num_classes=3).eval()
    ours = create_model("shufflenetv2_050", class_count=3).eval()
    ours.load_state_dict(theirs.state_dict())
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.allclose(ours(images), theirs(images), atol=1e-5)


def test_every_short_name_is_known_and_has_an_input_spec():
    for short in SHORT_NAMES:
        assert import_timm().is_model(resolve_name(short)), short
        assert input_spec_for(short, 64).height == 64
    systems = "effb4 effb1 effb7 effb3 seresnext50 densenet121 mbv3s mbv3l ghostnet shufflenetv2 inceptionresnet swinb"
    more = "effv2s resnext101x4 fcanet50 hrnet cspdarknet inception"
    assert set(f"{systems} {more}".split()) <= SHORT_NAMES.keys()


def test_settings_hand_the_classifier_on_and_name_their_own_fields():
    settings = TeacherSettings(pool="gem", hidden_units=8, classifier_dropout=0.7, dropout_samples=2)
    assert settings.network(3)["classifier"] == ClassifierSettings("gem", 8, 0.7, 2)
    with pytest.raises(UsageError, match="classifier_dropout=1, expected 0 to less than 1"):
        TeacherSettings(classifier_dropout=1)
    with pytest.raises(UsageError, match="repeats one answer; give --teacher-classifier-dropout"):
        TeacherSettings(dropout_samples=2)
