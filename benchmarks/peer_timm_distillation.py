"""The peer: timm's own distillation task on timm's own data pipeline, in the order of timm's train script.

    python -m edgedistill.benchmarks.peer_timm_distillation --dataset RUN/dataset.csv --teacher TEACHER/model.pt \
        --model mobilenetv3_small_100 --size 96 --epochs 40 --out runs/timm-kd

timm's wheel does not hold its train script, so its pieces are put together here as train.py of timm 1.0.31 does:
create_loader with its augmentation, Mixup, create_optimizer_v2, a cosine scheduler per update, LogitDistillationTask
with a live teacher (any timm network whose weights a model.pt holds). It reads the manifest of an edgedistill run (train
images alone) and writes the same evaluation files. Nothing of edgedistill's training is used.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np

from edgedistill import console
from edgedistill.artifacts import append_jsonl, write_array, write_json
from edgedistill.benchmarks.command import exit_with
from edgedistill.data.manifest import Dataset, read_dataset
from edgedistill.metrics import accuracy, macro_f1, softmax


class Images:
    """timm takes any data set with __getitem__, __len__ and a transform that create_loader sets."""

    def __init__(self, dataset: Dataset, split: str) -> None:
        self.rows, self.dataset, self.transform = dataset.rows(split), dataset, None

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        from PIL import Image

        row = self.rows[index]
        image: Any = Image.open(self.dataset.paths[row]).convert("RGB")
        return (image if self.transform is None else self.transform(image)), int(self.dataset.labels[row])


def open_teacher(path: Path) -> Any:
    """A model.pt loads with plain timm."""
    import timm
    import torch

    saved = torch.load(path, weights_only=True)
    model = timm.create_model(saved["architecture"], **saved["model_kwargs"])
    model.load_state_dict(saved["state_dict"])
    spec = saved["input_spec"]
    model.pretrained_cfg = model.pretrained_cfg | {key: tuple(x / 255 for x in spec[key]) for key in ("mean", "std")}
    return model.eval()


def loader(images: Images, args: argparse.Namespace, model: Any, *, training: bool) -> Any:
    from timm.data import create_loader, resolve_data_config

    config = resolve_data_config({"input_size": (3, args.size, args.size), "crop_pct": 1.0}, model=model)
    return create_loader(
        images,
        input_size=config["input_size"],
        batch_size=args.batch_size,
        is_training=training,
        mean=config["mean"],
        std=config["std"],
        crop_pct=1.0,
        interpolation="bilinear",
        scale=(args.scale, 1.0) if training else None,
        hflip=0.5 if training else 0.0,
        vflip=0.5 if training and args.any_way_up else 0.0,
        color_jitter=args.color_jitter or None,
        auto_augment=args.aa,
        num_workers=args.workers,
        use_prefetcher=False,
        persistent_workers=False,
    )


def train(args: argparse.Namespace, dataset: Dataset) -> Any:
    """The student after all epochs; metrics.jsonl gets one line per epoch."""
    import timm
    import torch
    from timm.data import Mixup
    from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
    from timm.optim import create_optimizer_v2
    from timm.scheduler import CosineLRScheduler
    from timm.task import LogitDistillationTask

    classes = len(dataset.class_names)
    model = timm.create_model(args.model, num_classes=classes, pretrained=False)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    mixing = args.mixup > 0 or args.cutmix > 0  # as train.py: Mixup smooths the labels itself where it is used
    task = LogitDistillationTask(
        student_model=model.to(device),
        teacher_model=open_teacher(args.teacher).to(device),
        criterion=SoftTargetCrossEntropy() if mixing else LabelSmoothingCrossEntropy(args.smoothing),
        task_loss_weight=args.task_loss_weight,
        temperature=args.temperature,
        device=device,
        verbose=False,
    )
    batches = loader(Images(dataset, "train"), args, model, training=True)
    shares = {"prob": args.mixup_prob, "label_smoothing": args.smoothing, "num_classes": classes}
    mixup = Mixup(args.mixup, args.cutmix, **shares) if mixing else None
    optimizer = create_optimizer_v2(model, opt="radam", lr=args.lr, weight_decay=1e-4)
    steps = len(batches)
    scheduler = CosineLRScheduler(optimizer, t_initial=steps * args.epochs, lr_min=args.lr * 0.01, t_in_epochs=False)
    for epoch in range(args.epochs):
        task.train()
        start, total = time.perf_counter(), 0.0
        for step, (images, labels) in enumerate(batches):
            images, targets = images.to(device), labels.to(device)
            if mixup is not None:
                images, targets = mixup(images, targets)
            loss = task(images, targets)["loss"]
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step_update(epoch * steps + step + 1)
            total += float(loss.detach())
        row = {"epoch": epoch + 1, "train_loss": total / steps, "seconds": time.perf_counter() - start}
        append_jsonl(args.out / "student" / "metrics.jsonl", row)
        console.note(f"timm: epoch {epoch + 1}/{args.epochs}, loss {row['train_loss']:.4f}, {row['seconds']:.1f} s")
    return model


def evaluate(args: argparse.Namespace, dataset: Dataset, model: Any) -> dict[str, Any]:
    """The files of an edgedistill evaluation, of the test split, through timm's own transform."""
    import torch

    model.eval()
    device = next(model.parameters()).device
    with torch.inference_mode():
        batches = loader(Images(dataset, "test"), args, model, training=False)
        logits = torch.cat([model(images.to(device)).float().cpu() for images, _ in batches]).numpy()
    rows = dataset.rows("test")
    labels, probabilities = dataset.labels[rows], softmax(logits).astype(np.float32)
    folder = args.out / "evaluation"
    write_array(folder / "student.probs.npy", probabilities)
    write_array(folder / "test_ids.npy", dataset.ids[rows].astype(str))
    write_array(folder / "test_labels.npy", labels.astype(np.int32))
    values = {"accuracy": accuracy(probabilities, labels), "macro_f1": macro_f1(probabilities, labels)}
    record = {"split": "test", "n": len(rows), "classes": list(dataset.class_names), "models": {"student": values}}
    write_json(folder / "evaluation.json", record, format="edgedistill-evaluation")
    return values


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dataset", type=Path, required=True, help="dataset.csv of a run")
    parser.add_argument("--teacher", type=Path, required=True, help="model.pt of the teacher")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="mobilenetv3_small_100", help="timm's name of the student")
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--task-loss-weight", type=float, default=0.3, help="the rest is the distillation's")
    parser.add_argument("--temperature", type=float, default=4.0)
    parser.add_argument("--smoothing", type=float, default=0.1)
    parser.add_argument("--mixup", type=float, default=0.0)
    parser.add_argument("--cutmix", type=float, default=1.0)
    parser.add_argument("--mixup-prob", type=float, default=1.0, help="share of the batches that are mixed")
    parser.add_argument("--scale", type=float, default=0.6, help="smallest share of the area that a crop keeps")
    parser.add_argument("--color-jitter", type=float, default=0.0)
    parser.add_argument("--aa", help="timm's --aa, such as rand-m9-mstd0.5")
    parser.add_argument("--any-way-up", action="store_true")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if args.batch_size % 2:
        parser.error("--batch-size must be even: timm's Mixup takes pairs")
    return args


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    from edgedistill.timm_import import import_timm

    import_timm()
    import torch
    from timm.utils import random_seed

    dataset = read_dataset(args.dataset)
    (args.out / "student" / "metrics.jsonl").unlink(
        missing_ok=True
    )  # timm's script resumes by epoch; this one starts anew
    random_seed(args.seed)
    torch.manual_seed(args.seed)
    values = evaluate(args, dataset, train(args, dataset))
    console.out.print(json.dumps(values))
    return 0


if __name__ == "__main__":
    exit_with(main)
