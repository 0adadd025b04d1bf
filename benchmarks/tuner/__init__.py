"""`edgedistill tune`: the deployment with the best score on this CPU, found by measuring. Runs without torch.

From the ground up: ``space`` lists what can be chosen, ``truth`` judges answers (of one label per image or of several heads,
by the figures of the evaluation), ``students`` and ``valset`` read what there is, ``measure`` takes the
measurements (behind one seam, so that the search can be tried on simulated ones) and ``journal`` keeps them. ``heats`` makes
speeds of rounds, ``known`` answers for all that was measured, ``estimates`` for what was not (``cascade``: two stages, from
stored logits), ``search`` decides what to measure next. ``chance`` says how far the choice was luck, ``explain``,
``picture`` and ``tune`` tell and write the outcome.
"""

from edgedistill.benchmarks.tuner.settings import TuneSettings
from edgedistill.benchmarks.tuner.tune import TuneResult, tune

__all__ = ["TuneResult", "TuneSettings", "tune"]
