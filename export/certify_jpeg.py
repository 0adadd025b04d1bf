"""The certificate on the same images as JPEG files of several sizes, so that scaled decoding is covered.

    python -m edgedistill.export.certify_jpeg RUN --sizes 300,900,1500 --out FILE.json

re-encodes the val images of RUN/dataset.csv at quality 90, resized so that the longer side has that many pixels, into a
temporary folder, and certifies RUN/openvino on each. Exit code 1 when one of the certificates fails.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2

from edgedistill import console
from edgedistill.artifacts import RunDir, write_json
from edgedistill.benchmarks.machine import machine_record
from edgedistill.errors import DataError, EdgedistillError
from edgedistill.export.certificate import Limits, certify, table_rows
from edgedistill.export.export import exported_forms
from edgedistill.export.samples import Samples, find_images
from edgedistill.images import decode_image, read_bytes

QUALITY = 90


def certify_jpeg(
    run: RunDir, sizes: Sequence[int], *, data: str | None = None, limit: int = 1000, threads: int | None = None
) -> dict[str, Any]:
    """{size: certificate} under 'sizes', with a verdict over all. Raises DataError when there are no val images."""
    network, forms = exported_forms(run.model, run.openvino)
    images = find_images(network, manifest=run.dataset, data=data)
    if images.missing:
        raise DataError(f"{run.root}: {images.missing}")
    samples = images.certificate.thinned(limit)
    certificates: dict[str, Any] = {}
    for size in sizes:
        with tempfile.TemporaryDirectory() as folder:
            encoded = reencode(samples, size, Path(folder))
            certificates[str(size)] = certify(forms, encoded, Limits(), threads=threads)
    verdicts = {certificate["verdict"] for certificate in certificates.values()}
    return {
        "quality": QUALITY,
        "sizes": certificates,
        "verdict": "pass" if verdicts == {"pass"} else "fail",
        "machine": machine_record(),
    }


def reencode(samples: Samples, size_px: int, folder: Path) -> Samples:
    """The same images as JPEG quality 90 with ``size_px`` pixels on the longer side, in ``folder``."""
    paths = []
    for number, path in enumerate(samples.paths):
        data, name = read_bytes(path)
        image = decode_image(data, name=name)
        scale = size_px / max(image.shape[:2])
        size = tuple(max(1, round(side * scale)) for side in (image.shape[1], image.shape[0]))
        way = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
        resized = image if size == (image.shape[1], image.shape[0]) else cv2.resize(image, size, interpolation=way)
        _, jpeg = cv2.imencode(".jpg", resized, [cv2.IMWRITE_JPEG_QUALITY, QUALITY])
        paths.append(folder / f"{number}.jpg")
        paths[-1].write_bytes(jpeg.tobytes())
    return dataclasses.replace(samples, paths=tuple(paths))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run folder with model.pt, dataset.csv and openvino/")
    parser.add_argument("--sizes", default="300,900,1500", help="pixels on the longer side, comma separated")
    parser.add_argument("--data", help="where the images lie now, if they were moved")
    parser.add_argument("--limit", type=int, default=1000, help="number of images at most")
    parser.add_argument("--threads", type=int, help="default: all cores")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    options = parser.parse_args()
    sizes = [int(size) for size in options.sizes.split(",")]
    try:
        result = certify_jpeg(
            RunDir(options.run), sizes, data=options.data, limit=options.limit, threads=options.threads
        )
    except EdgedistillError as error:
        console.warn(str(error))
        return error.exit_code
    write_json(options.out, result | {"command": " ".join(sys.argv)}, format="edgedistill-certificate-jpeg")
    for size, certificate in result["sizes"].items():
        titles, rows = table_rows(certificate)
        console.out.print(console.table(f"JPEG at {size} px: {certificate['verdict']}", titles, rows))
    return 0 if result["verdict"] == "pass" else 1


if __name__ == "__main__":
    sys.exit(main())
