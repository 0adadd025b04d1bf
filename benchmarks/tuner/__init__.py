"""`edgedistill tune`: the deployment with the best score on this CPU, found by measuring. Runs without torch.

``students`` and ``valset`` read what there is, ``space`` lists what can be chosen, ``measure`` takes the measurements
(behind one seam, so that the search can be tried on simulated ones), ``search`` decides what to measure next,
``cascade`` evaluates two-stage deployments from stored logits, ``chance`` says how far the choice was luck, ``explain``
and ``tune`` tell and write the outcome.
"""

from edgedistill.benchmarks.tuner.settings import TuneSettings
from edgedistill.benchmarks.tuner.tune import TuneResult, tune

__all__ = ["TuneResult", "TuneSettings", "tune"]
