"""FixRes: a network trained at one resolution looks at images at a higher one (Touvron et al., 1906.06423).

Random crops show training objects larger than the deployed picture does; at a higher resolution they have the size that
the network knows. What the change does to the statistics before the pooling is mended by a short fine-tuning of the
classifier and the last batch-norm on the deployable pictures themselves.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from edgedistill.data.augment import Augment, AugmentSettings
from edgedistill.errors import ModelError, UsageError
from edgedistill.images import InputSpec
from edgedistill.training.loader import open_store
from edgedistill.training.loop import Job, train
from edgedistill.training.models import all_networks, resolve_name
from edgedistill.training.optimizers import Phase
from edgedistill.training.predict import BATCH_NORM_IMAGES, reestimate_batch_norm
from edgedistill.training.processes import on_main
from edgedistill.training.settings import TrainSettings

RATE = 0.1  # of the training's peak: only the last layers move, and not far


def deployed_spec(settings: TrainSettings, spec: InputSpec) -> InputSpec:
    """``spec`` at the resolution at which the network is evaluated and exported.

    Raises UsageError for a ``test_size`` of a network that is built for one resolution.
    """
    if settings.test_size is None:
        return spec
    config = all_networks().get_pretrained_cfg(resolve_name(settings.name))
    if config is not None and config.fixed_input_size:
        text = (
            f"--test-size {settings.test_size}: {settings.name} is built for the size that it trains at; choose a "
            "convolutional network, or train at that size"
        )
        raise UsageError(settings.in_own_flags(text))
    return spec.resized(settings.test_size)


def adapt(job: Job, model: nn.Module, *, resume: bool) -> nn.Module:
    """``model`` after its training by ``job``, fine-tuned at ``test_size`` for ``fixres_epochs``; unchanged without it.

    Batch-norm statistics are measured anew at that resolution first; then the classifier and the last batch-norm learn,
    on whole pictures without augmentation, and all else stands still. Work in progress lies in fixres/ of the job's
    folder. Raises what ``train`` raises.
    """
    settings = job.settings
    spec = deployed_spec(settings, job.spec)
    if settings.test_size is None:
        return model
    draw = job.phases[0].draw
    paths = job.store.paths[draw.rows]
    on_main(
        lambda: reestimate_batch_norm(
            model, paths, spec, batch_size=settings.batch_size, limit=BATCH_NORM_IMAGES, seed=settings.seed
        )
    )
    if not settings.fixres_epochs:
        return model
    rate = settings.lr * RATE
    loaded = spec if job.loaded is None else spec.covering([job.loaded])
    tuning = dataclasses.replace(
        job,
        title=f"{job.title} at {settings.test_size} px",
        folder=job.folder / "fixres",
        settings=dataclasses.replace(settings, cutmix_probability=0.0, mixup_probability=0.0, ema_decay=0.0),
        store=open_store(job.store.paths, loaded, cache_gib=settings.cache_gib),
        phases=(Phase("fixres", settings.fixres_epochs, draw, rate, rate * settings.final_lr),),
        loss=dataclasses.replace(job.loss, hard=dataclasses.replace(job.loss.hard, deferred=0.0)),
        spec=spec,
        augment=Augment(AugmentSettings(strength="none"), loaded.height, loaded.width),
        loaded=loaded,
        validation=None,
        views=None,  # they are augmented; whole pictures have the stored labels
    )
    with only_last_layers_learn(model):
        return train(tuning, model, resume=resume)


@contextmanager
def only_last_layers_learn(model: nn.Module) -> Iterator[None]:
    """Inside, nothing but the classifier and the last batch-norm has gradients, and other batch-norms keep their
    statistics in training mode too. Raises ModelError for a network whose classifier timm does not know."""
    learning = [_classifier(model), *_batch_norms(model)[-1:]]
    frozen = _batch_norms(model)[:-1]
    wanted = {id(parameter) for module in learning for parameter in module.parameters()}
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    for parameter, _ in before:
        parameter.requires_grad_(id(parameter) in wanted)
    for layer in frozen:
        layer.eval()
        layer.train = _stay(layer)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for parameter, state in before:
            parameter.requires_grad_(state)
        for layer in frozen:
            del layer.train


def _stay(layer: nn.Module) -> Any:
    """What ``layer.train(mode)`` becomes where the layer must not leave evaluation mode."""
    return lambda mode=True: layer


def _batch_norms(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, _BatchNorm)]


def _classifier(model: Any) -> nn.Module:
    head = model.get_classifier() if hasattr(model, "get_classifier") else None
    if not isinstance(head, nn.Module) or not list(head.parameters()):
        raise ModelError(f"{type(model).__name__}: no classifier to fine-tune at --test-size; choose another network")
    return head
